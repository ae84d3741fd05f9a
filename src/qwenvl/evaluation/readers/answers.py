"""What readers of questions share: answers as metrics take them, and annotations that lie in a file of their own.

texts_of     right answers, any of which will do
people_of    the answers of several people
commonest    what most of them say
by_id        entries of annotations, by what they are about
annotation   the one of a question
picture      the first of several names that is there
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...text.parts import shown
from ..items import Places, Problem
from .files import Entry, Malformed, Unanswered, list_of, text_of

Annotations = Mapping[str, list[Mapping[str, Any]]]


def texts_of(entry: Mapping[str, Any], key: str) -> list[str]:
    """A text, or a list of them. Raises Unanswered where there is none, and Malformed."""
    value = entry.get(key)
    if value is None or value == []:
        raise Unanswered(f"it has no {key}")
    return [text_of({key: one}, key) for one in (value if isinstance(value, list) else [value])]


def people_of(entry: Mapping[str, Any], *, numbered: bool = False) -> list[dict[str, Any]]:
    """The `answers` of people as the VQA metric takes them. Raises Unanswered and Malformed.

    The metric knows people apart by their `answer_id`. `numbered` gives them one, in files whose form has none.
    """
    if entry.get("answers") in (None, []):
        raise Unanswered("it has no answers")
    people = []
    for number, given in enumerate(list_of(entry, "answers"), 1):
        if not isinstance(given, dict):
            given = {"answer": given}
        person: dict[str, Any] = {"answer": text_of(given, "answer")}
        if numbered or "answer_id" in given:
            person["answer_id"] = number if numbered else given["answer_id"]
        people.append(person)
    return people


def commonest(people: Sequence[Mapping[str, Any]]) -> str:
    """The answer that most people give; of several, the one that is given first."""
    answer: str = Counter(person["answer"] for person in people).most_common(1)[0][0]
    return answer


def by_id(found: Iterable[Entry], key: str) -> tuple[Annotations, list[Problem]]:
    """Entries by the id that they have under `key`, and a Problem for each that has none."""
    known: dict[str, list[Mapping[str, Any]]] = {}
    problems = []
    for where, entry in found:
        try:
            if not isinstance(entry, dict):
                raise Malformed(f"an annotation is an object, not {shown(entry)}")
            known.setdefault(text_of(entry, key), []).append(entry)
        except Malformed as error:
            problems.append(Problem("malformed", where, str(error)))
    return known, problems


def annotation(known: Annotations, name: str) -> Mapping[str, Any]:
    """The annotation of a question; the last, if it has several, as in the official code. Raises Unanswered."""
    if name not in known:
        raise Unanswered("the annotations do not have this question")
    return known[name][-1]


def picture(places: Places, names: Sequence[str], folders: Sequence[str] = ()) -> Path:
    """The first of the names that is there; or where the first of them should be, if none is."""
    found = [places.picture(name, folders) for name in names]
    return next((path for path in found if os.path.isfile(path)), found[0])
