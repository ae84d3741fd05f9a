"""VQA accuracy, of VQAv2, OK-VQA, TextVQA and VizWiz: an answer is right as far as three of ten people gave it.

vqa_accuracy     of one answer beside those of the people
normalised       an answer as it is compared
without_marks    the part of that which people's answers go through, too

As the evaluation code of visualqa.org, in the form that Qwen-VL's `eval_mm/vqa_eval.py` has it, quirks included:

- People's answers lose their punctuation, and only where they are not all the same; they are not lower-cased, nor are
  their numbers written as digits. So the answer "one" becomes "1", and never agrees with people who wrote "one".
- Of periods, 32 are dropped at most, unless a digit follows.
- A mark is dropped if anywhere in the text it touches a space, or if a comma stands between digits; else it becomes a
  space.
- "The other people" are those whose entry differs: where entries have no `answer_id`, equal answers are all left out.
- Of contractions, those with a capital never apply, since the answer is lower-cased before; "somebody'd" becomes
  "somebodyd".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

PEOPLE = 3  # who agree make an answer wholly right
PERIODS = 32  # the value of `re.UNICODE`, which stands where the official code means flags, and `sub` takes a count
MARKS = ';/[]"{}()=+\\_-><@`,?!'
PERIOD, COMMA = re.compile(r"\.(?!\d)"), re.compile(r"\d,\d")
ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
# fmt: off
CONTRACTED = (
    "ain't", "aren't", "can't", "could've", "couldn't", "couldn't've", "didn't", "doesn't", "don't", "hadn't",
    "hadn't've", "hasn't", "haven't", "he'd", "he'd've", "he's", "how'd", "how'll", "how's", "isn't", "it'd",
    "it'd've", "it'll", "ma'am", "mightn't", "mightn't've", "might've", "mustn't", "must've", "needn't", "not've",
    "o'clock", "oughtn't", "'ow's'at", "shan't", "she'd've", "should've", "shouldn't", "shouldn't've",
    "somebody'd've", "somebody'll", "somebody's", "someone'd", "someone'd've", "someone'll", "someone's",
    "something'd", "something'd've", "something'll", "that's", "there'd", "there'd've", "there're", "there's",
    "they'd", "they'd've", "they'll", "they're", "they've", "'twas", "wasn't", "we'd've", "we've", "weren't",
    "what'll", "what're", "what's", "what've", "when's", "where'd", "where's", "where've", "who'd", "who'd've",
    "who'll", "who's", "who've", "why'll", "why're", "why's", "won't", "would've", "wouldn't", "wouldn't've", "y'all",
    "y'all'll", "y'all'd've", "you'd", "you'd've", "you'll", "you're", "you've",
)
# fmt: on
# What lacks one apostrophe, to what has them all.
CONTRACTIONS = {
    form[:at] + form[at + 1 :]: form for form in CONTRACTED for at, letter in enumerate(form) if letter == "'"
} | {"somebody'd": "somebodyd"}


def vqa_accuracy(answer: str, people: Sequence[Mapping[str, Any]]) -> float:
    """From 0 to 1: for each of the people, a third for each other one who gave the answer, up to 1; the mean of that.

    `people` are a question's `answers` of the annotation file, with an `answer` each. Nobody's answers make 0.
    """
    given = normalised(answer)
    entries = [dict(entry) for entry in people]
    if len({entry["answer"] for entry in entries}) > 1:
        for entry in entries:
            entry["answer"] = without_marks(entry["answer"])
    agreeing = [sum(other["answer"] == given for other in entries if other != entry) for entry in entries]
    return sum(min(count / PEOPLE, 1.0) for count in agreeing) / len(entries) if entries else 0.0


def normalised(answer: str) -> str:
    """One line, without marks and articles, in lower case, numbers to ten as digits, apostrophes put right."""
    words = without_marks(answer.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    kept = [word for word in (NUMBERS.get(word, word) for word in words) if word not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word, word) for word in kept)


def without_marks(text: str) -> str:
    """Marks dropped or made spaces, periods dropped (see above)."""
    out, commas = text, COMMA.search(text) is not None
    for mark in MARKS:
        alone = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if alone or commas else " ")
    return PERIOD.sub("", out, count=PERIODS)
