"""The Triton kernels against the exact path. `test_packed_triton.py` runs this file, in Triton's interpreter and, where
there is a GPU, on it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_layers import CASES, Pretended, golden_layer, random_layer
from torch import Tensor

from qwenvl.adapt import packed, packed_triton
from qwenvl.adapt.fuse import _joined
from qwenvl.adapt.packed import PackedLinear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF, BFLOAT, FULL = torch.float16, torch.bfloat16, torch.float32
# The norm of an output's error in units of the sum of its terms' sizes, and of itself once it is rounded.
SUMMED, ROUNDED = 2e-6, {FULL: 0.0, HALF: 2**-10.9, BFLOAT: 2**-6.9 if INTERPRETED else 2**-7.9}


@pytest.fixture(autouse=True)
def no_other_way() -> None:
    """Each test ends with kernels that have not failed: else it would have compared the exact path with itself."""
    yield
    assert not any(kernel.failed for kernel in (packed.TRITON, packed.FEW_ROWS, packed.UNPACKING))


def on_device(x: Tensor) -> Tensor:
    """On the GPU, or what is taken for it."""
    return x.as_subclass(Pretended) if INTERPRETED else x.cuda()


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What a kernel should store of a float32 weight; Triton's interpreter cuts bfloat16 off instead of rounding it."""
    if INTERPRETED and dtype == BFLOAT:
        return (weight.contiguous().view(torch.int32) & -65536).view(FULL).to(BFLOAT)
    return weight.to(dtype)


def check_weight(layer: PackedLinear) -> None:
    """The kernel's weight is the exact path's, bit for bit, in every dtype."""
    for dtype in (FULL, HALF, BFLOAT):
        found = layer.to(DEVICE)._unpacked_on_cuda(dtype)
        assert found is not None
        assert found.dtype == dtype
        assert found.is_contiguous()
        exact = layer.weight_in(HALF) if dtype == HALF else rounded(layer.weight_in(FULL), dtype)
        assert torch.equal(found, exact)


def check_product(layer: PackedLinear, x: Tensor) -> None:
    """The product is that of the exact weight, but for sums in float32 and the rounding of the result."""
    layer.to(DEVICE)
    with torch.no_grad():
        found, again = (layer(on_device(x)).cpu().as_subclass(Tensor) for _ in range(2))
    assert found.dtype == x.dtype
    assert torch.equal(found, again)
    wide, weight, bias = x.double(), layer.weight_in(FULL).double().cpu(), layer.bias.double().cpu()
    exact, size = wide @ weight.T + bias, wide.abs() @ weight.abs().T + bias.abs()
    room = size * SUMMED + exact.abs() * ROUNDED[x.dtype] + (2**-24 if x.dtype == HALF else 0)
    assert ((found.double() - exact).abs() <= room).all()


@pytest.mark.parametrize("case", CASES)
def test_goldens(goldens: Path, case: str) -> None:
    """AutoGPTQ's own cases, with asymmetric zeros and act-order among them: its weight, and its outputs."""
    layer, golden = golden_layer(goldens, case)
    found = layer.to(DEVICE)._unpacked_on_cuda(FULL)
    assert found is not None
    assert torch.equal(found.cpu(), golden["dequant_weight"])
    check_weight(layer)
    with torch.no_grad():
        outputs = layer(on_device(golden["x"])).cpu().as_subclass(Tensor)
    torch.testing.assert_close(outputs, golden["y"], atol=1e-4, rtol=0)
    check_product(layer, golden["x"][:1])


@st.composite
def layers(draw: st.DrawFn) -> PackedLinear:
    """Layers of every form that a checkpoint may have, and halves of fused ones."""
    bits = draw(st.sampled_from((4, 8)))
    group_size = draw(st.sampled_from((8, 12, 32, 96, 128, -1)))
    inputs, outputs = draw(st.integers(1, 24)) * 8, draw(st.integers(1, 6)) * 8
    form = {"bits": bits, "group_size": group_size, "shuffled": draw(st.booleans()), "symmetric": draw(st.booleans())}
    layer = random_layer(inputs, outputs, **form)
    layer.scales[0, 0], layer.scales[-1, 1] = 2e-7, -0.01  # one is subnormal
    if draw(st.booleans()):
        _joined(random_layer(inputs, outputs, **{**form, "shuffled": False}), layer)
        assert not layer.qweight.is_contiguous() or layer.qweight.shape[0] == 1
    return layer


@given(layers(), st.integers(1, 20), st.sampled_from((FULL, HALF)))
@settings(max_examples=10 if INTERPRETED else 100, deadline=None, derandomize=True)
def test_any_layer(layer: PackedLinear, rows: int, dtype: torch.dtype) -> None:
    """Odd sizes, short and unordered groups, codes of 4 and 8 bits, words between another layer's, one pass and two."""
    check_weight(layer)
    check_product(layer, torch.randn(rows, layer.in_features).to(dtype))


@pytest.mark.parametrize("rows", [1] if INTERPRETED else [1, 5, 16, 40])  # the interpreter multiplies bfloat16 wrongly
def test_bfloat16(rows: int) -> None:
    """The dtype of most GPUs."""
    check_product(random_layer(264, 72), torch.randn(rows, 264).to(BFLOAT))


@pytest.mark.parametrize(("inputs", "rows"), [(11008, 1), (4096, 3)])
def test_real_depths(inputs: int, rows: int) -> None:
    """As many inputs as the real model's linears have, in float16, where the tensor cores' way is taken for rows."""
    check_product(random_layer(inputs, 64, symmetric=True), torch.randn(rows, inputs).to(HALF))


def test_nothing_beyond_the_ends() -> None:
    """What lies around a layer's tensors and a row of x, and between such rows, is neither read nor written."""

    def guarded(tensor: Tensor) -> Tensor:
        filler = float("nan") if tensor.is_floating_point() else 0x5A5A5A5A
        around = torch.full((tensor.numel() + 512,), filler, dtype=tensor.dtype)
        around[256 : 256 + tensor.numel()] = tensor.flatten()
        return around.to(DEVICE)[256 : 256 + tensor.numel()].view(tensor.shape)

    for form in ({}, {"bits": 8}, {"shuffled": True}, {"group_size": 32}):
        layer = random_layer(136, 40, **form)
        for name, buffer in layer.named_buffers():
            setattr(layer, name, guarded(buffer))
        check_weight(layer)
        for rows in (1, 5):
            wide = torch.full((rows + 1, 160), float("nan"), dtype=HALF)
            wide[:rows, 8:144] = torch.randn(rows, 136).to(HALF)
            check_product(layer, wide[:rows, 8:144])


def test_many_strips() -> None:
    """So many outputs that a strip's program gets fewer warps."""
    outputs = packed_triton.BLOCK_N * packed_triton.MANY
    for rows, dtype in ((1, FULL), (2, HALF)):
        check_product(random_layer(128, outputs), torch.randn(rows, 128).to(dtype))
