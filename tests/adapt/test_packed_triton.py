"""Packed layers on a GPU: the Triton kernels themselves where Triton is, and everywhere what is handed to them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton_runs
from packed_layers import CASES, Pretended, golden_layer, random_layer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qwenvl.adapt import packed
from qwenvl.adapt.packed import CUDA_ROWS, PASS, Kernel, PackedLinear
from qwenvl.weights.gptq import dequantize

MODULE = "qwenvl.adapt.packed_triton"


@pytest.mark.parametrize("where", triton_runs.WHERE)
def test_the_kernels_themselves(where: str) -> None:
    """They give the exact path's numbers: on goldens, on shapes of every form, without touching what lies around."""
    triton_runs.run("interpreted_triton.py", where)


# --- what the kernels are handed, and what happens without them ------------------------------------------------------


class StandIn(ModuleType):
    """In the place of the Triton kernels: notes what it is handed and computes it as `dequantize` does."""

    def __init__(self) -> None:
        super().__init__(MODULE)
        self.handed: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def matvec(self, x: Tensor, *parts: Tensor, **facts: Any) -> Tensor:
        self.handed.append(("matvec", (x, *parts), facts))
        assert len(x) <= PASS
        qweight, qzeros, scales, bias = parts
        index = torch.arange(x.shape[1], dtype=torch.int32) // facts["group_size"]
        return F.linear(x.float(), dequantize(qweight, qzeros, scales.float(), index), bias.float()).to(x.dtype)

    def dequantize(self, *parts: Tensor, **facts: Any) -> Tensor:
        self.handed.append(("dequantize", parts, facts))
        qweight, qzeros, scales, g_idx = parts
        return dequantize(qweight, qzeros, scales.float(), g_idx).to(facts["dtype"])

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.handed]


@pytest.fixture(autouse=True)
def kernels_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins with kernels that have not failed yet."""
    for kernel in (packed.TRITON, packed.FEW_ROWS, packed.UNPACKING):
        monkeypatch.setattr(kernel, "failed", False)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The kernels that a layer finds."""
    module = StandIn()
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module


def pretended(rows: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An input that says it is on a GPU."""
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).to(dtype).as_subclass(Pretended)


def check(layer: PackedLinear, x: Tensor) -> None:
    """The layer's output is the exact path's."""
    with torch.no_grad():
        found = layer(x).as_subclass(Tensor)
    exact = F.linear(x.as_subclass(Tensor).float(), layer.weight_in(torch.float32), layer.bias)
    torch.testing.assert_close(found, exact.to(x.dtype), atol=1e-3, rtol=1e-2 if x.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, 32), (4, -1), (8, 128), (8, -1)])
def test_a_few_rows(stand_in: StandIn, bits: int, group_size: int) -> None:
    """One product from the words as they are, with the size of their groups; nothing is unpacked."""
    layer = random_layer(256, 48, bits=bits, group_size=group_size)
    check(layer, pretended(3, 256))
    ((name, parts, facts),) = stand_in.handed
    assert name == "matvec"
    assert [id(part) for part in parts[1:]] == [id(p) for p in (layer.qweight, layer.qzeros, layer.scales, layer.bias)]
    assert facts == {"group_size": 256 if group_size == -1 else group_size, "bits": bits}
    x = pretended(1, 256).view(1, 1, 256)
    with torch.no_grad():
        assert layer(x).shape == (1, 1, 48)


@pytest.mark.parametrize("case", CASES)
def test_goldens(goldens: Path, stand_in: StandIn, case: str) -> None:
    """AutoGPTQ's cases, shuffled groups among them, give its outputs through what the kernels are handed."""
    layer, golden = golden_layer(goldens, case)
    for x, y in zip(golden["x"].split(1), golden["y"].split(1), strict=True):
        with torch.no_grad():
            found = layer(x.as_subclass(Pretended)).as_subclass(Tensor)
        torch.testing.assert_close(found, y, atol=1e-4, rtol=0)
    assert set(stand_in.names) == {"matvec"}


def test_shuffled_groups(stand_in: StandIn) -> None:
    """Words are put in order for a few rows, once until they change; for many, the kernel reads the order itself."""
    layer = random_layer(256, 48, group_size=32, shuffled=True)
    for rows in (1, 2):
        check(layer, pretended(rows, 256))
    words = [parts[1] for _, parts, _ in stand_in.handed]
    assert words[0] is words[1]
    layer.qweight.add_(1)
    check(layer, pretended(1, 256))
    assert stand_in.handed[-1][1][1] is not words[0]
    check(layer, pretended(100, 256))
    name, parts, facts = stand_in.handed[-1]
    assert name == "dequantize"
    assert parts[3] is layer.g_idx
    assert facts == {"group_size": None, "bits": 4, "dtype": torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_many_rows(stand_in: StandIn, dtype: torch.dtype) -> None:
    """A prompt unpacks the layer, in the activations' dtype, by the kernel and never by the path that takes more."""
    layer = random_layer(256, 48)
    x = pretended(CUDA_ROWS + 1, 256, dtype)
    exact, layer.weight_in = layer.weight_in, None  # type: ignore[assignment, method-assign]
    with torch.no_grad():
        found = layer(x).as_subclass(Tensor)
    expected = F.linear(x.as_subclass(Tensor), exact(dtype), layer.bias.to(dtype))
    torch.testing.assert_close(found, expected)
    ((name, parts, facts),) = stand_in.handed
    assert name == "dequantize"
    assert facts == {"group_size": 128, "bits": 4, "dtype": dtype}
    assert [id(p) for p in parts] == [id(p) for p in (layer.qweight, layer.qzeros, layer.scales, layer.g_idx)]


@pytest.mark.parametrize("rows", [PASS, PASS + 1, CUDA_ROWS])
def test_passes(stand_in: StandIn, rows: int) -> None:
    """More rows than the kernel takes at once go through it in turn."""
    check(random_layer(256, 48), pretended(rows, 256))
    assert [len(parts[0]) for _, parts, _ in stand_in.handed] == ([PASS] if rows == PASS else [PASS, rows - PASS])


@pytest.mark.parametrize("form", [{"inputs": 192}, {"group_size": 4}, {"group_size": 12, "inputs": 72}], ids=str)
def test_groups_that_do_not_fit(stand_in: StandIn, form: dict[str, int]) -> None:
    """A short last group, or a word with codes of two groups: one row is unpacked for, too."""
    layer = random_layer(**{"inputs": 256, "outputs": 48, **form})
    check(layer, pretended(1, layer.in_features))
    assert stand_in.names == ["dequantize"]


def test_scales_of_other_dtypes(stand_in: StandIn) -> None:
    """The kernels are exact with float16 scales only; others go the exact way."""
    layer = random_layer(256, 48)
    layer.scales = layer.scales.float()
    for rows in (1, 100):
        check(layer, pretended(rows, 256))
    assert stand_in.names == []


def test_gradients(stand_in: StandIn) -> None:
    """QLoRA: forward and backward unpack by the kernel, and the gradient is the exact weight's."""
    layer = random_layer(256, 48)
    x = pretended(2, 256).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    expected = layer.weight_in(torch.float32).sum(0).expand(2, -1)
    torch.testing.assert_close(x.grad.as_subclass(Tensor), expected, atol=1e-4, rtol=1e-5)
    assert stand_in.names == ["dequantize", "dequantize"]


ERRORS = [
    RuntimeError("Failed to find C compiler.\nSet CC"),
    subprocess.CalledProcessError(1, ["gcc", "main.c"]),
    PermissionError(13, "Permission denied", "/.triton"),
    NotImplementedError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_kernel_that_fails(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    """However it fails (no compiler, a failing one, a folder that cannot be written): told once, in one line for each
    kernel, and the exact way takes over.
    """

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(stand_in, "matvec", fails)
    monkeypatch.setattr(stand_in, "dequantize", fails)
    for layer in (random_layer(256, 48), random_layer(128, 16, shuffled=True)):
        for rows in (1, 1, 100, 100):
            check(layer, pretended(rows, layer.in_features))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "few rows" in told[0]
    assert "unpacks" in told[1]
    assert all((str(error).split("\n")[0] or "NotImplementedError") in line for line in told)


def test_without_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line for all kernels together, and the exact way."""
    monkeypatch.setitem(sys.modules, MODULE, None)
    layer = random_layer(256, 48)
    for rows in (1, 100, 1, 100):
        check(layer, pretended(rows, 256))
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("Triton cannot be used here (")


@pytest.mark.parametrize("rows", [1, 100])
def test_out_of_memory_is_not_a_missing_kernel(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """It is raised as it is: the other way would need more."""

    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(stand_in, "matvec", fails)
    monkeypatch.setattr(stand_in, "dequantize", fails)
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        random_layer(256, 48)(pretended(rows, 256))
    assert not packed.FEW_ROWS.failed
    assert not packed.UNPACKING.failed


def test_a_failing_capture_is_no_missing_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What fails while a graph is captured is that graph's: the kernel goes on being used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    kernel = Kernel("a kernel")

    def fails() -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="capturing"):
        kernel(fails)
    assert not kernel.failed
    assert capsys.readouterr().err == ""


# --- the exact path's memory -----------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the bytes of every tensor that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and all(made is not given for given in args):
            self.sizes.append(made.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_unpacking_takes_little_more_than_the_weight(dtype: torch.dtype, bits: int) -> None:
    """Beside the weight itself, the exact path makes nothing that grows with it: it once took four times the weight."""
    layer = random_layer(4096, 1024 + 32, bits=bits, group_size=128)
    with Largest() as made:
        weight = layer.weight_in(dtype)
    exact = dequantize(layer.qweight, layer.qzeros, layer.scales.float(), layer.g_idx)
    assert torch.equal(weight, exact.to(dtype))
    held = {buffer.untyped_storage().nbytes() for buffer in layer.buffers()}
    beside = [size for size in made.sizes if size not in held and size != weight.untyped_storage().nbytes()]
    assert beside
    assert max(beside) <= 8 * packed.BLOCK  # values being shifted out of words: 4 bytes each, some in int64
