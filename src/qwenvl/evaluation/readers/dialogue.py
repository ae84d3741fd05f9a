"""Questions that a chat model answers in words: MME and TouchStone.

DIALOGUE           the benchmarks
read_mme_lines     MME: a file of lines for each task, as its scorer and the reference take them
read_mme_folders   MME: its own folders, where each picture has a file of its two questions
read_touchstone    TouchStone's table

MME scores pictures of which both questions are answered rightly: a picture with another number of questions than two is
told, and left out. All fourteen tasks have to be there.

TouchStone's owners publish the English table alone: they have never said what the Chinese one is called, nor released
it. `touchstone_cn*.tsv` with the same columns is taken for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from ...text.parts import shown
from ..benchmark import Benchmark, Source
from ..choices import MME_GROUPS
from ..forms import MME, TOUCHSTONE
from ..items import Item, Places, Problem
from .files import Entry, Malformed, base64_of, content, each, rows, text_of

TASKS = tuple(task for tasks in MME_GROUPS.values() for task in tasks)
QUESTIONS = "questions_answers_YN"  # the folder of some tasks' questions, beside that of their pictures
ENDINGS = (".jpg", ".png", ".jpeg")
TRUTHS = ("Yes", "No")


def read_mme_lines(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
    """Lines of picture, question and answer, with tabs between them; pictures lie in `images`, by task."""
    for path in files:
        task = path.stem
        yield from _pairs(task, _lines(path), partial(_picture, places, task))


def read_mme_folders(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:  # noqa: ARG001 - a reader's
    """Files of lines of question and answer, named as their pictures are; texts in other folders are none."""
    for task in TASKS:
        texts = {path: _beside(path) for path in files if _folder(path).name == task}
        pictures = {picture.name: picture for picture in texts.values()}
        lines = chain.from_iterable(_lines(path, picture.name) for path, picture in texts.items())
        yield from _pairs(task, lines, pictures.__getitem__)


def read_touchstone(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:  # noqa: ARG001 - a reader's
    """Rows with index, image in base64, question, category, and what a judge is told beside an answer."""

    def make(_: str, row: Mapping[str, Any]) -> Item:
        truth = {"annotation": text_of(row, "human_annotation"), "reference": text_of(row, "gpt4_ha_answer")}
        picture = base64_of(row, "image")
        return Item(text_of(row, "index"), (picture,), text_of(row, "question"), truth, group=text_of(row, "category"))

    for path in files:
        yield from each(rows(path), make)


def _lines(path: Path, picture: str | None = None) -> Iterator[Entry]:
    """The lines of a file as entries with picture, question and answer; with `picture`, lines do not name theirs."""
    keys = ("picture", "question", "answer") if picture is None else ("question", "answer")
    for number, line in enumerate(content(path).split(b"\n"), 1):
        where = f"{path.parent.name}/{path.name}:{number}"
        try:
            fields = line.decode("utf-8").strip().split("\t")
        except UnicodeDecodeError as error:
            yield where, Malformed(f"not UTF-8: {error}")
            continue
        if fields == [""]:
            continue
        if len(fields) == len(keys):
            yield where, {"picture": picture, **dict(zip(keys, fields, strict=True))}
        else:
            yield where, Malformed(f"a line is {' and '.join(keys)} with tabs between them, not {shown(fields)}")


def _pairs(task: str, lines: Iterator[Entry], picture: Callable[[str], Path]) -> Iterator[Item | Problem]:
    """A task's items, two for each picture."""
    asked: dict[str, list[Item]] = {}

    def make(_: str, line: Mapping[str, Any]) -> Item:
        name = line["picture"]
        if line["answer"] not in TRUTHS:
            raise Malformed(f"answer should be Yes or No, not {shown(line['answer'])}")
        of_picture = asked.setdefault(name, [])
        number = f"{task}/{name}#{len(of_picture) + 1}"
        item = Item(number, (picture(name),), line["question"], line["answer"], group=task, more={"picture": name})
        of_picture.append(item)
        return item

    yield from (one for one in each(lines, make) if isinstance(one, Problem))
    for name, items in asked.items():
        if len(items) == 2:
            yield from items
        else:
            yield Problem("malformed", f"{task}/{name}", f"a picture has two questions, and this one {len(items)}")


def _picture(places: Places, task: str, name: str) -> Path:
    return places.picture(name, (f"images/{task}", task, f"{task}/images", f"{task}/images/toy_dataset"))


def _folder(questions: Path) -> Path:
    """The folder of a task, of a file of it."""
    return questions.parent.parent if questions.parent.name == QUESTIONS else questions.parent


def _beside(questions: Path) -> Path:
    """The picture of a file of questions: beside it, or in the folder of pictures; where it should be, if it is not."""
    folder = _folder(questions)
    apart = [folder / "images", folder / "images" / "toy_dataset"]  # artwork has them deeper
    folders = apart if questions.parent.name == QUESTIONS else [folder]
    places = [place / f"{questions.stem}{ending}" for place in folders for ending in ENDINGS]
    return next((place for place in places if os.path.isfile(place)), places[0])


def _mme(above: str) -> Source:
    url = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
    return Source(tuple(f"{above}{task}/**/*.txt" for task in TASKS), read_mme_folders, url)


def _touchstone(language: str, title: str, file: str, url: str, score: float) -> Benchmark:
    return Benchmark(
        f"touchstone_{language}",
        f"TouchStone, {title}",
        "touchstone",
        TOUCHSTONE,
        (Source((file,), read_touchstone, url),),
        url,
        {"Qwen/Qwen-VL-Chat": {"score": score}},
        size=908,
        table=7,
    )


DIALOGUE = (
    Benchmark(
        "mme",
        "MME",
        "mme",
        MME,
        (
            Source(tuple(f"Your_Results/{task}.txt" for task in TASKS), read_mme_lines, _mme("").url),
            _mme(""),
            _mme("MME_Benchmark_release_version/"),
            _mme("MME_Benchmark_release_version/MME_Benchmark/"),
        ),
        _mme("").url,
        {"Qwen/Qwen-VL-Chat": {"Perception": 1487.58, "Cognition": 360.71}},
        size=2374,
        table=7,
    ),
    _touchstone(
        "en",
        "English",
        "touchstone_20230831.tsv",
        "https://touchstone-beijing.oss-cn-beijing.aliyuncs.com/dataset/touchstone_20230831.tsv",
        645.2,
    ),
    _touchstone("cn", "Chinese", "touchstone_cn*.tsv", "", 401.2),
)
