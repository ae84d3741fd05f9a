"""Run a checkpoint whose decoder linears are packed (GPTQ), without unpacking the model.

Int4Linear           a linear layer over 4-bit words
quantize_structure   put it, or its sibling of 8 bits, in the place of the decoder's linears
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import QwenVLConfig
from ..errors import ConfigError
from ..weights.gptq import unpack_rows, zero_points
from ..weights.keymap import entries
from .int8 import Int8Linear
from .packed import Kernel, PackedLinear

CPU_KERNEL = Kernel("torch's int4 kernel for CPUs")
CPU_GROUPS = (32, 64, 128, 256)  # the sizes of groups that it takes
CPU_OUTPUTS = 16  # of which the outputs must be a multiple
CPU_ROWS = 32  # from more rows on, the unpacked weight is faster (bench/compare_packed.py)


class Int4Linear(PackedLinear):
    """Four bits.

    On a CPU a few rows go through torch's int4 kernel, which has activations and scales in bfloat16: the result differs
    by a quarter of a percent (the norm of the difference over the norm). For it, a second copy of the codes is kept, in
    the order in which it reads them.
    """

    def _on_cpu(self, x: Tensor) -> Tensor | None:
        rows = x.reshape(-1, self.in_features)
        order = self.order()
        if order is None or order[1] not in CPU_GROUPS or self.out_features % CPU_OUTPUTS or len(rows) > CPU_ROWS:
            return None
        inputs, size = order

        def product() -> Tensor:
            codes, scaling = self._made("CPU codes", self.qweight, lambda: self._for_cpu(inputs))
            wanted = (rows if inputs is None else rows[:, inputs]).bfloat16().contiguous()
            y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(wanted, codes, size, scaling)
            return (y.to(x.dtype) + self.bias.to(x.dtype)).view(*x.shape[:-1], self.out_features)

        return CPU_KERNEL(product)

    def _for_cpu(self, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """The codes in the kernel's order; scale and (8 - zero) * scale of each group, [groups, out, 2] bfloat16."""
        codes = unpack_rows(self.qweight).int()
        codes = (codes if inputs is None else codes[inputs]).T.contiguous()
        scales = self.scales.float()
        offsets = (8 - zero_points(self.qzeros, self.bits)) * scales
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return packed, torch.stack((scales, offsets), dim=-1).bfloat16()


def quantize_structure(model: nn.Module, config: QwenVLConfig, *, exact: bool = True) -> None:
    """Replace the linears that the checkpoint holds packed, five in every decoder block and perhaps the head, by packed
    ones, in place.

    The new layers are empty: made for a model on the meta device that a packed checkpoint fills. `exact` is theirs, see
    `PackedLinear`. Raises ConfigError if the configuration has no `quantization_config`.
    """
    if config.quantization_config is None:
        raise ConfigError("config.json has no quantization_config: these weights are not packed")
    kind = Int4Linear if config.quantization_config.bits == 4 else Int8Linear
    names = (entry.ours for entry in entries(config))
    for path in [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]:
        old = model.get_submodule(path)
        assert isinstance(old, nn.Linear), f"{path} is a {type(old).__name__}"
        with old.weight.device:
            new = kind(old.in_features, old.out_features, config.quantization_config)
        new.exact = exact
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, new)
