"""The Triton kernel for attention of one token against torch's in float64. `test_attend.py` runs this file, in Triton's
interpreter and, where there is a GPU, on it.
"""

from __future__ import annotations

import os

import pytest
import torch
from support import random_model, small_config
from torch import Tensor
from torch.nn import functional as F

from qwenvl.adapt import attend_triton
from qwenvl.adapt.attend_triton import PART, TILE, attend
from qwenvl.generation.decode import prefill
from qwenvl.model.cache import KVCache

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF, BFLOAT, FULL = torch.float16, torch.bfloat16, torch.float32
# Of a result; Triton's interpreter cuts bfloat16 off instead of rounding it.
ROUNDED = {FULL: 2e-6, HALF: 2**-10.9, BFLOAT: 2**-6.9 if INTERPRETED else 2**-7.9}
RAGGED = [1, PART - 1, PART, PART + 1, 300]
HEADS = 2


def seeing(lengths: list[int], slots: int) -> Tensor:
    """The mask [B,1,1,S] of rows that see so many of their first slots, as `Decoder.step` makes it."""
    hidden = torch.arange(slots) >= torch.tensor(lengths)[:, None, None, None]
    return torch.zeros_like(hidden, dtype=FULL).masked_fill(hidden, -torch.inf)


def numbers(mask: Tensor, size: int, *, rows: int = 0, dtype: torch.dtype = FULL) -> list[Tensor]:
    """A query, a transposed view; keys and values, views of a longer cache; the mask. What it hides is NaN."""
    generator, slots = torch.Generator().manual_seed(size), mask.shape[-1]
    rows = rows or len(mask)
    query = torch.randn(rows, 1, HEADS, size, generator=generator).transpose(1, 2)
    both = torch.randn(2, rows, HEADS, slots + 20, size, generator=generator)
    both[..., slots:, :] = torch.nan
    keys, values = both[..., :slots, :].masked_fill_(mask.mT == -torch.inf, torch.nan).unbind()
    return [tensor.to(DEVICE, dtype) for tensor in (query, keys, values, mask)]


def check(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> None:
    """The same bits twice, and the numbers of torch's attention over keys and values that are zero where hidden."""
    found, again = (attend(query, keys, values, mask) for _ in range(2))
    assert (found.dtype, found.shape) == (query.dtype, query.shape)
    assert torch.equal(found, again)
    hidden = mask.mT == -torch.inf
    seen = query.double(), keys.double().masked_fill(hidden, 0), values.double().masked_fill(hidden, 0)
    expected = F.scaled_dot_product_attention(*seen, mask.double())
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=ROUNDED[query.dtype])


KINDS = [(16, FULL), (32, FULL), (64, FULL), (128, FULL), (256, HALF), (64, HALF), (32, BFLOAT), (128, BFLOAT)]


@pytest.mark.parametrize(("size", "dtype"), KINDS)
def test_ragged_rows(size: int, dtype: torch.dtype) -> None:
    """Every row has the attention over its own slots, whatever lies in the others, NaN too; the last part is short."""
    check(*numbers(seeing(RAGGED, 300), size, dtype=dtype))


@pytest.mark.parametrize(("slots", "length"), [(1, 1), (PART, 1), (3 * PART, PART), (3 * PART + 1, 3 * PART + 1)])
def test_one_row(slots: int, length: int) -> None:
    """A conversation's row, in one part and in several."""
    check(*numbers(seeing([length], slots), 32))


def test_one_mask_for_all_rows() -> None:
    """[1,1,1,S], for rows of one length."""
    check(*numbers(seeing([200], 260), 32, rows=3))


def test_any_strides() -> None:
    """Slots before heads, every other column, a mask of every other slot: no layout is taken for granted."""
    mask = seeing(RAGGED, 300)
    mask[-1, ..., :200] = -torch.inf
    query, keys, values, mask = numbers(mask, 64)
    keys = keys.transpose(1, 2).contiguous().transpose(1, 2)
    query, values = query.repeat_interleave(2, -1)[..., ::2], values.repeat_interleave(3, -1)[..., ::3]
    mask = mask.repeat_interleave(2, -1)[..., ::2]
    assert {tensor.stride(-1) for tensor in (query, keys, values, mask)} == {1, 2, 3}
    check(query, keys, values, mask)


def test_any_mask() -> None:
    """Holes, hidden beginnings, and weights of all sizes: more than a length can be masked."""
    generator = torch.Generator().manual_seed(1)
    mask = 3 * torch.randn(4, 1, 1, 300, generator=generator)
    mask[0, ..., 5:290] = -torch.inf
    mask[1, ..., : TILE // 256 + 3] = -torch.inf  # of 64 float32, all of the first tile
    mask[2, ..., PART : 2 * PART] = -torch.inf
    mask[3, ..., ::2] = -torch.inf
    check(*numbers(mask, 64))


def test_a_row_that_sees_nothing() -> None:
    """It is zero, not NaN, and its neighbours do not notice."""
    inputs = numbers(seeing([0, 140], 150), 32)
    found = attend(*inputs)
    assert (found[0] == 0).all()
    check(*(tensor[1:] for tensor in inputs))
    assert torch.equal(found[1:], attend(*(tensor[1:] for tensor in inputs)))


def test_large_scores() -> None:
    """Hundreds of thousands above and below zero: the greatest share rules, and nothing overflows."""
    query, keys, values, mask = numbers(seeing(RAGGED, 300), 32)
    for sign in (1, -1):
        check(query * 2**16, sign * keys.abs() * query.sign(), values, mask)


def test_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are joined at once; the greatest sums stand among the last."""
    monkeypatch.setattr(attend_triton, "JOINED", 2)
    query, keys, values, mask = numbers(seeing([5 * PART - 3, 40], 5 * PART), 32)
    check(query, keys * torch.linspace(0, 4, 5 * PART, device=DEVICE)[:, None], values, mask)


def test_what_is_seen_is_not_hidden() -> None:
    """NaN among a row's own values is in its result, and in no other row's or head's."""
    query, keys, values, mask = numbers(seeing([300, 300], 300), 32)
    values[0, 1, 290] = torch.nan
    found = attend(query, keys, values, mask).isnan()
    assert found[0, 1].all()
    assert found.sum() == 32


def test_a_step_is_a_forward() -> None:
    """`Decoder.step` with the kernel gives what `forward` gives without, in ragged rows, also where it is over PART."""
    model = random_model(small_config()).requires_grad_(False).to(DEVICE)
    lengths = [130, 5, PART - 1, PART]
    width = max(lengths)
    ids = torch.randint(0, 60, (len(lengths), width), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    real = torch.tensor([[column >= width - length for column in range(width)] for length in lengths], device=DEVICE)
    stepped, plain = (KVCache.allocate(model.config, len(lengths), 200, device=DEVICE) for _ in range(2))
    for cache in (stepped, plain):
        prefill(model, cache, ids, attention_mask=real)
    calls = []

    def by_kernel(*parts: Tensor, is_causal: bool) -> Tensor:
        assert not is_causal
        calls.append(1)
        return attend(*parts)

    tolerance = 2e-5 if INTERPRETED else 1e-4
    for _ in range(2):
        following = ids[:, len(calls)]
        expected = model(following[:, None], cache=plain)[:, 0]
        with pytest.MonkeyPatch.context() as patch:
            for block in model.decoder.blocks:
                patch.setattr(block.attn, "attend", by_kernel)
            found = model.decoder.step(following, stepped)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    assert len(calls) == 2 * len(model.decoder.blocks)


@pytest.mark.skipif(INTERPRETED, reason="only a GPU captures")
def test_captured() -> None:
    """A CUDA graph replays it for rows that have grown since."""
    query, keys, values, mask = numbers(seeing([300] * 4, 300), 128, dtype=BFLOAT)
    attend(query, keys, values, mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend(query, keys, values, mask)
    for lengths in ([1, 2, 3, 4], [1, PART, PART + 1, 299]):
        mask.copy_(seeing(lengths, 300))
        graph.replay()
        assert torch.equal(found, attend(query, keys, values, mask))
