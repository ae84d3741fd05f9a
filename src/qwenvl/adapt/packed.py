"""A linear layer over packed weights that runs wherever torch does, without unpacking the model.

    PackedLinear   holds packed words and unpacks them when it is called

This is the exact, portable path, for any number of bits and any order of groups. Every call unpacks the whole layer,
which takes four to five times that layer's 16-bit weight while it lasts; the kernels of `int4` and `int8` are checked
against it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import QuantizationConfig
from ..weights.gptq import dequantize


class PackedLinear(nn.Module):
    """x W^T + b with W packed as `weights/gptq.py` describes; holds buffers only, nothing here is trained.

    `qweight` [in * bits / 32, out] int32, `qzeros` [groups, out * bits / 32] int32, `scales` [groups, out], `g_idx`
    [in] int32, `bias` [out]. Scales keep the dtype in which they are stored (float16) whatever the model's dtype: the
    weight is exact only with them, so choose a dtype when loading and do not cast the module to bfloat16 afterwards.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor

    def __init__(self, in_features: int, out_features: int, quantization: QuantizationConfig) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits = quantization.bits
        groups, per_word = quantization.groups(in_features), quantization.per_word
        words = {"qweight": (in_features // per_word, out_features), "qzeros": (groups, out_features // per_word)}
        for name, shape in words.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16))
        size = in_features if quantization.group_size == -1 else quantization.group_size
        self.register_buffer("g_idx", torch.arange(in_features, dtype=torch.int32) // size)
        self.register_buffer("bias", torch.zeros(out_features))

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], unpacked.

        In float16 it is scale * step rounded to float16, as the published model computes it. Otherwise it is computed
        in float32, where it is exact, and cast: bfloat16 would lose bits of the scale before the product is made.
        """
        scales = self.scales.to(torch.float16 if dtype == torch.float16 else torch.float32)
        return dequantize(self.qweight, self.qzeros, scales, self.g_idx).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of `x`.

        Where gradients flow through it (QLoRA), the backward pass unpacks again: autograd would otherwise keep every
        layer's unpacked weight, and training would take a 16-bit model's memory.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            return checkpoint(self._product, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_in(x.dtype), self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"
