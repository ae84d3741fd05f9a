"""Samples, the batches that they make, and the order in which they come.

Sample             one training text with its pictures
Batch              several, padded on the right
collate            samples to a batch
BatchOrder         which samples the n-th update sees: a pure function of seed and n
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..text.prompt import IGNORED_LABEL

MEGABATCH = 50  # batches among which samples of one length find each other; more would tie a sample to its length


@dataclass(frozen=True)
class Sample:
    """One training text.

    ids and labels are equally long; label -100 carries no loss. pixels [N,3,S,S] fill the ids' image spans in order.
    source says where it came from ("train.jsonl:17"), for messages.
    """

    ids: list[int]
    labels: list[int]
    pixels: Tensor | None
    source: str


@dataclass(frozen=True)
class Batch:
    """Samples side by side: input_ids and labels [B,T], padded on the right; pixels [N,3,S,S] of all rows in order.

    attention_mask [B,T] is true at real tokens, None if nothing is padded. tokens counts the real ones.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None
    pixels: Tensor | None
    sources: list[str]
    tokens: int

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        moved = {
            name: value.to(device)
            for name in ("input_ids", "labels", "attention_mask", "pixels")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)


def collate(samples: Sequence[Sample], pad_id: int = 0) -> Batch:
    """Samples as a batch. Nobody reads what stands at padding, so any id of the vocabulary will do for `pad_id`."""
    lengths = [len(sample.ids) for sample in samples]
    shape = len(samples), max(lengths)
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORED_LABEL)
    for row, sample in enumerate(samples):
        input_ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        labels[row, : len(sample.labels)] = torch.tensor(sample.labels)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    pixels = [sample.pixels for sample in samples if sample.pixels is not None]
    return Batch(
        input_ids,
        labels,
        None if mask.all() else mask,
        torch.cat(pixels) if pixels else None,
        [sample.source for sample in samples],
        sum(lengths),
    )


class BatchOrder:
    """Endless batches of sample numbers: update n sees `batch(n)`, whatever came before it and whatever machine asks.

    Every pass over the data has its own shuffle, and a batch may end one pass and begin the next, so that every sample
    is seen equally often. With `lengths`, samples of like length share a batch, to save padding: a shuffled stretch of
    50 batches is sorted, cut into batches, and these are shuffled again. `in_order` shuffles nothing: for data that has
    an order of its own.
    Raises ConfigError if there is nothing to order.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, lengths: Sequence[int] | None = None, *, in_order: bool = False
    ) -> None:
        if count < 1:
            raise ConfigError("there is no sample to train on")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._in_order = in_order
        self._pass = lru_cache(maxsize=2)(self._make_pass)  # a batch touches two at most, unless they are tiny

    def batch(self, step: int) -> list[int]:
        """The samples of update `step`, from 0."""
        indices: list[int] = []
        at, end = step * self.batch_size, (step + 1) * self.batch_size
        while at < end:
            number, offset = divmod(at, self.count)
            taken = self._pass(number)[offset : offset + end - at]
            indices += taken.tolist()
            at += len(taken)
        return indices

    def pieces(self, step: int, *, rank: int = 0, ranks: int = 1, accumulation: int = 1) -> list[list[int]]:
        """What one rank takes of `batch(step)`: a list for each accumulation step.

        Together, the pieces of all ranks are the batch, in order.
        """
        indices = self.batch(step)
        size = len(indices) // (ranks * accumulation)
        starts = [(turn * ranks + rank) * size for turn in range(accumulation)]
        return [indices[start : start + size] for start in starts]

    def _make_pass(self, number: int) -> np.ndarray:
        if self._in_order:
            return np.arange(self.count)
        random = np.random.default_rng((self.seed, number))
        order = random.permutation(self.count)
        if self._lengths is None:
            return order
        # The samples between the batch that the last pass left open and the one that this pass leaves open.
        begin = -number * self.count % self.batch_size
        batches = max(self.count - begin, 0) // self.batch_size
        grouped = order[begin : begin + batches * self.batch_size]
        stretch = MEGABATCH * self.batch_size
        for start in range(0, len(grouped), stretch):
            part = grouped[start : start + stretch]
            grouped[start : start + stretch] = part[np.argsort(self._lengths[part], kind="stable")]
        rows = grouped.reshape(batches, self.batch_size)
        order[begin : begin + len(grouped)] = rows[random.permutation(batches)].reshape(-1)
        return order
