"""The decoder's attention where a faster way is there: on a GPU, of one new token in each row over its own slots.

    attend         `scaled_dot_product_attention`, by a Triton kernel where that is faster
    attend_faster  have a model's decoder use it

Where there is a mask, torch's kernel gives each head's one query to one processor, for one row 32 of an H100's 132; and
it reads, for every row, as many slots as the longest has. The kernel shares one row's slots out, and reads each row's
own.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.decoder import Attention
from ..model.qwenvl import QwenVL
from .packed import TRITON, Kernel

ONE_TOKEN = Kernel("the Triton kernel for attention of one token")
SIZES, DTYPES = (16, 32, 64, 128, 256), (torch.float16, torch.bfloat16, torch.float32)
TOLERANCE = 0.02  # of the largest value: two roundings to 16 bits lie far below, another computation far above
_checked: set[tuple[torch.device, torch.dtype, int, bool]] = set()


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
    """Queries [B,H,T,D], keys and values [B,H,S,D], mask [1 or B,1,T,S] to [B,H,T,D].

    By the kernel for one token in each row with a mask that is added, on a GPU, where no gradients are wanted. The
    first time for each device, dtype and head size, of one row and of several, the result is held against torch's own;
    should they differ, it is torch's from then on. That waits for the device: a step runs once before it is captured.
    """
    mixed = None if mask is None else _by_kernel(query, key, value, mask)
    where = (query.device, query.dtype, query.shape[-1], query.shape[0] > 1)
    if mixed is not None and where in _checked:
        return mixed
    expected = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)
    if mixed is not None and (mixed - expected).abs().max() <= TOLERANCE * expected.abs().max():
        _checked.add(where)
    elif mixed is not None:
        ONE_TOKEN.fail(RuntimeError("it does not give what torch's attention gives"))
    return expected


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor | None:
    """None if this is not for the kernel, or there is none."""
    one_token = query.is_cuda and query.shape[2] == 1 and mask.is_floating_point()
    if not one_token or query.shape[-1] not in SIZES or query.dtype not in DTYPES or ONE_TOKEN.failed:
        return None
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    kernels = TRITON(lambda: importlib.import_module(".attend_triton", __package__))
    return None if kernels is None else ONE_TOKEN(lambda: kernels.attend(query, key, value, mask))


def attend_faster(model: QwenVL) -> None:
    """Have the decoder's attention use `attend`, in place."""
    for module in model.decoder.modules():
        if isinstance(module, Attention):
            module.attend = attend
