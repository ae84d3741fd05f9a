"""Conversations in a file, as samples.

    ConversationDataset   the reference's fine-tuning data: a JSON list, or JSON lines

A record is {"id": ..., "conversations": [{"from": "user" or "assistant", "value": text}, ...]} whose texts hold
`<img>path</img>`, `<ref>` and `<box>` as the reference writes them. Every record is checked before training begins, and
all that is wrong is said at once; pictures are only looked for then, and decoded when they are needed, in the workers.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from ..config import QwenVLConfig
from ..errors import ConfigError, ImageError, PromptError
from ..image import URL_SCHEME, ImagePolicy, preprocess
from ..text.parts import parse_tagged, shown
from ..text.prompt import IGNORED_LABEL, TrainingExample, training_example
from ..text.tokenizer import Tokenizer
from .batches import Sample
from .errors import DataError

POLICY = ImagePolicy(allow_urls=False)  # an epoch should not depend on other people's servers
MAX_LENGTH = 2048  # tokens, unless the caller says otherwise; the length of the reference's training
SHOWN, LISTED = 3, 100  # bad records that an error quotes, and that are listed above it


class _BadRecord(Exception):
    """Why a record cannot be trained on."""


class ConversationDataset:
    """Conversations as samples of at most `max_length` tokens; those that are longer are cut, as in the reference.

    By default that is 2048, or the model's positions if it has fewer.
    Relative paths of pictures are relative to `image_root`, by default the file's folder. Bad records are fatal, or,
    with on_error="skip", left out and told; `bad` has a line for each. A picture that turns out to be broken when it is
    decoded is fatal too, or, with "skip", the next record that can be read stands in for it.
    Bad is also a record with nothing of a reply to learn, and one that `max_length` cuts within a picture.
    Raises DataError, ConfigError if `max_length` or the tokenizer does not fit the model.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        config: QwenVLConfig,
        *,
        max_length: int | None = None,
        on_error: Literal["fatal", "skip"] = "fatal",
        image_root: str | Path | None = None,
        quiet: bool = False,
    ) -> None:
        self.path, self.tokenizer, self.config = Path(path), tokenizer, config
        self.max_length = min(MAX_LENGTH, config.max_position_embeddings) if max_length is None else max_length
        self.on_error = on_error
        self.image_root = self.path.parent if image_root is None else Path(image_root)
        self._check_arguments()
        self._records: list[Any] = []
        self._sources: list[str] = []
        self.lengths: list[int] = []
        self._newlines = frozenset(tokenizer.encode("\n"))
        self._broken: set[int] = set()  # records whose pictures could not be decoded, which is told once
        seen = hashlib.sha256()
        bad = []
        records = tqdm(_records(self.path), desc=f"checking {self.path.name}", unit="record", disable=quiet or None)
        for source, record in records:
            try:
                example = self._checked(record)
            except _BadRecord as error:
                bad.append(f"{source}: {error}")
                continue
            self._records.append(record["conversations"])
            self._sources.append(source)
            self.lengths.append(len(example.ids))
            seen.update(repr((example.ids, example.images)).encode(errors="surrogatepass"))
        self.fingerprint = seen.hexdigest()[:16]
        self.bad = tuple(bad)
        self._report(quiet)

    def _check_arguments(self) -> None:
        longest = self.config.max_position_embeddings
        if not 0 < self.max_length <= longest:
            raise ConfigError(f"max_length must be 1 to the model's {longest} positions, not {self.max_length}")
        if self.on_error not in ("fatal", "skip"):
            raise ConfigError(f"on_error must be 'fatal' or 'skip', not {self.on_error!r}")
        ours, theirs = self.tokenizer.image_start_id, self.config.visual.image_start_id
        if ours != theirs:
            raise ConfigError(f"<img> is {ours} to the tokenizer but visual.image_start_id is {theirs}")

    def _report(self, quiet: bool) -> None:
        count = len(self._records) + len(self.bad)
        first = "; ".join(self.bad[:SHOWN]) + ("; ..." if len(self.bad) > SHOWN else "")
        if len(self.bad) > SHOWN and not quiet:
            more = [f"... and {len(self.bad) - LISTED} more"] if len(self.bad) > LISTED else []
            tqdm.write("\n".join([*self.bad[:LISTED], *more]), file=sys.stderr)
        told = f"{self.path}: {len(self.bad)} of {count} records cannot be trained on: {first}"
        if self.bad and self.on_error == "fatal":
            raise DataError(f"{told} (for training, on_error 'skip' leaves them out)", self.bad)
        if not self._records:
            raise DataError(told if self.bad else f"{self.path} has no record", self.bad)
        if self.bad and not quiet:
            tqdm.write(told, file=sys.stderr)

    def __len__(self) -> int:
        """Records that can be trained on."""
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        """A record as ids, labels and pixels [N,3,S,S]. Raises DataError for a broken picture, as the class says."""
        for tries in range(len(self)):
            at = (index + tries) % len(self)
            example = self._example(self._records[at])
            try:
                pixels = [preprocess(self._place(image), self._size, POLICY) for image in example.images]
            except ImageError as error:
                told = f"{self._sources[at]}: {error}"
                if self.on_error == "fatal":
                    raise DataError(f"{told} (for training, on_error 'skip' takes another record)", [told]) from None
                if at not in self._broken:
                    tqdm.write(f"{told}; the next record stands in for it", file=sys.stderr)
                self._broken.add(at)
                continue
            return Sample(example.ids, example.labels, torch.stack(pixels) if pixels else None, self._sources[at])
        raise DataError(f"{self.path}: no record has pictures that can be read")

    @property
    def _size(self) -> int:
        return self.config.visual.image_size

    def _example(self, conversations: Sequence[Any]) -> TrainingExample:
        n_queries = self.config.visual.n_queries
        return training_example(self.tokenizer, conversations, self.max_length, n_queries=n_queries)

    def _place(self, image: str) -> str | Path:
        """What to open: a data URL as it is, a path under the root."""
        return image if image.startswith("data:") else self.image_root / image

    def _checked(self, record: Any) -> TrainingExample:  # noqa: ANN401 - parsed JSON
        """The record's ids and labels. Raises _BadRecord."""
        if isinstance(record, _BadRecord):
            raise record
        if not isinstance(record, dict):
            raise _BadRecord(f"a record is an object with conversations, not {shown(record)}")
        conversations = record.get("conversations")
        if not isinstance(conversations, list):
            raise _BadRecord(f"conversations must be a list of messages, not {shown(conversations)}")
        try:
            example = self._example(conversations)
        except PromptError as error:
            raise _BadRecord(str(error)) from None
        for message in conversations:
            pictures = sum("image" in part for part in parse_tagged(message["value"]))
            if {message["value"].count("<img>"), message["value"].count("</img>")} != {pictures}:
                raise _BadRecord(f"a picture is written <img>path</img>, not as in {shown(message['value'])}")
        if example.cut_image:
            raise _BadRecord(f"max_length {self.max_length} ends within a picture: allow more tokens")
        if not self._has_reply(example):
            raise _BadRecord(
                f"no token of a reply is among its first {self.max_length}: nothing can be learned from it"
            )
        for image in example.images:
            if URL_SCHEME.match(image):
                raise _BadRecord(f"pictures are read from files: download {shown(image)}")
            place = self._place(image)
            if isinstance(place, Path) and not os.path.isfile(place):
                raise _BadRecord(f"there is no picture {shown(str(place))}")
        return example

    def _has_reply(self, example: TrainingExample) -> bool:
        """Whether labels go beyond the frame that every message has: its two tags and the newline."""
        frame = {IGNORED_LABEL, self.tokenizer.im_start_id, self.tokenizer.im_end_id} | self._newlines
        return not frame.issuperset(example.labels)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record of a file with where it stands ("train.jsonl:17") and its id; one that is no JSON is a _BadRecord."""
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if data.lstrip()[:1] == b"[":
        try:
            records = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not valid JSON: {error}") from None
        for number, record in enumerate(records, 1):
            yield f"{path.name} record {number}{_named(record)}", record
        return
    single = _parsed(data)
    if isinstance(single, dict):  # which may be spread over lines
        yield f"{path.name}:1{_named(single)}", single
        return
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            record = _parsed(line)
            yield f"{path.name}:{number}{_named(record)}", record


def _parsed(text: bytes) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return _BadRecord(f"not JSON: {error}")


def _named(record: Any) -> str:  # noqa: ANN401 - parsed JSON
    name = record.get("id") if isinstance(record, dict) else None
    return "" if name is None else f" ({shown(name)})"
