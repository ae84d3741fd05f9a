"""The int4 layout of GPTQ checkpoints (AutoGPTQ v1), taken apart and put together again, bit for bit.

    unpack_rows, pack_rows          qweight: eight input rows to a word
    unpack_columns, pack_columns    qzeros: eight output columns to a word
    dequantize                      the linear's weight, [out, in]

A word is int32 and holds eight 4-bit values, the lowest nibble first. Zero points are stored minus one.
All functions work on whole tensors, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

PER_WORD = 8  # 4-bit values in an int32


def _shifts(like: Tensor) -> Tensor:
    """Bit positions of the eight values of a word, [8]."""
    return torch.arange(0, 32, 4, dtype=torch.int32, device=like.device)


def _join(values: Tensor, dim: int) -> Tensor:
    """Put values 0..15 along `dim` (of size 8) at their places in an int32; the sum is made in int64 and wrapped."""
    shape = [1] * values.dim()
    shape[dim] = PER_WORD
    words = (values.to(torch.int64) << _shifts(values).to(torch.int64).view(shape)).sum(dim)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_rows(words: Tensor) -> Tensor:
    """[in/8, out] int32 -> [in, out] int8, values 0..15."""
    # The shift copies the sign bit into the high bits; the mask takes them away again.
    values = (words[:, None, :] >> _shifts(words)[None, :, None]) & 15
    return values.to(torch.int8).reshape(-1, words.shape[1])


def pack_rows(values: Tensor) -> Tensor:
    """[in, out], values 0..15 -> [in/8, out] int32, the inverse of `unpack_rows`."""
    return _join(values.reshape(-1, PER_WORD, values.shape[1]), dim=1)


def unpack_columns(words: Tensor) -> Tensor:
    """[groups, out/8] int32 -> [groups, out] int8, values 0..15."""
    values = (words[:, :, None] >> _shifts(words)) & 15
    return values.to(torch.int8).reshape(words.shape[0], -1)


def pack_columns(values: Tensor) -> Tensor:
    """[groups, out], values 0..15 -> [groups, out/8] int32, the inverse of `unpack_columns`."""
    return _join(values.reshape(values.shape[0], -1, PER_WORD), dim=2)


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor) -> Tensor:
    """The weight [out, in] of a packed linear, in the dtype of `scales` (a transposed view of an [in, out] tensor).

    weight[o, i] = scales[g, o] * (q[i, o] - zero[g, o]) with g = g_idx[i] and zero = stored + 1, in 1..16 (a stored 15
    is 16, as in AutoGPTQ's current kernels, and does not wrap to 0). In float32 the product is exact, for the scales of
    checkpoints have 11 significant bits; in float16 it is rounded once, as the published Int4 model rounds it.

    Shapes: qweight [in/8, out] int32, qzeros [groups, out/8] int32, scales [groups, out], g_idx [in] int32.
    """
    zeros = unpack_columns(qzeros) + 1
    groups = g_idx.long()  # any order: act-order checkpoints shuffle them
    steps = unpack_rows(qweight) - zeros[groups]  # [in, out], -16..14
    return steps.to(scales.dtype).mul_(scales[groups]).T
