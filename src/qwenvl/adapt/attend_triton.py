"""A Triton kernel for attention of one new token in each row, over as many slots as the row has (Flash-Decoding).

    attend   softmax(q K^T + mask) V for queries [B,H,1,D], float32 inside

A program takes one part of one head's slots, and another kernel joins the parts by the logarithms of their sums: so
one row alone is shared by all of a GPU's processors. The mask says what a row has: where a part has nothing that is to
be seen, its program leaves at once, and inside a part hidden keys and values are not read either but taken for zeros.
What lies in hidden slots is therefore without effect, NaN too; a row that is to see nothing gives zeros.

No atomics, so equal calls give equal bits. Nothing is tuned at run time and nothing waits for the device, so it can be
captured in a CUDA graph once it has run with the same sizes, dtypes and alignment. Triton 3.3 or newer; it comes with
torch for CUDA.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Slots to a part. One row of 32 heads and 512 slots makes 128 programs, about one for each of an H100's 132 processors;
# and what a part leaves to be joined, D float32 numbers, is 1/128 of the keys and values that it reads in 16 bits.
PART = 128
# Bytes of keys, and as many of values, that a program asks for at once: 8 loads of 16 bytes for each of 128 threads. A
# processor's share of an H100's memory, 25 bytes in a nanosecond, needs some 20 KB under way; two programs have 64.
TILE = 16 * 1024
JOINED = 32  # parts that are joined at once; for each so many more, 4096 slots, the joining is compiled again
NOTHING: tl.constexpr = tl.constexpr(-1.0e30)  # less than any score, yet a number: its difference to itself is 0
LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))  # for the device has 2^x


@triton.jit(do_not_specialize=["slots"])  # else it is compiled again for other caches
def _part_kernel(
    query: tl.tensor, key: tl.tensor, value: tl.tensor, mask: tl.tensor, mixed: tl.tensor, log_sums: tl.tensor,
    slots: tl.tensor, heads: tl.tensor, scale: tl.tensor,
    query_row: tl.tensor, query_head: tl.tensor, query_column: tl.tensor,
    key_row: tl.tensor, key_head: tl.tensor, key_slot: tl.tensor, key_column: tl.tensor,
    value_row: tl.tensor, value_head: tl.tensor, value_slot: tl.tensor, value_column: tl.tensor,
    mask_row: tl.tensor, mask_slot: tl.tensor,
    PART: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr,
) -> None:  # fmt: skip
    """One part of one head of one row, by tiles: its attention [D], and the logarithm of its sum to base 2."""
    row, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    result = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    mask += row * mask_row
    first = tl.program_id(1) * PART
    every = first + tl.arange(0, PART)
    allowed = tl.load(mask + every * mask_slot, mask=every < slots, other=float("-inf")).to(tl.float32)
    if tl.max(allowed, axis=0) == float("-inf"):
        tl.store(log_sums + result, float("-inf"))
        return
    column = tl.arange(0, D)
    q = tl.load(query + row * query_row + head * query_head + column * query_column).to(tl.float32) * (scale * LOG2_E)
    key += row * key_row + head * key_head
    value += row * value_row + head * value_head
    most, total, acc = NOTHING, 0.0, tl.zeros([D], tl.float32)
    for start in range(0, PART, TILE):
        slot = first + start + tl.arange(0, TILE)
        bias = tl.load(mask + slot * mask_slot, mask=slot < slots, other=float("-inf")).to(tl.float32)
        seen = (bias > float("-inf"))[:, None]
        k = tl.load(key + slot[:, None] * key_slot + column[None, :] * key_column, mask=seen, other=0.0)
        v = tl.load(value + slot[:, None] * value_slot + column[None, :] * value_column, mask=seen, other=0.0)
        scores = tl.sum(k.to(tl.float32) * q[None, :], axis=1) + bias * LOG2_E
        higher = tl.maximum(most, tl.max(scores, axis=0))
        shares, kept = tl.exp2(scores - higher), tl.exp2(most - higher)
        acc = acc * kept + tl.sum(shares[:, None] * v.to(tl.float32), axis=0)
        total = total * kept + tl.sum(shares, axis=0)
        most = higher
    tl.store(mixed + result * D + column, acc / total)
    tl.store(log_sums + result, most + tl.log2(total))


@triton.jit(do_not_specialize=["parts"])
def _join_kernel(
    mixed: tl.tensor, log_sums: tl.tensor, out: tl.tensor, parts: tl.tensor,
    PARTS: tl.constexpr, JOINED: tl.constexpr, D: tl.constexpr,
) -> None:  # fmt: skip
    """The parts of one head of one row, up to PARTS, weighted by their sums; those without a sum were not written."""
    result = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, D)
    most, total, acc = NOTHING, 0.0, tl.zeros([D], tl.float32)
    for start in range(0, PARTS, JOINED):
        part = start + tl.arange(0, JOINED)
        sums = tl.load(log_sums + result * parts + part, mask=part < parts, other=float("-inf"))
        seen = (sums > float("-inf"))[:, None]
        m = tl.load(mixed + (result * parts + part)[:, None] * D + column[None, :], mask=seen, other=0.0)
        higher = tl.maximum(most, tl.max(sums, axis=0))
        shares, kept = tl.exp2(sums - higher), tl.exp2(most - higher)
        acc = acc * kept + tl.sum(shares[:, None] * m, axis=0)
        total = total * kept + tl.sum(shares, axis=0)
        most = higher
    total = tl.where(total > 0.0, total, 1.0)  # a row that sees nothing
    tl.store(out + result * D + column, (acc / total).to(out.dtype.element_ty))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Queries [B,H,1,D], keys and values [B,H,S,D], mask [1 or B,1,1,S], added, to [B,H,1,D] in the dtype of `query`.

    All may be views. D is a power of two from 16 to 256, S any number of slots.
    """
    rows, heads, slots, size = key.shape
    assert query.shape == (rows, heads, 1, size), f"{tuple(query.shape)} for keys {tuple(key.shape)}"
    assert value.shape == key.shape, f"values {tuple(value.shape)} for keys {tuple(key.shape)}"
    assert mask.shape[1:] == (1, 1, slots), f"a mask {tuple(mask.shape)} for {slots} slots"
    mask = mask.expand(rows, -1, -1, -1)
    parts = triton.cdiv(slots, PART)
    mixed = torch.empty(rows * heads, parts, size, dtype=torch.float32, device=query.device)
    log_sums = torch.empty(rows * heads, parts, dtype=torch.float32, device=query.device)
    out = torch.empty(rows, heads, 1, size, dtype=query.dtype, device=query.device)
    strides = (*(query.stride(i) for i in (0, 1, 3)), *key.stride(), *value.stride(), mask.stride(0), mask.stride(3))
    tile = min(TILE // (size * key.element_size()), PART)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call] # a kernel is started on the current device, wherever its arguments are
        _part_kernel[(rows * heads, parts)](
            query, key, value, mask, mixed, log_sums, slots, heads, size**-0.5, *strides,
            PART=PART, TILE=tile, D=size, num_warps=4,
        )  # fmt: skip
        _join_kernel[(rows * heads,)](
            mixed, log_sums, out, parts, PARTS=triton.cdiv(parts, JOINED) * JOINED, JOINED=JOINED, D=size, num_warps=4
        )  # fmt: skip
    return out
