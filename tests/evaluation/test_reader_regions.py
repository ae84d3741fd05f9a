"""RefCOCO and GRIT are read from either form of their data, and what is wrong with an entry is told with its place."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmark_data import DATA, changed, copied, form, prompt

from qwenvl.evaluation.catalogue import BENCHMARKS
from qwenvl.evaluation.items import DataError
from qwenvl.evaluation.readers.regions import REGIONS

REFCOCO = [one for one in REGIONS if one.name.startswith("refcoco")]
LINES = DATA / "refcoco" / "refcoco_val.jsonl"
COCO = "coco/train2014/COCO_train2014_00000000000{}.jpg"


def spoiled(root: Path, text: str) -> Path:
    """A copy of the data whose converted lines are these."""
    copied(root, "refcoco", "coco")
    (root / "refcoco" / "refcoco_val.jsonl").write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("benchmark", REFCOCO, ids=lambda one: one.name)
def test_both_forms_of_refcoco(benchmark: Any) -> None:
    """Converted lines and the owners' refs and instances give the same items, but for ids; of this split alone."""
    converted, owners = (form(benchmark.name, source.files[0]) for source in benchmark.sources)
    assert not converted.problems
    assert not owners.problems
    assert [replace(item, id="") for item in owners.items] == [replace(item, id="") for item in converted.items]
    assert [item.id for item in converted.items] == ["1", "2", "3", "4", "5"]
    first = {"val": 5, "testA": 10, "test": 10, "testB": 15}[benchmark.name.split("_")[1]]
    assert [item.id for item in owners.items] == [str(first + number) for number in range(5)]


def test_an_item_of_refcoco() -> None:
    """A box of corners, the picture's size, and the reference's prompt; the phrase is data, tags and all."""
    item = form("refcoco_val", "refs(unc).p").items[2]
    assert item.pictures == (DATA / COCO.format(8),)
    assert item.truth == [4.5, 4.25, 26.0, 17.0]
    assert item.more == {"width": 48, "height": 64}
    expected = "<img>COCO_train2014_000000000008.jpg</img><ref>whatever is <b>lower</b> & right</ref><box>"
    assert prompt(BENCHMARKS["refcoco_val"], item) == expected


def test_what_is_wrong_with_lines(tmp_path: Path) -> None:
    """Each entry that cannot be scored is told, with its line and why; the others stay."""
    line = LINES.read_text(encoding="utf-8").splitlines()[0]
    wrong = {
        "{": "not JSON",
        "[]": "an entry is an object",
        changed(line, sent=...): "it has no sent",
        changed(line, sent=["a"]): "sent should be a text",
        changed(line, width="wide"): "width should be a number",
        changed(line, height=0): "height should be pixels",
        changed(line, bbox=[1, 2, 3]): "bbox should be four numbers",
        changed(line, bbox=[1, 2, 3, math.nan]): "y2 should be a number",
        changed(line, bbox=[1, 2, 3, 10**400]): "y2 should be a number",
        changed(line, bbox="1, 2, 3, 4"): "bbox should be a list",
        changed(line, image="data/coco/none.jpg"): "there is no",
        changed(line, image="\0\ud800"): "there is no",
    }
    read = form("refcoco_val", "refcoco_val.jsonl", spoiled(tmp_path, "\n".join([*wrong, line])))
    assert [item.id for item in read.items] == [str(len(wrong) + 1)]
    assert len(read.problems) == len(wrong)
    for number, (problem, reason) in enumerate(zip(read.problems, wrong.values(), strict=True), 1):
        assert reason in problem.what
        assert problem.where == (f"refcoco_val.jsonl:{number}" if problem.kind == "malformed" else str(number))
    assert [problem.kind for problem in read.problems] == ["malformed"] * 10 + ["missing picture"] * 2


def test_an_empty_file(tmp_path: Path) -> None:
    """Nothing to ask is said, not scored."""
    with pytest.raises(DataError, match=r"refcoco_val.jsonl has no entry"):
        form("refcoco_val", "refcoco_val.jsonl", spoiled(tmp_path, "\n"))


def with_refs(root: Path, refs: Any) -> Path:
    """A copy of the data with these refs, pickled, or with these bytes."""
    copied(root, "refcoco", "coco")
    data = refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol=2)
    (root / "refcoco" / "refs(unc).p").write_bytes(data)
    return root


def test_what_is_wrong_with_refs(tmp_path: Path) -> None:
    """A ref without its box, picture or sentences, and a sentence twice, are told; the others stay."""
    refs = [ref for ref in pickle.loads((DATA / "refcoco" / "refs(unc).p").read_bytes()) if ref["split"] == "val"]
    known = refs[0]
    broken = [
        "ref",
        known | {"sentences": None},
        known | {"sentences": ["text"]},
        known | {"ann_id": 12345},
        known | {"image_id": "7"},
        known | {"sentences": [{"sent_id": 90}]},
        *refs,
        known,
    ]
    read = form("refcoco_val", "refs(unc).p", with_refs(tmp_path, broken))
    assert len(read.items) == 5
    assert [problem.kind for problem in read.problems] == ["malformed"] * 8 + ["duplicate id"] * 2
    told = [str(problem) for problem in read.problems]
    assert told[0] == "refs(unc).p ref 1: a ref is an object with a split and sentences, not 'ref'"
    assert told[3] == "refs(unc).p ref 4 sentence 1: the instances have nothing of ann_id 12345"
    assert told[7] == "refs(unc).p ref 6 sentence 1: it has no sent"


class Code:
    """What runs something when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_refs_that_hold_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code in a pickle is refused in one line, and not run; so are broken ones, and what is no plain data."""
    monkeypatch.chdir(tmp_path)
    endless: list[Any] = []
    endless.append(endless)
    for number, refs in enumerate(([Code()], b"", b"\x80\x02]q", b"cos\nsystem\n.", {1}, endless, {"a": 1}, b"\xff")):
        with pytest.raises(DataError, match=r"refs\(unc\)\.p") as raised:
            form("refcoco_val", "refs(unc).p", with_refs(tmp_path / str(number), refs))
        assert "\n" not in str(raised.value)
        assert number not in (0, 3) or "it holds code" in str(raised.value)
    assert not (tmp_path / "ran").exists()


def test_refs_of_python_2(tmp_path: Path) -> None:
    """The owners' pickles hold texts of Python 2, whose bytes are Latin 1."""
    text = (
        b"(lp0\n(dp1\nS'split'\np2\nS'val'\np3\nsS'ann_id'\np4\nI101\nsS'image_id'\np5\nI7\nsS'sentences'\np6\n(lp7\n"
        b"(dp8\nS'sent_id'\np9\nL5L\nsS'sent'\np10\nS'caf\\xe9'\np11\nsasa."
    )
    (item,) = form("refcoco_val", "refs(unc).p", with_refs(tmp_path, text)).items
    assert (item.id, item.text) == ("5", "café")


def test_instances_that_are_none(tmp_path: Path) -> None:
    """The file of instances has to have pictures and boxes."""
    copied(tmp_path, "refcoco", "coco")
    for text in ("", "[]", '{"images": []}'):
        (tmp_path / "refcoco" / "instances.json").write_text(text)
        with pytest.raises(DataError, match=r"instances\.json"):
            form("refcoco_val", "refs(unc).p", tmp_path)


def test_pictures_where_the_owners_put_them(tmp_path: Path) -> None:
    """COCO's pictures may lie as refer has them."""
    copied(tmp_path, "refcoco")
    (tmp_path / "images" / "mscoco" / "images").mkdir(parents=True)
    copied(tmp_path / "images" / "mscoco", "coco")
    (tmp_path / "images" / "mscoco" / "coco" / "train2014").rename(tmp_path / "images/mscoco/images/train2014")
    assert len(form("refcoco_val", "refs(unc).p", tmp_path).items) == 5


def test_grit(tmp_path: Path) -> None:
    """Samples as published have no truth; sizes are the pictures'. In the scorer's form the first box is the truth."""
    source = "samples/test/refexp.json"
    items = form("grit_refexp", source).items
    assert [item.truth for item in items] == [None] * 5
    assert [item.more for item in items[:2]] == [{"width": 40, "height": 30}, {"width": 48, "height": 30}]
    samples = json.loads((DATA / "grit" / source).read_text(encoding="utf-8"))
    scored = [{"input": sample, "output": {"bboxes": [[1, 2, 3, 4], [0, 0, 1, 1]]}} for sample in samples]
    path = copied(tmp_path, "grit") / "grit" / source
    path.write_text(json.dumps(scored))
    again = form("grit_refexp", source, tmp_path).items
    assert [replace(item, pictures=()) for item in again] == [
        replace(item, pictures=(), truth=[1, 2, 3, 4]) for item in items
    ]


def test_what_is_wrong_with_grit(tmp_path: Path) -> None:
    """A broken picture is told as such; so are ones that are missing, and samples of another form."""
    source = "samples/test/refexp.json"
    path = copied(tmp_path, "grit") / "grit" / source
    first, *_, last = json.loads(path.read_text(encoding="utf-8"))
    (tmp_path / "grit" / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    wrong = [
        first | {"image_id": "broken.png"},
        first | {"image_id": "none.png"},
        {"input": first, "output": {"bboxes": []}},
        {"input": []},
        {"input": first, "output": 3},
        last,
        last,
    ]
    path.write_text(json.dumps(wrong))
    read = form("grit_refexp", source, tmp_path)
    assert [item.id for item in read.items] == ["refexp_4"]
    kinds = ["broken picture", "missing picture", "malformed", "malformed", "malformed", "duplicate id"]
    assert [problem.kind for problem in read.problems] == kinds
    assert read.problems[0].where == "refexp.json entry 1"
    path.write_text('{"a": 1}')
    with pytest.raises(DataError, match="should be a list"):
        form("grit_refexp", source, tmp_path)
