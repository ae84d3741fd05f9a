"""Linear layers over 8-bit words.

Int8Linear   a `PackedLinear` of 8 bits, with a CPU's way to compute a few rows
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..weights.gptq import pack_rows, unpack_rows, zero_points
from .packed import Kernel, PackedLinear

CPU_KERNEL = Kernel("torch's int8 kernel for CPUs")
CPU_INPUTS = 32  # of which the inputs must be a multiple: with others it computes something else, and says nothing
CPU_ROWS = 32  # from more rows on, the unpacked weight is faster (bench/compare_packed.py)
MIDDLE = 128  # the zero point of symmetric weights


class Int8Linear(PackedLinear):
    """Eight bits.

    On a CPU, symmetric weights with one scale for each output are kept as int8 [out, in], in place of the words, and a
    few rows go through torch's int8 kernel, which has activations in bfloat16. Saving writes the words.
    """

    _values: Tensor | None = None  # [out, in] int8, while they stand in for the words

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], as `PackedLinear.weight_in` gives it."""
        if self._values is None:
            return super().weight_in(dtype)
        computed = torch.float16 if dtype == torch.float16 else torch.float32
        return (self._values.to(computed) * self.scales[0, :, None].to(computed)).to(dtype)

    def _on_cpu(self, x: Tensor) -> Tensor | None:
        rows = x.reshape(-1, self.in_features)
        if len(rows) > CPU_ROWS or CPU_KERNEL.failed or not self._keep_values():
            return None

        def product() -> Tensor:
            ones = torch.ones(self.out_features, dtype=torch.bfloat16)  # its scales are bfloat16: ours come after
            y: Tensor = torch.ops.aten._weight_int8pack_mm(rows.bfloat16().contiguous(), self._values, ones)
            scaled = y.float() * self.scales[0].float() + self.bias.float()
            return scaled.to(x.dtype).view(*x.shape[:-1], self.out_features)

        return CPU_KERNEL(product)

    def _keep_values(self) -> bool:
        """Whether the values are there, after having made them if these weights can be kept so."""
        if self._values is None:
            if self.scales.shape[0] > 1 or self.in_features % CPU_INPUTS:
                return False
            symmetric = self._made(
                "symmetric", self.qzeros, lambda: zero_points(self.qzeros, self.bits).eq(MIDDLE).all()
            )
            if not symmetric:
                return False
            self._values = (unpack_rows(self.qweight, self.bits).T - MIDDLE).to(torch.int8).contiguous()
            self.qweight = self.qweight.new_empty(0, self.out_features)
        return True

    def _restore_words(self) -> None:
        if self._values is not None:
            self.qweight = pack_rows(self._values.T.to(torch.int16) + MIDDLE, self.bits)
            self._values = None

    def _apply(self, fn: Any, recurse: Any = True) -> Any:  # noqa: ANN401 - as torch declares it: `.to` and the like
        self._restore_words()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as torch calls it
        self._restore_words()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as torch calls it
        self._restore_words()
        super()._load_from_state_dict(*args, **kwargs)
