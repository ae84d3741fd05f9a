"""Packed linears on a CPU: the table of bytes gives what the unpacked weight gives, and stands in for the words."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_layers import random_layer
from torch import nn

from qwenvl.adapt import packed, packed_cpu
from qwenvl.adapt.int4 import arrange
from qwenvl.adapt.packed import CPU_ROWS, CPU_SUMS, PackedLinear, few_rows

SHAPES: list[dict[str, Any]] = [
    {"inputs": 256, "outputs": 48},
    {"inputs": 256, "outputs": 200, "shuffled": True},
    {"inputs": 128, "outputs": 32, "group_size": 32},
    {"inputs": 192, "outputs": 96},  # the last group is a short one
    {"inputs": 192, "outputs": 104, "shuffled": True},
    {"inputs": 256, "outputs": 48, "group_size": -1},
    {"inputs": 64, "outputs": 40, "bits": 8, "group_size": -1, "symmetric": True},
    {"inputs": 256, "outputs": 48, "bits": 8, "symmetric": True},
    {"inputs": 256, "outputs": 48, "bits": 8, "symmetric": True, "shuffled": True},
]
ASYMMETRIC = {"inputs": 64, "outputs": 40, "bits": 8, "group_size": -1}  # some steps do not fit into a byte


@pytest.fixture(autouse=True)
def kernel_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins with a kernel that has not failed yet."""
    monkeypatch.setattr(CPU_SUMS, "failed", False)


def arranged(**shape: Any) -> PackedLinear:
    layer = random_layer(**shape)
    layer.arrange()
    return layer


def unpacked(monkeypatch: pytest.MonkeyPatch, layer: PackedLinear) -> list[torch.dtype]:
    """Where calls of `weight_in` are written down from now on."""
    calls: list[torch.dtype] = []
    weight_in = layer.weight_in
    monkeypatch.setattr(layer, "weight_in", lambda dtype: (calls.append(dtype), weight_in(dtype))[1])
    return calls


@pytest.mark.parametrize("shape", [*SHAPES, ASYMMETRIC], ids=str)
@pytest.mark.parametrize("rows", [1, 3, CPU_ROWS + 1])
def test_both_ways_are_one(shape: dict[str, Any], rows: int) -> None:
    """In float32 to the last digits, in 16 bits within the rounding of what goes in and comes out."""
    layer = arranged(**shape)
    x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(rows))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        given_ = x.to(dtype)
        expected = F.linear(
            given_.double(), random_layer(**shape).weight_in(torch.float32).double(), layer.bias.double()
        )
        found = layer(given_[None])
        assert (found.dtype, found.shape) == (dtype, (1, rows, layer.out_features))
        torch.testing.assert_close(found[0].double(), expected, rtol=tolerance, atol=tolerance * expected.std().item())


@settings(max_examples=60, deadline=None)
@given(
    words=st.integers(1, 40),
    outputs=st.integers(1, 30).map(lambda n: 8 * n),
    group_size=st.sampled_from([-1, 8, 16, 24, 64]),
    bits=st.sampled_from([4, 8]),
    shuffled=st.booleans(),
)
def test_any_shape(words: int, outputs: int, group_size: int, bits: int, shuffled: bool) -> None:
    """Sizes that are no multiple of anything: the product is the unpacked weight's, and the words come out again."""
    shape: dict[str, Any] = {"inputs": 8 * words, "outputs": outputs, "group_size": group_size, "bits": bits}
    layer, plain = (
        arranged(**shape, shuffled=shuffled, symmetric=bits == 8),
        random_layer(**shape, shuffled=shuffled, symmetric=bits == 8),
    )
    x = torch.randn(1, layer.in_features)
    weight = plain.weight_in(torch.float32)
    assert torch.equal(layer.weight_in(torch.float32), weight)
    assert torch.equal(layer.state_dict()["qweight"], plain.qweight)
    bound = 1e-5 * (x.abs() @ weight.abs().T + 1)
    assert ((layer(x) - F.linear(x, weight, plain.bias)).abs() <= bound).all()


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[6]], ids=str)
def test_which_way(shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows do not unpack an arranged layer; many rows do, and so does one that was not arranged."""
    layer = arranged(**shape)
    calls = unpacked(monkeypatch, layer)
    most = few_rows(layer.in_features * layer.out_features)
    few, many = torch.randn(most, layer.in_features), torch.randn(most + 1, layer.in_features)
    layer(few)
    layer(few.bfloat16())
    assert calls == []
    layer(many.bfloat16())
    assert calls == [torch.float32]  # not bfloat16, which a CPU multiplies slowly
    plain = random_layer(**shape)
    calls = unpacked(monkeypatch, plain)
    plain(few)
    assert calls == [torch.float32]


def test_a_prompt_is_not_unpacked_from_words() -> None:
    """The table alone is there, at a byte and a twelfth for each weight: a CPU holds no weight twice."""
    layer = arranged(inputs=256, outputs=192)
    assert layer.qweight.numel() == 0
    table = layer._table
    assert table is not None
    assert table.scales.nbytes == 2 * 192 * 4
    assert table.rows.nbytes == packed_cpu.table_bytes(256, 192, 2) - 2 * 192 * 4
    assert layer(torch.randn(CPU_ROWS + 1, 256)).isfinite().all()
    assert layer._table is table


def test_a_weight_that_does_not_fit_stays() -> None:
    """Eight bits with zero points away from the middle keep their words and are unpacked."""
    layer = arranged(**ASYMMETRIC)
    assert layer._table is None
    assert layer.qweight.numel() > 0


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[6]], ids=str)
def test_new_weights_are_seen(shape: dict[str, Any]) -> None:
    """An arranged layer that is loaded, moved or copied computes with what it then holds, as fast as before."""
    layer, other = arranged(**shape), random_layer(**shape)
    other.qweight.random_(-(2**31), 2**31 - 1, generator=torch.Generator().manual_seed(9))
    if layer.bits == 8:
        other.qweight.bitwise_and_(0x7F7F7F7F)
    other.arrange()
    x = torch.randn(1, layer.in_features)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    before = layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert not torch.equal(layer(x), before)
    layer.load_state_dict(state, assign=True)
    assert torch.equal(layer(x), before)
    layer.to("cpu", torch.float64)  # scales, too
    layer.to(torch.float32)
    assert torch.equal(layer(x), before)
    assert torch.equal(copy.deepcopy(layer)(x), before)
    assert layer._table is not None
    assert all(torch.equal(tensor.to(state[name].dtype), state[name]) for name, tensor in layer.state_dict().items())


def test_a_new_bias_is_seen() -> None:
    """A bias of zeros is not added; one that was written to is."""
    layer = arranged(inputs=64, outputs=16, group_size=32)
    x = torch.randn(1, 64)
    layer.bias.zero_()
    before = layer(x)
    layer.bias += 1
    torch.testing.assert_close(layer(x), before + 1)


def test_a_model_is_arranged() -> None:
    """All packed layers of it, and nothing else."""
    model = nn.Sequential(random_layer(64, 16), nn.Linear(16, 16), random_layer(16, 8, group_size=16))
    arrange(model, quiet=True)
    assert [getattr(layer, "_table", None) is not None for layer in model] == [True, False, True]


def test_scales_are_not_rounded() -> None:
    """A model that is cast keeps the weights' scales as they are stored; they once became bfloat16, for good."""
    layer = arranged(inputs=64, outputs=16)
    weight = layer.weight_in(torch.float32)
    assert torch.equal(layer.to(torch.bfloat16).weight_in(torch.float32), weight)
    assert layer.scales.dtype == torch.float16
    assert layer.bias.dtype == torch.bfloat16


def test_wrong_calls_cost_no_kernel() -> None:
    """Rows of another width are an error, no rows are none; the kernel goes on, which once was given up for them."""
    layer = arranged(inputs=64, outputs=16)
    with pytest.raises(RuntimeError, match="shapes"):
        layer(torch.randn(2, 32))
    assert layer(torch.randn(0, 64)).shape == (0, 16)
    assert not CPU_SUMS.failed


def test_another_default_device() -> None:
    """Tables are made where the words are; `torch.set_default_device` once sent half of one elsewhere."""
    expected = arranged(inputs=64, outputs=16)(torch.ones(1, 64))
    layer, x = random_layer(64, 16), torch.ones(1, 64)
    packed_cpu._all_rows.cache_clear()
    with torch.device("meta"):
        layer.arrange()
    assert torch.equal(layer(x), expected)


def test_few_rows_are_fewer_for_small_layers() -> None:
    """A small layer is unpacked in less time than its kernel is called."""
    assert few_rows(100_000) < 16 < few_rows(3_000_000) < few_rows(50_000_000) == CPU_ROWS


def test_a_nan_stays_one() -> None:
    """What is wrong in the activations is not hidden by the bytes."""
    x = torch.zeros(1, 64)
    x[0, 3] = torch.nan
    assert arranged(inputs=64, outputs=16)(x).isnan().all()


@pytest.mark.parametrize(
    "error", [RuntimeError("no such thing\nhere"), AttributeError("no op"), NotImplementedError("not on this CPU")]
)
def test_a_kernel_that_is_missing(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told once, in one line, and the exact way takes over."""
    layer = arranged(**SHAPES[0])
    x = torch.randn(1, layer.in_features)

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(packed_cpu, "multiply", fails)
    expected = F.linear(x, layer.weight_in(torch.float32), layer.bias)
    for _ in range(2):
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert str(error).split("\n")[0] in told


def test_out_of_memory_is_not_a_missing_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised as it is: another way would need more."""
    layer = arranged(**SHAPES[0])

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(packed_cpu, "multiply", fails)
    with pytest.raises(torch.OutOfMemoryError):
        layer(torch.randn(1, 256))
    assert not packed.CPU_SUMS.failed
