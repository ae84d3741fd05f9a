"""A linear layer over packed weights that runs wherever torch does, without unpacking the model.

    PackedLinear   holds packed words and unpacks them when it is called, or multiplies them as they are
    Kernel         a faster way, used until it fails

One token reads every weight once and does little with it, so it takes as long as its bytes take to arrive: there the
packed words are multiplied as they are, by a kernel for the device. A prompt has many rows for each weight, and for
these the layer is unpacked, for a large product: on a GPU by a kernel, else by the exact, portable path, for any number
of bits and any order of groups, against which the kernels are checked. While it lasts it takes the unpacked weight, and
some ten megabytes beside it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import QuantizationConfig
from ..weights.gptq import pack_rows, unpack_rows, zero_points
from . import packed_cpu

T = TypeVar("T")


class Kernel:
    """A way to compute that a device or a build of torch may lack: used until it fails, which is told once."""

    def __init__(self, name: str) -> None:
        self.name, self.failed = name, False

    def __call__(self, compute: Callable[[], T]) -> T | None:
        """What `compute` returns; None if it fails, and from then on. Running out of memory is no such failure.

        Compilers fail in ways of their own (no C compiler, a folder that cannot be written), so any error counts. While
        a CUDA graph is captured it is raised: the capture is lost then, whatever comes instead.
        """
        if self.failed:
            return None
        try:
            return compute()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise
            self.fail(error)
            return None

    def fail(self, error: Exception) -> None:
        """Do without from now on, which is told in one line."""
        self.failed = True
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        print(f"{self.name} cannot be used here ({reason}): going on without, more slowly", file=sys.stderr)


CPU_SUMS = Kernel("torch's kernel for sums of bytes")
CPU_ROWS = 64  # beyond so many, the unpacked weight is faster, of small layers beyond fewer (bench/compare_packed.py)
TRITON = Kernel("Triton")
FEW_ROWS = Kernel("the Triton kernel for a few rows of packed weights")
UNPACKING = Kernel("the Triton kernel that unpacks weights")
CUDA_ROWS = 32  # by counting bytes, not measured: a pass reads half a byte of a 4-bit weight, unpacking moves 4.5
PASS = 16  # rows that the kernel takes at once
BLOCK = 2**20  # weights that are unpacked at a time, for which some 14 bytes each are needed on the way


def few_rows(weights: int) -> int:
    """Up to how many rows the kernel for CPUs is faster than unpacking a layer of so many weights."""
    return min(8 + weights // 100_000, CPU_ROWS)


class PackedLinear(nn.Module):
    """x W^T + b with W packed as `weights/gptq.py` describes; holds buffers only, nothing here is trained.

    `qweight` [in * bits / 32, out] int32, `qzeros` [groups, out * bits / 32] int32, `scales` [groups, out], `g_idx`
    [in] int32, `bias` [out]. Scales keep the dtype in which they are stored (float16), whatever the model is cast to:
    the weight is exact only with them.

    Every way to multiply has these weights exactly; activations of 16 bits are summed up in float32.
    """

    _table: packed_cpu.Table | None = None  # while it stands in for the words
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
        computed = torch.float16 if dtype == torch.float16 else torch.float32
        weight = torch.empty(self.in_features, self.out_features, dtype=dtype, device=self.qweight.device)
        for columns in self._blocks():
            scales = self.scales[:, columns].to(computed)
            weight[:, columns] = self._steps(columns).to(computed).mul_(scales[self.g_idx])
        return weight.T

    def _steps(self, columns: slice) -> Tensor:
        """The codes of some outputs less their zero points, [in, columns]."""
        if self._table is not None:
            return packed_cpu.steps(self._table, columns)
        return unpack_rows(self.qweight[:, columns], self.bits) - self._zeros(columns)

    def _zeros(self, columns: slice) -> Tensor:
        """The zero points of some outputs, [in, columns]."""
        per_word = 32 // self.bits
        words = self.qzeros[:, columns.start // per_word : columns.stop // per_word]
        return zero_points(words, self.bits)[self.g_idx]

    def _blocks(self) -> Iterator[slice]:
        """The outputs, some at a time, so that what is made of them on the way stays small."""
        size = max(BLOCK // self.in_features // 32, 1) * 32
        for start in range(0, self.out_features, size):
            yield slice(start, min(start + size, self.out_features))

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
        weight = self._unpacked_on_cuda(dtype) if x.is_cuda else None
        weight = self.weight_in(dtype) if weight is None else weight
        return F.linear(x.to(dtype), weight, self.bias.to(dtype)).to(x.dtype)

    def _few_rows(self, x: Tensor) -> Tensor | None:
        """The product by a kernel; None if there is none for this device, these rows or these groups."""
        if x.shape[-1] != self.in_features:  # torch says so below, and it is no kernel's failure
            return None
        rows = x.reshape(-1, self.in_features)
        y = self._on_cuda(rows) if x.is_cuda else self._on_cpu(rows) if x.device.type == "cpu" else None
        return None if y is None else y.view(*x.shape[:-1], self.out_features)

    def arrange(self) -> None:
        """On a CPU, keep the weight in the order in which its kernel reads it, in place of the words.

        It takes a byte and a twelfth for each weight. Saving, loading and moving see the words all the same.
        """
        if self._table is None and self.qweight.device.type == "cpu":
            self._table = packed_cpu.arrange(self._steps, self.scales, self.g_idx, self.bits)
            if self._table is not None:
                self.qweight = self.qweight.new_empty(0, self.out_features)

    def _words(self) -> Tensor:
        """What `qweight` is, or was before `arrange`."""
        if self._table is None:
            return self.qweight
        return torch.cat([pack_rows(self._steps(part) + self._zeros(part), self.bits) for part in self._blocks()], 1)

    @contextmanager
    def _as_words(self) -> Iterator[None]:
        """For a while, hold the words again, so that they can be replaced."""
        arranged = self._table is not None
        self.qweight, self._table = self._words(), None
        try:
            yield
        finally:
            if arranged:
                self.arrange()

    def _on_cpu(self, rows: Tensor) -> Tensor | None:
        """[rows, in] to [rows, out]."""
        table = self._table
        if table is None or not 1 <= len(rows) <= few_rows(self.in_features * self.out_features):
            return None
        y = CPU_SUMS(lambda: packed_cpu.multiply(rows.float(), table))
        if y is not None and self._made("bias", self.bias, lambda: bool(self.bias.any())):
            y += self.bias
        return None if y is None else y.to(rows.dtype)

    def _on_cuda(self, rows: Tensor) -> Tensor | None:
        """[rows, in] to [rows, out]."""
        if not 1 <= len(rows) <= CUDA_ROWS or (kernels := self._triton()) is None or FEW_ROWS.failed:
            return None
        order = self.order()
        if order is None or order[1] * self.bits % 32:  # a word must not hold codes of two groups
            return None
        inputs, size = order

        def product() -> Tensor:
            words, wanted = self.qweight, rows
            if inputs is not None:  # a second copy of the words, which a step would be slower without
                words, wanted = self._made("words in order", words, lambda: self._reordered(inputs)), rows[:, inputs]
            parts = [
                kernels.matvec(part, words, self.qzeros, self.scales, self.bias, group_size=size, bits=self.bits)
                for part in torch.split(wanted, PASS)
            ]
            y: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
            return y

        return FEW_ROWS(product)

    def _unpacked_on_cuda(self, dtype: torch.dtype) -> Tensor | None:
        """What `weight_in` gives, by a kernel that needs no memory beside it; None if there is none."""
        if (kernels := self._triton()) is None or UNPACKING.failed:
            return None
        order = self.order()
        size = order[1] if order is not None and order[0] is None else None
        parts = self.qweight, self.qzeros, self.scales, self.g_idx
        weight: Tensor | None = UNPACKING(
            lambda: kernels.dequantize(*parts, group_size=size, bits=self.bits, dtype=dtype)
        )
        return weight

    def _triton(self) -> ModuleType | None:
        """The kernels, if Triton is there (it comes with torch for CUDA) and these scales are exact in them."""
        if self.scales.dtype != torch.float16 or TRITON.failed:
            return None
        if torch.compiler.is_compiling():  # which does not see through `import_module`, and comes after a first call
            from . import packed_triton

            return packed_triton
        return TRITON(lambda: importlib.import_module(".packed_triton", __package__))

    def _reordered(self, inputs: Tensor) -> Tensor:
        """The words with their inputs in this order."""
        parts = [unpack_rows(self.qweight[:, columns], self.bits)[inputs] for columns in self._blocks()]
        return torch.cat([pack_rows(part, self.bits) for part in parts], dim=1)

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

    def _apply(self, fn: Any, recurse: Any = True) -> Any:  # noqa: ANN401 - as torch declares it: `.to` and the like
        with self._as_words():
            scales = self.scales
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            if self.scales.dtype != scales.dtype:
                self.scales = scales.to(self.scales.device)
            return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as torch calls it
        with self._as_words():
            super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:  # noqa: ANN401
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "qweight"] = self._words()

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"
