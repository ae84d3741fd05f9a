"""Unpacking and packing of the int4 layout, against AutoGPTQ's tensors and against each other."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qwenvl.weights.gptq import dequantize, pack_columns, pack_rows, unpack_columns, unpack_rows

CASES = ["A", "B", "C", "D", "E"]


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    """Every golden tensor; loaded once."""
    return load_file(Path(__file__).parents[1] / "goldens" / "gptq" / "cases.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_weight_is_bitwise_the_oracles(golden: dict[str, torch.Tensor], case: str) -> None:
    """Nibble order, the zero point's plus one, groups (shuffled in D) and the wrap at 16 (in E) are AutoGPTQ's."""
    qweight, qzeros, scales, g_idx = (golden[f"{case}.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx"))
    assert torch.equal(dequantize(qweight, qzeros, scales.float(), g_idx), golden[f"{case}.dequant_weight"])
    half = dequantize(qweight, qzeros, scales, g_idx)
    assert half.dtype == torch.float16
    assert torch.equal(half, golden[f"{case}.dequant_weight"].half())


@pytest.mark.parametrize("case", CASES)
def test_unpack_then_pack_changes_no_bit(golden: dict[str, torch.Tensor], case: str) -> None:
    """Packing is the exact inverse of unpacking, sign bits included."""
    assert torch.equal(pack_rows(unpack_rows(golden[f"{case}.qweight"])), golden[f"{case}.qweight"])
    assert torch.equal(pack_columns(unpack_columns(golden[f"{case}.qzeros"])), golden[f"{case}.qzeros"])


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**32))
def test_words_survive(rows: int, columns: int, seed: int) -> None:
    """Any int32 words survive there and back, and any nibbles survive back and there, along both directions."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (rows, columns), generator=generator).to(torch.int32)
    assert torch.equal(pack_rows(unpack_rows(words)), words)
    assert torch.equal(pack_columns(unpack_columns(words)), words)
    nibbles = torch.randint(0, 16, (8 * rows, columns), generator=generator, dtype=torch.int8)
    assert torch.equal(unpack_rows(pack_rows(nibbles)), nibbles)
    assert torch.equal(unpack_columns(pack_columns(nibbles.T.contiguous())), nibbles.T)


def test_lowest_nibble_comes_first() -> None:
    """The layout, written out by hand: 0x76543210 holds 0, 1, ... 7."""
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert unpack_rows(word).flatten().tolist() == list(range(8))
    assert unpack_columns(word).flatten().tolist() == list(range(8))
