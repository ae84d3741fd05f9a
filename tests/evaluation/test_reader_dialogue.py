"""MME is read as its scorer has it and as its owners do, TouchStone from its tables; what is wrong is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_data import DATA, copied, form, prompt

from qwenvl.evaluation.catalogue import BENCHMARKS, find, read
from qwenvl.evaluation.choices import MME_GROUPS, mme_score
from qwenvl.evaluation.items import DataError, Item
from qwenvl.evaluation.readers.dialogue import TASKS

LINES, FOLDERS = "Your_Results/existence.txt", "existence/**/*.txt"
RELEASE = "MME_Benchmark_release_version"


def by_id(items: tuple[Item, ...]) -> list[Item]:
    """In one order, since folders are sorted and lines are not."""
    return sorted(items, key=lambda item: item.id)


def test_both_forms_of_mme() -> None:
    """Lines by task, and files by picture in either layout of folders, are the same items."""
    lines, folders = form("mme", LINES), form("mme", FOLDERS)
    assert not lines.problems
    assert not folders.problems
    assert by_id(lines.items) == by_id(folders.items)
    assert {item.group for item in lines.items} == {task for tasks in MME_GROUPS.values() for task in tasks}
    first, second = lines.items[:2]
    assert (first.id, second.id) == ("existence/0000.jpg#1", "existence/0000.jpg#2")
    assert (first.truth, second.truth, first.more) == ("Yes", "No", {"picture": "0000.jpg"})
    assert first.pictures == (DATA / "mme" / "existence" / "0000.jpg",)
    assert prompt(BENCHMARKS["mme"], first) == (
        "<img>0000.jpg</img>\nIs this a block for existence? Please answer yes or no."
    )


def test_mme_can_be_scored() -> None:
    """In the order in which they are read, a picture's questions follow one another, as the score wants them."""
    items = form("mme", FOLDERS).items
    for task in TASKS:
        of_task = [item for item in items if item.group == task]
        assert mme_score([(item.truth, item.truth) for item in of_task]) == 200


def test_the_archive_of_mme(tmp_path: Path) -> None:
    """The owners' folder may stay in that of their archive, and other texts may lie in it."""
    copied(tmp_path, "mme")
    (tmp_path / "mme" / "existence" / "notes").mkdir()
    (tmp_path / "mme" / "existence" / "notes" / "readme.txt").write_text("Hello")
    (tmp_path / "mme").rename(tmp_path / RELEASE)
    read_again = form("mme", f"{RELEASE}/{FOLDERS}", tmp_path)
    assert not read_again.problems
    assert [item.id for item in by_id(read_again.items)] == [item.id for item in by_id(form("mme", LINES).items)]


def test_a_task_of_mme_that_is_missing(tmp_path: Path) -> None:
    """Without all fourteen tasks there is no score of the paper; the message stays short."""
    copied(tmp_path, "mme")
    (tmp_path / "mme" / LINES).unlink()
    assert len(read(BENCHMARKS["mme"], tmp_path).files) == 14
    (tmp_path / "mme" / "existence" / "0000.txt").unlink()
    with pytest.raises(DataError, match=r"existence\.txt with Your_Results/count\.txt and 12 more of that kind, or"):
        read(BENCHMARKS["mme"], tmp_path)


def test_what_is_wrong_with_lines_of_mme(tmp_path: Path) -> None:
    """Lines of another form, and pictures with another number of questions than two, are told with their place."""
    path = copied(tmp_path, "mme") / "mme" / LINES
    good = path.read_text(encoding="utf-8")
    many = "".join(f"many.jpg\t{letter}?\tYes\n" for letter in "ABC")
    odd = f"one.jpg\tIs it?\tYes\n{many}bad.jpg\tA?\tYes\nbad.jpg\tB?\tno!\n"
    text = f"{good}{odd}no tabs\n\nnone.jpg\tA?\tYes\nnone.jpg\tB?\tNo\n"
    path.write_bytes(text.encode() + b"\xff\t\xff\t\xff\n")
    found = form("mme", LINES, tmp_path)
    assert len(found.items) == 28
    assert [(problem.kind, problem.where) for problem in found.problems] == [
        ("malformed", f"{LINES}:8"),
        ("malformed", f"{LINES}:9"),
        ("malformed", f"{LINES}:13"),
        ("malformed", "existence/one.jpg"),
        ("malformed", "existence/many.jpg"),
        ("malformed", "existence/bad.jpg"),
        ("missing picture", "existence/none.jpg#1"),
        ("missing picture", "existence/none.jpg#2"),
    ]
    assert found.problems[3].what == "a picture has two questions, and this one 1"


def test_what_is_wrong_with_folders_of_mme(tmp_path: Path) -> None:
    """A picture with one question, and one that is missing, are told; empty files of all are refused."""
    folder = copied(tmp_path, "mme") / "mme"
    (folder / "existence" / "0000.txt").write_text("Is it?\tYes\n")
    (folder / "scene" / "images" / "0006.jpg").unlink()
    found = form("mme", FOLDERS, tmp_path)
    assert len(found.items) == 24
    assert [problem.kind for problem in found.problems] == ["malformed", "missing picture", "missing picture"]
    assert found.problems[0].where == "existence/0000.jpg"
    for path in folder.rglob("*.txt"):
        path.write_text("")
    for file in (FOLDERS, LINES):
        with pytest.raises(DataError, match="has no entry"):
            form("mme", file, tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "question"),
    [
        ("touchstone_en", "touchstone_20230831.tsv", "Describe it. (1)"),
        ("touchstone_cn", "touchstone_cn*.tsv", "描述这张图。 (1)"),
    ],
)
def test_touchstone(name: str, file: str, question: str) -> None:
    """A row with its picture, what a judge is told, and all its categories."""
    found = form(name, file)
    assert not found.problems
    item = found.items[1]
    assert (item.id, item.text) == ("1", question)
    assert item.group == "visual recognition ability,visual comprehension ability"
    assert item.truth.keys() == {"annotation", "reference"}
    assert item.truth["reference"].endswith('\nIt is "grey".')
    assert isinstance(item.pictures[0], bytes)
    assert item.pictures[0].startswith(b"\x89PNG")
    assert prompt(BENCHMARKS[name], item) == f"<img>bytes</img>{question}"


def test_what_is_wrong_with_touchstone(tmp_path: Path) -> None:
    """Rows without a picture, or with too few columns, are told; so is a file that is no table."""
    path = copied(tmp_path, "touchstone") / "touchstone" / "touchstone_cn.tsv"
    head = "index\timage\tquestion\thuman_annotation\tgpt4_ha_answer\tcategory\ttask_name"
    rows = ["1\taGk=?\tq\ta\tr\tc\tt", "2\taGk=\tq\ta\tr\tc\tt", "2\taGk=\tq\ta\tr\tc\tt", "3\taGk=\tq"]
    path.write_text("\n".join([head, *rows]), encoding="utf-8")
    found = form("touchstone_cn", "touchstone_cn*.tsv", tmp_path)
    assert [item.pictures for item in found.items] == [(b"hi",)]
    assert [(problem.kind, problem.where) for problem in found.problems] == [
        ("malformed", "touchstone_cn.tsv:2"),
        ("duplicate id", "2"),
        ("malformed", "touchstone_cn.tsv:5"),
    ]
    path.write_text(head.replace("gpt4_ha_answer", "answer") + "\n" + rows[1], encoding="utf-8")
    (problem,) = form("touchstone_cn", "touchstone_cn*.tsv", tmp_path).problems
    assert problem.what == "it has no gpt4_ha_answer"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not a table"):
        form("touchstone_cn", "touchstone_cn*.tsv", tmp_path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="has no entry"):
        form("touchstone_cn", "touchstone_cn*.tsv", tmp_path)


def test_the_tables_of_the_paper() -> None:
    """Benchmarks are found by the table in which the paper reports them, with its figures."""
    sixth, seventh = (find([table]) for table in ("table6", "table7"))
    assert len([one for one in sixth if one.form.region]) == 9
    names = {one.name for one in seventh}
    assert names >= {"mme", "seed_image", "seed_video", "touchstone_en", "touchstone_cn"}
    assert BENCHMARKS["mme"].published == {"Qwen/Qwen-VL-Chat": {"Perception": 1487.58, "Cognition": 360.71}}
