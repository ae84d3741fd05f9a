"""The packed layout of GPTQ checkpoints (AutoGPTQ v1), taken apart and put together again, bit for bit.

    unpack_rows, pack_rows          qweight: eight input rows to a word (four of 8 bits)
    unpack_columns, pack_columns    qzeros: as many output columns to a word
    dequantize                      the linear's weight, [out, in]

A word is int32 and holds eight 4-bit values or four 8-bit ones, the lowest bits first: W words hold W * 32 / bits
values. Zero points are stored minus one. All functions work on whole tensors, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _shifts(bits: int, like: Tensor) -> Tensor:
    """Bit positions of the values of a word, [32 / bits]."""
    return torch.arange(0, 32, bits, dtype=torch.int32, device=like.device)


def _join(values: Tensor, dim: int, bits: int) -> Tensor:
    """Put values along `dim` (of size 32 / bits) at their places in an int32; the sum is made in int64 and wrapped."""
    shape = [1] * values.dim()
    shape[dim] = 32 // bits
    words = (values.to(torch.int64) << _shifts(bits, values).to(torch.int64).view(shape)).sum(dim)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _split(words: Tensor, shifts: Tensor, bits: int) -> Tensor:
    # The shift copies the sign bit into the high bits; the mask takes them away again.
    values: Tensor = (words >> shifts) & (2**bits - 1)
    return values.to(torch.int8 if bits == 4 else torch.int16)


def unpack_rows(words: Tensor, bits: int = 4) -> Tensor:
    """[words, out] int32 -> [in, out], values from 0, as int8 (4 bits) or int16 (8 bits)."""
    return _split(words[:, None, :], _shifts(bits, words)[None, :, None], bits).reshape(-1, words.shape[1])


def pack_rows(values: Tensor, bits: int = 4) -> Tensor:
    """[in, out], values from 0 -> [words, out] int32, the inverse of `unpack_rows`."""
    return _join(values.reshape(-1, 32 // bits, values.shape[1]), 1, bits)


def unpack_columns(words: Tensor, bits: int = 4) -> Tensor:
    """[groups, words] int32 -> [groups, out], values from 0, as int8 (4 bits) or int16 (8 bits)."""
    return _split(words[:, :, None], _shifts(bits, words), bits).reshape(words.shape[0], -1)


def pack_columns(values: Tensor, bits: int = 4) -> Tensor:
    """[groups, out], values from 0 -> [groups, words] int32, the inverse of `unpack_columns`."""
    return _join(values.reshape(values.shape[0], -1, 32 // bits), 2, bits)


def zero_points(qzeros: Tensor, bits: int) -> Tensor:
    """[groups, words] int32 -> [groups, out], stored + 1: a stored 15 (of 4 bits) is 16, as in AutoGPTQ's current
    kernels, and does not wrap to 0.
    """
    return unpack_columns(qzeros, bits) + 1


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor) -> Tensor:
    """The weight [out, in] of a packed linear, in the dtype of `scales` (a transposed view of an [in, out] tensor).

    weight[o, i] = scales[g, o] * (q[i, o] - zero[g, o]) with g = g_idx[i]. In float32 the product is exact, for the
    scales of checkpoints have 11 significant bits; in float16 it is rounded once, as the published Int4 model rounds
    it.

    Shapes: qweight [words, out] int32, qzeros [groups, words] int32, scales [groups, out], g_idx [in] int32.
    """
    bits = 32 * qweight.shape[0] // len(g_idx)
    zeros = zero_points(qzeros, bits)
    groups = g_idx.long()  # any order: act-order checkpoints shuffle them
    steps = unpack_rows(qweight, bits) - zeros[groups]  # [in, out], within -2^bits and 2^bits
    return steps.to(scales.dtype).mul_(scales[groups]).T
