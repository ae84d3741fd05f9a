"""A question to an engine, and its answer on the way to whoever waits on an event loop.

Question   a prompt and how it is to be answered
Answer     what comes of it: iterate over it for its deltas
Delta      the text that some new ids have made certain
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from ..errors import QwenVLError
from ..generation.engine import Engine
from ..generation.request import Request
from ..generation.sampling import SamplingOptions
from ..pictures import PictureStore
from ..text.prompt import Prompt
from ..text.stream import ReplyStream
from ..text.tokenizer import Tokenizer
from .refusals import Refused, stopping, too_late

Cut = Literal["late", "stopped"]


@dataclass(frozen=True)
class Question:
    """A prompt, with the pictures that it names, and how it is to be answered: `n` times.

    `stop` are texts that end an answer; `strip` drops white space around it. `top` asks for every id's log-probability,
    and those of so many of the most likely ones.
    """

    prompt: Prompt
    options: SamplingOptions
    n: int = 1
    stop: Sequence[str] = ()
    strip: bool = True
    top: int | None = None
    images: PictureStore = field(default_factory=dict)


@dataclass(frozen=True)
class Delta:
    """The text that some new ids of an answer have made certain, maybe none, and where these ids stand in it."""

    index: int
    text: str
    ids: range


class Answer:
    """One of a request's answers. Close it if you do not read it to its end.

    Attributes:
        index: which of them.
        request: the engine's.
        text: what has been read so far.
        begun, first_at: when the question arrived and the first id came, by `time.monotonic`.
        cut_because: it ended before its end, and why.
        news: of whoever reads it; set when there is something to read.
    """

    request: Request
    first_at: float | None

    def __init__(self, index: int, tokenizer: Tokenizer, question: Question, begun: float) -> None:
        self.index, self.text, self.begun, self.first_at = index, "", begun, None
        self.cut_because: Cut | None = None
        self.news: asyncio.Event | None = None
        self._stream = ReplyStream(tokenizer, question.stop, strip=question.strip)
        self._arrived: deque[str] = deque()  # the text of each id that has not been read
        self._read = 0

    def ask(self, engine: Engine, question: Question, pixels: Sequence[Tensor], number: int) -> None:
        """Submit the question for the answer of this number, which draws with a seed of its own."""
        options = question.options
        if number and options.seed is not None:
            options = replace(options, seed=(options.seed + number) % 2**63)
        self.request = engine.submit(
            question.prompt.ids,
            pixels,
            options,
            should_stop=self._take,
            with_log_probabilities=question.top is not None,
            top_log_probabilities=question.top or 0,
        )

    def arrival(self) -> Delta | None:
        """What has come and has not been read yet."""
        count = len(self._arrived)
        if not count:
            return None
        text = "".join(self._arrived.popleft() for _ in range(count))
        self.text += text
        self._read += count
        return Delta(self.index, text, range(self._read - count, self._read))

    def rest(self) -> Delta | None:
        """What was held back, once the request has ended and all arrivals have been read.

        Raises Refused if it did not end by itself.
        """
        if self.request.finish_reason == "cancelled":
            raise stopping() if self.cut_because == "stopped" else too_late()
        if isinstance(self.request.error, QwenVLError):
            raise Refused(500, str(self.request.error), code="generation_failed")
        if self.request.error is not None:
            raise Refused(500, "the answer failed; the server's log says why", code="internal_error")
        text = self._stream.flush()
        self.text += text
        return Delta(self.index, text, range(self._read, self._read)) if text else None

    @property
    def has_news(self) -> bool:
        """It goes on, or has ended, and somebody who reads it does not know that yet."""
        return bool(self._arrived) or self.request.finish_reason is not None

    @property
    def shown(self) -> range:
        """Which of the request's ids are the answer's: all but the one that ended it."""
        return range(self._read)

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """Why it ended, if it ended well."""
        return "length" if self.request.finish_reason == "length" else "stop"

    def close(self) -> None:
        """End it here. Its row of the cache is free from the engine's next step on."""
        self.request.cancel()

    def cut(self, because: Cut) -> None:
        """End it here, and tell who reads it."""
        if self.request.finish_reason is None:
            self.cut_because = because
            self.request.cancel()

    def _take(self, id_: int) -> bool:
        """In the engine's thread: a new id, which does not end the answer by itself."""
        if self.first_at is None:
            self.first_at = time.monotonic()
        self._arrived.append(self._stream.push(id_))
        return self._stream.stopped
