"""Weights by columns: only where they are faster, and never noticed but by the processor."""

from pathlib import Path

import pytest
import torch
from support import random_model, small_config, write_checkpoint
from torch import Tensor, nn

import qwenvl
from qwenvl.adapt import layout
from qwenvl.adapt.layout import columns_first
from qwenvl.adapt.packed import Kernel
from qwenvl.weights.checkpoint import Checkpoint, by_columns

WIDENING = ("attn.c_attn", "mlp.w1", "mlp.w2")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_a_loaded_model_reads_its_widening_weights_by_columns(tmp_path: Path, stored: torch.dtype) -> None:
    """In float32 on the CPU the decoder's weights with more outputs than inputs lie by columns; values are kept."""
    model = random_model(small_config(intermediate_size=704, vocab_size=320)).to(stored)
    folder = write_checkpoint(tmp_path / "plain", model, None, None)
    loaded = qwenvl.load(folder, device="cpu", dtype="float32", quiet=True).model
    by_column = {n for n, p in loaded.named_parameters() if p.dim() == 2 and p.stride() == (1, p.shape[0])}
    layers = range(model.config.num_hidden_layers)
    expected = {f"decoder.blocks.{i}.{name}.weight" for i in layers for name in WIDENING} | {"decoder.lm_head.weight"}
    assert by_column == expected
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.get_parameter(name), weight.float()), name


def test_other_dtypes_and_devices_are_left_alone() -> None:
    """What was not measured to be faster is not done."""
    model = random_model(small_config())
    assert not columns_first(model, torch.bfloat16, torch.device("cpu"))
    assert not columns_first(model, torch.float32, torch.device("cuda"))


def test_what_is_saved_does_not_depend_on_it(tmp_path: Path) -> None:
    """A model whose weights lie by columns is written as any other, byte for byte."""
    model = random_model(small_config())
    plain = write_checkpoint(tmp_path / "plain", model, None, None)
    for name in columns_first(model, torch.float32, torch.device("cpu")):
        weight = model.get_parameter(name)
        weight.data = by_columns(weight.data, weight.dtype)
    again = write_checkpoint(tmp_path / "again", model, None, None)
    for file in Checkpoint(plain).folder.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows oneDNN is given; every layer counts as large, on a machine that has it or pretends to."""
    seen: list[int] = []

    def product(x: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> Tensor:
        seen.append(x.numel() // x.shape[-1])
        return x @ weight.T if bias is None else x @ weight.T + bias

    monkeypatch.setattr(layout, "LARGE", 0)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", product, raising=False)
    return seen


def test_a_few_rows_are_onednns(tmp_path: Path, products: list[int]) -> None:
    """Several rows of a loaded float32 model, not one nor many, nor where gradients are wanted, nor in 16 bits."""
    model = random_model(small_config())
    folder = write_checkpoint(tmp_path / "plain", model, None, None)
    loaded = qwenvl.load(folder, device="cpu", dtype="float32", quiet=True).model
    for batch, columns in ((1, 1), (3, 1), (2, 16), (3, 11), (1, 40)):
        ids = torch.randint(1, 50, (batch, columns))
        products.clear()
        with torch.no_grad():
            assert torch.allclose(loaded(ids), model(ids), atol=1e-5)
        assert bool(products) == (2 <= batch * columns <= 32)
        assert set(products) <= {batch * columns}
    products.clear()
    loaded(torch.ones(3, 1, dtype=torch.int64)).sum().backward()
    half = qwenvl.load(folder, device="cpu", dtype="bfloat16", quiet=True).model
    with torch.no_grad():
        half(torch.ones(3, 1, dtype=torch.int64))
    assert not products


def test_without_onednn_it_is_torchs(
    products: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the kernel fails it is given up, which is told once; where there is none, layers stay as they are."""
    linear = layout.FewRowsLinear(8, 8)
    monkeypatch.setattr(layout, "ONEDNN", Kernel("oneDNN's product"))
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(
                linear(torch.ones(3, 8)), nn.functional.linear(torch.ones(3, 8), linear.weight, linear.bias)
            )
    assert capsys.readouterr().err.count("oneDNN's product") == 1
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = nn.Sequential(nn.Linear(8, 8))
    layout.read_for_few_rows(plain)
    assert type(plain[0]) is nn.Linear
    assert not products


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("rows", [2, 8, 32])
@pytest.mark.parametrize("bias", [True, False])
def test_the_kernel_itself(rows: int, bias: bool) -> None:
    """It is there, and sums up as torch's does, for weights by rows and by columns."""
    torch.manual_seed(0)
    linear = layout.FewRowsLinear(256, 320, bias)
    x = torch.randn(1, rows, 256)
    expected = nn.functional.linear(
        x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double()
    )
    with torch.no_grad():
        for weight in (linear.weight, by_columns(linear.weight.data, torch.float32)):
            linear.weight.data = weight.data
            assert torch.allclose(linear(x).double(), expected, atol=1e-5)
    assert not layout.ONEDNN.failed
