"""A question to an engine, and its answer on the way to whoever waits on an event loop.

Question   a prompt and how it is to be answered
Answer     what comes of it: iterate over it for its deltas
Delta      the text that some new ids have made certain
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
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
    """The text that some new ids have made certain, maybe none, and where these stand among the answer's ids."""

    text: str
    ids: range


class Answer:
    """One of a question's answers. Close it if you do not read it to its end.

    Attributes:
        request: the engine's.
        text: what has been read so far.
        begun, first_at: when the question arrived and the first id came, by `time.monotonic`.
        cut_because: it ended before its end, and why.
    """

    request: Request
    first_at: float | None

    def __init__(self, tokenizer: Tokenizer, question: Question, begun: float, deadline: float) -> None:
        self.text, self.begun, self.first_at = "", begun, None
        self.cut_because: Cut | None = None
        self._stream = ReplyStream(tokenizer, question.stop, strip=question.strip)
        self._arrived: deque[str] = deque()  # the text of each id that has not been read
        self._read = 0
        self._deadline = deadline

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

    async def deltas(self, news: Callable[[], asyncio.Event]) -> AsyncIterator[Delta]:
        """What comes, as it comes. `news` gives the event that the next step sets.

        Raises Refused where it fails, takes too long, or the server stops.
        """
        while True:
            event = news()  # taken before we look: what comes later sets it
            ended = self.request.finish_reason
            if delta := self._arrival():
                yield delta
            elif ended is not None:
                break
            else:
                try:
                    async with asyncio.timeout_at(self._deadline):
                        await event.wait()
                except TimeoutError:
                    self.cut("late")
        if ended == "cancelled":
            raise stopping() if self.cut_because == "stopped" else too_late()
        if self.request.error is not None:
            raise _failure(self.request.error)
        if rest := self._stream.flush():
            self.text += rest
            yield Delta(rest, range(self._read, self._read))

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

    def _arrival(self) -> Delta | None:
        count = len(self._arrived)
        if not count:
            return None
        text = "".join(self._arrived.popleft() for _ in range(count))
        self.text += text
        self._read += count
        return Delta(text, range(self._read - count, self._read))


def _failure(error: Exception) -> Refused:
    """What a client is told when an answer went wrong: of our own errors their line, of others nothing."""
    if isinstance(error, QwenVLError):
        return Refused(500, str(error), code="generation_failed")
    return Refused(500, "the answer failed; the server's log says why", code="internal_error")
