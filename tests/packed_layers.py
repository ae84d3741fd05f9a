"""Packed linears for tests, golden and random, a whole packed checkpoint, and a tensor that says it is on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from qwenvl.adapt.int4 import Int4Linear, Int8Linear
from qwenvl.adapt.packed import PackedLinear
from qwenvl.config import QuantizationConfig, QwenVLConfig
from qwenvl.weights.gptq import pack_columns, pack_rows
from qwenvl.weights.keymap import entries

CASES = ["A", "B", "C", "D", "E"]
GROUP = 32  # inputs of a group of `packed_tensors`


class Pretended(torch.Tensor):
    """A tensor in the host's memory that layers take for one on a GPU."""

    is_cuda = property(lambda _: True)  # type: ignore[assignment]


def golden_layer(goldens: Path, case: str) -> tuple[Int4Linear, dict[str, torch.Tensor]]:
    """A golden linear as a module, and its tensors."""
    cases = load_file(goldens / "gptq" / "cases.safetensors")
    tensors = {name[2:]: tensor for name, tensor in cases.items() if name.startswith(f"{case}.")}
    facts = json.loads((goldens / "gptq" / "cases.json").read_text())["cases"][case]
    layer = Int4Linear(facts["in_features"], facts["out_features"], QuantizationConfig(group_size=facts["group_size"]))
    state = {name: tensors[name] for name in ("qweight", "qzeros", "scales", "g_idx")}
    bias = tensors.get("bias", torch.zeros(facts["out_features"]))
    layer.load_state_dict({"bias": bias, **state})
    return layer, tensors


def random_layer(
    inputs: int, outputs: int, *, bits: int = 4, group_size: int = 128, symmetric: bool = False, shuffled: bool = False
) -> PackedLinear:
    """A packed linear of random codes, scales, zero points and bias."""
    generator = torch.Generator().manual_seed(inputs + outputs)
    kind = Int4Linear if bits == 4 else Int8Linear
    layer = kind(inputs, outputs, QuantizationConfig(bits=bits, group_size=group_size))
    layer.qweight.random_(-(2**31), 2**31 - 1, generator=generator)
    layer.qzeros.random_(-(2**31), 2**31 - 1, generator=generator)
    if symmetric:
        middle = torch.full((layer.scales.shape[0], outputs), 2 ** (bits - 1) - 1)
        layer.qzeros.copy_(pack_columns(middle, bits))
    layer.scales.uniform_(1e-3, 1e-2, generator=generator)
    layer.bias.normal_(generator=generator)
    if shuffled:
        layer.g_idx.copy_(layer.g_idx[torch.randperm(inputs, generator=generator)])
    return layer


def packed_tensors(config: QwenVLConfig, *, shuffled: bool = False) -> dict[str, torch.Tensor]:
    """Random tensors of an Int4 checkpoint under the reference's names, of a size at which the model says something."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for entry in entries(config):
        name, shape = entry.reference, entry.reference_shape
        if name.endswith("qweight"):
            values = torch.randint(0, 16, (shape[0] * 8, shape[1]), generator=generator)
            tensors[name] = pack_rows(values)
        elif name.endswith("qzeros"):
            tensors[name] = pack_columns(torch.randint(5, 10, (shape[0], shape[1] * 8), generator=generator))
        elif name.endswith("scales"):
            tensors[name] = (torch.rand(shape, generator=generator) * 0.02 + 0.005).half()
        elif name.endswith("g_idx"):
            groups = torch.arange(shape[0], dtype=torch.int32) // GROUP
            tensors[name] = groups[torch.randperm(shape[0], generator=generator)] if shuffled else groups
        elif ".ln_" in name and name.endswith("weight"):
            tensors[name] = torch.ones(shape).half()
        else:
            tensors[name] = (torch.randn(shape, generator=generator) * 0.05).half()
    return tensors
