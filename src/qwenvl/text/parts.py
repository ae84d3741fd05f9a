"""A query as parts, a conversation as turns: checked, copied, JSON-serialisable.

    parts_of        a query, checked, as parts
    Turn            a query and its reply
    parse_tagged    a trusted text in the reference's notation, as parts

A query is a str or a list of parts, each one of
    {"image": source}                           a picture; the source is not opened here
    {"text": str}                               text, taken as data: no tag in it is ever special
    {"ref": str}                                a phrase
    {"box": box or boxes}, {"quad": ...}        places on the 0..1000 scale: [x1, y1, x2, y2], or four corners flat
    {"ref": str, "box": ...}, {"ref": str, "quad": ...}
    {"ref": str, "box": None}, {"box": None}    last part only: ends in an open `<box>`, for the model to go on
`parse_tagged` marks its parts: {"image": ..., "numbered": False} has no `Picture k:` before it, and in
{"text": ..., "tagged": True} stray tags, `<img>` excepted, become special ids as the reference makes them.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import PromptError
from .boxes import SCALE, points_text
from .tokenizer import IMAGE_TAGS

Part: TypeAlias = dict[str, Any]
Query: TypeAlias = "str | Sequence[Mapping[str, Any]]"

CORNERS = {"box": 4, "quad": 8}  # coordinates that one place takes

_PART_KEYS = ("image", "text", "ref", "box", "quad")
_MARKS = {"image": "numbered", "text": "tagged"}  # part -> the key with which parse_tagged says how to render it


def _whole(number: Any) -> int | None:  # noqa: ANN401 - a user's part
    """An int, a NumPy integer, or a float without a fraction, as an int."""
    if isinstance(number, float) and number.is_integer():
        return int(number)
    try:
        return None if isinstance(number, bool) else operator.index(number)
    except TypeError:
        return None


def _is_list(value: Any) -> bool:  # noqa: ANN401 - a user's part
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def shown(value: Any) -> str:  # noqa: ANN401 - a user's part
    """The beginning of a value, for a message of one line."""
    return " ".join(repr(value).split())[:80]


def _places(value: Any, kind: str, where: str) -> list[list[int]]:  # noqa: ANN401 - a user's part
    """One place or several, checked, as a list of lists of ints."""
    size = CORNERS[kind]
    places = []
    for place in value if _is_list(value) and value and _is_list(value[0]) else [value]:
        numbers = [n for n in map(_whole, place) if n is not None] if _is_list(place) else []
        if not len(numbers) == size == len(place):
            raise PromptError(f"{where}: a {kind} is {size} whole numbers on the 0..{SCALE} scale, not {shown(place)}")
        if not all(0 <= number <= SCALE for number in numbers):
            raise PromptError(f"{where}: {kind} {numbers} is off the 0..{SCALE} scale; to_thousandths converts pixels")
        places.append(numbers)
    return places


def _checked_part(part: Any, where: str) -> Part:  # noqa: ANN401 - a user's part
    """A copy of a part with its values checked. Raises PromptError beginning with `where`."""
    if not isinstance(part, Mapping):
        raise PromptError(f"{where} is a {type(part).__name__}, not a dict such as {{'text': '...'}}")
    kinds = [key for key in _PART_KEYS if key in part]
    if len(kinds) != 1 and kinds not in (["ref", "box"], ["ref", "quad"]):
        raise PromptError(
            f"{where} must have one of {', '.join(_PART_KEYS)} (ref may have a box or a quad), not {shown(list(part))}"
        )
    mark = _MARKS.get(kinds[0])
    if unknown := [key for key in part if key not in kinds and key != mark]:
        raise PromptError(f"{where} has a key that a part with {kinds[0]} cannot have: {shown(unknown[0])}")
    checked = dict(part)
    if "image" in part and part["image"] is None:
        raise PromptError(f"{where}: image is None")
    for key in {"text", "ref"} & part.keys():
        if not isinstance(part[key], str):
            raise PromptError(f"{where}: {key} must be a str, not {type(part[key]).__name__}")
    if mark in part and not isinstance(part[mark], bool):
        raise PromptError(f"{where}: {mark} must be True or False, not {shown(part[mark])}")
    for key in CORNERS.keys() & part.keys():
        if not (key == "box" and part[key] is None):
            checked[key] = _places(part[key], key, where)
    return checked


def parts_of(query: Query, numbered: bool = True) -> tuple[Part, ...]:
    """A query's parts, checked and copied; with `numbered=False` each picture that does not say otherwise is bare.

    Raises PromptError, with the part's number, on anything that is no part, and on an empty query.
    """
    if isinstance(query, str):
        query = [{"text": query}]
    if not isinstance(query, Sequence):
        raise PromptError(f"a query is a str or a list of parts, not a {type(query).__name__}")
    parts = tuple(_checked_part(part, f"part {number}") for number, part in enumerate(query, 1))
    if not any(part.get("text") != "" for part in parts):
        raise PromptError("the prompt is empty: give it a text or an image")
    for number, part in enumerate(parts[:-1], 1):
        if part.get("box", ()) is None:
            raise PromptError(f"part {number}: only the last part can leave its box open (None)")
    if not numbered:
        for part in parts:
            if "image" in part:
                part.setdefault("numbered", False)
    return parts


@dataclass(frozen=True)
class Turn:
    """A question, as parts whose images are str references (path, URL, key of a store), and its reply, if any.

    Raises PromptError as `parts_of` does, and for a picture that is not a str.
    """

    parts: Sequence[Part]
    reply: str | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", parts_of(self.parts))
        for number, part in enumerate(self.parts, 1):
            if not isinstance(part.get("image", ""), str):
                raise PromptError(f"part {number}: a turn keeps a str that refers to its picture, not the picture")
        if not (self.reply is None or isinstance(self.reply, str)):
            raise PromptError(f"a turn's reply must be a str or None, not a {type(self.reply).__name__}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `from_dict` reads back."""
        return {"parts": [dict(part) for part in self.parts], "reply": self.reply}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Turn:
        """Build from parsed JSON. Raises PromptError."""
        if not (isinstance(data, Mapping) and data.keys() == {"parts", "reply"}):
            raise PromptError(f"a turn is an object with parts and reply, not {shown(data)}")
        return cls(data["parts"], data["reply"])


# Tagged text

_TAG = re.compile(f"({'|'.join(IMAGE_TAGS)})")
_PLACE = re.compile(r"\((0|[1-9][0-9]{0,3}),(0|[1-9][0-9]{0,3})\)")


def _exact_place(text: str, kind: str) -> list[int] | None:
    """The coordinates in a tag's body, if it is written exactly as a part renders."""
    numbers = [int(n) for point in _PLACE.findall(text) for n in point]
    fits = len(numbers) == CORNERS[kind] and max(numbers) <= SCALE and points_text(numbers) == text
    return numbers if fits else None


def _read_places(pieces: Sequence[str], at: int) -> tuple[Part, int]:
    """Places that touch each other, the first at the tag `pieces[at]`: a part, or an empty one, and the text after."""
    kind = pieces[at][1:-1] if at < len(pieces) else ""
    places: list[list[int]] = []
    end = at
    while kind in CORNERS and pieces[end : end + 3 : 2] == [f"<{kind}>", f"</{kind}>"]:
        if (place := _exact_place(pieces[end + 1], kind)) is None:
            break
        places.append(place)
        if pieces[end + 3] != "":
            return {kind: places}, end + 3
        end += 4
    if places:
        return {kind: places}, end - 1
    if kind == "box" and at + 2 == len(pieces) and pieces[at + 1] == "":
        return {"box": None}, at + 1
    return {}, at + 1


def _read_part(pieces: Sequence[str], at: int) -> tuple[Part, int]:
    """The part that begins with the tag `pieces[at]`, or an empty one, and where the text after it is."""
    closed = pieces[at + 2 : at + 3] == [pieces[at].replace("<", "</")]
    if pieces[at] == "<img>" and closed and pieces[at + 1]:
        return {"image": pieces[at + 1], "numbered": False}, at + 3
    if pieces[at] == "<ref>" and closed:
        part: Part = {"ref": pieces[at + 1]}
        if pieces[at + 3] == "":
            places, end = _read_places(pieces, at + 4)
            if places:
                return part | places, end
        return part, at + 3
    return _read_places(pieces, at)


def parse_tagged(text: str) -> list[Part]:
    """Parts of a trusted text in the reference's notation, which render exactly as it is written. Never raises.

    `<img>path</img>` becomes an image part without `Picture k:`, `<ref>`, `<box>` and `<quad>` the parts of these
    names; text between stays as it is. A tag that is not closed, or whose inside is not as a part would be written,
    stays text too; its tag still becomes a special id, but for a lone `<img>`, which is plain characters.
    Not for text that a stranger wrote: it says which files are read.
    """
    pieces = _TAG.split(text)  # text, tag, text, tag, ..., text
    parts: list[Part] = []
    plain = [pieces[0]]

    def flush() -> None:
        if joined := "".join(plain):
            parts.append({"text": joined, "tagged": True} if _TAG.search(joined) else {"text": joined})
        plain.clear()

    at = 1
    while at < len(pieces):
        part, end = _read_part(pieces, at)
        if part:
            flush()
            parts.append(part)
        else:
            plain.append(pieces[at])
        plain.append(pieces[end])
        at = end + 1
    flush()
    return parts
