"""ScienceQA, SEED-Bench and MMBench are read from either form of their data; what is wrong is told with its line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmark_data import DATA, changed, copied, form, prompt

from qwenvl.evaluation.catalogue import BENCHMARKS
from qwenvl.evaluation.choices import ROTATION
from qwenvl.evaluation.items import DataError
from qwenvl.evaluation.readers.choices import unprompted
from qwenvl.evaluation.readers.files import Malformed

SCIENCEQA, SEED, PROMPTS = "scienceqa_test_img.jsonl", "SEED-Bench.json", "image_input.jsonl"


def lines(path: str) -> list[str]:
    """Of a file of the data."""
    return (DATA / path).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", ["scienceqa_test_img", "scienceqa_test_img_letter"])
def test_both_forms_of_scienceqa(name: str) -> None:
    """Converted lines, and problems of the test split with a picture, are the same items, but for ids."""
    converted, owners = form(name, SCIENCEQA), form(name, "problems.json")
    assert not converted.problems
    assert not owners.problems
    assert [replace(item, id="") for item in owners.items] == [replace(item, id="") for item in converted.items]
    assert [item.id for item in converted.items] == ["1", "2", "3", "4", "5"]
    assert [item.id for item in owners.items] == ["4", "11", "12", "30", "41"]
    assert [item.truth for item in owners.items] == [0, 2, 1, 4, 0]


def test_pictures_of_scienceqa_beside_the_problems(tmp_path: Path) -> None:
    """The owners' test.zip holds the folder `test`: unpacked beside problems.json, its pictures are found, too."""
    folder = copied(tmp_path, "scienceqa") / "scienceqa"
    (folder / "images" / "test").rename(folder / "test")
    read = form("scienceqa_test_img", "problems.json", tmp_path)
    assert [item.pictures for item in read.items[:1]] == [(folder / "test/4/image.png",)]
    assert not read.problems


def test_prompts_of_scienceqa() -> None:
    """The reference's text; a question without a hint has N/A in its place."""
    first, second, *_ = form("scienceqa_test_img", "problems.json").items
    benchmark = BENCHMARKS["scienceqa_test_img"]
    assert prompt(benchmark, first) == (
        "<img>image.png</img>Context: N/A\nQuestion: Which one is round?\n"
        "Options: A. the red one\nB. the blue one\nAnswer:"
    )
    assert prompt(benchmark, second) == (
        "<img>image.png</img>Context: Look at the legend.\nQuestion: What does the map show?\n"
        "Options: A. a lake\nB. a hill\nC. a road\nAnswer:"
    )


def test_what_is_wrong_with_scienceqa(tmp_path: Path) -> None:
    """Each line that cannot be scored is told; no hint is no fault."""
    line = lines(f"scienceqa/{SCIENCEQA}")[0]
    wrong = {
        "no": "not JSON",
        changed(line, question=...): "it has no question",
        changed(line, hint=...): "it has no hint",
        changed(line, hint=[]): "hint should be a text",
        changed(line, choices="ab"): "choices should be a list",
        changed(line, choices=["a"]): "choices should be two to 10",
        changed(line, choices=["a"] * 11): "choices should be two to 10",
        changed(line, choices=["a", None]): "choices should be a text",
        changed(line, answer=2): "answer should be the index",
        changed(line, answer=-1): "answer should be the index",
        changed(line, answer=True): "answer should be the index",
        changed(line, answer="A"): "answer should be the index",
        changed(line, image="none.png"): "there is no",
    }
    path = copied(tmp_path, "scienceqa") / "scienceqa" / SCIENCEQA
    path.write_text("\n".join([*wrong, changed(line, hint=None)]), encoding="utf-8")
    read = form("scienceqa_test_img", SCIENCEQA, tmp_path)
    assert [(item.id, item.hint) for item in read.items] == [("14", "")]
    assert all(reason in problem.what for problem, reason in zip(read.problems, wrong.values(), strict=True))
    assert [problem.where for problem in read.problems] == [
        *(f"{SCIENCEQA}:{number}" for number in range(1, 13)),
        "13",
    ]


def test_what_is_wrong_with_problems(tmp_path: Path) -> None:
    """The split may name a problem twice, or one that is not there; files of another shape are refused."""
    folder = copied(tmp_path, "scienceqa") / "scienceqa"
    (folder / "pid_splits.json").write_text('{"test": ["4", "4", "nobody", 4]}')
    read = form("scienceqa_test_img", "problems.json", tmp_path)
    assert [item.id for item in read.items] == ["4"]
    assert [problem.kind for problem in read.problems] == ["duplicate id", "malformed", "malformed"]
    assert read.problems[1].where == "problems.json 'nobody'"
    for text in ("", "[]", '{"test": 3}'):
        (folder / "pid_splits.json").write_text(text)
        with pytest.raises(DataError, match=r"pid_splits\.json"):
            form("scienceqa_test_img", "problems.json", tmp_path)


@pytest.mark.parametrize(("name", "prompts"), [("seed_image", PROMPTS), ("seed_video", "video_input_4.jsonl")])
def test_both_forms_of_seed_bench(name: str, prompts: str) -> None:
    """Questions and the prompts made of them are the same items; prompts do not say of which kind they are."""
    owners, converted = form(name, SEED), form(name, prompts)
    assert not converted.problems
    assert not owners.problems
    assert [replace(item, group="") for item in owners.items] == list(converted.items)
    assert all(len(item.pictures) == (4 if name == "seed_video" else 1) for item in owners.items)
    for item, line in zip(owners.items, lines(f"seed_bench/{prompts}"), strict=True):
        made, expected = prompt(BENCHMARKS[name], item), json.loads(line)["prompt"]
        assert made == expected.replace("/home/someone/seed_bench_image/", "").replace("video_imgs_4/", "")


def test_groups_of_seed_bench() -> None:
    """Kinds of questions by name; pictures' and videos' apart."""
    groups = [item.group for name in ("seed_image", "seed_video") for item in form(name, SEED).items]
    assert groups[1] == "Instances Counting"
    assert groups[5:] == ["Action Recognition"] * 2 + ["Action Prediction"] + ["Procedure Understanding"] * 2


GOOD = "<img>a</img>\nQuestion: q\nOptions: A. 1\nB. 2\nC. 3\nD. 4\nAnswer:"


@pytest.mark.parametrize(
    "text",
    [
        "Errorcannot open video",
        GOOD.replace("<img>a</img>\n", ""),
        GOOD.replace("</img>\n", "</img>"),
        GOOD.replace("\nC. 3", ""),
        GOOD.replace("Question: ", "Question:"),
        GOOD + " ",
        "x" + GOOD,
        GOOD.replace("\nB. 2\nC. 3", "\nC. 3\nB. 2"),
        GOOD.replace("<img>a</img>", "<img></img>"),
        "",
    ],
)
def test_prompts_of_another_form(text: str) -> None:
    """What is no prompt of SEED-Bench is refused, such as the error of a video that the reference could not decode."""
    with pytest.raises(Malformed, match="prompt should have"):
        unprompted(text)


def test_a_prompt_makes_itself_again() -> None:
    """Wherever the cuts fall, what was cut is what is asked: also if a question has marks of options in it."""
    assert unprompted(GOOD) == (["a"], "q", ("1", "2", "3", "4"))
    odd = GOOD.replace("q\n", "which:\nB. or\nC. ?\n").replace("2", "2\nB. 2\n")
    names, question, options = unprompted(odd)
    again = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
    assert f"<img>{names[0]}</img>\nQuestion: {question}\nOptions: {again}\nAnswer:" == odd


def test_what_is_wrong_with_seed_bench(tmp_path: Path) -> None:
    """Questions and prompts that cannot be scored are told, by their ids where they have one."""
    folder = copied(tmp_path, "seed_bench") / "seed_bench"
    whole = json.loads((folder / SEED).read_text(encoding="utf-8"))
    first = whole["questions"][0]
    wrong = [
        3,
        first | {"question_type_id": 13},
        first | {"question_type_id": [1]},
        first | {"answer": "E"},
        first | {"choice_c": None},
        first | {"data_id": "none"},
        *whole["questions"],
        first,
    ]
    (folder / SEED).write_text(json.dumps({"questions": wrong, "question_type": {"a": []}}))
    read = form("seed_image", SEED, tmp_path)
    assert len(read.items) == 5
    assert [problem.kind for problem in read.problems][:5] == ["malformed"] * 5
    assert [problem.kind for problem in read.problems][5:] == ["missing picture", "duplicate id"]
    assert [item.group for item in read.items] == ["1", "5", "6", "9", "2"]
    assert str(read.problems[3]).startswith("SEED-Bench.json questions 4 ('101'): answer should be one of A, B, C, D")
    line = lines(f"seed_bench/{PROMPTS}")[0]
    bad = [changed(line, prompt="Error"), changed(line, answer="AB"), changed(line, question_id=...), "{", line, line]
    (folder / PROMPTS).write_text("\n".join(bad))
    read = form("seed_image", PROMPTS, tmp_path)
    assert [item.id for item in read.items] == ["101"]
    assert [problem.kind for problem in read.problems] == ["malformed"] * 4 + ["duplicate id"]
    for text in ("[]", '{"questions": 1}', ""):
        (folder / SEED).write_text(text)
        with pytest.raises(DataError, match=r"SEED-Bench\.json"):
            form("seed_image", SEED, tmp_path)


def test_a_video_without_a_frame(tmp_path: Path) -> None:
    """Videos are asked with four frames or not at all."""
    folder = copied(tmp_path, "seed_bench") / "seed_bench"
    (folder / "video_imgs_4" / "v1_2.jpg").unlink()
    (problem,) = form("seed_video", SEED, tmp_path).problems
    assert (problem.kind, problem.where) == ("missing picture", "v1")


@pytest.mark.parametrize("split", ["dev", "test"])
def test_both_forms_of_mmbench(split: str) -> None:
    """The table and the lines made of it are the same items; pictures are in the table itself."""
    stem = f"mmbench_{split}_20230712"
    table, converted = form(f"mmbench_{split}", f"{stem}.tsv"), form(f"mmbench_{split}", f"{stem}/{stem}.jsonl")
    assert not table.problems
    assert not converted.problems
    bare = [replace(item, group="", pictures=()) for item in table.items]
    assert bare == [replace(item, pictures=()) for item in converted.items]
    files = [path.read_bytes() for item in converted.items for path in item.pictures]  # type: ignore[union-attr]
    assert [data for item in table.items for data in item.pictures] == files
    assert [int(item.id) % ROTATION for item in table.items] == [241] * 4 + [252] * 2
    truths = [item.truth for item in table.items]
    assert truths == ([1, 0, 3, 2, 1, 0] if split == "dev" else [None] * 6)
    assert table.items[4].group == "object_localization"


def test_prompts_of_mmbench() -> None:
    """Options that are "nan" or empty are not shown; nor is such a hint, but as N/A."""
    items = form("mmbench_dev", "mmbench_dev_20230712.tsv").items
    benchmark = BENCHMARKS["mmbench_dev"]
    assert prompt(benchmark, items[1]) == (
        "<img>bytes</img>Context: N/A\nQuestion: Which colour has the block?\n"
        "Options: A. green\nB. blue\nC. black\nD. red\nAnswer:"
    )
    assert prompt(benchmark, items[4]) == (
        "<img>bytes</img>Context: There is one\tblock.\nQuestion: Is it round?\nOptions: A. yes\nB. no\nAnswer:"
    )


def test_what_is_wrong_with_mmbench(tmp_path: Path) -> None:
    """Rows and lines that cannot be scored are told, with their line."""
    name = "mmbench_dev_20230712"
    folder = copied(tmp_path, "mmbench") / "mmbench"
    head, *rows = (folder / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    columns = head.split("\t")
    row = dict(zip(columns, rows[0].split("\t"), strict=True))
    wrong = [
        row | {"image": "%%%"},
        row | {"image": ""},
        row | {"index": "1.5"},
        row | {"answer": "E"},
        row | {"answer": ""},
        row | {"C": "nan", "answer": "C"},
        row | {"B": "", "C": "", "D": ""},
    ]
    spoiled = ["\t".join(one.values()) for one in [*wrong, row, row]]
    (folder / f"{name}.tsv").write_text("\n".join([head, *spoiled, "a\tb"]), encoding="utf-8")
    read = form("mmbench_dev", f"{name}.tsv", tmp_path)
    assert [item.id for item in read.items] == ["241"]
    malformed = [problem.where for problem in read.problems if problem.kind == "malformed"]
    assert malformed == [f"{name}.tsv:{number}" for number in (*range(2, 9), 11)]
    assert [str(problem.what)[:12] for problem in read.problems][:3] == ["image should"] * 2 + ["index should"]
    assert sum(problem.kind == "duplicate id" for problem in read.problems) == 1
    line = lines(f"mmbench/{name}/{name}.jsonl")[0]
    (folder / name / f"{name}.jsonl").write_text("\n".join([changed(line, answer=...), changed(line, index="x"), line]))
    read = form("mmbench_dev", f"{name}/{name}.jsonl", tmp_path)
    assert (len(read.items), len(read.problems)) == (1, 2)


@pytest.mark.parametrize(
    ("name", "file", "folder"),
    [
        ("scienceqa_test_img", SCIENCEQA, "scienceqa"),
        ("seed_image", PROMPTS, "seed_bench"),
        ("mmbench_dev", "mmbench_dev_20230712.tsv", "mmbench"),
    ],
)
@pytest.mark.parametrize("spoil", [lambda _: b"", lambda rows: rows[:1] if rows[0].startswith(b"index") else []])
def test_empty_files(
    tmp_path: Path, name: str, file: str, folder: str, spoil: Callable[[Sequence[bytes]], Any]
) -> None:
    """A file without a question is no benchmark; nor is a table of a heading alone."""
    path = copied(tmp_path, folder) / folder / file
    path.write_bytes(b"".join(spoil(path.read_bytes().splitlines(keepends=True)) or [b""]))
    with pytest.raises(DataError, match="has no entry"):
        form(name, file, tmp_path)
