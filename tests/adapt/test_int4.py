"""Int4 linears against AutoGPTQ's own numbers, and a packed model end to end."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packed_layers import CASES, golden_layer

from qwenvl.adapt.int4 import quantize_structure
from qwenvl.config import QuantizationConfig, QwenVLConfig
from qwenvl.errors import ConfigError
from qwenvl.model.qwenvl import QwenVL
from qwenvl.weights.keymap import entries


@pytest.mark.parametrize("arranged", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_oracles(goldens: Path, case: str, arranged: bool) -> None:
    """The layer computes what AutoGPTQ's computes, in float32 and in float16, with and without act-order; also after
    its weight has been arranged for a CPU.
    """
    layer, golden = golden_layer(goldens, case)
    if arranged:
        layer.arrange()
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
