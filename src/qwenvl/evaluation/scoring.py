"""Answers to figures: which metric a benchmark has, over which of its parts, and how sure its value is.

Answered   an item and what the model said to it
Figure     one number, with its 95% bootstrap interval
Scores     all figures of a benchmark, the score of each item, and what is odd about which
METRICS    by the names that forms use
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, TypeAlias

import numpy as np

from .captions import score_captions
from .choices import MME_GROUPS, Rotated, circular, likeliest, majority, mme_label
from .forms import LETTERS
from .grounding import MODEL_SCALE, REFERENCE_SCALE, box_of, correct, iou
from .items import Item
from .texts import anls, exact_match, gqa_normalised, relaxed_accuracy
from .vqa import vqa_accuracy

RESAMPLES, SURE = 1000, 95  # bootstrap samples, and the percentage of them that an interval holds
CAPTION_TITLES = {"CIDEr": "CIDEr", "Bleu_4": "BLEU-4", "ROUGE_L": "ROUGE-L", "METEOR": "METEOR"}
LETTER = re.compile(rf"\b[{LETTERS}]\b")


@dataclass(frozen=True)
class Answered:
    """An item, and the model's answer, or the loss of each of its options."""

    item: Item
    answer: str = ""
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A value, between which two it lies with 95% confidence, and over how many units: items, unless it says others."""

    name: str
    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Scores:
    """What a benchmark came to.

    Attributes:
        figures: the first is the one that the paper reports.
        items: what the metric gave each item, by id.
        groups: a figure for each subtask, if there are any.
        odd: ids of answers that are not what was asked for, such as those without a box, by what is odd. They are
            scored as the reference scores them.
    """

    figures: tuple[Figure, ...]
    items: Mapping[str, float]
    groups: Mapping[str, Figure] = field(default_factory=dict)
    odd: Mapping[str, Sequence[str]] = field(default_factory=dict)


Metric: TypeAlias = "Callable[[Sequence[Answered]], Scores]"


def figure(name: str, strata: Sequence[Sequence[float]], scale: float = 100.0) -> Figure:
    """`scale` times the sum of the strata's means, with a percentile bootstrap interval.

    Units are drawn with replacement within each stratum, from a fixed seed: the same scores give the same interval.
    """
    parts = [np.asarray(stratum, np.float64) for stratum in strata]
    draw = np.random.default_rng(0)
    sums = np.zeros(RESAMPLES)
    for part in parts:
        # How often each of the different values is drawn: as many numbers as there are values, not units.
        values, counts = np.unique(part, return_counts=True)
        drawn = draw.multinomial(len(part), counts / len(part), size=RESAMPLES)
        sums += drawn @ values / len(part)
    low, high = np.percentile(scale * sums, [(100 - SURE) / 2, (100 + SURE) / 2])
    value = scale * sum(fmean(part) for part in strata)
    return Figure(name, value, float(low), float(high), sum(map(len, strata)))


def moved(one: Figure, value: float) -> Figure:
    """The figure with another value, of the corpus, where that is not the mean over units; the interval goes along."""
    return replace(one, value=value, low=one.low + value - one.value, high=one.high + value - one.value)


def scored(name: str, answered: Sequence[Answered], give: Callable[[Answered], float], **odd: Sequence[str]) -> Scores:
    """The mean of what each item is given, in percent, by subtask too."""
    items = {one.item.id: float(give(one)) for one in answered}
    return Scores((figure(name, [list(items.values())]),), items, _by_group(name, answered, items), _told(odd))


def _by_group(name: str, answered: Sequence[Answered], items: Mapping[str, float]) -> dict[str, Figure]:
    groups: dict[str, list[float]] = {}
    for one in answered:
        if one.item.group:
            groups.setdefault(one.item.group, []).append(items[one.item.id])
    return {group: figure(name, [values]) for group, values in groups.items()}


def _told(odd: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    return {name.replace("_", " "): ids for name, ids in odd.items() if ids}


def _without_words(answered: Sequence[Answered]) -> list[str]:
    return [one.item.id for one in answered if not one.answer.strip()]


def _captions(answered: Sequence[Answered]) -> Scores:
    """CIDEr x 100, as papers print it, then BLEU-4, ROUGE-L and, where it can be had, METEOR x 100; units are pictures.

    CIDEr weighs words by the references of the scored pictures. A bootstrap sample keeps these weights, and its corpus
    BLEU and METEOR are not computed anew: their intervals are those of the means over pictures, around the corpus'
    values.
    """
    found = score_captions(
        {one.item.id: one.answer for one in answered},
        {one.item.id: one.item.truth for one in answered},
        with_meteor=True,
    )
    titles = {name: title for name, title in CAPTION_TITLES.items() if name in found.corpus}
    per_image = {name: [image[name] for image in found.images.values()] for name in titles}
    figures = [moved(figure(title, [per_image[name]]), 100 * found.corpus[name]) for name, title in titles.items()]
    items = dict(zip(found.images, per_image["CIDEr"], strict=True))
    return Scores(tuple(figures), items, odd=_told({"empty answers": _without_words(answered)}))


def _mean(name: str, give: Callable[[Answered], float]) -> Metric:
    """A metric that is the mean of what it gives each answer's text, in percent."""

    def metric(answered: Sequence[Answered]) -> Scores:
        return scored(name, answered, give, empty_answers=_without_words(answered))

    return metric


def _choice(answered: Sequence[Answered]) -> Scores:
    return scored("accuracy", answered, lambda one: likeliest(one.losses) == one.item.truth)


def _letter(answered: Sequence[Answered]) -> Scores:
    """The first capital that stands by itself and is an option's letter; an answer without one is wrong."""

    def chosen(one: Answered) -> int:
        letters = LETTERS[: len(one.item.options)]
        found = next((letter for letter in LETTER.findall(one.answer) if letter in letters), None)
        return -1 if found is None else letters.index(found)

    lost = [one.item.id for one in answered if chosen(one) < 0]
    return scored("accuracy", answered, lambda one: chosen(one) == one.item.truth, answers_without_a_letter=lost)


def _circular(answered: Sequence[Answered]) -> Scores:
    """MMBench, both ways in which the reference counts a question's rotations; units are questions."""
    rows = [Rotated(int(one.item.id), one.item.options, one.item.truth) for one in answered]
    predictions = {row.index: likeliest(one.losses) for row, one in zip(rows, answered, strict=True)}
    strict, usual = circular(rows, predictions), majority(rows, predictions)
    items = {one.item.id: float(predictions[row.index] == row.answer) for row, one in zip(rows, answered, strict=True)}
    of_question = {row.question: one.item.group for row, one in zip(rows, answered, strict=True)}
    groups: dict[str, list[float]] = {}
    for question, right in strict.items():
        if of_question[question]:
            groups.setdefault(of_question[question], []).append(float(right))
    return Scores(
        (
            figure("circular accuracy", [list(map(float, strict.values()))]),
            figure("majority accuracy", [list(map(float, usual.values()))]),
        ),
        items,
        {group: figure("circular accuracy", [values]) for group, values in groups.items()},
    )


def _grounding(answered: Sequence[Answered]) -> Scores:
    """Accuracy with the reference's scale of boxes, beside it with the model's own, and the mean IoU of the former."""
    given: dict[int, list[float]] = {REFERENCE_SCALE: [], MODEL_SCALE: []}
    overlaps, lost = [], []
    for one in answered:
        width, height = one.item.more["width"], one.item.more["height"]
        for scale, right in given.items():
            box = box_of(one.answer, width, height, scale)
            right.append(float(correct(box, one.item.truth)))
            if scale == REFERENCE_SCALE:
                overlap = iou(box, one.item.truth)
                overlaps.append(overlap if overlap >= 0 else 0.0)  # nan has no area
                if not any(box):
                    lost.append(one.item.id)
    items = {one.item.id: right for one, right in zip(answered, given[REFERENCE_SCALE], strict=True)}
    return Scores(
        (
            figure("accuracy", [given[REFERENCE_SCALE]]),
            figure("accuracy, boxes / 1000", [given[MODEL_SCALE]]),
            figure("mean IoU", [overlaps]),
        ),
        items,
        _by_group("accuracy", answered, items),
        _told({"answers without a box": lost}),
    )


def _mme(answered: Sequence[Answered]) -> Scores:
    """The two sums of tasks' scores, 100 x (accuracy + accuracy+) each; then both of all tasks; units are pictures.

    A picture has two questions: accuracy is of questions, accuracy+ of pictures of which both are right. One of whose
    questions has no answer is left out, and listed.
    """
    items = {one.item.id: float(mme_label(one.answer) == one.item.truth.lower()) for one in answered}
    tasks: dict[str, dict[str, list[Answered]]] = {}
    for one in answered:
        tasks.setdefault(one.item.group, {}).setdefault(one.item.more["picture"], []).append(one)
    accuracy: dict[str, list[float]] = {}
    both: dict[str, list[float]] = {}
    half = []
    for task, pictures in tasks.items():
        for asked in pictures.values():
            right = [items[one.item.id] for one in asked]
            if len(asked) == 2:
                accuracy.setdefault(task, []).append(fmean(right))
                both.setdefault(task, []).append(float(all(right)))
            else:
                half += [one.item.id for one in asked]
    scores = {task: [one + two for one, two in zip(accuracy[task], both[task], strict=True)] for task in accuracy}
    figures = [
        figure(name, [scores[task] for task in of_group if task in scores])
        for name, of_group in MME_GROUPS.items()
        if any(task in scores for task in of_group)
    ]
    for name, values in (("accuracy", accuracy), ("accuracy+", both)):
        figures += [figure(name, [[value for of_task in values.values() for value in of_task]])] if values else []
    groups = {
        f"{task}, {name}": figure(name, [values[task]])
        for task in scores
        for name, values in (("score", scores), ("accuracy", accuracy), ("accuracy+", both))
    }
    other = [one.item.id for one in answered if mme_label(one.answer) == "other"]
    odd = {"answers neither yes nor no": other, "answers about pictures with one answer": half}
    return Scores(tuple(figures), items, groups, _told(odd))


def _small(answered: Sequence[Answered]) -> Scores:
    """The small model's own questions: the same text, or every box with an IoU of at least a half, in order."""
    from ..training.recipes.tiny_evaluate import judge

    return scored("accuracy", answered, lambda one: judge(one.item.more["question"], one.answer)[0])


METRICS: dict[str, Metric] = {
    "captions": _captions,
    "vqa": _mean("VQA accuracy", lambda one: vqa_accuracy(one.answer, one.item.truth)),
    "anls": _mean("ANLS", lambda one: anls(one.answer, one.item.truth)),
    "relaxed": _mean(
        "relaxed accuracy", lambda one: any(relaxed_accuracy(one.answer, known) for known in one.item.truth)
    ),
    "exact": _mean("accuracy", lambda one: exact_match(one.answer, one.item.truth)),
    "gqa": _mean("accuracy", lambda one: exact_match(gqa_normalised(one.answer), one.item.truth)),
    "choice": _choice,
    "letter": _letter,
    "circular": _circular,
    "grounding": _grounding,
    "mme": _mme,
    "small": _small,
}


def score(metric: str, answered: Sequence[Answered]) -> Scores:
    """Figures of answers to items whose truth is known. What was not answered is not among them."""
    known: Any = [one for one in answered if one.item.truth is not None]
    return METRICS[metric](known) if known else Scores((), {})
