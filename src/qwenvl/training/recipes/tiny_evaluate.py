"""Held-out accuracy of the small model, skill by skill and language by language, with confidence intervals.

questions       the benchmark: single questions about pictures of a split that training never saw
asked           the same for one skill and language, without an end
evaluate        answers them in batches, greedily
Score           right, asked, and (of boxes) the mean IoU
table           Markdown

`qwenvl eval run tiny` asks the same questions, through the engine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ...image import preprocess
from ...pipeline import Pipeline
from ...text.boxes import parse_spans
from ...text.parts import parse_tagged
from ...text.prompt import chatml_prompt, raw_prompt
from .tiny_questions import SKILLS, Exchange, compare, raw_form
from .tiny_scenes import Scene, Split, draw, scene
from .tiny_words import LANGUAGES, Language

BATCH = 32
LONGEST = 192  # tokens of an answer; a caption of five shapes and a word takes some 160
# What each row of the table asks: a skill of the questions, and how: in ChatML or in the base form.
ROWS = (
    "box",
    "box (raw)",
    "boxes",
    "inside",
    "count",
    "colour",
    "shape",
    "exists",
    "relation",
    "text",
    "compare",
    "caption",
)


@dataclass(frozen=True)
class Question:
    """A row of the table that this counts for, the exchange, and its pictures."""

    row: str
    exchange: Exchange
    scenes: tuple[Scene, ...]


@dataclass(frozen=True)
class Score:
    """How many of those asked were right; `overlap` is the mean IoU where boxes were asked for."""

    right: int
    asked: int
    overlap: float | None = None

    @property
    def share(self) -> float:
        """Of 1."""
        return self.right / max(self.asked, 1)

    def interval(self) -> tuple[float, float]:
        """Wilson's 95% confidence interval of the share."""
        n, p, z = max(self.asked, 1), self.share, 1.96
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        reach = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(middle - reach, 0.0), min(middle + reach, 1.0)


def questions(split: Split, each: int, *, rows: Sequence[str] = ROWS, first: int = 0) -> list[Question]:
    """`each` questions for every row and language, each about a picture of its own."""
    found: list[Question] = []
    for row in rows:
        for language in LANGUAGES:
            stream = asked(row, language, split, first)
            found += [next(stream) for _ in range(each)]
    return found


def asked(row: str, language: Language, split: Split, first: int = 0) -> Iterator[Question]:
    """Questions of a row in a language without an end, from scene number `first` of the split on."""
    skill = row.split(" ")[0]
    number = first
    while True:
        scenes = tuple(scene(split.seed(2 * number + k), words=1.0 if skill == "text" else 0.35) for k in range(2))
        number += 1
        rng = random.Random(f"{row} {language.name} {scenes[0].seed}")
        if skill == "compare":
            yield Question(row, compare(rng, scenes[0], scenes[1], language), scenes)
            continue
        exchange = SKILLS["box" if skill == "boxes" else skill](rng, scenes[0], language)
        if exchange is not None and exchange.skill == skill:
            yield Question(row, exchange, scenes[:1])


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if wide <= 0 or high <= 0:
        return 0.0
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return wide * high / (areas[0] + areas[1] - wide * high)


def judge(question: Question, reply: str) -> tuple[bool, float | None]:
    """Whether a reply is right: the same text, or as many boxes as there should be, each with IoU >= 0.5 in order."""
    exchange = question.exchange
    if not exchange.targets and exchange.skill != "caption":
        return reply.strip() == exchange.answer, None
    prefix = f"<ref>{exchange.phrase}</ref><box>" if question.row.endswith("(raw)") else ""
    found = [(*r.points[0], *r.points[1]) for r in parse_spans(prefix + reply)]
    wanted = [(*r.points[0], *r.points[1]) for r in parse_spans(exchange.answer)]
    overlaps = [overlap(a, b) for a, b in zip(found, wanted, strict=False)]
    overlaps += [0.0] * (len(wanted) - len(overlaps))
    right = len(found) == len(wanted) and min(overlaps) >= 0.5
    if exchange.skill == "caption":
        right = right and _phrases(reply) == _phrases(exchange.answer)
    return right, sum(overlaps) / len(overlaps)


def _phrases(reply: str) -> list[str | None]:
    return [region.label for region in parse_spans(reply)]


def evaluate(vl: Pipeline, asked: Sequence[Question], *, quiet: bool = False) -> dict[tuple[str, str], Score]:
    """Scores by row and language."""
    judged: dict[tuple[str, str], list[tuple[bool, float | None]]] = {}
    order = sorted(asked, key=lambda q: (q.row, q.exchange.language.name))
    batches = [order[k : k + BATCH] for k in range(0, len(order), BATCH)]
    for batch in tqdm(batches, desc="evaluating", disable=quiet or None):
        for question, reply in zip(batch, answers(vl, batch), strict=True):
            key = question.row, question.exchange.language.name
            judged.setdefault(key, []).append(judge(question, reply))
    return {key: _score(results) for key, results in judged.items()}


def _score(results: Iterable[tuple[bool, float | None]]) -> Score:
    rights, overlaps = zip(*results, strict=True)
    measured = [o for o in overlaps if o is not None]
    return Score(sum(rights), len(rights), sum(measured) / len(measured) if measured else None)


def answers(vl: Pipeline, batch: Sequence[Question]) -> list[str]:
    """Greedy replies to several questions at once."""
    assert vl.tokenizer is not None
    tokenizer, n_queries = vl.tokenizer, vl.config.visual.n_queries
    prompts: list[list[int]] = []
    for question in batch:
        pictures = [{"image": k} for k in range(len(question.scenes))]
        if question.row.endswith("(raw)"):
            text = parse_tagged(raw_form(question.exchange)[0])
            prompts.append(raw_prompt(tokenizer, [*pictures, *text], n_queries=n_queries, numbered=False).ids)
        else:
            query = [*pictures, *parse_tagged(question.exchange.question)]
            prompts.append(chatml_prompt(tokenizer, query, n_queries=n_queries).ids)
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.eos_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    pixels = torch.stack([preprocess(draw(s), vl.config.visual.image_size) for q in batch for s in q.scenes])
    stops = (tokenizer.im_end_id, tokenizer.eos_id)
    replies = vl.generate_ids(ids, pixels, mask, max_new_tokens=LONGEST, do_sample=False, stop_ids=stops)
    return [tokenizer.decode([i for i in reply if i not in stops]) for reply in replies]


def table(scores: Mapping[tuple[str, str], Score]) -> str:
    """A Markdown table: a row of each skill, a column of each language."""
    lines = ["| | " + " | ".join(language.name for language in LANGUAGES) + " |", "|---|" + "---|" * len(LANGUAGES)]
    for row in dict.fromkeys(row for row, _ in scores):
        cells = []
        for language in LANGUAGES:
            score = scores[row, language.name]
            low, high = score.interval()
            iou = "" if score.overlap is None else f", IoU {score.overlap:.2f}"
            cells.append(f"{100 * score.share:.1f}% ({100 * low:.1f} to {100 * high:.1f}){iou}")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(vl: Pipeline, each: int, *, split: Split = Split.TEST, quiet: bool = False) -> dict[str, Any]:
    """The whole benchmark as a dict for JSON: by row and language right, asked, share, its 95% interval, mean IoU."""
    scores = evaluate(vl, questions(split, each), quiet=quiet)
    found: dict[str, Any] = {}
    for (row, language), score in scores.items():
        low, high = score.interval()
        own = {"right": score.right, "asked": score.asked, "share": score.share, "interval": [low, high]}
        found.setdefault(row, {})[language] = own | ({} if score.overlap is None else {"iou": score.overlap})
    return {"split": split.name.lower(), "each": each, "scores": found, "table": table(scores)}
