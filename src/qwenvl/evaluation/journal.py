"""Answers on the disk as they come: what a run that was stopped goes on from.

Journal     a folder of answers, a file for each process that writes
json_bytes  JSON as it is written here
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..errors import QwenVLError
from ..files import whole_file
from .answering import Answer
from .items import DataError

SETTINGS, ANSWERS = "run.json", "answers-*.jsonl"
CHANGEABLE = {"data", "skip"}  # the data may move, and a run that stopped at a broken picture may go on without it


class Journal:
    """The answers of one run over one benchmark, in a folder.

    A line is an answer. A process that was killed may leave half a line at a file's end: it is no answer, and is cut
    off before more is written. Raises DataError for lines that are neither.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, settings: dict[str, Any]) -> None:
        """Make the folder, or find that it holds answers of the same run. Raises DataError if they may be another's."""
        path = self.folder / SETTINGS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._compare(self.settings(), settings)
            elif any(self.folder.glob(ANSWERS)):
                raise DataError(
                    f"{self.folder} has answers, and no {SETTINGS} that says of which run: choose another --out, or "
                    "remove that folder"
                )
            with whole_file(path) as file:
                file.write(json_bytes(settings, indent=2))
        except OSError as error:
            raise DataError(f"cannot write to {self.folder}: {error.strerror}") from None

    def settings(self) -> dict[str, Any]:
        """Of the run. Raises DataError where there is none."""
        path = self.folder / SETTINGS
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError):
            raise DataError(f"{self.folder} has no run: {SETTINGS} is missing or damaged") from None
        return found if isinstance(found, dict) else {}

    def _compare(self, before: dict[str, Any], settings: dict[str, Any]) -> None:
        now = json.loads(json.dumps(settings))
        keys = sorted((now.keys() | before.keys()) - CHANGEABLE)
        if different := [key for key in keys if now.get(key) != before.get(key)]:
            key = different[0]
            raise DataError(
                f"{self.folder} has answers of another run ({key}: {before.get(key)!r}, now {now.get(key)!r}): choose "
                "another --out, or remove that folder"
            )

    def answers(self) -> dict[str, Answer]:
        """What has come so far, by id: the answer, or the error of an item that has none."""
        found: dict[str, Answer] = {}
        for path in sorted(self.folder.glob(ANSWERS)):
            for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
                try:
                    answer = Answer.from_dict(json.loads(line))
                except (ValueError, TypeError, AttributeError):
                    raise DataError(f"{path}:{number} is no answer; remove that line, and it is asked again") from None
                if answer.id not in found or not answer.error:
                    found[answer.id] = answer
        return found

    @contextmanager
    def appending(self, rank: int) -> Iterator[Writer]:
        """A writer of a process's own file. Raises DataError if it cannot be written."""
        path = self.folder / f"answers-{rank}.jsonl"
        try:
            with open(path, "a+b") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
                yield Writer(file)
        except QwenVLError:
            raise
        except OSError as error:
            raise DataError(f"cannot write to {path}: {error.strerror}") from None


def json_bytes(value: Any, indent: int | None = None) -> bytes:  # noqa: ANN401 - JSON
    """JSON and a line's end. Half a surrogate pair, which UTF-8 has no bytes for, becomes JSON's own escape."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


class Writer:
    """Appends answers, each whole before the next is computed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def add(self, answer: Answer) -> None:
        """Write one answer through to the system: it outlives this process."""
        self._file.write(json_bytes(answer.to_dict()))
        self._file.flush()
