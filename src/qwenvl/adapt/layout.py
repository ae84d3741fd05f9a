"""How a CPU reads the decoder's float32 weights, which is for the processor to choose and for nobody else to notice.

columns_first       the weights that are faster to read column by column; the loader lays them out so
read_for_few_rows   have large products of a few rows computed by oneDNN

One token against a weight [out,in] reads all of it once, so a step takes as long as memory needs. As PyTorch lays
weights out, with `in` contiguous, each output is a short dot product; with `out` contiguous, one long row is added per
input, and for weights with more outputs than inputs that is the faster in float32, and no slower for a whole prompt
(bench/compare_eager.py times both with all else around them). Names, shapes and what is saved stay as they are.

A few rows at once, as when several requests are decoded together, should take as long as one, since the weight is read
once. torch's usual product first copies the weight into blocks, which only pays for many rows; oneDNN's does not. On
the mid-size model of that bench, 8 rows decode 4.2 times as many tokens in a second as one (AMD EPYC, 2 cores, torch
2.13.0+cpu, 2026-11-23; python bench/compare_engine.py --only steady).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..model.qwenvl import QwenVL
from .packed import Kernel

ONEDNN = Kernel("oneDNN's product of a few rows")
FEW_ROWS = range(2, 33)  # from 64 on, torch's is as fast or faster; one row is what the columns are for
LARGE = 2**20  # weights; smaller ones stay in the processor's caches whoever copies them


def columns_first(model: QwenVL, dtype: torch.dtype, device: torch.device) -> frozenset[str]:
    """Names of the weights to lay out by columns for this dtype and device: none but for float32 on a CPU."""
    if dtype != torch.float32 or device.type != "cpu":
        return frozenset()
    return frozenset(
        f"decoder.{name}.weight"
        for name, module in model.decoder.named_modules()
        if isinstance(module, nn.Linear) and module.out_features > module.in_features
    )


class FewRowsLinear(nn.Linear):
    """`nn.Linear`, whose products of a few float32 rows are oneDNN's where no gradient is wanted."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        few = input.numel() // self.in_features in FEW_ROWS and input.shape[-1] == self.in_features
        plain = type(input) is Tensor and input.dtype == self.weight.dtype == torch.float32 and input.is_cpu
        if few and plain and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            product: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
            y = ONEDNN(lambda: product(input, self.weight, self.bias, "none", [], ""))
            if y is not None:
                return y
        return super().forward(input)


def read_for_few_rows(model: nn.Module) -> None:
    """Have a model's large linear layers be `FewRowsLinear`, before they are filled; where torch has oneDNN."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for path, old in list(model.named_modules()):
        if type(old) is nn.Linear and old.weight.numel() >= LARGE:
            owner, _, name = path.rpartition(".")
            with old.weight.device:
                new = FewRowsLinear(old.in_features, old.out_features, old.bias is not None)
            setattr(model.get_submodule(owner), name, new)
