"""An engine driven step by step, with a clock beside it: when ids are there, and how much of the engine is in use.

Answer         one request, and when each of its ids was there
Driver         submits, steps, and notes
TimeUp         there was no time for all of it
rate           new ids in a second, of all answers
decoding_rate  the same while no prompt is being computed any more
gaps           seconds between the ids of an answer
percentiles    the middle and the 95th percentile
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import sleep
from typing import Any

import numpy as np

from ..errors import QwenVLError
from ..generation.engine import Engine, Load
from ..generation.request import Request
from .workload import Ask

SETTLING = 4  # steps from the last first id to those that are timed, as ids may be read a step late


class TimeUp(QwenVLError):
    """What an engine was given to do was not done in its time."""


@dataclass(eq=False)
class Answer:
    """A request that was due at one time, and the times at which its ids were there: seconds of the driver's clock."""

    request: Request
    due: float
    times: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds from when it was due to its first id."""
        return self.times[0] - self.due


class Driver:
    """Steps `engine` until `end`, and looks at `clock` after each step. `loads` has what was in use then."""

    def __init__(self, engine: Engine, clock: Callable[[], float], end: float) -> None:
        self.engine, self.clock, self.end = engine, clock, end
        self.loads: list[Load] = []
        self._going: list[Answer] = []

    def ask(self, ask: Ask, due: float | None = None, **options: Any) -> Answer:  # noqa: ANN401 - SamplingOptions
        """Submit a request that was due then, or now."""
        due = self.clock() if due is None else due
        wanted = {"stop_ids": (), "max_new_tokens": ask.new, **options}
        answer = Answer(self.engine.submit(ask.ids, ask.pictures or None, **wanted), due)
        self._going.append(answer)
        return answer

    def step(self) -> bool:
        """One step; false if there was none to take. Raises what went wrong with a request, and TimeUp."""
        more = self.engine.step()
        now = self.clock()
        self.loads.append(self.engine.load)
        for answer in self._going:
            answer.times += [now] * (len(answer.request.ids) - len(answer.times))
            if answer.request.error is not None:
                raise answer.request.error
        self._going = [answer for answer in self._going if answer.request.finish_reason is None]
        if now > self.end and self._going:
            self.cancel()
            raise TimeUp("there was not enough time for it")
        return more

    def until(self, answers: Iterable[Answer]) -> None:
        """Step until these have an id each."""
        for answer in answers:
            while not answer.times:
                self.step()

    def settle(self, answers: Iterable[Answer]) -> None:
        """Step until these have begun, and a few steps more."""
        self.until(answers)
        for _ in range(SETTLING):
            self.step()

    def finish(self) -> None:
        """Step until there is nothing more to do."""
        while self.step():
            pass

    def cancel(self) -> None:
        """End all that go on, and free their rows."""
        for answer in self._going:
            answer.request.cancel()
        self._going = []
        while self.engine.step():
            pass

    def together(self, asks: Sequence[Ask], **options: Any) -> list[Answer]:  # noqa: ANN401 - SamplingOptions
        """All at once."""
        due = self.clock()
        answers = [self.ask(ask, due, **options) for ask in asks]
        self.finish()
        return answers

    def in_turn(self, asks: Sequence[Ask]) -> list[Answer]:
        """One after the other."""
        answers = []
        for ask in asks:
            answers.append(self.ask(ask))
            self.finish()
        return answers

    def arriving(self, asks: Sequence[Ask], times: Sequence[float]) -> list[Answer]:
        """Each at its time, in seconds from now."""
        begin, answers = self.clock(), list[Answer]()
        while len(answers) < len(asks):
            due = begin + times[len(answers)]
            if due <= self.clock():
                answers.append(self.ask(asks[len(answers)], due))
            elif not self.step():
                sleep(max(due - self.clock(), 0))
        self.finish()
        return answers


def rate(answers: Sequence[Answer]) -> float:
    """New ids in a second, from when the first was due to the last id."""
    return sum(len(a.times) for a in answers) / (_last(answers) - min(answer.due for answer in answers))


def decoding_rate(answers: Sequence[Answer]) -> float:
    """New ids in a second after the last of all first ids; 0 if there is none."""
    begin, end = max(answer.times[0] for answer in answers), _last(answers)
    later = sum(time > begin for answer in answers for time in answer.times)
    return later / (end - begin) if later else 0.0


def gaps(answers: Iterable[Answer], after: float = 0.0) -> list[float]:
    """Seconds between one id of an answer and its next, where the next was there after a time."""
    pairs = (pair for answer in answers for pair in pairwise(answer.times))
    return [next_ - one for one, next_ in pairs if next_ > after]


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The middle, and what 95 of 100 are at most; between two values by their distance."""
    middle, high = np.percentile(values, (50, 95)).tolist()
    return middle, high


def _last(answers: Sequence[Answer]) -> float:
    return max(answer.times[-1] for answer in answers)
