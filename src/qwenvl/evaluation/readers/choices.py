"""Questions with options: ScienceQA, SEED-Bench, MMBench.

CHOICES                                   the benchmarks
read_scienceqa, read_problems             ScienceQA: the reference's JSON lines; problems.json with pid_splits.json
read_seed, read_seed_prompts              SEED-Bench: its JSON file; the prompts that the reference made of it
read_mmbench_table, read_mmbench          MMBench: its table; the JSON lines that the reference made of it

Truths are indices of options. Of SEED-Bench's and MMBench's forms the owners' comes first, since it alone has the kinds
of questions; the questions are the same.

Videos are not decoded here: four frames of each, uniformly sampled, must lie in `video_imgs_4` as the reference and
`qwenvl eval frames` write them, `<question_id>_0.jpg` to `_3.jpg`. Where the reference could not decode one, an error
stands in place of its prompt, which is told as a malformed entry.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ...text.parts import shown
from ..benchmark import CONVERTED, Benchmark, Source
from ..forms import CHOICE, CHOICE_LETTER, CIRCULAR, LETTERS, NO_HINT, SEED
from ..items import DataError, Item, Places, Problem
from .files import Entry, Malformed, base64_of, document, each, entries, list_of, records, rows, text_of

SEED_LETTERS = MMBENCH_LETTERS = "ABCD"
SEED_FOLDERS = ("SEED-Bench-image", "seed_bench_image")
SEED_IMAGES = range(1, 10)  # dimensions 1 to 9 ask about pictures, 10 to 12 about videos
SEED_VIDEOS = range(10, 13)
SEED_FOLDER, SEED_OWNERS = "seed_bench", "SEED-Bench.json"
FRAMES = 4
SEED_FRAMES = f"video_imgs_{FRAMES}"
ABSENT = ("", "nan")  # what a cell of a table holds that has nothing to say
TAGS = re.compile(r"(?:<img>[^<>\n]+</img>\n)+")


def read_scienceqa(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
    """Lines of {"image", "question", "hint", "choices", "answer"}; they have no ids, so their numbers stand in."""

    def make(where: str, entry: Mapping[str, Any]) -> Item:
        return _chosen(where.rpartition(":")[2], places.picture(text_of(entry, "image")), entry)

    for path in files:
        yield from each(records(path), make)


def read_problems(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
    """Problems of the test split that have a picture."""
    problems, splits = (document(path) for path in files)
    test = splits.get("test") if isinstance(splits, dict) else None
    if not isinstance(problems, dict) or not isinstance(test, list):
        raise DataError(f"{files[0]} should be an object, and {files[1]} have a list 'test'")

    def asked() -> Iterator[Entry]:
        for name in test:
            entry = problems.get(name) if isinstance(name, str) else None
            where = f"{files[0].name} {shown(name)}"
            if not isinstance(entry, dict):
                yield where, Malformed(f"{files[1].name} names it, and there is no such problem")
            elif entry.get("image") is not None:
                yield where, entry | {"id": name}

    def make(_: str, entry: Mapping[str, Any]) -> Item:
        picture = f"test/{entry['id']}/{text_of(entry, 'image')}"
        return _chosen(entry["id"], places.picture(picture, ("images",)), entry)

    yield from each(asked(), make)


def read_seed(files: Sequence[Path], places: Places, *, dimensions: range) -> Iterator[Item | Problem]:
    """Questions of some dimensions, whose names are the groups."""
    for path in files:
        whole = document(path)
        kinds = whole.get("question_type") if isinstance(whole, dict) else None
        pairs = kinds.items() if isinstance(kinds, dict) else ()
        names = {number: name for name, number in pairs if isinstance(number, int)}
        yield from each(_of_dimensions(path, dimensions), partial(_seed_item, places, names))


def read_seed_prompts(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
    """Lines of {"question_id", "prompt", "answer"}, of whose prompts pictures, question and options are read back."""

    def make(_: str, entry: Mapping[str, Any]) -> Item:
        names, question, options = unprompted(text_of(entry, "prompt"))
        pictures = tuple(_seed_picture(places, name) for name in names)
        return Item(text_of(entry, "question_id"), pictures, question, _letter(entry, SEED_LETTERS), options)

    for path in files:
        yield from each(records(path), make)


def unprompted(prompt: str) -> tuple[list[str], str, tuple[str, ...]]:
    """Pictures, question and four options of a prompt of SEED-Bench, which they make again. Raises Malformed."""
    found = TAGS.match(prompt)
    begin, *marks, end = "Question: ", "\nOptions: A. ", "\nB. ", "\nC. ", "\nD. ", "\nAnswer:"
    rest = prompt[found.end() :] if found else ""
    pieces = []
    if rest.startswith(begin) and rest.endswith(end):
        rest = rest[len(begin) : -len(end)]
        for mark in marks:
            piece, there, rest = rest.partition(mark)
            pieces += [piece] if there else []
        pieces.append(rest)
    if not found or len(pieces) != 1 + len(marks):
        raise Malformed(f"prompt should have pictures, a question and the options A to D, not {shown(prompt)}")
    names = re.findall(r"<img>(.+?)</img>", found[0])
    return names, pieces[0], tuple(pieces[1:])


def read_mmbench_table(files: Sequence[Path], places: Places, *, answers: bool) -> Iterator[Item | Problem]:  # noqa: ARG001 - a reader's
    """Rows with index, question, hint, A to D, answer, category and image, in base64; what is not there is "nan"."""

    def make(_: str, row: Mapping[str, Any]) -> Item:
        options = {letter: str(row[letter]) for letter in MMBENCH_LETTERS if row.get(letter, "") not in ABSENT}
        letters = "".join(options)
        if len(letters) < 2:
            raise Malformed(f"it has no options, but {shown(options)}")
        hint = row.get("hint", "")
        return Item(
            _index(row),
            (base64_of(row, "image"),),
            text_of(row, "question"),
            _letter(row, letters) if answers else None,
            tuple(options.values()),
            "" if hint in (*ABSENT, NO_HINT) else hint,
            row.get("category", ""),
        )

    for path in files:
        yield from each(rows(path), make)


def read_mmbench(files: Sequence[Path], places: Places, *, answers: bool) -> Iterator[Item | Problem]:
    """Lines of {"index", "image", "hint", "question", "choices"}, and "answer" but in the split for tests."""

    def make(_: str, entry: Mapping[str, Any]) -> Item:
        return _chosen(_index(entry), places.picture(text_of(entry, "image")), entry, answers=answers)

    for path in files:
        yield from each(records(path), make)


def _chosen(name: str, picture: Path, entry: Mapping[str, Any], *, answers: bool = True) -> Item:
    """An entry with "question", "hint", "choices" and "answer", an index."""
    options = tuple(text_of({"choices": choice}, "choices") for choice in list_of(entry, "choices"))
    if not 2 <= len(options) <= len(LETTERS):
        raise Malformed(f"choices should be two to {len(LETTERS)}, not {len(options)}")
    truth = entry.get("answer") if answers else None
    if answers and (not isinstance(truth, int) or isinstance(truth, bool) or not 0 <= truth < len(options)):
        raise Malformed(f"answer should be the index of a choice, not {shown(truth)}")
    hint = "" if entry.get("hint", "") is None else text_of(entry, "hint")
    return Item(name, (picture,), text_of(entry, "question"), truth, options, "" if hint == NO_HINT else hint)


def _letter(entry: Mapping[str, Any], letters: str) -> int:
    answer = text_of(entry, "answer")
    if len(answer) != 1 or answer not in letters:
        raise Malformed(f"answer should be one of {', '.join(letters)}, not {shown(answer)}")
    return letters.index(answer)


def _index(entry: Mapping[str, Any]) -> str:
    text = text_of(entry, "index")
    if not (text.isascii() and text.isdecimal()):
        raise Malformed(f"index should be a whole number, not {shown(text)}")
    return text


def _of_dimensions(path: Path, dimensions: range) -> Iterator[Entry]:
    """Entries of these dimensions, and those that are of none."""
    for where, entry in entries(path, "questions"):
        kind = entry.get("question_type_id") if isinstance(entry, dict) else None
        if kind in dimensions:
            yield where, entry
        elif kind not in SEED_IMAGES and kind not in SEED_VIDEOS:
            yield where, Malformed(f"a question has a question_type_id from 1 to 12, not {shown(kind)}")


def _seed_item(places: Places, names: Mapping[Any, str], _: str, entry: Mapping[str, Any]) -> Item:
    name, kind = text_of(entry, "question_id"), entry["question_type_id"]
    if kind in SEED_VIDEOS:
        shown_files = [f"{SEED_FRAMES}/{name}_{frame}.jpg" for frame in range(FRAMES)]
    else:
        shown_files = [text_of(entry, "data_id")]
    return Item(
        name,
        tuple(_seed_picture(places, file) for file in shown_files),
        text_of(entry, "question"),
        _letter(entry, SEED_LETTERS),
        tuple(text_of(entry, f"choice_{letter.lower()}") for letter in SEED_LETTERS),
        group=names.get(kind, str(kind)),
    )


def _seed_picture(places: Places, name: str) -> Path:
    """A picture, also where the prompt has a folder of another machine before its name."""
    first = places.picture(name, SEED_FOLDERS)
    other = places.picture(PurePosixPath(name).name, SEED_FOLDERS)
    return other if os.path.isfile(other) and not os.path.isfile(first) else first


def _published(name: str, base: float, chat: float) -> dict[str, dict[str, float]]:
    return {"Qwen/Qwen-VL": {name: base}, "Qwen/Qwen-VL-Chat": {name: chat}}


def _seed(name: str, title: str, dimensions: range, prompts: str, pictures: str, size: int, table: int) -> Benchmark:
    owners = "https://huggingface.co/datasets/AILab-CVC/SEED-Bench"
    # The paper's "All", 56.3 and 58.2, is of the questions of both together: the score of neither.
    figures = {"seed_image": (62.3, 65.4), "seed_video": (39.1, 37.8)}[name]
    return Benchmark(
        name,
        title,
        SEED_FOLDER,
        SEED,
        (
            Source((SEED_OWNERS,), partial(read_seed, dimensions=dimensions), owners),
            Source((prompts,), read_seed_prompts, f"{CONVERTED}/{SEED_FOLDER}/{prompts}"),
        ),
        pictures,
        _published("accuracy", *figures),
        size,
        table,
    )


def _mmbench(name: str, title: str, *, answers: bool, size: int | None = None) -> Benchmark:
    stem = f"{name}_20230712"
    url = f"https://download.openmmlab.com/mmclassification/datasets/mmbench/{stem}.tsv"
    return Benchmark(
        name,
        title,
        "mmbench",
        CIRCULAR,
        tuple(
            Source((f"{above}{stem}.{ending}",), partial(read, answers=answers), url)
            for ending, read in (("tsv", read_mmbench_table), ("jsonl", read_mmbench))
            for above in ("", f"{stem}/")
        ),
        url,
        size=size,
    )


SCIENCEQA = Benchmark(
    "scienceqa_test_img",
    "ScienceQA-Img",
    "scienceqa",
    CHOICE,
    (
        Source(("scienceqa_test_img.jsonl",), read_scienceqa, f"{CONVERTED}/scienceqa/scienceqa_test_img.jsonl"),
        Source(("problems.json", "pid_splits.json"), read_problems, "https://github.com/lupantech/ScienceQA"),
    ),
    "https://scienceqa.s3.us-west-1.amazonaws.com/images/test.zip",
    _published("accuracy", 67.1, 68.2),
    size=2017,
    table=4,
)

CHOICES = (
    SCIENCEQA,
    Benchmark(
        "scienceqa_test_img_letter",
        f"{SCIENCEQA.title}, by letter",
        SCIENCEQA.folder,
        CHOICE_LETTER,
        SCIENCEQA.sources,
        SCIENCEQA.pictures,
        size=SCIENCEQA.size,
    ),
    _seed(
        "seed_image",
        "SEED-Bench, pictures",
        SEED_IMAGES,
        "image_input.jsonl",
        "https://huggingface.co/datasets/AILab-CVC/SEED-Bench",
        14233,
        7,
    ),
    _seed(
        "seed_video",
        "SEED-Bench, videos",
        SEED_VIDEOS,
        "video_input_4.jsonl",
        "https://github.com/AILab-CVC/SEED-Bench/blob/main/DATASET.md",
        5009,
        7,
    ),
    _mmbench("mmbench_dev", "MMBench dev", answers=True, size=4377),
    _mmbench("mmbench_test", "MMBench test", answers=False),
)
