"""What is measured, with which sizes, and in how many seconds. Torch is not imported here.

Plan                 the sizes of one benchmark; FULL, QUICK and TINY are the three there are
Budget               seconds shared out among what is still to be done
PARTS, OF_AN_ENGINE  what `--only` may name
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

IN_A_MODEL = ("encode", "prefill", "first-token", "decode", "batch")  # parts for which a model is loaded once
OF_AN_ENGINE = ("throughput", "steady", "arrivals", "long-prompt", "second-round", "lookup")  # what --engine measures
COMPARISONS = ("transformers", "compile")  # parts that are told beside the others: one that fails is left out
PARTS = (*IN_A_MODEL, "start-up", *COMPARISONS)


@dataclass(frozen=True)
class Plan:
    """Sizes of one benchmark. Lengths are tokens.

    seconds         that the whole may take; a process that has not ended GRACE later is stopped
    parts           which of PARTS and OF_AN_ENGINE are measured
    prefill         length of the prompt whose prefill is timed, a picture among it
    decode          how many new tokens each decoding run behind one picture is about
    most_steps      decode no more than so many of them, in the middle of the run; 0: all that the time allows
    rows            batch sizes of the throughput runs, each `batch_context` tokens long and `batch_new` more
    repeats         how often what takes milliseconds is repeated, for the median
    copied_bytes    size of the tensor whose copy tells the memory's rate
    matmul_side     rows and columns of the matrices whose product tells the rate of arithmetic
    peer_tokens     new tokens of the comparison with `transformers`
    context, answer what an engine's requests have on average: tokens at half of the answer, and new ones
    rounds          how often an engine is measured on the same lengths, for the median; a first round warms it up
    arrivals        requests that arrive one after the other
    long_prompt     tokens of the prompt that arrives while others decode, at most
    """

    seconds: float = 460
    parts: tuple[str, ...] = PARTS
    prefill: int = 2048
    decode: tuple[int, ...] = (1792, 7934)
    most_steps: int = 0
    rows: tuple[int, ...] = (1, 8, 32)
    batch_context: int = 512
    batch_new: int = 128
    repeats: int = 20
    copied_bytes: int = 4 * 2**30
    matmul_side: int = 8192
    peer_tokens: int = 256
    context: int = 512
    answer: int = 128
    rounds: int = 5
    arrivals: int = 96
    long_prompt: int = 6144


GRACE = 15.0  # seconds that a process may take longer than it was told, before it is stopped
FULL = Plan()
QUICK = replace(
    FULL, seconds=105, parts=IN_A_MODEL, most_steps=128, batch_new=32, repeats=5, answer=32, rounds=1, arrivals=48
)
TINY = Plan(
    seconds=300,  # half a minute, where nothing else runs
    parts=tuple(part for part in PARTS if part != "compile"),  # half a minute of C++ compiling
    prefill=96,
    decode=(24, 400),
    most_steps=24,
    rows=(1, 8, 32),
    batch_context=16,
    batch_new=8,
    repeats=3,
    copied_bytes=32 * 2**20,
    matmul_side=512,
    peer_tokens=8,
    context=128,  # a quarter of the others, as a picture's span is in the embedded model
    answer=64,
    arrivals=24,
    long_prompt=1536,
)


class Budget:
    """Seconds for a row of things to do, shared by weight: what one does not use, those after it get.

    `Budget(60, [1, 2])` allows 20 to the first and, if that took 5, 55 to the second.
    """

    def __init__(
        self, seconds: float, weights: Sequence[float], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock, self._end = clock, clock() + seconds
        self._weights = list(weights)

    @property
    def left(self) -> float:
        """Seconds until the end, none of them negative."""
        return max(self._end - self._clock(), 0.0)

    def share(self) -> float:
        """Seconds for the next one."""
        share = self._weights[0] / sum(self._weights)
        del self._weights[0]
        return share * self.left
