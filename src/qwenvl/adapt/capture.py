"""Decoding steps that a GPU replays instead of being told of kernel by kernel.

    Stepper   logits behind one more token, for one cache

A step of the real model is some 500 kernels of a few microseconds each, and telling a GPU of one takes about as long as
running it. A CUDA graph is told once and replayed with one call. It is captured for a length: attention reads the first
slots of the cache, as many as the bucket has, and masks those that are not written yet. A step that cannot be captured
is run as it is.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..model.cache import KVCache
from ..model.qwenvl import QwenVL
from .packed import Kernel

# Slots by which buckets grow. What is read beyond a row's end is half of this on average, less than a hundredth of the
# real model's weights; and a capture takes about as long as a few steps.
BUCKET = 256
GRAPHS = Kernel("a CUDA graph of the decoding step")
_CAPTURING = threading.Lock()  # one capture at a time, as all are on one stream


class Stepper:
    """Takes ids [B] of rows that stand in `cache`, prefilled, to the logits [B,V] that follow, and counts them there.

    On CUDA the result is the graph's own memory: the next call writes over it. Everywhere else, in training mode and
    once a capture has failed (`captures` is false then), a step is the model's `forward`. A Stepper is for the cache
    and the weights that it was made with, where they are.

    `step` is what is captured: `Decoder.step`, or a function that computes the same. `beside` is another Stepper whose
    graphs these share their memory with: what one of the two returned, the other's next call writes over, too.
    """

    def __init__(self, model: QwenVL, cache: KVCache, *, beside: Stepper | None = None) -> None:
        self.model, self.cache = model, cache
        self.step: Callable[[Tensor, KVCache], Tensor] = model.decoder.step
        self.captures = cache.keys.is_cuda and not model.training and not GRAPHS.failed
        self._graphs: dict[int, Callable[[], Tensor]] = {}
        # Memory that the graphs share, since only one runs at a time: once there is one, it is in the list.
        self._pool: list[Any] = [] if beside is None else beside._pool
        with torch.inference_mode(False):  # it is written to later, also where that mode is not on
            self._ids = torch.zeros(cache.batch, dtype=torch.int64, device=cache.keys.device)

    @torch.no_grad()
    def __call__(self, ids: Tensor, going: Tensor | None = None) -> Tensor:
        """One step. going [B,1]: rows that have not ended; a captured step takes the others along all the same."""
        replay = self._replay(ids) if self.captures else None
        if replay is None:
            logits: Tensor = self.model(ids[:, None], attention_mask=going, cache=self.cache, logits_to_keep=1)
            return logits[:, -1]
        following = replay()
        self.cache.host_lengths += 1
        return following

    def _replay(self, ids: Tensor) -> Callable[[], Tensor] | None:
        """The captured step for these ids in their bucket; None if it cannot be captured, nor any from then on."""
        longest = int(self.cache.host_lengths.max()) + 1
        bucket = min(-(-longest // BUCKET) * BUCKET, self.cache.max_length)
        self._ids.copy_(ids)
        if bucket not in self._graphs:
            lengths = self.cache.lengths.clone()
            try:
                self._graphs[bucket] = self._capture(bucket)
            except torch.OutOfMemoryError:  # of this cache; a smaller one may have the room
                self.captures = False
                print("no memory to capture a decoding step: going on without, more slowly", file=sys.stderr)
            except Exception as error:
                self.captures = False
                GRAPHS.fail(error)
            finally:
                self.cache.lengths.copy_(lengths)  # which running a step has advanced
        if not self.captures:
            self._graphs.clear()  # and their memory
            self._pool.clear()
        return self._graphs.get(bucket)

    def _capture(self, bucket: int) -> Callable[[], Tensor]:
        """A step within the first `bucket` slots, as a function that replays it."""
        view, device = self.cache.bucket(bucket), self.cache.keys.device
        aside, graph = _stream(device), torch.cuda.CUDAGraph()
        # The outer context goes back to the stream that we are on also where a failed capture does not.
        with _CAPTURING, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            # Once for real, aside: kernels are chosen and compiled, and what modules keep for them is made, when they
            # are first used, which cannot be captured. What it writes into the cache, the first replay writes again.
            aside.wait_stream(torch.cuda.current_stream(device))
            try:
                with torch.cuda.stream(aside):
                    self.step(self._ids, view)
            finally:
                torch.cuda.current_stream(device).wait_stream(aside)
            # Other threads may go on using the device meanwhile: what they do is not for this capture to forbid.
            with torch.cuda.graph(
                graph, pool=next(iter(self._pool), None), stream=aside, capture_error_mode="thread_local"
            ):
                logits = self.step(self._ids, view)
        self._pool[:] = [graph.pool()]

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one on which all steps are captured: cuBLAS keeps 32 MiB for every stream that it has been used on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
