"""Decoding through the loop that users get, `generation.decode.decode`, greedy, with a clock beside it.

TimedStepper    steps, whose captures are timed apart; compiled by `torch.compile`, if asked for
Stretch         some steps of a run, and how long they took
prefilled       a prompt in a cache of its own, which is where a run begins
stretch         decode so many tokens
longest_run     as many tokens of a run as there is time for
first_id        how long the first token takes
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
from ..generation.decode import decode, prefill
from ..generation.room import allocate, bounded
from ..generation.sampling import SamplingOptions
from ..model.cache import KVCache
from ..model.qwenvl import QwenVL
from .device import Device

PROBE = 8  # steps that tell how long one takes
FEWEST = 16  # steps of a run that was cut, at least
FIRST_OF = 16  # new tokens that are asked for where the first is waited for
CAUTION = 1.15  # by how much a run may take longer than its first steps promise


class TimedStepper(Stepper):
    """A Stepper that counts its captures and the seconds that they took.

    With `backend`, one of `torch.compile`'s, what is captured was compiled by it, as one graph of operations; on a CPU
    the compiled step is then called where a GPU replays it. Should that fail, it is raised: steps that were not
    compiled are not what was asked for. Other steppers go on capturing.
    """

    def __init__(self, model: QwenVL, cache: KVCache, device: Device, *, backend: str = "") -> None:
        super().__init__(model, cache)
        self.device, self.captured, self.capture_seconds = device, 0, 0.0
        self._failure: Exception | None = None  # of a compiled step
        self.compiled = bool(backend)
        if self.compiled:
            self.step = torch.compile(self.step, backend=backend, fullgraph=True, dynamic=False)
            self.captures = True

    def __call__(self, ids: Tensor, going: Tensor | None = None) -> Tensor:
        """One step. Raises RuntimeError if it could not be compiled, or captured once it was."""
        logits = super().__call__(ids, going)
        if self._failure is not None:
            told = f"{type(self._failure).__name__}: {self._failure}"
            raise RuntimeError(f"a step compiled by torch.compile failed: {told}") from self._failure
        return logits

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
            if not self.compiled:
                raise
            self._failure, self.captures = error, False
            return partial(self.step, self._ids, self.cache)  # which is not called
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


@torch.no_grad()
def prefilled(model: QwenVL, ids: Tensor, new: int, pixels: Tensor | None = None) -> tuple[KVCache, Tensor]:
    """A cache that holds prompts [B,T] and has room for so many new tokens, and the logits [B,V] that follow.

    Raises CacheError where the memory is not enough.
    """
    rows, slots = len(ids), ids.shape[1] + new
    cache = allocate(model, rows, slots)
    with bounded(model, rows, slots, cache=cache):
        return cache, prefill(model, cache, ids, pixels=pixels)


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
    with warnings.catch_warnings(), closing(stream):
        warnings.simplefilter("ignore")  # steps that are taken back in a row whose prompt was skipped to: its alpha
        for _ in stream:
            read += 1
            if read > 2 and device.clock() - begin > seconds:  # one step takes what the one before left undone
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


@torch.no_grad()
def first_id(model: QwenVL, ids: Tensor, pixels: Tensor, device: Device) -> float:
    """Seconds from a prompt [1,T] with a picture to the first new id on the host, with more to come.

    A cache for all of them is allocated, and whatever the loop does before it reads the id is part of what a user waits
    for. What the device still has to do when the id is there is not.
    """
    begin = device.now()
    cache, logits = prefilled(model, ids, FIRST_OF, pixels)
    with closing(decode(model, cache, logits, ids, SamplingOptions(max_new_tokens=FIRST_OF))) as stream:
        next(stream)
        return device.clock() - begin
