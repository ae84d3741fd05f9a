"""Files of annotations, entry by entry; what is wrong with one entry does not end the others.

records     of JSON lines
entries     of a list within a JSON document
members     of a list within one that was read already
rows        of a table with tabs or commas, as dicts of texts
document    a whole JSON document
content     a file, as it is
each        entries made into items; those that cannot be are Problems
text_of, number_of, list_of, base64_of     a field of an entry, of its type
Malformed   why an entry is no item
Unanswered, BrokenPicture   that is because nobody says what its answer is, or because of its picture
"""

from __future__ import annotations

import base64
import codecs
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ...text.parts import shown
from ..items import DataError, Item, Kind, Problem

Entry: TypeAlias = "tuple[str, Any]"  # where it stands, and what it is: a Malformed, if that is not known
LARGEST = sys.float_info.max  # of whole numbers, JSON has larger ones
LARGEST_FIELD = 1 << 28  # bytes of a table's field: pictures are in them, as base64


class Malformed(Exception):
    """Why an entry cannot be read."""

    kind: Kind = "malformed"


class Unanswered(Malformed):
    """That an entry cannot be scored: it has no annotation."""

    kind: Kind = "no answer"


class BrokenPicture(Malformed):
    """Why its picture cannot be."""

    kind: Kind = "broken picture"


def records(path: Path) -> Iterator[Entry]:
    """Each line of JSON that is not blank, with its place ("val.jsonl:17"). Raises DataError."""
    for number, line in enumerate(content(path).split(b"\n"), 1):
        if line.strip():
            yield f"{path.name}:{number}", _parsed(line)


def entries(path: Path, key: str | None = None) -> Iterator[Entry]:
    """Each member of the list that a JSON file is, or has under `key`. Raises DataError."""
    yield from members(path, document(path), key)


def members(path: Path, found: Any, key: str | None = None) -> Iterator[Entry]:  # noqa: ANN401 - JSON
    """Each member of the list that the document `found` of a file is, or has under `key`. Raises DataError."""
    if key is not None:
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, list):
        raise DataError(f"{path} should {'be a list' if key is None else f'have a list {key!r}'}")
    for number, entry in enumerate(found, 1):
        yield f"{path.name} {key or 'entry'} {number}", entry


def rows(path: Path, delimiter: str = "\t") -> Iterator[Entry]:
    """Each row of a table whose first line names its columns, one at a time: pictures are in them. Raises DataError."""
    csv.field_size_limit(LARGEST_FIELD)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, delimiter=delimiter)
            for row in table:
                where = f"{path.name}:{table.line_num}"
                whole = None not in row and None not in row.values()
                yield where, row if whole else Malformed("it has more or fewer columns than the first line")
    except OSError as error:
        raise _unreadable(path, error) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a table in UTF-8: {error}") from None


def document(path: Path) -> Any:  # noqa: ANN401 - JSON
    """A JSON file. Raises DataError."""
    found = _parsed(content(path))
    if isinstance(found, Malformed):
        raise DataError(f"{path} is {found}")
    return found


def content(path: Path) -> bytes:
    """A file's bytes, without a byte order mark. Raises DataError."""
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise _unreadable(path, error) from None


def each(found: Iterable[Entry], make: Callable[[str, Mapping[str, Any]], Item]) -> Iterator[Item | Problem]:
    """What `make` makes of each entry, given its place; a Problem where it raises Malformed."""
    for where, entry in found:
        try:
            if isinstance(entry, Malformed):
                raise entry
            if not isinstance(entry, dict):
                raise Malformed(f"an entry is an object, not {shown(entry)}")
            yield make(where, entry)
        except Malformed as error:
            name = entry.get("question_id", entry.get("id")) if isinstance(entry, dict) else None
            yield Problem(error.kind, where if name is None else f"{where} ({shown(name)})", str(error))


def text_of(entry: Mapping[str, Any], key: str) -> str:
    """A text; a number is written out. Raises Malformed."""
    value = entry.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise Malformed(f"{key} should be a text, not {shown(value)}" if key in entry else f"it has no {key}")
    return value


def number_of(entry: Mapping[str, Any], key: str) -> float:
    """A finite number. Raises Malformed."""
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -LARGEST <= value <= LARGEST:
        raise Malformed(f"{key} should be a number, not {shown(value)}" if key in entry else f"it has no {key}")
    return float(value)


def list_of(entry: Mapping[str, Any], key: str) -> list[Any]:
    """A list that is not empty. Raises Malformed."""
    value = entry.get(key)
    if not isinstance(value, list) or not value:
        raise Malformed(f"{key} should be a list, not {shown(value)}" if key in entry else f"it has no {key}")
    return value


def base64_of(entry: Mapping[str, Any], key: str) -> bytes:
    """What a text in base64 stands for, such as a picture's file. Raises Malformed."""
    try:
        decoded = base64.b64decode("".join(text_of(entry, key).split()), validate=True)
    except ValueError:
        decoded = b""
    if not decoded:
        raise Malformed(f"{key} should be base64, not {shown(entry[key])}")
    return decoded


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot read {path}: {error.strerror}")


def _parsed(text: bytes) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return Malformed(f"not JSON: {error}")
