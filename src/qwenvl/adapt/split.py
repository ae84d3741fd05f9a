"""Attention of one new token over a long cache, in parts that more of a GPU's processors share (Flash-Decoding).

    attend            `scaled_dot_product_attention`, in parts where that is faster
    split_attention   have a model's decoder use it on a GPU

Where there is a mask, torch's kernel gives each head's one query to one processor: 32 of an H100's 132, and these read
the cache with a fraction of its bandwidth. Parts of the cache are attended by themselves, and their results weighted
by the sums that their softmax was divided by.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.decoder import Attention
from ..model.qwenvl import QwenVL
from .capture import BUCKET
from .packed import Kernel

PART = BUCKET  # slots to a part; so the last one of a bucket, too, has a slot that is not masked
SHORTEST = 4 * PART  # slots from which on it is worth the three small kernels that join the parts
SPLIT = Kernel("attention in parts")
TOLERANCE = 0.02  # of the largest value: two roundings to 16 bits lie far below, another computation far above
_checked: set[tuple[torch.device, torch.dtype]] = set()


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
    """Queries [B,H,T,D], keys and values [B,H,S,D], mask [1 or B,1,T,S] to [B,H,T,D].

    In parts for one token of one row with a mask that is added, behind many whole parts on a GPU. The first time, for
    each device and dtype, the result is held against torch's own; should they differ, it is torch's from then on. That
    waits for the device: a step runs once before it is captured.
    """
    alone = query.is_cuda and query.shape[0] == query.shape[2] == 1 and mask is not None and mask.is_floating_point()
    whole = key.shape[-2] >= SHORTEST and key.shape[-2] % PART == 0
    mixed = None
    if alone and whole and mask is not None and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        mixed = SPLIT(lambda: in_parts(query, key, value, mask))
    where = (query.device, query.dtype)
    if mixed is not None and where in _checked:
        return mixed
    expected = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)
    if mixed is not None and (mixed - expected).abs().max() <= TOLERANCE * expected.abs().max():
        _checked.add(where)
    elif mixed is not None:
        SPLIT.fail(RuntimeError("it does not give what torch's attention gives"))
    return expected


def in_parts(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """One query [1,H,1,D] of keys and values [1,H,S,D], S a multiple of PART; mask [1,1,1,S], added. To [1,H,1,D]."""
    heads, parts = query.shape[1], key.shape[2] // PART
    queries = query[0, :, None].expand(-1, parts, -1, -1)  # [H,parts,1,D], as a batch of H with so many heads
    keys, values = (cached.view(heads, parts, PART, -1) for cached in (key, value))
    bias = mask.view(1, parts, 1, PART).expand(heads, -1, -1, -1)
    if query.is_cuda:
        mixed, log_sums, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(queries, keys, values, bias, True)
    else:
        mixed, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, attn_mask=bias
        )
    shares = log_sums[:, :, :1, None].softmax(dim=1)  # [H,parts,1,1] float32; behind the first, CUDA's are padding
    joined: Tensor = (mixed * shares).sum(dim=1)[None]
    return joined.to(query.dtype)


def split_attention(model: QwenVL) -> None:
    """Have the decoder's attention use `attend`, in place."""
    for module in model.decoder.modules():
        if isinstance(module, Attention):
            module.attend = attend
