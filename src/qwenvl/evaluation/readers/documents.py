"""Benchmarks of questions about pages, charts, diagrams and covers: DocVQA, InfographicVQA, ChartQA, AI2D, OCR-VQA.

docvqa       makes a Reader of docvqa.org's own files
chartqa      a Reader of ChartQA's own files
ai2d         makes a Reader of the folder of AI2D
ocrvqa       makes a Reader of one split of OCR-VQA
DOCUMENTS    the benchmarks
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...text.parts import shown
from ..benchmark import Benchmark, Reader, Source
from ..forms import CHART, DOCUMENT, EXACT, EXACT_LONG
from ..items import DataError, Item, Places, Problem
from .answers import picture, texts_of
from .converted import answered, documents, numbered, reference, unanswered
from .files import Entry, Malformed, document, each, entries, list_of, text_of
from .questions import figures

DOCVQA = "https://rrc.cvc.uab.es/?ch=17&com=downloads"
AI2D_IDS = "ai2d_test_ids.csv"
TRAIN, VAL, TEST = 1, 2, 3  # OCR-VQA's splits
OCRVQA_ENDINGS = (".jpg", ".png", ".gif", ".jpeg")


def docvqa(*, public: bool) -> Reader:
    """A reader of `data`, of DocVQA, whose pictures are under `image`, and InfographicVQA: `image_local_name`."""

    def make(places: Places, split: str, entry: Mapping[str, Any]) -> Item:
        drawn = "image_local_name" in entry
        name = text_of(entry, "image_local_name" if drawn else "image")
        folders = ("infographicsvqa_images",) if drawn else (split, "spdocvqa_images", "documents")
        answers = texts_of(entry, "answers") if public else None
        return Item(
            id=text_of(entry, "questionId"),
            pictures=(picture(places, (name, os.path.basename(name)), folders),),
            text=text_of(entry, "question"),
            truth=answers,
            shot=answers[0] if answers else "",
        )

    def read(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
        split = files[0].name.partition("_")[0]
        return each(entries(files[0], "data"), lambda _, entry: make(places, split, entry))

    return read


def chartqa(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
    """Each of a list, by its number: entries have no id; pictures are in the folder `png` beside it."""
    split = files[0].parent.name

    def make(where: str, entry: Mapping[str, Any]) -> Item:
        answers = texts_of(entry, "label")
        image = places.picture(text_of(entry, "imgname"), (f"{split}/png", f"ChartQA Dataset/{split}/png"))
        return Item(where.rpartition(" ")[2], (image,), text_of(entry, "query"), answers, shot=answers[0])

    return each(entries(files[0]), make)


def ai2d(*, test: bool) -> Reader:
    """A reader of `ai2d/questions`, whose pictures are those of the list of ids, or those that are not.

    The options follow the question as "(a) one (b) another". Pictures are shown as they are, as the reference shows
    them, also where other work puts letters over their texts.
    """

    def read(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
        try:
            ids = {line.strip().removesuffix(".png") for line in files[0].read_text("utf-8-sig").splitlines()}
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {files[0]}: {error}") from None
        folder = places.file("ai2d/questions")
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}: it is in ai2d-all.zip")
        pages = sorted(folder.glob("*.json"), key=lambda path: (len(path.name), path.name))
        chosen = (path for path in pages if (path.name.partition(".")[0] in ids) == test)
        return each((entry for path in chosen for entry in _asked(path)), lambda _, entry: _diagram(places, entry))

    return read


def _asked(path: Path) -> Iterator[Entry]:
    """Each question about a diagram, with its text and the picture's name beside it."""
    try:
        page = document(path)
    except DataError as error:
        yield path.name, Malformed(str(error))
        return
    questions = page.get("questions") if isinstance(page, dict) else None
    if not isinstance(questions, dict):
        yield path.name, Malformed("it should have an object 'questions'")
        return
    for number, (text, entry) in enumerate(questions.items(), 1):
        told = {"text": text, "imageName": page.get("imageName")}
        yield f"{path.name}:{number}", entry | told if isinstance(entry, dict) else entry


def _diagram(places: Places, entry: Mapping[str, Any]) -> Item:
    texts = [text_of({"an option": one}, "an option") for one in list_of(entry, "answerTexts")]
    right = entry.get("correctAnswer")
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(texts):
        raise Malformed(f"correctAnswer should be the number of an option, not {shown(right)}")
    options = " ".join(f"({chr(ord('a') + at)}) {text}" for at, text in enumerate(texts))
    image = places.picture(text_of(entry, "imageName"), ("ai2d/images", "images"))
    name, question = text_of(entry, "questionId"), f"{text_of(entry, 'text')} {options}"
    return Item(name, (image,), question, [texts[right]], shot=texts[right])


def ocrvqa(split: int) -> Reader:
    """A reader of the books of a split; a question's id is the book's with a number."""

    def asked(path: Path) -> Iterator[Entry]:
        books = document(path)
        if not isinstance(books, dict):
            raise DataError(f"{path} should be an object with a book for each id")
        for name, book in books.items():
            where = f"{path.name} {name}"
            if not isinstance(book, dict) or book.get("split") not in (TRAIN, VAL, TEST):
                yield where, Malformed("a book is an object with a split of 1, 2 or 3")
            elif book["split"] == split:
                yield from _book(where, name, book)

    def make(places: Places, entry: Mapping[str, Any]) -> Item:
        answers = texts_of(entry, "answer")
        ending = os.path.splitext(text_of(entry, "imageURL"))[1]
        names = [f"{entry['book']}{one}" for one in (ending, *OCRVQA_ENDINGS)]
        image = picture(places, names, ("images",))
        return Item(entry["id"], (image,), text_of(entry, "question"), answers, shot=answers[0])

    def read(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
        return each(asked(files[0]), lambda _, entry: make(places, entry))

    return read


def _book(where: str, name: str, book: Mapping[str, Any]) -> Iterator[Entry]:
    """A book's questions, each as an entry."""
    questions, answers = book.get("questions"), book.get("answers")
    if not isinstance(questions, list) or not isinstance(answers, list) or len(questions) != len(answers):
        yield where, Malformed("questions and answers should be lists of one length")
        return
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True), 1):
        told = {"id": f"{name}-{number}", "book": name, "imageURL": book.get("imageURL")}
        yield f"{where} question {number}", {**told, "question": question, "answer": answer}


def _docvqa(split: str, own: str, *, public: bool) -> tuple[Source, ...]:
    """DocVQA's own files: as they first came, and as they come since questions have types; in a folder or alone."""
    read, shots = docvqa(public=public), docvqa(public=True)
    names = {
        f"{split}/{split}_v1.0.json": "train/train_v1.0.json",
        f"spdocvqa_qas/{own}": "spdocvqa_qas/train_v1.0_withQT.json",
        own: "train_v1.0_withQT.json",
    }
    return tuple(Source((name,), read, DOCVQA, (train,), shots) for name, train in names.items())


def _infographics(name: str, *, public: bool) -> tuple[Source, ...]:
    read, shots = docvqa(public=public), docvqa(public=True)
    train = "infographicsVQA_train_v1.0.json"
    return tuple(
        Source((f"{at}{name}",), read, DOCVQA, (f"{at}{train}",), shots) for at in ("", "infographicsvqa_qas/")
    )


def _chartqa(kind: str) -> Benchmark:
    own = tuple(
        Source(
            (f"{at}test/test_{kind}.json",),
            chartqa,
            "https://github.com/vis-nlp/ChartQA",
            (f"{at}train/train_{kind}.json",),
        )
        for at in ("", "ChartQA Dataset/")
    )
    return Benchmark(
        name=f"chartqa_test_{kind}",
        title=f"ChartQA, {kind}",
        folder="chartqa",
        form=CHART,
        sources=(reference("chartqa", f"test_{kind}.jsonl", read=numbered, shots=f"train_{kind}.jsonl"), *own),
        pictures="https://drive.google.com/file/d/1Lm_w6zeET1Hyl_9ks6w5nEsgpoyPHalV/view",
        # The paper reports only the mean of both parts: 65.7 of Qwen-VL and 66.3 of Qwen-VL-Chat, in table 5.
        size=1250,
        table=5,
    )


def _ocrvqa(name: str, split: int, published: Mapping[str, Mapping[str, float]], table: int | None) -> Benchmark:
    return Benchmark(
        name=f"ocrvqa_{name}",
        title=f"OCR-VQA {name}",
        folder="ocrvqa",
        form=EXACT_LONG,
        sources=(
            reference("ocrvqa", f"ocrvqa_{name}.jsonl", read=numbered, shots="ocrvqa_train.jsonl"),
            Source(("dataset.json",), ocrvqa(split), "https://ocr-vqa.github.io/", ("dataset.json",), ocrvqa(TRAIN)),
        ),
        pictures="https://ocr-vqa.github.io/kvqa_ProjectFiles/README.txt",
        published=published,
        table=table,
    )


DOCUMENTS: tuple[Benchmark, ...] = (
    Benchmark(
        name="docvqa_val",
        title="DocVQA val",
        folder="docvqa",
        form=DOCUMENT,
        sources=(
            reference("docvqa", "val.jsonl", "val/val_v1.0.json", read=documents, shots="train.jsonl"),
            reference("docvqa", "val.jsonl", read=answered, shots="train.jsonl"),
            *_docvqa("val", "val_v1.0_withQT.json", public=True),
        ),
        pictures=DOCVQA,
        size=5349,
    ),
    Benchmark(
        name="docvqa_test",
        title="DocVQA test",
        folder="docvqa",
        form=DOCUMENT,
        sources=(
            reference("docvqa", "test.jsonl", read=unanswered, shots="train.jsonl"),
            *_docvqa("test", "test_v1.0.json", public=False),
        ),
        pictures=DOCVQA,
        published=figures(65.1, 62.6, "ANLS"),
        size=5188,
        table=5,
        submit_as="questionId",
    ),
    Benchmark(
        name="infographicvqa_val",
        title="InfographicVQA val",
        folder="infographicsvqa",
        form=DOCUMENT,
        sources=(
            # The reference's script names these files; it says nowhere where they are.
            Source(
                ("val.jsonl", "infographicsVQA_val_v1.0_withQT.json"), documents, DOCVQA, ("train.jsonl",), numbered
            ),
            *_infographics("infographicsVQA_val_v1.0_withQT.json", public=True),
        ),
        pictures=DOCVQA,
        size=2801,
    ),
    Benchmark(
        name="infographicvqa_test",
        title="InfographicVQA test",
        folder="infographicsvqa",
        form=DOCUMENT,
        sources=(
            Source(("test.jsonl",), unanswered, DOCVQA, ("train.jsonl",), numbered),
            *_infographics("infographicsVQA_test_v1.0.json", public=False),
        ),
        pictures=DOCVQA,
        size=3288,
        submit_as="questionId",
    ),
    _chartqa("human"),
    _chartqa("augmented"),
    Benchmark(
        name="ai2d_test",
        title="AI2D",
        folder="ai2diagram",
        form=EXACT,
        sources=(
            reference("ai2diagram", "test.jsonl", read=numbered, shots="train.jsonl"),
            Source(
                (AI2D_IDS,),
                ai2d(test=True),
                f"https://s3-us-east-2.amazonaws.com/prior-datasets/{AI2D_IDS}",
                (AI2D_IDS,),
                ai2d(test=False),
            ),
        ),
        pictures="https://ai2-public-datasets.s3.amazonaws.com/diagrams/ai2d-all.zip",
        published=figures(62.3, 57.7, "accuracy"),
        size=3088,
        table=5,
    ),
    _ocrvqa("val", VAL, {}, None),
    _ocrvqa("test", TEST, figures(75.7, 70.5, "accuracy"), 5),
)
