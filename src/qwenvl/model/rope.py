"""Rotary positions, dynamic NTK and log-n scaling: pure functions of lengths and positions.

    ntk_alpha            how far a prompt stretches the rotation's base
    inverse_frequencies  the rotation's angles per position
    rotary_tables        cosines and sines for given positions
    rotate               turn queries and keys
    logn_factors         the query's scale beyond the trained length

All tables are float32 whatever the model's dtype, as in the reference: an angle of 8000 radians has no digits left for
its fraction in bfloat16.
"""

import math

import torch
from torch import Tensor


def ntk_alpha(length: int, seq_length: int) -> float:
    """Dynamic-NTK alpha of a prompt of `length` tokens: 1 up to `seq_length`, then 3, 7, 15 as each doubling begins."""
    if length <= seq_length:
        return 1.0
    return 2.0 ** math.ceil(math.log2(length / seq_length) + 1) - 1


def inverse_frequencies(head_size: int, base: float, alpha: float = 1.0, device: torch.device | None = None) -> Tensor:
    """Radians per position of each pair of channels, [D/2] float32, for the base stretched by `alpha`."""
    stretched = base * alpha ** (head_size / (head_size - 2))
    return 1.0 / stretched ** (torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size)


def rotary_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines, each [B,1,T,1,D] float32, for positions [B,T] and inverse frequencies [B,D/2].

    The two axes of size 1 stand for query-or-key and for the heads. The sines of the first half are negated, which is
    the sign of (-x2, x1) below.
    """
    angles = positions[:, :, None] * frequencies[:, None, :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1)[:, None, :, None], torch.cat((-sin, sin), -1)[:, None, :, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i against channel i + D/2: x cos + (-x2, x1) sin, the "half-split" form. x and result [B,2,T,H,D].

    Computed in float32, which the tables are, and cast back, as in the reference.
    """
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).type_as(x)


def logn_factors(positions: Tensor, seq_length: int) -> Tensor:
    """log(i) / log(seq_length) where i, a position [B,T] counted from 1, is beyond `seq_length`, else 1. [B,T]."""
    return ((positions + 1).float().log() / math.log(seq_length)).clamp(min=1.0)
