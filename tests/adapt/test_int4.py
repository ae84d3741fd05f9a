"""Int4 linears against AutoGPTQ's own numbers, and a packed model end to end."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwenvl.adapt.int4 import Int4Linear, quantize_structure
from qwenvl.config import QuantizationConfig, QwenVLConfig
from qwenvl.errors import ConfigError
from qwenvl.model.qwenvl import QwenVL
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
