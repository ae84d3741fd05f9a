"""Int4 linears against AutoGPTQ's own numbers, and a packed model end to end."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from qwenvl.adapt import int4, int8
from qwenvl.adapt.int4 import Int4Linear, quantize_structure
from qwenvl.adapt.int8 import Int8Linear
from qwenvl.adapt.packed import PackedLinear
from qwenvl.config import QuantizationConfig, QwenVLConfig
from qwenvl.errors import ConfigError
from qwenvl.model.qwenvl import QwenVL
from qwenvl.weights.gptq import pack_columns
from qwenvl.weights.keymap import entries

CASES = ["A", "B", "C", "D", "E"]


def golden_layer(goldens: Path, case: str) -> tuple[Int4Linear, dict[str, torch.Tensor]]:
    """A golden linear as a module, and its tensors."""
    cases = load_file(goldens / "gptq" / "cases.safetensors")
    tensors = {name[2:]: tensor for name, tensor in cases.items() if name.startswith(f"{case}.")}
    facts = json.loads((goldens / "gptq" / "cases.json").read_text())["cases"][case]
    layer = Int4Linear(facts["in_features"], facts["out_features"], QuantizationConfig(group_size=facts["group_size"]))
    state = {name: tensors[name] for name in ("qweight", "qzeros", "scales", "g_idx")}
    layer.load_state_dict({"bias": torch.zeros(facts["out_features"]), **state, **only(tensors, "bias")})
    return layer, tensors


def only(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {name: tensors[name]} if name in tensors else {}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_oracles(goldens: Path, case: str) -> None:
    """The layer computes what AutoGPTQ's computes, in float32 and in float16, with and without act-order."""
    layer, golden = golden_layer(goldens, case)
    torch.testing.assert_close(layer(golden["x"]), golden["y"], atol=1e-4, rtol=0)
    torch.testing.assert_close(layer(golden["x"].half()), golden["y_fp16"], atol=0.05, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_weight_is_rounded_once(goldens: Path, case: str) -> None:
    """In bfloat16 the weight is the exact one rounded, never a product of rounded scales."""
    layer, golden = golden_layer(goldens, case)
    assert torch.equal(layer.weight_in(torch.bfloat16), golden["dequant_weight"].bfloat16())


def tiny_int4(goldens: Path) -> QwenVLConfig:
    config = QwenVLConfig.load(goldens / "tiny-112")
    return replace(config, quantization_config=QuantizationConfig())


def test_structure_has_the_packed_names_and_shapes(goldens: Path) -> None:
    """On the meta device, the quantised model holds exactly the tensors that the table of names expects."""
    config = tiny_int4(goldens)
    with torch.device("meta"):
        model = QwenVL(config)
    quantize_structure(model, config)
    state = model.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        entry.ours: entry.our_shape for entry in entries(config)
    }
    assert all(tensor.is_meta for tensor in state.values())
    packed = {entry.ours for entry in entries(config) if entry.kind == "packed"}
    assert {name for name, tensor in state.items() if tensor.dtype == torch.int32} == packed


def test_plain_configuration_is_refused(goldens: Path) -> None:
    """A model is not packed unless its configuration says that its weights are."""
    config = QwenVLConfig.load(goldens / "tiny-112")
    with torch.device("meta"):
        model = QwenVL(config)
    with pytest.raises(ConfigError, match="no quantization_config"):
        quantize_structure(model, config)


# --- a few rows, by kernels ------------------------------------------------------------------------------------------


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.fixture(autouse=True)
def kernels_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins with kernels that have not failed yet."""
    for kernel in (int4.CPU_KERNEL, int8.CPU_KERNEL):
        monkeypatch.setattr(kernel, "failed", False)


def random_layer(
    inputs: int, outputs: int, *, bits: int = 4, group_size: int = 128, symmetric: bool = False, shuffled: bool = False
) -> PackedLinear:
    """A packed linear of random codes, scales, zero points and bias."""
    generator = torch.Generator().manual_seed(inputs + outputs)
    kind = Int4Linear if bits == 4 else Int8Linear
    layer = kind(inputs, outputs, QuantizationConfig(bits=bits, group_size=group_size))
    layer.qweight.random_(-(2**31), 2**31 - 1, generator=generator)
    layer.qzeros.random_(-(2**31), 2**31 - 1, generator=generator)
    if symmetric:
        middle = torch.full((layer.scales.shape[0], outputs), 2 ** (bits - 1) - 1)
        layer.qzeros.copy_(pack_columns(middle, bits))
    layer.scales.uniform_(1e-3, 1e-2, generator=generator)
    layer.bias.normal_(generator=generator)
    if shuffled:
        layer.g_idx.copy_(layer.g_idx[torch.randperm(inputs, generator=generator)])
    return layer


SHAPES = [
    {"inputs": 256, "outputs": 48},
    {"inputs": 256, "outputs": 48, "shuffled": True},
    {"inputs": 128, "outputs": 32, "group_size": 32},
    {"inputs": 192, "outputs": 48},  # the last group is a short one
    {"inputs": 128, "outputs": 24, "group_size": 64},  # torch's kernel takes multiples of 16 outputs
    {"inputs": 256, "outputs": 48, "group_size": -1},
    {"inputs": 64, "outputs": 40, "bits": 8, "group_size": -1, "symmetric": True},
    {"inputs": 64, "outputs": 40, "bits": 8, "group_size": -1},
    {"inputs": 72, "outputs": 40, "bits": 8, "group_size": -1, "symmetric": True},
    {"inputs": 256, "outputs": 48, "bits": 8, "symmetric": True},
    {"inputs": 256, "outputs": 48, "bits": 8, "shuffled": True},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_every_way_is_the_exact_one(shape: dict[str, Any], rows: int) -> None:
    """In 16 bits and in float32 that need not be exact within their rounding; in exact float32 to the last digits."""
    layer = random_layer(**shape)
    x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(rows))
    expected = F.linear(x, layer.weight_in(torch.float32), layer.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-5)
    assert difference(layer(x.bfloat16()[None]), expected[None]) < 1e-2
    layer.exact = False
    found = layer(x)
    assert found.dtype == torch.float32
    assert difference(found, expected) < 1e-2


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        (SHAPES[0], True),
        (SHAPES[1], True),
        (SHAPES[3], False),
        (SHAPES[6], True),
        (SHAPES[7], False),
        (SHAPES[9], False),
    ],
    ids=str,
)
def test_which_way(shape: dict[str, Any], kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows of bfloat16 do not unpack the layer where a kernel fits it; many rows, and exact float32, do."""
    layer = random_layer(**shape)
    unpacked: list[torch.dtype] = []
    weight_in = layer.weight_in
    monkeypatch.setattr(layer, "weight_in", lambda dtype: (unpacked.append(dtype), weight_in(dtype))[1])
    few, many = torch.randn(1, layer.in_features), torch.randn(200, layer.in_features)
    layer(few.bfloat16())
    assert unpacked == ([] if kernel else [torch.float32])  # not bfloat16, which a CPU multiplies slowly
    layer(few)
    layer(many.bfloat16())
    layer.exact = False
    layer(many)
    assert unpacked[-3:] == [torch.float32] * 3
    layer(few)
    assert len(unpacked) == (3 if kernel else 5)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[6]], ids=str)
def test_new_weights_are_seen(shape: dict[str, Any]) -> None:
    """What a kernel keeps for itself is made anew when the words change: loaded, written to, or moved."""
    layer, other = random_layer(**shape), random_layer(**shape)
    other.qweight.random_(-(2**31), 2**31 - 1, generator=torch.Generator().manual_seed(9))
    x = torch.randn(1, layer.in_features).bfloat16()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    before = layer(x)
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())  # words come out again
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert not torch.equal(layer(x), before)
    layer.load_state_dict(state, assign=True)
    assert torch.equal(layer(x), before)
    layer.to("cpu", torch.float32)
    assert torch.equal(layer(x), before)


def test_values_of_eight_bits_take_the_words_place() -> None:
    """A CPU holds the weight once."""
    layer = random_layer(**SHAPES[6])
    words = layer.qweight.clone()
    layer(torch.randn(1, 64).bfloat16())
    assert layer.qweight.numel() == 0
    assert torch.equal(layer.state_dict()["qweight"], words)
    assert layer.qweight.numel() == words.numel()


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[6]], ids=str)
@pytest.mark.parametrize(
    "error", [RuntimeError("no such thing\nhere"), AttributeError("no op"), ImportError("no module")]
)
def test_a_kernel_that_is_missing(
    shape: dict[str, Any], error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told once, in one line, and the exact way takes over."""
    layer = random_layer(**shape)
    x = torch.randn(1, layer.in_features).bfloat16()

    def fails(*_: object) -> None:
        raise error

    for name in ("_weight_int4pack_mm_for_cpu", "_weight_int8pack_mm"):
        monkeypatch.setattr(torch.ops.aten, name, fails)
    expected = F.linear(x.float(), layer.weight_in(torch.float32), layer.bias)
    for _ in range(2):
        assert difference(layer(x), expected) < 1e-2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert str(error).split("\n")[0] in told


def test_out_of_memory_is_not_a_missing_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised as it is: another way would need more."""
    layer = random_layer(**SHAPES[0])

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", fails)
    with pytest.raises(torch.OutOfMemoryError):
        layer(torch.randn(1, 256).bfloat16())
    assert not int4.CPU_KERNEL.failed
