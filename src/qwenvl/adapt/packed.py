"""A linear layer over packed weights that runs wherever torch does, without unpacking the model.

    PackedLinear   holds packed words and unpacks them when it is called, or multiplies them as they are
    Kernel         a faster way, used until it fails

One token reads every weight once and does little with it, so it takes as long as its bytes take to arrive: there the
packed words are multiplied as they are, by a kernel for the device. A prompt has many rows for each weight, and for
these the layer is unpacked: the exact, portable path, for any number of bits and any order of groups, against which the
kernels are checked. It takes four to five times the layer's 16-bit weight while it lasts.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import QuantizationConfig
from ..weights.gptq import dequantize, pack_rows, unpack_rows

T = TypeVar("T")


class Kernel:
    """A way to compute that a device or a build of torch may lack: used until it fails, which is told once."""

    def __init__(self, name: str) -> None:
        self.name, self.failed = name, False

    def __call__(self, compute: Callable[[], Tensor]) -> Tensor | None:
        """What `compute` returns; None if it fails, and from then on. Running out of memory is no such failure."""
        if self.failed:
            return None
        try:
            return compute()
        except torch.OutOfMemoryError:
            raise
        except (ImportError, AttributeError, NotImplementedError, RuntimeError) as error:
            self.failed = True
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            print(f"{self.name} cannot be used here ({reason}): going on without, more slowly", file=sys.stderr)
            return None


CUDA_KERNEL = Kernel("the Triton kernel for packed weights")
CUDA_ROWS = 16  # what it takes at once


class PackedLinear(nn.Module):
    """x W^T + b with W packed as `weights/gptq.py` describes; holds buffers only, nothing here is trained.

    `qweight` [in * bits / 32, out] int32, `qzeros` [groups, out * bits / 32] int32, `scales` [groups, out], `g_idx`
    [in] int32, `bias` [out]. Scales keep the dtype in which they are stored (float16) whatever the model's dtype: the
    weight is exact only with them, so choose a dtype when loading and do not cast the module to bfloat16 afterwards.

    `exact`: on a CPU, float32 activations are multiplied in float32. If it is false they may be rounded to bfloat16 on
    the way, for a kernel that is faster; bfloat16 activations always may. On CUDA the kernel is exact in the weights.
    """

    exact = True
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
        self._kept: dict[str, tuple[Tensor, int, Any]] = {}

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
        few = self._few_rows(x)
        return self._product(x) if few is None else few

    def _product(self, x: Tensor) -> Tensor:
        # A CPU without matrix units for bfloat16 multiplies it several times slower than float32, and not better.
        dtype = torch.float32 if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x.dtype
        return F.linear(x.to(dtype), self.weight_in(dtype), self.bias.to(dtype)).to(x.dtype)

    def _few_rows(self, x: Tensor) -> Tensor | None:
        """The product by a kernel; None if there is none for this device, these rows or these groups."""
        rows = x.numel() // self.in_features
        if x.is_cuda:
            order = self.order() if rows <= CUDA_ROWS and self.scales.dtype == torch.float16 else None
            return None if order is None else CUDA_KERNEL(lambda: self._on_cuda(x, *order))
        if x.device.type == "cpu" and (x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and not self.exact)):
            return self._on_cpu(x)
        return None

    def _on_cpu(self, x: Tensor) -> Tensor | None:  # noqa: ARG002 - each number of bits has its own
        return None

    def _on_cuda(self, x: Tensor, order: Tensor | None, group_size: int) -> Tensor:
        from .packed_triton import matvec  # Triton comes with torch for CUDA

        rows = x.reshape(-1, self.in_features)
        words = self.qweight
        if order is not None:
            codes = functools.partial(unpack_rows, words, self.bits)
            words = self._made("words in order", words, lambda: pack_rows(codes()[order], self.bits))
            rows = rows[:, order]
        y: Tensor = matvec(rows, words, self.qzeros, self.scales, self.bias, group_size=group_size, bits=self.bits)
        return y.view(*x.shape[:-1], self.out_features)

    def order(self) -> tuple[Tensor | None, int] | None:
        """The inputs' order [in] in which groups stand one after the other, None if they do as they are; their size.

        None at all if the groups are not all of one size. Act-order checkpoints shuffle them.
        """
        return self._made("order", self.g_idx, self._find_order)

    def _find_order(self) -> tuple[Tensor | None, int] | None:
        size = -(-self.in_features // self.scales.shape[0])
        groups, order = self.g_idx.sort(stable=True)
        if not torch.equal(groups, torch.arange(self.in_features, device=groups.device) // size):
            return None
        return (None if torch.equal(self.g_idx, groups) else order), size

    def _made(self, name: str, source: Tensor, make: Callable[[], T]) -> T:
        """What was made from a buffer, as long as it is that buffer, unwritten; else made now."""
        known = self._kept.get(name)
        if known is not None and torch.compiler.is_compiling():  # which knows no versions, and runs after a first call
            return known[2]  # type: ignore[no-any-return]
        version = 0 if source.is_inference() else source._version
        if known is None or known[0] is not source or known[1] != version:
            known = self._kept[name] = source, version, make()
        made: T = known[2]
        return made

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"
