"""TouchStone's scores, from what a judge said.

touchstone_scores   of our answers and the reference answers, whole and by category
figures             the same as a benchmark's figures
TouchstoneScores    what that gives
Means               both scores, over some rounds
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from .items import Item
from .judge import ORDERS, Verdict
from .scoring import Scores, figure, moved

SCALE = 100.0
NOT_ASKED = "not asked"
UNREAD = "rounds without a verdict"


@dataclass(frozen=True)
class Means:
    """Scores from 100 to 1000, over the `rounds` that could be read; None where none could."""

    answer: float | None
    reference: float | None
    rounds: int


@dataclass(frozen=True)
class TouchstoneScores:
    """Scores over all rounds that could be read, and what could not.

    Attributes:
        overall: of all items.
        groups: by category; an item with several counts in each.
        unread: the items of the rounds that do not count, by the kind of failure; one is named for each of its rounds.
        half: items that count with one round only, so that the judge's favour for what it reads first stays in them.
    """

    overall: Means
    groups: Mapping[str, Means]
    unread: Mapping[str, tuple[str, ...]]
    half: tuple[str, ...]


def touchstone_scores(items: Sequence[Item], verdicts: Iterable[Verdict]) -> TouchstoneScores:
    """100 times the mean of the judge's scores over all rounds, as in the reference: those unread are left out.

    Of several verdicts of a round the last counts, and those of other items do not. An item's categories are its
    `group`, with commas between them.
    """
    latest = {verdict.round: verdict for verdict in verdicts}
    read: list[tuple[float, float]] = []
    groups: dict[str, list[tuple[float, float]]] = {}
    unread: dict[str, list[str]] = {}
    half = []
    for item in items:
        scores = []
        for order in ORDERS:
            verdict = latest.get((item.id, order))
            if verdict and verdict.scores:
                scores.append(verdict.scores)
            else:
                unread.setdefault((verdict and verdict.wrong) or NOT_ASKED, []).append(item.id)
        if len(scores) == 1:
            half.append(item.id)
        read += scores
        for name in _categories(item):
            groups.setdefault(name, []).extend(scores)
    return TouchstoneScores(
        _means(read),
        {name: _means(scores) for name, scores in groups.items()},
        {kind: tuple(ids) for kind, ids in unread.items()},
        tuple(half),
    )


def figures(items: Sequence[Item], verdicts: Sequence[Verdict]) -> Scores:
    """The score of our answers, then that of the reference answers; units are items, with one round or two.

    An item's own score is from 1 to 10. What was not read is told by its kind, and is no part of a figure.
    """
    found = touchstone_scores(items, verdicts)
    rounds: dict[str, list[tuple[float, float]]] = {}
    for verdict in {verdict.round: verdict for verdict in verdicts}.values():
        if verdict.scores:
            rounds.setdefault(verdict.id, []).append(verdict.scores)
    ours = {item.id: fmean(own for own, _ in rounds[item.id]) for item in items if item.id in rounds}
    others = {name: fmean(other for _, other in rounds[name]) for name in ours}
    odd = {f"{UNREAD} ({kind})": ids for kind, ids in found.unread.items()}
    if found.half:
        odd["answers judged in one order only"] = found.half
    if found.overall.answer is None or found.overall.reference is None:
        return Scores((), {}, odd=odd)
    groups: dict[str, list[float]] = {}
    for item in items:
        for name in _categories(item) if item.id in ours else ():
            groups.setdefault(name, []).append(ours[item.id])
    return Scores(
        (
            moved(figure("score", [list(ours.values())], SCALE), found.overall.answer),
            moved(figure("score of the reference answers", [list(others.values())], SCALE), found.overall.reference),
        ),
        ours,
        {
            name: moved(figure("score", [values], SCALE), found.groups[name].answer or 0.0)
            for name, values in groups.items()
        },
        odd,
    )


def _categories(item: Item) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in item.group.split(",") if part.strip()))


def _means(scores: Sequence[tuple[float, float]]) -> Means:
    if not scores:
        return Means(None, None, 0)
    ours, others = zip(*scores, strict=True)
    return Means(SCALE * fmean(ours), SCALE * fmean(others), len(scores))
