"""What an engine is asked for where it is measured: prompts with pictures, of mixed lengths, and when they arrive.

Ask        one request
Workload   random ones; the same with the same seed
spread     lengths of a given mean
arrivals   times of a Poisson process
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, islice

import torch
from torch import Tensor

from ..config import QwenVLConfig
from .subject import picture_ids

PICTURES = (0, 1, 0, 1, 0, 1, 0, 2)  # how many the requests have, in turn
DIFFERENT = 0.6  # of the pictures that are shown; the others are shown before
LEAST_TEXT = 8  # tokens of a prompt beside its pictures
LENGTHS = 0  # the seed of lengths: with all contents they are the same


@dataclass(frozen=True)
class Ask:
    """A prompt, its pictures [3,S,S] on the host, and how many new ids are asked for."""

    ids: list[int]
    pictures: tuple[Tensor, ...]
    new: int

    @property
    def context(self) -> float:
        """Tokens that its steps read on average."""
        return len(self.ids) + (self.new + 1) / 2


class Workload:
    """Requests of random ids and pixels, of which two workloads with different seeds have nothing in common."""

    def __init__(self, config: QwenVLConfig, seed: int) -> None:
        self.config, self._generator = config, torch.Generator().manual_seed(seed)

    def text(self, tokens: int) -> list[int]:
        """Random ids without a picture."""
        ordinary = min(self.config.visual.image_start_id, self.config.vocab_size)
        ids: list[int] = torch.randint(0, ordinary, (tokens,), generator=self._generator, device="cpu").tolist()
        return ids

    def picture(self) -> Tensor:
        """Pixels [3,S,S] as `preprocess` gives them."""
        size = self.config.visual.image_size
        return torch.randn(3, size, size, generator=self._generator, device="cpu")

    def ask(self, text: int, new: int, pictures: Sequence[Tensor] = ()) -> Ask:
        """Pictures, so many tokens of text behind them, and new ids."""
        return Ask(picture_ids(self.config) * len(pictures) + self.text(text), tuple(pictures), new)

    def mixed(self, count: int, context: int, new: int) -> list[Ask]:
        """Requests of this mean context and these many new ids on average, with no picture, one or two.

        Some pictures are shown more than once. Where pictures alone take the context, there is little text.
        """
        lengths, span = random.Random(LENGTHS), len(picture_ids(self.config))
        shown = list(islice(cycle(PICTURES), count))
        text = max(round(context - new / 2 - span * sum(shown) / count), LEAST_TEXT)
        pool = cycle([self.picture() for _ in range(math.ceil(DIFFERENT * sum(shown)))])
        sizes = zip(spread(text, count, lengths), spread(new, count, lengths), shown, strict=True)
        return [self.ask(tokens, wanted, list(islice(pool, n))) for tokens, wanted, n in sizes]


def spread(mean: int, count: int, source: random.Random) -> list[int]:
    """Whole numbers evenly from half of the mean to one and a half times it, in random order."""
    steps = [(number + 0.5) / count for number in range(count)]
    found = [max(round(mean * (0.5 + step)), 1) for step in steps]
    source.shuffle(found)
    return found


def arrivals(rate: float, count: int, seed: int) -> Iterator[float]:
    """Seconds at which requests arrive of which `rate` come in a second on average, each regardless of the others."""
    source = random.Random(seed)
    return accumulate(source.expovariate(rate) for _ in range(count))
