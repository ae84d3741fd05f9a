"""What is missing of a benchmark's data is told before an evaluation begins."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from qwenvl.evaluation import prepare as module
from qwenvl.evaluation.catalogue import BENCHMARKS
from qwenvl.evaluation.items import Item
from qwenvl.evaluation.prepare import prepare
from qwenvl.image import ImagePolicy

DATA = Path(__file__).parent / "data"
GQA = replace(BENCHMARKS["gqa_testdev"], size=5)


def copied(tmp_path: Path) -> Path:
    """GQA's folder of the fixtures, which may be changed."""
    shutil.copytree(DATA / "gqa", tmp_path / "gqa")
    return tmp_path / "gqa"


def test_all_is_there() -> None:
    """Files with their bytes, the form that is read, items and pictures are counted; and all of it is JSON."""
    found = prepare(GQA, DATA, quiet=True)
    name = "testdev_balanced.jsonl"
    assert found.ready
    assert found.error is None
    assert [form.chosen for form in found.forms] == [True, False]
    assert found.forms[0].files == {name: (DATA / "gqa" / name).stat().st_size}
    assert (found.items, found.expected, found.problems, found.listed) == (5, 5, {}, ())
    size = sum((DATA / f"gqa/images/n{number}.jpg").stat().st_size for number in range(1, 6))
    assert found.pictures == module.Pictures(5, 0, 0, size, ())
    written = json.loads(json.dumps(found.as_json()))
    assert written["ready"] is True
    assert written["pictures_url"] == GQA.pictures
    assert written["forms"][1]["url"] == GQA.sources[1].url


def test_a_part_is_not_ready() -> None:
    """Five of 12,578 questions are not the benchmark."""
    assert not prepare(BENCHMARKS["gqa_testdev"], DATA, quiet=True).ready
    assert prepare(replace(GQA, size=None), DATA, quiet=True).ready


@pytest.mark.parametrize("name", [name for name, one in BENCHMARKS.items() if one.sources[0].files])
def test_nothing_is_there(name: str, tmp_path: Path) -> None:
    """Of an empty folder, and of none, each benchmark says which files it wants, and where they are published."""
    for root in (tmp_path, tmp_path / "none"):
        found = prepare(BENCHMARKS[name], root, quiet=True)
        assert not found.ready
        assert found.error is not None
        assert str(root) in found.error
        assert found.items == found.pictures.count == 0
        assert all(size is None for form in found.forms for size in form.files.values())
        assert not any(form.chosen for form in found.forms)
        json.dumps(found.as_json())


def test_pictures_that_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing pictures, files that are none, cut ones and those that are too large are counted and named."""
    folder = copied(tmp_path) / "images"
    (folder / "n1.jpg").unlink()
    (folder / "n2.jpg").write_bytes(b"no picture")
    Image.new("RGB", (40, 40)).save(folder / "whole.png")
    (folder / "n3.jpg").write_bytes((folder / "whole.png").read_bytes()[:-20])
    Image.new("RGB", (200, 2)).save(folder / "n4.jpg")
    (folder / "n5.jpg").write_bytes((folder / "n5.jpg").read_bytes() + bytes(5000))
    monkeypatch.setattr(module, "LIBRARY_POLICY", ImagePolicy(max_bytes=4000, max_pixels=300))
    found = prepare(GQA, tmp_path, quiet=True)
    assert (found.items, found.problems) == (4, {"missing picture": 1})
    assert (found.pictures.count, found.pictures.missing, found.pictures.broken) == (5, 1, 4)
    for number, told in zip((2, 3, 4, 5), found.pictures.listed, strict=True):
        assert str(folder / f"n{number}.jpg") in told
    assert "200 x 2" in found.pictures.listed[2]
    assert "over the limit of 4000" in found.pictures.listed[3]
    assert not found.ready


def test_problems_are_counted_and_the_first_listed(tmp_path: Path) -> None:
    """All are counted by kind; a report stays short, and a picture that many items show is opened once."""
    path = copied(tmp_path) / "testdev_balanced.jsonl"
    line = path.read_text(encoding="utf-8").splitlines()[0]
    path.write_text("\n".join([line] * 4 + ["{"] * 30), encoding="utf-8")
    found = prepare(GQA, tmp_path, quiet=True)
    assert found.problems == {"malformed": 30, "duplicate id": 3}
    assert len(found.listed) == module.LISTED
    assert found.listed[3].startswith("testdev_balanced.jsonl:5: not JSON")
    assert found.pictures.count == found.items == 1


def test_annotations_that_cannot_be_read(tmp_path: Path) -> None:
    """A file that is something else, or empty, is an error that is told, with the files that there are."""
    folder = copied(tmp_path)
    (folder / "testdev_balanced.jsonl").write_bytes(b"")
    found = prepare(GQA, tmp_path, quiet=True)
    assert found.error == f"gqa_testdev: {folder / 'testdev_balanced.jsonl'} has no entry"
    assert found.forms[0].files == {"testdev_balanced.jsonl": 0}
    (folder / "testdev_balanced.jsonl").unlink()
    (folder / "testdev_balanced_questions.json").write_bytes(b"[1")
    found = prepare(GQA, tmp_path, quiet=True)
    assert found.error is not None
    assert "not JSON" in found.error


def test_pictures_within_annotations() -> None:
    """Bytes are opened like files; what is drawn when it is needed is only counted."""

    def read(*_: object) -> list[Item]:
        whole = (DATA / "gqa/images/n1.jpg").read_bytes()
        return [Item(str(at), (one,)) for at, one in enumerate((whole, b"none", lambda: Image.new("RGB", (1, 1))))]

    benchmark = replace(GQA, sources=(replace(GQA.sources[0], read=read),))
    found = prepare(benchmark, DATA, quiet=True).pictures
    assert (found.count, found.missing, found.broken) == (3, 0, 1)
    assert found.size == (DATA / "gqa/images/n1.jpg").stat().st_size
