"""Two projections of the same input as one product, after loading.

    fuse         give every decoder block's MLP its two input projections as one
    FusedSwiGLU  what stands in the place of `SwiGLU`

The modules `w1` and `w2` stay, with their names and shapes, as views of the one weight: adapters, shards and whoever
saves the model find them where they were, and nothing is held twice.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.decoder import SwiGLU
from ..model.qwenvl import QwenVL
from .packed import PackedLinear

# What an output has of each tensor of a linear layer stands along this dimension; `g_idx` is the inputs'.
OUTPUTS = {"weight": 0, "bias": 0, "qweight": 1, "qzeros": 1, "scales": 1}


class FusedSwiGLU(nn.Module):
    """`SwiGLU` whose `w1` and `w2` read their input once.

    Where gradients are wanted, or one of the two has been replaced (by an adapter) or moved (by `.to`), it computes
    them one by one, as `SwiGLU` does.
    """

    def __init__(self, mlp: SwiGLU) -> None:
        super().__init__()
        self.w1, self.w2, self.c_proj = mlp.w1, mlp.w2, mlp.c_proj
        self._both = [_joined(mlp.w1, mlp.w2)]  # in a list, where `state_dict` does not look

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,C] to [B,T,C]."""
        if self._both and not _halves(self._both[0], self.w1, self.w2):
            self._both.clear()
        if not self._both or torch.is_grad_enabled():
            value, gate = self.w1(x), self.w2(x)
        else:
            value, gate = self._both[0](x).chunk(2, dim=-1)
        mixed: Tensor = self.c_proj(value * F.silu(gate))
        return mixed

    def _apply(self, fn: Any, recurse: Any = True) -> Any:  # noqa: ANN401 - as torch declares it: `.to` and the like
        self._both.clear()  # which would keep the memory that the halves leave
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def fuse(model: QwenVL) -> None:
    """Fuse the MLPs of a loaded model, in place, layer by layer; those whose projections do not fit together stay."""
    for block in model.decoder.blocks:
        mlp: Any = block.mlp
        if isinstance(mlp, SwiGLU) and _fit(mlp.w1, mlp.w2):
            block.mlp = FusedSwiGLU(mlp)


def _fit(w1: nn.Module, w2: nn.Module) -> bool:
    if type(w1) is not type(w2):
        return False
    if isinstance(w1, PackedLinear) and isinstance(w2, PackedLinear):
        # Act-order may have shuffled them differently; and what is arranged for a CPU holds no words.
        return torch.equal(w1.g_idx, w2.g_idx) and w1.qweight.numel() == w2.qweight.numel() > 0
    return type(w1) is nn.Linear


@torch.no_grad()
def _joined(w1: nn.Module, w2: nn.Module) -> nn.Module:
    """One module for both, whose memory they have from then on."""
    both = copy.deepcopy(w1, {id(old): old for old in (*w1.parameters(), *w1.buffers())})  # these are replaced below
    both.out_features = 2 * w1.out_features  # type: ignore[assignment, operator]
    for name, dim in OUTPUTS.items():
        old: Any = getattr(w1, name, None)
        if old is None:
            continue
        joined = torch.cat((old, getattr(w2, name)), dim)
        for module, tensor in ((both, joined), *zip((w1, w2), joined.chunk(2, dim), strict=True)):
            setattr(module, name, nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor)
    return both


def _halves(both: nn.Module, *halves: nn.Module) -> bool:
    """Whether two modules still are the halves of one."""
    name = "weight" if isinstance(both, nn.Linear) else "qweight"
    parts = getattr(both, name).chunk(2, OUTPUTS[name])
    return all(
        type(half) is type(both) and getattr(half, name).data_ptr() == part.data_ptr()
        for half, part in zip(halves, parts, strict=True)
    )
