"""Packed linears for tests: golden and random ones, and a tensor that says it is on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from qwenvl.adapt.int4 import Int4Linear, Int8Linear
from qwenvl.adapt.packed import PackedLinear
from qwenvl.config import QuantizationConfig
from qwenvl.weights.gptq import pack_columns

CASES = ["A", "B", "C", "D", "E"]


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
