"""Decoding through the loop that users get, `generation.decode.decode`, greedy, with a clock beside it.

TimedStepper    steps, whose captures are timed apart; compiled by `torch.compile`, if asked for
Stretch         some steps of a run, and how long they took
stretch         decode so many tokens
longest_run     as many tokens of a run as there is time for
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..adapt.capture import BUCKET, Stepper
from ..generation.decode import decode
from ..generation.sampling import SamplingOptions
from ..model.cache import KVCache
from ..model.qwenvl import QwenVL
from .device import Device

PROBE = 8  # steps that tell how long one takes
FEWEST = 16  # steps of a run that was cut, at least
CAUTION = 1.15  # by how much a run may take longer than its first steps promise


class TimedStepper(Stepper):
    """A Stepper that counts its captures and the seconds that they took.

    With `backend`, one of `torch.compile`'s, what is captured was compiled by it, as one graph of operations; on a CPU
    the compiled step is then called where a GPU replays it.
    """

    def __init__(self, model: QwenVL, cache: KVCache, device: Device, *, backend: str = "") -> None:
        super().__init__(model, cache)
        self.device, self.captured, self.capture_seconds = device, 0, 0.0
        self.failure: Exception | None = None  # of a capture: from then on, steps are as they are
        self.compiled = bool(backend)
        if self.compiled:
            self.step = torch.compile(self.step, backend=backend, fullgraph=True, dynamic=False)
            self.captures = True

    def _capture(self, bucket: int) -> Callable[[], Tensor]:
        begin = self.device.now()
        try:
            if self.compiled:  # packed weights choose and pack in their first call, which cannot be compiled
                self.model.decoder.step(self._ids, self.cache.bucket(bucket))
            if self.cache.keys.is_cuda:
                replay = super()._capture(bucket)
            else:
                replay = partial(self.step, self._ids, self.cache.bucket(bucket))
                replay()
        except Exception as error:
            self.failure = error
            raise
        self.capture_seconds += self.device.now() - begin
        self.captured += 1
        return replay


@dataclass(frozen=True)
class Stretch:
    """`steps` decoding steps behind `begin` tokens in each row: their seconds, and those of captures apart.

    The first new token takes no step, for the prefill has its logits. `wanted` is how many steps there should have
    been, `graphs` how many were captured, and `captured` says that all were replayed.
    """

    begin: int
    steps: int
    wanted: int
    seconds: float
    graphs: int
    capture_seconds: float
    captured: bool = False

    @property
    def step_seconds(self) -> float:
        """Of one step, without captures."""
        return self.seconds / self.steps

    @property
    def context(self) -> float:
        """Tokens that a step's attention reads, its own included, on average."""
        return self.begin + (self.steps + 1) / 2


def stretch(stepper: TimedStepper, logits: Tensor, history: Tensor, steps: int, *, seconds: float) -> Stretch:
    """Decode `steps` + 1 tokens behind a prefilled prompt: its ids `history` [B,T] and the logits [B,V] that follow it.

    Ends early after `seconds`.
    """
    cache, device, config = stepper.cache, stepper.device, stepper.model.config
    begun, graphs, before = int(cache.host_lengths[0]), stepper.captured, stepper.capture_seconds
    stream = decode(
        stepper.model,
        cache,
        logits,
        history,
        SamplingOptions(max_new_tokens=steps + 1),
        n_vocab=config.visual.image_pad_id + 1,  # as the published tokenizer has it: the head is wider
        stepper=stepper,
    )
    read, begin = 0, device.now()
    with warnings.catch_warnings(), closing(stream):  # type: ignore[type-var]
        warnings.simplefilter("ignore")  # steps that are taken back in a row whose prompt was skipped to: its alpha
        for _ in stream:
            read += 1
            if device.clock() - begin > seconds:
                break
        taken = device.clock() - begin  # the last token has been waited for
    spent = stepper.capture_seconds - before
    steps, wanted = max(read - 1, 1), steps
    return Stretch(begun, steps, wanted, taken - spent, stepper.captured - graphs, spent, stepper.captures)


def longest_run(
    stepper: TimedStepper, logits: Tensor, history: Tensor, steps: int, *, seconds: float, most: int
) -> tuple[Stretch, Stretch]:
    """The first steps of a run of `steps` behind a prefilled prompt, and the run, or what there is time for of it.

    What does not fit into `seconds`, or is more than `most` steps (0: no limit), is cut at both ends: attention takes
    longer with every token, and the middle of the run takes what the run does on average.
    """
    cache, prompt, clock = stepper.cache, int(stepper.cache.host_lengths[0]), stepper.device.clock
    begin = clock()

    def probe() -> Stretch:
        new = stretch(stepper, logits, history, min(PROBE, steps), seconds=seconds)
        cache.rewind([prompt] * cache.batch)
        return new

    first, second = probe(), probe()  # the first has captures and kernels that are loaded
    left = seconds - (clock() - begin)
    each = first.capture_seconds / max(first.graphs, 1)
    captures = each * (steps // BUCKET) if stepper.captures else 0.0
    promised = CAUTION * second.step_seconds
    fit = steps if steps * promised + captures <= left else int(left / promised)
    fit = min(max(fit, FEWEST), most or steps, steps)
    if fit < steps:
        skip_to(cache, prompt + (steps - fit) // 2)
    run = stretch(stepper, logits, history, fit, seconds=max(left, FEWEST * promised))
    return first, replace(run, wanted=steps)


def skip_to(cache: KVCache, length: int) -> None:
    """Let every row hold `length` tokens, all beyond those that it has with random keys and values."""
    begin = int(cache.host_lengths[0])
    with torch.no_grad():
        for store in (cache.keys, cache.values):
            store[:, :, :, begin:length].normal_()
    cache.advance([length - begin] * cache.batch)
