"""Questions and captions are read alike from the reference's converted files and from their owners' own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwenvl.evaluation import catalogue
from qwenvl.evaluation.benchmark import Benchmark, Dataset, Source
from qwenvl.evaluation.forms import parts
from qwenvl.evaluation.items import DataError, Item
from qwenvl.evaluation.readers.captions import CAPTIONS
from qwenvl.evaluation.readers.documents import DOCUMENTS
from qwenvl.evaluation.readers.questions import QUESTIONS

DATA = Path(__file__).parent / "data"
ALL = {one.name: one for one in (*CAPTIONS, *QUESTIONS, *DOCUMENTS)}
LINE = {"image": "data/gqa/images/n1.jpg", "question": "Why?", "question_id": "1", "answer": "so"}
# Their converted files have other ids than their owners'.
OTHER_IDS = {"vizwiz_val", "ai2d_test", "ocrvqa_val", "ocrvqa_test"}
# The first question of each: id, picture, text, the answer as it stands in an example, right answers.
FIRST: dict[str, tuple[str, str, str, str, Any]] = {
    "nocaps": ("1", "nocaps/images/b1.jpg", "", "A red block lies on a table.", 3),
    "flickr": ("1", "flickr30k/flickr30k-images/81.jpg", "", "A red block lies on a table.", 3),
    "vqav2_val": ("1001", "coco/val2014/COCO_val2014_000000000001.jpg", "What color is the block?", "red", 10),
    "vqav2_testdev": ("3001", "coco/test2015/COCO_test2015_000000000001.jpg", "What color is the block?", "", None),
    "okvqa_val": ("2001", "coco/val2014/COCO_val2014_000000000001.jpg", "What color is the block?", "red", 10),
    "textvqa_val": ("4001", "textvqa/train_images/a1.jpg", "what does the sign say?", "stop", 10),
    "vizwiz_val": ("0", "vizwiz/val/VizWiz_val_00000000.jpg", "What is this?", "can of beans", 10),
    "vizwiz_test": ("VizWiz_test_00000000.jpg", "vizwiz/test/VizWiz_test_00000000.jpg", "What is this?", "", None),
    "gqa_testdev": ("05001", "gqa/images/n1.jpg", "Is the cup left of the plate?", "no", ["no"]),
    "docvqa_val": (
        "6001",
        "docvqa/val/documents/val1_1.png",
        "What is the date of the letter?",
        "1/8/93",
        ["1/8/93", "January 8, 1993"],
    ),
    "docvqa_test": ("6101", "docvqa/test/documents/test1_1.png", "What is the date of the letter?", "", None),
    "infographicvqa_val": (
        "7001",
        "infographicsvqa/infographicsvqa_images/31.jpeg",
        "How many people voted?",
        "40 million",
        ["40 million", "40M"],
    ),
    "infographicvqa_test": (
        "7101",
        "infographicsvqa/infographicsvqa_images/31.jpeg",
        "How many people voted?",
        "",
        None,
    ),
    "chartqa_test_human": ("1", "chartqa/test/png/91.png", "What is the largest bar?", "Peru", ["Peru"]),
    "chartqa_test_augmented": ("1", "chartqa/test/png/91.png", "What is the largest bar?", "Peru", ["Peru"]),
    "ai2d_test": (
        "1",
        "ai2diagram/ai2d/images/2.png",
        "What is A in the diagram? (a) root (b) stem (c) leaf (d) seed",
        "leaf",
        ["leaf"],
    ),
    "ocrvqa_val": ("1", "ocrvqa/images/0400.jpg", "Who wrote this book?", "T. Moss", ["T. Moss"]),
    "ocrvqa_test": ("1", "ocrvqa/images/0312.jpg", "Who wrote this book?", "Ann Lee", ["Ann Lee"]),
}


def there(benchmark: Benchmark) -> list[Source]:
    """The forms in which the fixtures have a benchmark."""
    places = catalogue.Places(DATA, benchmark.folder)
    return [one for one in benchmark.sources if all(places.file(name).is_file() for name in one.files)]


def read(benchmark: Benchmark, source: Source, root: Path = DATA) -> Dataset:
    """The benchmark in that form, with its examples if it has any."""
    return catalogue.read(replace(benchmark, sources=(source,)), root, shots=bool(source.shots))


def prompt(benchmark: Benchmark, item: Item, shots: tuple[Item, ...] = ()) -> str:
    """A query as the reference writes it."""
    shown = parts(benchmark.form, item, shots)
    return "".join(part["text"] if "text" in part else f"<img>{part['image'].name}</img>" for part in shown)


def problems(name: str, root: Path, *, at: int = 0) -> list[tuple[str, str]]:
    """Kind and place of all that is wrong in a form of a benchmark."""
    benchmark = ALL[name]
    found = catalogue.read(replace(benchmark, sources=(benchmark.sources[at],)), root).problems
    return [(one.kind, one.where) for one in found]


def copied(tmp_path: Path, folder: str) -> Path:
    """A folder of the fixtures that may be changed."""
    shutil.copytree(DATA / folder, tmp_path / folder)
    return tmp_path / folder


def test_all_are_in_the_catalogue() -> None:
    """Each benchmark can be named, is of a table or of none, and has figures under known names."""
    assert set(FIRST) == set(ALL) <= set(catalogue.BENCHMARKS)
    for one in ALL.values():
        assert set(one.published) in (set(), {"Qwen/Qwen-VL", "Qwen/Qwen-VL-Chat"})
        assert one.table in ({4, 5} if one.published or "chartqa" in one.name else {None})
        assert all(url.startswith("http") for url in (one.pictures, *(source.url for source in one.sources)))


@pytest.mark.parametrize("name", sorted(ALL))
def test_both_forms_are_equal(name: str) -> None:
    """The reference's files and the owner's give the same five questions, and the same examples, without a problem."""
    benchmark = ALL[name]
    sources = there(benchmark)
    assert len(sources) >= 2
    assert sources[0] is benchmark.sources[0]
    whole = [read(benchmark, source) for source in sources]
    for dataset in whole:
        assert len(dataset.items) == 5
        assert dataset.problems == ()
        assert len(dataset.shots) == (0 if name == "nocaps" else 2)
        assert all(path.is_file() for path in dataset.files)
    bare = [[replace(item, id="") if name in OTHER_IDS else item for item in dataset.items] for dataset in whole]
    assert all(items == bare[0] for items in bare)
    assert {json.dumps(item.truth) for item in bare[0]} != {"null"} or FIRST[name][4] is None
    answers = [[(item.pictures, item.text, item.shot) for item in dataset.shots] for dataset in whole]
    assert all(examples == answers[0] for examples in answers)
    assert all(shot for _, _, shot in answers[0])


@pytest.mark.parametrize("name", sorted(ALL))
def test_the_first_question(name: str) -> None:
    """Every field is where it belongs; of people, ten answers with their numbers; of captions, all."""
    item = read(ALL[name], ALL[name].sources[0]).items[0]
    found = (item.id, item.pictures[0].relative_to(DATA).as_posix(), item.text, item.shot, item.truth)  # type: ignore[union-attr]
    *expected, truth = FIRST[name]
    assert list(found[:-1]) == expected
    if truth == 10:
        first, other = {"answer": item.shot, "answer_id": 1}, found[-1][-1]
        assert (found[-1][0], len(found[-1]), set(other), other["answer_id"]) == (first, 10, set(first), 10)
    elif truth == 3:
        assert found[-1] == [item.shot, "Somebody left a red block.", "The block is red."]
    else:
        assert found[-1] == truth


def test_ids_of_owners() -> None:
    """Where converted files have a line's number or the question's, owners' files have their own ids."""
    ids = {name: [item.id for item in read(ALL[name], there(ALL[name])[-1]).items] for name in OTHER_IDS}
    assert ids["vizwiz_val"][0] == "VizWiz_val_00000000.jpg"
    assert ids["ai2d_test"] == ["2.png-0", "2.png-1", "11.png-0", "11.png-1", "11.png-2"]
    assert ids["ocrvqa_test"] == ["0312-1", "0312-2", "0312-3", "0777-1", "0777-2"]


def test_prompts() -> None:
    """Word for word what the reference's scripts ask, alone and behind examples."""
    dataset = read(ALL["gqa_testdev"], ALL["gqa_testdev"].sources[0])
    assert prompt(ALL["gqa_testdev"], dataset.items[1]) == "<img>n2.jpg</img>What is the boy holding? Answer:"
    assert prompt(ALL["gqa_testdev"], dataset.items[1], dataset.shots) == (
        "<img>n1.jpg</img>Is the cup left of the plate? Answer: no"
        "<img>n2.jpg</img>What is the boy holding? Answer: kite"
        "<img>n2.jpg</img>What is the boy holding? Answer:"
    )
    dataset = read(ALL["flickr"], ALL["flickr"].sources[0])
    assert prompt(ALL["flickr"], dataset.items[0], dataset.shots[:1]) == (
        "<img>91.jpg</img>Describe the image in English: A lamp.<img>81.jpg</img>Describe the image in English:"
    )


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_place_of_files(name: str, tmp_path: Path) -> None:
    """Files are found wherever an owner's archive puts them, and in a folder of this one benchmark alone."""
    benchmark = ALL[name]
    known = there(benchmark)
    for source in benchmark.sources:
        same = next(one for one in reversed(known) if one.read == source.read or source not in known)
        root = tmp_path / str(benchmark.sources.index(source))
        for wanted, has in zip(source.files, same.files, strict=True):
            (root / wanted).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(DATA / benchmark.folder / has, root / wanted)
        if name == "ai2d_test":
            shutil.copytree(DATA / "ai2diagram/ai2d/questions", root / "ai2d/questions")
        dataset = catalogue.read(replace(benchmark, sources=(source,)), root)
        assert {one.kind for one in dataset.problems} == {"missing picture"}
        assert len(dataset.problems) == 5


def test_bad_lines_are_told(tmp_path: Path) -> None:
    """Of a converted file, each bad line is a problem with its place; the others are read."""
    lines = [
        json.dumps(LINE),
        "{not json",
        json.dumps({name: value for name, value in LINE.items() if name != "question"}),
        json.dumps(LINE | {"question": ["Why?"], "question_id": "4"}),
        json.dumps(LINE | {"question_id": None}),
        json.dumps(LINE | {"image": None}),
        json.dumps(LINE | {"answer": None, "question_id": "7"}),
        json.dumps(LINE | {"answer": [], "question_id": "8"}),
        json.dumps(LINE | {"answer": [["so"]], "question_id": "9"}),
        json.dumps(LINE | {"question": "Again?"}),
        json.dumps(LINE | {"image": "data/gqa/images/none.jpg", "question_id": "11"}),
        "",
        "null",
        json.dumps(LINE | {"question_id": 14, "answer": 3}),
    ]
    folder = copied(tmp_path, "gqa")
    (folder / "testdev_balanced.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"question": "caf\xe9"}')
    assert problems("gqa_testdev", tmp_path) == [
        ("malformed", "testdev_balanced.jsonl:2"),
        ("malformed", "testdev_balanced.jsonl:3 ('1')"),
        ("malformed", "testdev_balanced.jsonl:4 ('4')"),
        ("malformed", "testdev_balanced.jsonl:5"),
        ("malformed", "testdev_balanced.jsonl:6 ('1')"),
        ("no answer", "testdev_balanced.jsonl:7 ('7')"),
        ("no answer", "testdev_balanced.jsonl:8 ('8')"),
        ("malformed", "testdev_balanced.jsonl:9 ('9')"),
        ("duplicate id", "1"),
        ("missing picture", "11"),
        ("malformed", "testdev_balanced.jsonl:13"),
        ("malformed", "testdev_balanced.jsonl:15"),
    ]
    items = catalogue.read(ALL["gqa_testdev"], tmp_path).items
    assert [(item.id, item.truth) for item in items] == [("1", ["so"]), ("14", ["3"])]


def changed(path: Path, key: str, edit: Any) -> None:
    """A JSON file with the list under `key` edited in place."""
    found = json.loads(path.read_text(encoding="utf-8"))
    edit(found[key])
    path.write_text(json.dumps(found), encoding="utf-8")


@pytest.mark.parametrize("at", [0, 1])
def test_questions_without_annotation(at: int, tmp_path: Path) -> None:
    """What the annotations lack is never scored; a bad annotation is told with its place; of two, the last counts."""
    folder = copied(tmp_path, "vqav2")
    shutil.copytree(DATA / "coco", tmp_path / "coco")

    def spoil(found: list[Any]) -> None:
        del found[0]
        found[0]["answers"] = None
        found[1]["answers"][0]["answer"] = {}
        found += [None, {"answers": []}, {"question_id": 1005, "answers": [{"answer": "pie", "answer_id": 1}]}]

    changed(folder / "v2_mscoco_val2014_annotations.json", "annotations", spoil)
    found = problems("vqav2_val", tmp_path, at=at)
    assert [kind for kind, _ in found] == ["malformed", "malformed", "no answer", "no answer", "malformed"]
    assert found[0][1] == "v2_mscoco_val2014_annotations.json annotations 5"
    assert [where.rpartition(" ")[2] for _, where in found[2:]] == ["(1001)", "(1002)", "(1003)"]
    items = catalogue.read(ALL["vqav2_val"], tmp_path).items
    assert [len(item.truth) for item in items] == [10, 1]


def test_annotations_of_documents(tmp_path: Path) -> None:
    """DocVQA's converted questions take their answers from the annotations, not from their lines."""
    folder = copied(tmp_path, "docvqa")
    changed(folder / "val/val_v1.0.json", "data", lambda found: (found.pop(), found[0].update(answers=["today"])))
    dataset = catalogue.read(ALL["docvqa_val"], tmp_path)
    assert dataset.items[0].truth == ["today"]
    assert [(one.kind, one.where) for one in dataset.problems] == [("no answer", "val.jsonl:5 (6005)")]
    (folder / "val/val_v1.0.json").unlink()
    assert catalogue.read(ALL["docvqa_val"], tmp_path).items[0].truth == ["1/8/93", "January 8, 1993"]


def test_captions_that_are_wrong(tmp_path: Path) -> None:
    """A picture without captions is not scored, nor one with a caption that is no text."""
    folder = copied(tmp_path, "nocaps")

    def spoil(found: list[Any]) -> None:
        del found[:3]
        found[0]["caption"] = 5.5
        found[3]["caption"] = None
        found[6]["image_id"] = None

    changed(folder / "nocaps_val.json", "annotations", spoil)
    changed(folder / "nocaps_val.json", "images", lambda found: found.append(found[4]))
    assert problems("nocaps", tmp_path) == [
        ("malformed", "nocaps_val.json annotations 7"),
        ("no answer", "nocaps_val.json images 1 (1)"),
        ("malformed", "nocaps_val.json images 3 (3)"),
        ("duplicate id", "5"),
    ]
    (folder / "nocaps_val.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(DataError, match=r"nocaps_val\.json has no entry"):
        catalogue.read(ALL["nocaps"], tmp_path)


def test_owners_files_that_are_wrong(tmp_path: Path) -> None:
    """Odd entries of the forms that have objects within objects are told, and leave the others."""
    book = {"imageURL": "x.jpg", "questions": ["Who?"], "answers": ["Ann"], "split": 3}
    books = {
        "a": book,
        "b": None,
        "c": book | {"split": "3"},
        "d": book | {"answers": []},
        "e": book | {"imageURL": None},
        "f": book | {"answers": [None]},
        "g": book | {"questions": [7.5]},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(books))
    for name in "ag":
        shutil.copy(DATA / "ocrvqa/images/0312.jpg", tmp_path / f"{name}.png")  # another ending than the URL's
    dataset = catalogue.read(ALL["ocrvqa_test"], tmp_path)
    assert [(item.id, item.text) for item in dataset.items] == [("a-1", "Who?"), ("g-1", "7.5")]
    assert [(one.kind, one.where.partition(" ")[2]) for one in dataset.problems] == [
        ("malformed", "b"),
        ("malformed", "c"),
        ("malformed", "d"),
        ("malformed", "e question 1 ('e-1')"),
        ("no answer", "f question 1 ('f-1')"),
    ]

    pages = copied(tmp_path, "ai2diagram") / "ai2d/questions"
    (pages / "2.png.json").write_text("{")
    asked = {"answerTexts": ["a", "b"], "correctAnswer": 1, "questionId": "q"}
    wrong = [{"correctAnswer": 2}, {"correctAnswer": -1}, {"correctAnswer": True}, {"answerTexts": None}]
    questions: dict[str, Any] = {f"Why {number}?": asked | one for number, one in enumerate(wrong)}
    questions |= {"null?": None, "Right?": asked}
    (pages / "11.png.json").write_text(json.dumps({"imageName": "11.png", "questions": questions}))
    (pages.parents[1] / "test.jsonl").unlink()
    dataset = catalogue.read(ALL["ai2d_test"], tmp_path)
    assert [(item.text, item.truth) for item in dataset.items] == [("Right? (a) a (b) b", ["b"])]
    assert [(one.kind, one.where) for one in dataset.problems] == [
        ("malformed", "2.png.json"),
        *(("malformed", f"11.png.json:{number}") for number in range(1, 6)),
    ]


def test_karpathys_splits(tmp_path: Path) -> None:
    """Only the split is read; an image without one, or without captions, is a problem."""
    folder = copied(tmp_path, "flickr30k")

    def spoil(found: list[Any]) -> None:
        del found[0]["split"]
        found[1]["sentences"] = []
        found[2]["sentences"] = ["A text."]
        found += [None]

    changed(folder / "dataset_flickr30k.json", "images", spoil)
    assert [kind for kind, _ in problems("flickr", tmp_path, at=1)] == ["malformed"] * 4


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize("content", ["", "[]", "{}", "null", "7", "\udcff\udcfe{", "folder"])
def test_files_that_are_something_else(name: str, content: str, tmp_path: Path) -> None:
    """Empty files, other JSON, other encodings and folders: one DataError, or problems, never anything else."""
    benchmark = ALL[name]
    for number, source in enumerate(benchmark.sources):
        root = tmp_path / str(number)
        for file in source.files:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            if content == "folder":
                (root / file).mkdir()
            else:
                (root / file).write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(DataError, match=str(root)):
            raise_if_nothing(benchmark, source, root)


def raise_if_nothing(benchmark: Benchmark, source: Source, root: Path) -> None:
    """Problems, if all there is are problems, as a DataError that names the folder."""
    dataset = catalogue.read(replace(benchmark, sources=(source,)), root)
    assert not dataset.items
    raise DataError(f"{root}: {dataset.problems[0]}")


def test_missing_files_are_named(tmp_path: Path) -> None:
    """What is missing is said, of questions and of examples."""
    with pytest.raises(DataError, match=r"vqav2_val\.jsonl with v2_mscoco_val2014_annotations\.json, or v2_OpenEnded"):
        catalogue.read(ALL["vqav2_val"], tmp_path)
    (copied(tmp_path, "gqa") / "train_balanced.jsonl").unlink()
    with pytest.raises(DataError, match=r"train_balanced\.jsonl is missing"):
        catalogue.read(ALL["gqa_testdev"], tmp_path, shots=True)
    with pytest.raises(DataError, match="its data have none"):
        catalogue.read(ALL["nocaps"], DATA, shots=True)


def test_examples_have_answers(tmp_path: Path) -> None:
    """A line for training without an answer is no example, also where the questions themselves have none."""
    folder = copied(tmp_path, "vizwiz")
    path = folder / "vizwiz_train.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], lines[1].replace(', "answer": "unanswerable"', "")]), encoding="utf-8")
    dataset = catalogue.read(ALL["vizwiz_test"], tmp_path, shots=True)
    assert [item.shot for item in dataset.shots] == ["can of beans"]
    assert [one.kind for one in dataset.problems] == ["no answer"]
