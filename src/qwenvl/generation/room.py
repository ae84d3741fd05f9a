"""Memory that a generation takes, and a plain word where there is not enough.

allocate        a cache for a model's rows
fitting_rows    how many rows of a length an engine takes where nobody says
bounded         what runs within it says what would fit, should the device run out
out_of_memory   whether an error is that
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..adapt import layers
from ..adapt.ranks import is_shared, shared_errors
from ..errors import CacheError
from ..model.cache import KVCache
from ..model.qwenvl import QwenVL

LITTLE = 2**29  # bytes of a cache that nobody misses


def allocate(model: QwenVL, batch: int, max_length: int) -> KVCache:
    """An empty cache of `batch` rows with `max_length` slots each, where the model is. Raises CacheError."""
    weight, split = model.decoder.wte.weight, layers.split_of(model)
    with shared_errors(is_shared(model)), bounded(model, batch, max_length):
        if split is not None:
            return layers.allocate(model, split, batch, max_length)
        return KVCache.allocate(model.decoder.config, batch, max_length, weight.dtype, weight.device)


def fitting_rows(model: QwenVL, length: int) -> int:
    """As many rows as leave a fifth of a GPU's free memory to what is computed with them, up to 32.

    Elsewhere 8, where arithmetic is the limit, or of a small model as many more as take half a gigabyte.
    """
    row, free = _cache_bytes(model) * length, _free_bytes(model.decoder.wte.weight.device)
    least, room = (8, LITTLE) if free is None else (1, free * 4 // 5)
    return min(max(room // row, least), 32)


@contextmanager
def bounded(model: QwenVL, batch: int, max_length: int, *, cache: KVCache | None = None) -> Iterator[None]:
    """Turn running out of the device's memory into a CacheError that says how many tokens would fit.

    `cache` is what has been allocated for these rows already: it would be given back for a smaller one.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # which hold what the failed call had made
    else:
        return
    weight = model.decoder.wte.weight
    token = _cache_bytes(model)
    asked = f"{batch} x {max_length} tokens" if batch > 1 else f"{max_length} tokens"
    told = f"out of memory on {weight.device}: the cache of {asked} takes {token * batch * max_length / 1e9:.2f} GB"
    if layers.split_of(model) is None and (free := _free_bytes(weight.device)) is not None:
        held = 0 if cache is None else token * cache.batch * cache.max_length
        # No more than half of what did not fit, whatever the estimate says: memory may lie in pieces.
        fitting = min((free + held) // (token + _passing_bytes(model)), batch * max_length // 2)
        told += f" of the {(free + held) / 1e9:.2f} GB that the weights leave free"
        if fitting >= batch:
            told += f"; about {fitting // batch} tokens"
            told += f" a row would fit, or {fitting // max_length} rows of as many" if batch > 1 else " would fit"
    fewer = "tokens or rows" if batch > 1 else "tokens"
    smaller = ", or load an int4 checkpoint" if model.config.quantization_config is None else ""
    raise CacheError(f"{told}; ask for fewer {fewer}{smaller}")


def out_of_memory(error: BaseException) -> bool:
    """Whether torch found no memory: on a CPU it says so in a RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _cache_bytes(model: QwenVL) -> int:
    """What the cache of one token takes: its key and its value in every layer."""
    config = model.decoder.config  # a rank's, where several share the model
    width = config.num_attention_heads * config.kv_channels
    return 2 * config.num_hidden_layers * width * model.decoder.wte.weight.dtype.itemsize


def _passing_bytes(model: QwenVL) -> int:
    """What a prompt's token takes on its way through a block, roughly: its states, some of them in float32, and the
    MLP's inner ones, of which the two projections and their product are there at once.
    """
    config = model.config
    return (12 * config.hidden_size + 4 * config.mlp_width) * model.decoder.wte.weight.dtype.itemsize


def _free_bytes(device: torch.device) -> int | None:
    """What can still be allocated; None where the device does not say."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()  # what torch keeps for itself would be counted as taken
    return torch.cuda.mem_get_info(device)[0]
