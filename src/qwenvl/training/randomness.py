"""The global random generators: set, kept in a file, and put aside for a while.

seed         all of them, from numbers
state        what they are about to draw, as JSON
set_state    back to that
undisturbed  a block after which they draw what they would have drawn without it
"""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed(*numbers: int) -> None:
    """Seed Python's, NumPy's and torch's generators, on this process's devices too."""
    words = [int(word) for word in np.random.SeedSequence(numbers).generate_state(3)]
    random.seed(words[0])
    np.random.seed(words[1])
    torch.manual_seed(words[2])


def _packed(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _unpacked(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def state() -> dict[str, Any]:
    """The state of every generator that `seed` seeds, as JSON takes it."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": _packed(torch.get_rng_state()),
        "cuda": _packed(torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else None,  # type: ignore[no-untyped-call]
    }


def set_state(state: dict[str, Any]) -> None:
    """Back to what `state` returned, read from JSON or not."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_unpacked(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_unpacked(state["cuda"]))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever the block draws, the generators then go on as if it had drawn nothing."""
    before = state()
    try:
        yield
    finally:
        set_state(before)
