"""Requests and their answers when they are alone, and ways to run many of them on one engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwenvl.generation.batch import generate_batch
from qwenvl.generation.engine import Engine
from qwenvl.generation.request import Request
from qwenvl.generation.sampling import SamplingOptions
from qwenvl.model.qwenvl import QwenVL

TIE = 1e-4  # logits that lie closer than this may come in either order: a batch adds up in another order


@dataclass(frozen=True)
class Asked:
    """A prompt, and what is said to it when it is alone."""

    ids: list[int] = field(repr=False)
    pixels: Tensor | None = field(repr=False)
    options: SamplingOptions = field(repr=False)
    alone: list[int] = field(repr=False)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """For Hypothesis, which would print all numbers."""
        printer.text(repr(self))

    def submit(self, engine: Engine) -> Request:
        """Put it into an engine's queue."""
        return engine.submit(self.ids, self.pixels, self.options, stop_ids=())


def asked(
    model: QwenVL, ids: Sequence[int], pixels: Tensor | None = None, new_tokens: int = 8, **options: object
) -> Asked:
    """A request with the ids that `generate_batch` gives for it."""
    chosen = SamplingOptions(max_new_tokens=new_tokens, **options)  # type: ignore[arg-type]
    (alone,), _ = generate_batch(model, torch.tensor([list(ids)]), chosen, pixels=pixels)
    return Asked(list(ids), pixels, chosen, alone)


def mixed(model: QwenVL, count: int, longest: int, seed: int = 0) -> list[Asked]:
    """Prompts of 1 to `longest` ids with up to two pictures of three, some of which begin like others, 1 to 16 new ids.

    With `support.small_config`, prompts stretch their rotation from 65, 129 and 257 ids on.
    """
    draw = random.Random(seed)
    config = model.config
    vision = config.visual
    pictures = torch.randn(3, 3, vision.image_size, vision.image_size, generator=torch.Generator().manual_seed(seed))
    span = [vision.image_start_id, *[vision.image_start_id + 2] * vision.n_queries, vision.image_start_id + 1]
    requests: list[Asked] = []
    for _ in range(count):
        shown: list[int] = []
        ids: list[int] = []
        earlier = draw.choice(requests) if requests and draw.random() < 0.4 else None
        if earlier is not None and vision.image_start_id not in earlier.alone:  # a further round
            ids = [*earlier.ids, *earlier.alone]
            shown = (
                []
                if earlier.pixels is None
                else [int((pictures == p).flatten(1).all(1).nonzero()) for p in earlier.pixels]
            )
        for _ in range(draw.choice((0, 0, 1, 2))):
            shown.append(draw.randrange(3))
            ids += [draw.randrange(1, vision.image_start_id) for _ in range(draw.randrange(4))] + span
        ids += [draw.randrange(1, vision.image_start_id) for _ in range(draw.randrange(1, longest))]
        if len(ids) > 2 * longest:
            continue
        requests.append(asked(model, ids, pictures[shown] if shown else None, draw.randrange(1, 17)))
    return requests


def differs(model: QwenVL, one: Asked, ids: Sequence[int]) -> str:
    """Why `ids` are not what was said alone; nothing if they are, or if they part where two logits are nearly equal.

    The latter is listed among pytest's warnings.
    """
    if list(ids) == one.alone:
        return ""
    if len(ids) != len(one.alone):
        return f"{len(ids)} ids instead of {len(one.alone)}"
    parting = next(at for at, (a, b) in enumerate(zip(ids, one.alone, strict=True)) if a != b)
    text = torch.tensor([[*one.ids, *one.alone[:parting]]])
    with torch.no_grad():
        logits = model(text, one.pixels, logits_to_keep=1)[0, -1]
    gap = float(logits[one.alone[parting]] - logits[ids[parting]])
    return (
        "" if abs(gap) < TIE else f"id {parting} is {ids[parting]} instead of {one.alone[parting]}, {gap:g} less likely"
    )
