"""Weights by columns: only where they are faster, and never noticed but by the processor."""

from pathlib import Path

import pytest
import torch
from support import random_model, small_config, write_checkpoint

import qwenvl
from qwenvl.adapt.layout import columns_first
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
