"""Run a checkpoint whose decoder linears are packed to 4 bits (GPTQ), without unpacking the model.

    Int4Linear           a linear layer that holds packed words and unpacks them when it is called
    quantize_structure   put it in the place of the decoder's linears

This is the exact, portable path: it runs wherever torch does. It is not fast, for every call unpacks the whole layer,
which takes four to five times that layer's 16-bit weight while it lasts; faster kernels are checked against it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import QuantizationConfig, QwenVLConfig
from ..errors import ConfigError
from ..weights.gptq import PER_WORD, dequantize
from ..weights.keymap import entries


class Int4Linear(nn.Module):
    """x W^T + b with W packed as `weights/gptq.py` describes; holds buffers only, nothing here is trained.

    `qweight` [in/8, out] int32, `qzeros` [groups, out/8] int32, `scales` [groups, out], `g_idx` [in] int32,
    `bias` [out]. Scales keep the dtype in which they are stored (float16) whatever the model's dtype: the weight is
    exact only with them, so choose a dtype when loading and do not cast the module to bfloat16 afterwards.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor

    def __init__(self, in_features: int, out_features: int, quantization: QuantizationConfig) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        groups = -(-in_features // quantization.group_size)
        packed = {"qweight": (in_features // PER_WORD, out_features), "qzeros": (groups, out_features // PER_WORD)}
        for name, shape in packed.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16))
        group_of = torch.arange(groups, dtype=torch.int32)[:, None].expand(-1, quantization.group_size)
        self.register_buffer("g_idx", group_of.flatten()[:in_features])
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
        return f"in_features={self.in_features}, out_features={self.out_features}, bits=4"


def quantize_structure(model: nn.Module, config: QwenVLConfig) -> None:
    """Replace the linears that the checkpoint holds packed, five in every decoder block, by `Int4Linear`, in place.

    The new layers are empty: made for a model on the meta device that a packed checkpoint fills. Raises ConfigError if
    the configuration has no `quantization_config`.
    """
    if config.quantization_config is None:
        raise ConfigError("config.json has no quantization_config: these weights are not packed")
    names = (entry.ours for entry in entries(config))
    for path in [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]:
        old = model.get_submodule(path)
        assert isinstance(old, nn.Linear), f"{path} is a {type(old).__name__}"
        with old.weight.device:
            new = Int4Linear(old.in_features, old.out_features, config.quantization_config)
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, new)
