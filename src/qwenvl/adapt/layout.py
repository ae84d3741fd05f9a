"""How the decoder's weights lie in memory, which is for the processor to choose and for nobody else to notice.

columns_first   the weights that a CPU reads faster column by column; the loader lays them out so

One token against a weight [out,in] reads all of it once, so a step takes as long as memory needs. As PyTorch lays
weights out, with `in` contiguous, each output is a short dot product; with `out` contiguous, one long row is added per
input, and for weights with more outputs than inputs that is the faster in float32, and no slower for a whole prompt
(bench/compare_eager.py times both with all else around them). Names, shapes and what is saved stay as they are.
"""

from __future__ import annotations

import torch
from torch import nn

from ..model.qwenvl import QwenVL


def columns_first(model: QwenVL, dtype: torch.dtype, device: torch.device) -> frozenset[str]:
    """Names of the weights to lay out by columns for this dtype and device: none but for float32 on a CPU."""
    if dtype != torch.float32 or device.type != "cpu":
        return frozenset()
    return frozenset(
        f"decoder.{name}.weight"
        for name, module in model.decoder.named_modules()
        if isinstance(module, nn.Linear) and module.out_features > module.in_features
    )
