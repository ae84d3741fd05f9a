"""Questions with few possible answers: MME's yes and no, and options of which the likeliest counts.

mme_label, mme_score, MME_GROUPS    MME: accuracy and accuracy+, by picture
likeliest                           ScienceQA, SEED-Bench, MMBench: the option of the least loss
circular, majority                  MMBench: a question in several rotations of its options

As the reference's `eval_mm`, quirks included; each function names its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import PromptError

MME_GROUPS = {
    "Perception": (
        *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork"),
        "OCR",
    ),
    "Cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}
ROTATION = 1_000_000  # MMBench's index is rotation * this + question


def mme_label(answer: str) -> str:
    """Whether an answer is "yes", "no" or "other", which is always wrong.

    Quirk: it is what the first four characters of the answer's line hold, in lower case, its line end among them:
    "know" is no, "eyes" is yes, and two spaces before "yes" make it other.
    """
    begun = f"{answer.lower()}\n"[:4]
    return "yes" if "yes" in begun else "no" if "no" in begun else "other"


def mme_score(rows: Sequence[tuple[str, str]]) -> float:
    """A task's score, from 0 to 200: 100 x (accuracy + accuracy+), from (truth, answer), two in a row for each picture.

    Accuracy is of questions, accuracy+ of pictures of which both are right. Raises PromptError for a picture without
    its second question.
    """
    if not rows or len(rows) % 2:
        raise PromptError(f"MME asks two questions about each picture, but there are {len(rows)} answers")
    right = [mme_label(answer) == truth.lower() for truth, answer in rows]
    both = [one and other for one, other in zip(right[::2], right[1::2], strict=True)]
    return 100 * (sum(right) / len(right) + sum(both) / len(both))


def likeliest(losses: Sequence[float]) -> int:
    """Which option has the least loss, the mean over its tokens; the first of equal ones.

    Raises PromptError where there are none, or one is no number.
    """
    if not losses or any(map(math.isnan, losses)):
        raise PromptError(f"options need a loss each, not {list(losses)!r}")
    return min(range(len(losses)), key=losses.__getitem__)


@dataclass(frozen=True)
class Rotated:
    """One of MMBench's rows: the options in the order in which they were shown, and which is right."""

    index: int
    options: tuple[str, ...]
    answer: int

    @property
    def question(self) -> int:
        """Of which this is a rotation."""
        return self.index % ROTATION


def circular(rows: Sequence[Rotated], predictions: Mapping[int, int]) -> dict[int, bool]:
    """By question, whether each rotation of it was answered rightly. Quirk: one without a prediction is passed over."""
    right: dict[int, bool] = {row.question: True for row in rows}
    for row in rows:
        if row.index in predictions and predictions[row.index] != row.answer:
            right[row.question] = False
    return right


def majority(rows: Sequence[Rotated], predictions: Mapping[int, int]) -> dict[int, bool]:
    """By question, whether the option that most of its rotations chose, by its text, is the right one.

    The submission of the reference is of this kind, which gives more than `circular`. Where texts were chosen equally
    often it draws one; here it is the one that was chosen first, so that a score can be had again.
    """
    chosen: dict[int, list[str]] = {}
    truth: dict[int, str] = {}
    for row in rows:
        truth.setdefault(row.question, row.options[row.answer])
        if row.index in predictions:
            chosen.setdefault(row.question, []).append(row.options[predictions[row.index]])
    return {
        question: bool(chosen.get(question)) and Counter(chosen[question]).most_common(1)[0][0] == text
        for question, text in truth.items()
    }
