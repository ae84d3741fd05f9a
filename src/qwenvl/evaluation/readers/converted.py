"""The reference's converted files: JSON lines of {"image", "question", "question_id", "answer"}.

answered     a Reader: the answers are in the lines
numbered     the same, for files whose `question_id` are not all different
unanswered   a Reader of test splits whose answers are not public
people       a Reader: people's answers are in a second file, of visualqa.org's form
documents    a Reader: texts are in a second file, of docvqa.org's form
reference    where the reference publishes such files
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..benchmark import Reader, Source
from ..items import Item, Places, Problem
from .answers import annotation, by_id, people_of, texts_of
from .files import each, entries, records, text_of

PUBLISHED = "https://ofasys-wlcb.oss-cn-wulanchabu.aliyuncs.com/Qwen-VL/evaluation"


def reference(folder: str, *files: str, read: Reader, shots: str) -> Source:
    """The reference's files; examples are lines of the training split, whose ids nobody needs."""
    return Source(files, read, f"{PUBLISHED}/{folder}/{files[0]}", (shots,), numbered)


def answered(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
    """Each line, with its answers."""

    def make(_: str, line: Mapping[str, Any]) -> Item:
        answers = texts_of(line, "answer")
        return _item(line, places, text_of(line, "question_id"), answers, answers[0])

    return each(records(files[0]), make)


def numbered(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
    """Each line, with its answers and the line's number as the id.

    A `question_id` of AI2D's is the name of the picture, about which others ask, too; nothing says that those of
    ChartQA and OCR-VQA are all different.
    """

    def make(where: str, line: Mapping[str, Any]) -> Item:
        answers = texts_of(line, "answer")
        return _item(line, places, where.rpartition(":")[2], answers, answers[0])

    return each(records(files[0]), make)


def unanswered(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
    """Each line, without an answer, whatever it has there."""
    return each(records(files[0]), lambda _, line: _item(line, places, text_of(line, "question_id"), None, ""))


def people(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
    """Each line, with the answers of people from the `annotations` of the second file."""
    return _annotated(files, places, "annotations", "question_id", people_of)


def documents(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
    """Each line, with the answers from the `data` of the second file."""
    return _annotated(files, places, "data", "questionId", lambda entry: texts_of(entry, "answers"))


def _annotated(
    files: Sequence[Path], places: Places, members: str, key: str, truth: Callable[[Mapping[str, Any]], list[Any]]
) -> Iterator[Item | Problem]:
    lines, annotations = files
    known, problems = by_id(entries(annotations, members), key)
    yield from problems

    def make(_: str, line: Mapping[str, Any]) -> Item:
        name = text_of(line, "question_id")
        shot = texts_of(line, "answer")[0] if line.get("answer") else ""  # only training splits need one
        return _item(line, places, name, truth(annotation(known, name)), shot)

    yield from each(records(lines), make)


def _item(line: Mapping[str, Any], places: Places, name: str, truth: list[Any] | None, shot: str) -> Item:
    path = places.picture(text_of(line, "image"))
    return Item(id=name, pictures=(path,), text=text_of(line, "question"), truth=truth, shot=shot)
