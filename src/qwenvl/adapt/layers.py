"""One model over several devices one after the other, each with some of its layers: for GPUs that are too small alone.

    layer_counts   how many blocks go to each device
    LayerSplit     where each tensor is, and the moves between devices
    allocate       a cache whose layers are where their blocks are
    LayerStack     its keys or values

The first device also has the vision tower and the token table, the last one the final norm and the head. Hidden states
are moved by hooks on the blocks, and logits back to the first device, where ids and pixels are taken to as always: who
calls the model never moves a tensor. One device works at a time, so this is no faster than one device that is large
enough. A step is not captured, since a CUDA graph is of one device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..model.cache import KVCache, Slots
from ..model.decoder import AttentionContext
from ..model.qwenvl import Output, QwenVL


def layer_counts(layers: int, block: int, others: Sequence[int], free: Sequence[int]) -> list[int]:
    """How many consecutive blocks each device gets, so that all are filled to equal shares of their free bytes.

    block: bytes of a block and of its part of the cache. others: bytes that each device holds besides. Each block goes
    where the share is smallest with it.
    """
    counts = [0] * len(free)
    for _ in range(layers):
        shares = [
            (other + block * (count + 1)) / max(room, 1)
            for other, count, room in zip(others, counts, free, strict=True)
        ]
        counts[shares.index(min(shares))] += 1
    return counts


class LayerSplit:
    """A model whose consecutive blocks are on consecutive devices, `counts[d]` of them on `devices[d]`."""

    def __init__(self, devices: Sequence[torch.device], counts: Sequence[int]) -> None:
        self.devices, self.counts = tuple(devices), tuple(counts)
        self.blocks = [device for device, count in zip(devices, counts, strict=True) for _ in range(count)]

    def device_of(self, name: str) -> torch.device:
        """Where the tensor of this name belongs."""
        if name.startswith("decoder.blocks."):
            return self.blocks[int(name.split(".")[2])]
        return self.devices[-1 if name.startswith(("decoder.ln_f.", "decoder.lm_head.")) else 0]

    def apply(self, model: QwenVL) -> None:
        """Have a model move its hidden states from device to device, in place."""
        decoder, first = model.decoder, self.devices[0]
        for block, device in zip(decoder.blocks, self.blocks, strict=True):
            block.register_forward_pre_hook(_Entrance(device))
        for module in (decoder.ln_f, decoder.lm_head):
            module.register_forward_pre_hook(lambda _module, given: (given[0].to(self.devices[-1]), *given[1:]))
        decoder.lm_head.register_forward_hook(lambda _head, _given, logits: logits.to(first))
        model.register_forward_hook(lambda _model, _given, output: _moved_output(output, first))
        decoder.split = self  # type: ignore[assignment] # found by `allocate`


# What the context of each forward is on each device; gone with the context.
_contexts: WeakKeyDictionary[AttentionContext, dict[torch.device, AttentionContext]] = WeakKeyDictionary()


class _Entrance:
    """A pre-hook of blocks: hidden states and what the layers of a forward share, on the block's device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, _block: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x, context, *rest = given
        there = _contexts.setdefault(context, {})
        if self.device not in there:
            there[self.device] = _moved_context(context, self.device)
        return x.to(self.device), there[self.device], *rest


def _moved_context(context: AttentionContext, device: torch.device) -> AttentionContext:
    slots: Slots | None = context.slots
    if isinstance(slots, tuple):
        rows, columns, places = (index.to(device) for index in slots)
        slots = rows, columns, places
    return replace(
        context,
        cos=context.cos.to(device),
        sin=context.sin.to(device),
        logn=_moved(context.logn, device),
        mask=_moved(context.mask, device),
        slots=slots if isinstance(slots, tuple) else _moved(slots, device),
    )


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _moved_output(output: Tensor | Output, device: torch.device) -> Tensor | Output:
    """Logits are there already; hidden states and attention maps come from wherever they were made."""
    if isinstance(output, Tensor):
        return output
    hidden, maps = (
        None if tensors is None else tuple(tensor.to(device) for tensor in tensors)
        for tensors in (output.hidden_states, output.attentions)
    )
    return replace(output, hidden_states=hidden, attentions=maps)


def split_of(model: QwenVL) -> LayerSplit | None:
    """How a model is split, None if it is not."""
    return getattr(model.decoder, "split", None)


def allocate(model: QwenVL, split: LayerSplit, batch: int, max_length: int) -> KVCache:
    """`KVCache.allocate`, with the keys and values of each layer on the device of its block."""
    config, first, dtype = model.config, split.devices[0], model.decoder.wte.weight.dtype
    cache: Any = KVCache.allocate(config, batch, max_length, dtype, "meta")
    _, *row = cache.keys.shape
    with torch.inference_mode(False):
        cache.lengths = torch.zeros_like(cache.lengths, device=first)
        cache.frequencies = torch.zeros_like(cache.frequencies, device=first)
        for name in ("keys", "values"):
            parts = [
                torch.zeros(count, *row, dtype=dtype, device=device)
                for device, count in zip(split.devices, split.counts, strict=True)
            ]
            setattr(cache, name, LayerStack(parts))
    whole: KVCache = cache
    return whole


class LayerStack:
    """Keys or values [L,B,H,S,D] whose layers lie on several devices, in parts [L_d,B,H,S,D], one for each device.

    It is read and written as the one tensor would be where its layers are taken one by one, or all alike: `stack[3]`,
    `stack[:, 2:4]`, `stack[:, 0, :, :n] = stack[:, 1, :, :n]`. Views share memory as a tensor's do. Its device is the
    first one, where a cache's lengths are.
    """

    is_cuda = False  # not one GPU's, so no step over it is captured

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = tuple(parts)
        self.device, self.dtype = parts[0].device, parts[0].dtype

    @property
    def shape(self) -> torch.Size:
        """Of all layers together."""
        return torch.Size((len(self), *self.parts[0].shape[1:]))

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[Tensor]:
        return (layer for part in self.parts for layer in part)

    def __getitem__(self, index: int | tuple[Any, ...]) -> Any:  # noqa: ANN401 - a layer, or a stack
        if isinstance(index, int):
            for part in self.parts:
                if index < len(part):
                    return part[index]
                index -= len(part)
            raise IndexError("there is no such layer")
        return LayerStack([part[_of_all_layers(index)] for part in self.parts])

    def __setitem__(self, index: tuple[Any, ...], value: LayerStack) -> None:
        for part, new in zip(self.parts, value.parts, strict=True):
            part[_of_all_layers(index)] = new


def _of_all_layers(index: Any) -> tuple[Any, ...]:  # noqa: ANN401 - whatever stands in the brackets
    if not isinstance(index, tuple) or index[0] != slice(None):
        raise IndexError(
            "of a cache over several devices take one layer, or all: cache.keys[layer], cache.keys[:, ...]"
        )
    return index
