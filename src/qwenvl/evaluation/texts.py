"""Scores of one answer beside annotations, both texts: how far they agree.

anls                 DocVQA, InfographicVQA: one less the edit distance, as far as half of a text is right
relaxed_accuracy     ChartQA: numbers within five hundredths
exact_match          AI2D, OCR-VQA: the same, but for case and white space around
gqa_normalised       GQA: an answer as `exact_match` is to compare it

All are of the reference's `eval_mm`, quirks included; each function names its own.
"""

from __future__ import annotations

from collections.abc import Sequence

ANLS_THRESHOLD = 0.5
RELAXED = 0.05


def anls(answer: str, annotations: Sequence[str], threshold: float = ANLS_THRESHOLD) -> float:
    """1 - edit distance / length for the annotation that is nearest; 0 if that is below the threshold.

    Compared in lower case, without white space at the ends or doubled inside. Quirks: the length is that of the longer
    text before that, in upper case, so spaces, and letters whose upper case is longer ("ß"), raise the score; the
    threshold itself is kept; two empty texts score 1.
    """
    distances = []
    for annotation in annotations:
        distance = levenshtein(_spaced(annotation), _spaced(answer))
        length = max(len(annotation.upper()), len(answer.upper()))
        distances.append(distance / length if length else 0.0)
    score = 1.0 - min(distances, default=1.0)
    return score if score >= threshold else 0.0


def levenshtein(a: str, b: str) -> int:
    """Characters to insert, drop or change until one text is the other."""
    row = list(range(len(b) + 1))
    for count, letter in enumerate(a, 1):
        before, row[0] = row[0], count
        for at, other in enumerate(b, 1):
            before, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, before + (letter != other))
    return row[-1]


def relaxed_accuracy(answer: str, annotation: str) -> bool:
    """Whether two numbers differ by at most a twentieth, or two texts are the same but for case.

    Quirks: the twentieth is of the model's answer, not of the annotation, since the reference passes them the other way
    round: to 10, 10.5 is right and 10.51 wrong. If the answer is 0, the texts are compared: "0" is not "0.0".
    What is a number is what `float` reads, which a percent sign may follow: "1_000" and full-width digits are, "1,000"
    is not. nan and infinite numbers are never right.
    """
    target, given = _number(answer.strip()), _number(annotation)
    if given is not None and target:
        return abs(given - target) / abs(target) <= RELAXED
    return annotation.lower() == answer.strip().lower()


def exact_match(answer: str, annotations: str | Sequence[str]) -> bool:
    """Whether the answer is one of the annotations, but for case and white space around them."""
    known = [annotations] if isinstance(annotations, str) else annotations
    return any(answer.strip().lower() == annotation.strip().lower() for annotation in known)


def gqa_normalised(answer: str) -> str:
    """What is compared of an answer to GQA's questions.

    In lower case, what stands before the first period, comma and exclamation mark; of that, what stands behind the
    first "is ", "are ", "a ", "an " and "the ", and before " of". Quirk of the reference: it cuts texts, not words, and
    each time keeps the second piece alone. So "banana split" becomes "split", "this is his hat" nothing, "3.5" is "3".
    Annotations are not cleaned.
    """
    text = answer.strip().lower()
    for mark in ".,!":
        text = text.split(mark)[0]
    for word in ("is ", "are ", "a ", "an ", "the "):
        if word in text:
            text = text.split(word)[1]
    return text.split(" of")[0].strip()


def _spaced(text: str) -> str:
    return " ".join(text.strip().lower().split())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
