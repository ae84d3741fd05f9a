"""The small model's own benchmark: questions about drawn pictures of the split that its training never saw.

SMALL_BENCHMARKS    its skills in ChatML, by skill and language; and phrases to find, asked as RefCOCO asks
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from ...training.recipes.tiny_evaluate import ROWS, Question, asked
from ...training.recipes.tiny_scenes import Split, draw
from ...training.recipes.tiny_words import LANGUAGES
from ..benchmark import Benchmark, Reader, Source
from ..forms import REGION, SMALL, Form
from ..items import Item, Places, Problem

EACH = 300  # questions of each skill and language
RAW = "box (raw)"  # what is asked in the base model's form
SKILLS = [row for row in ROWS if row != RAW]


def _skills(_files: Sequence[Path], _places: Places) -> Iterator[Item | Problem]:
    """Every skill in turn, so that the first few items are of all."""
    for number, question in _in_turn(SKILLS):
        exchange = question.exchange
        group = f"{question.row}, {exchange.language.name}"
        pictures = tuple(partial(draw, scene) for scene in question.scenes)
        more = {"question": question}
        yield Item(f"{group} {number}", pictures, exchange.question, exchange.answer, group=group, more=more)


def _phrases(_files: Sequence[Path], _places: Places) -> Iterator[Item | Problem]:
    """One phrase and its box in pixels."""
    for number, question in _in_turn([RAW]):
        exchange, scene = question.exchange, question.scenes[0]
        sides = (scene.width, scene.height, scene.width, scene.height)
        truth = [side * place / 1000 for side, place in zip(sides, exchange.targets[0], strict=True)]
        language = exchange.language.name
        yield Item(
            f"{language} {number}",
            (partial(draw, scene),),
            exchange.phrase,
            truth,
            group=language,
            more={"width": scene.width, "height": scene.height},
        )


def _in_turn(rows: Sequence[str]) -> Iterator[tuple[int, Question]]:
    """The first question of every skill and language, then the second of each."""
    streams = [asked(row, language, Split.TEST) for row in rows for language in LANGUAGES]
    for number in range(1, EACH + 1):
        for stream in streams:
            yield number, next(stream)


def _made_here(name: str, title: str, form: Form, read: Reader, skills: int) -> Benchmark:
    return Benchmark(name, title, "", form, (Source((), read, ""),), "", size=EACH * len(LANGUAGES) * skills)


SMALL_BENCHMARKS = (
    _made_here("tiny", "Small model: skills", SMALL, _skills, len(SKILLS)),
    _made_here("tiny_grounding", "Small model: phrases", REGION, _phrases, 1),
)
