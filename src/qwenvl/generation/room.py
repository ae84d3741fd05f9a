"""Memory that a generation takes, and a plain word where there is not enough.

allocate   a cache for a model's rows
bounded    what runs within it says what would fit, should the device run out
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import CacheError
from ..model.cache import KVCache
from ..model.qwenvl import QwenVL


def allocate(model: QwenVL, batch: int, max_length: int) -> KVCache:
    """An empty cache of `batch` rows with `max_length` slots each, where the model is. Raises CacheError."""
    weight = model.decoder.wte.weight
    with bounded(model, batch, max_length):
        return KVCache.allocate(model.config, batch, max_length, weight.dtype, weight.device)


@contextmanager
def bounded(model: QwenVL, batch: int, max_length: int) -> Iterator[None]:
    """Turn running out of the device's memory into a CacheError that says how many tokens would fit."""
    try:
        yield
    except torch.OutOfMemoryError:
        config, weight = model.config, model.decoder.wte.weight
        width = config.num_attention_heads * config.kv_channels
        token = 2 * config.num_hidden_layers * width * weight.dtype.itemsize
        asked = f"{batch} x {max_length} tokens" if batch > 1 else f"{max_length} tokens"
        told = f"out of memory on {weight.device}: the cache of {asked} takes {token * batch * max_length / 1e9:.2f} GB"
    else:
        return
    # Outside the handler, where the failed call's tensors are let go of.
    free = _free_bytes(weight.device)
    if free is not None:
        told += f" and {free / 1e9:.2f} GB are free, enough for about {max(free // (token * batch), 0)} of them"
        told += " a row" if batch > 1 else ""
    raise CacheError(f"{told}; ask for fewer tokens or rows, or load an int4 checkpoint")


def _free_bytes(device: torch.device) -> int | None:
    """What can still be allocated; None where the device does not say."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
