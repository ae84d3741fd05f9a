"""The map of names at full size: all 853 and 1,461 names, one to one, with the shapes of the real checkpoints."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwenvl.adapt.int4 import quantize_structure
from qwenvl.config import QuantizationConfig, QwenVLConfig, VisionConfig
from qwenvl.errors import ConfigError
from qwenvl.model.qwenvl import QwenVL
from qwenvl.weights.keymap import COPY, dropped_names, entries, our_names, reference_names

BF16 = QwenVLConfig(
    vocab_size=151936,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    intermediate_size=22016,
    visual=VisionConfig(),
)
INT4 = replace(BF16, quantization_config=QuantizationConfig())
INT8_HEAD = replace(BF16, quantization_config=QuantizationConfig(bits=8, group_size=-1, lm_head=True))
# Of the sorted names of the published Int4 checkpoint, one a line.
INT4_NAMES_SHA256 = "02c96b5832939f283878950e125c125b040a5f30f0615cc2a504f460dfbe06c4"
INT4_BYTES = 9_731_786_240


def total_bytes(config: QwenVLConfig) -> int:
    """Size of a 16-bit checkpoint with int32 packed words."""
    return sum(math.prod(e.reference_shape) * (4 if e.kind == "packed" else 2) for e in entries(config))


def test_the_published_names_and_bytes() -> None:
    """The table writes out exactly the names of the published checkpoints, and shapes that add up to their bytes."""
    assert (len(reference_names(BF16)), len(reference_names(INT4))) == (853, 1461)
    assert hashlib.sha256("\n".join(sorted(reference_names(INT4))).encode()).hexdigest() == INT4_NAMES_SHA256
    assert total_bytes(INT4) == INT4_BYTES


def test_bf16_names_follow_from_the_int4_names() -> None:
    """Without packing, `.weight` stands for the packed tensors, and only c_attn keeps a bias."""
    suffixes = (".qweight", ".qzeros", ".scales", ".g_idx")
    expected = set()
    for name in reference_names(INT4):
        stem = name.rpartition(".")[0]
        if name.endswith(suffixes):
            expected.add(f"{stem}.weight")
        elif not (name.startswith("transformer.h.") and name.endswith(".bias") and not stem.endswith("c_attn")):
            expected.add(name)
    assert set(reference_names(BF16)) == expected


def test_a_packed_head_is_asked_for_by_name() -> None:
    """With `lm_head`, the head has the names and shapes of a packed linear, and nothing else changes."""
    plain, packed = (
        {e.reference: e.reference_shape for e in entries(replace(BF16, quantization_config=quantization))}
        for quantization in (QuantizationConfig(), QuantizationConfig(lm_head=True))
    )
    assert {name: plain[name] for name in plain if name not in packed} == {"lm_head.weight": (151936, 4096)}
    assert {name: packed[name] for name in packed if name not in plain} == {
        "lm_head.qweight": (512, 151936),
        "lm_head.qzeros": (32, 18992),
        "lm_head.scales": (32, 151936),
        "lm_head.g_idx": (4096,),
        "lm_head.bias": (151936,),
    }


@pytest.mark.parametrize("config", [BF16, INT4, INT8_HEAD], ids=["bf16", "int4", "int8 with the head"])
def test_one_to_one_onto_the_model(config: QwenVLConfig) -> None:
    """At full size on the meta device, nothing of the model is missing, left over or of another shape."""
    with torch.device("meta"):
        model = QwenVL(config)
    if config.quantization_config:
        quantize_structure(model, config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {entry.ours: entry.our_shape for entry in entries(config)} == shapes
    assert len(set(our_names(config))) == len(our_names(config)) == len(set(reference_names(config)))
    assert not dropped_names(config) & set(reference_names(config))


@pytest.mark.real
def test_the_real_index(reference_dir: Path) -> None:
    """The published index of the Int4 checkpoint, where it is at hand, agrees name by name."""
    index = json.loads((reference_dir / "hf" / "model.safetensors.index.json").read_text())
    config = QwenVLConfig.load(reference_dir / "hf")
    assert config.quantization_config == INT4.quantization_config
    assert set(reference_names(config)) == set(index["weight_map"])
    assert total_bytes(config) == index["metadata"]["total_size"]


def test_operations_undo_each_other(tiny_config: QwenVLConfig) -> None:
    """Each operation's inverse restores every element, in the reference's shape."""
    for entry in entries(tiny_config):
        tensor = torch.randn(entry.reference_shape)
        ours = entry.translate(tensor, "reference", "qwenvl", tiny_config)
        assert ours.shape == entry.our_shape
        assert torch.equal(entry.translate(ours, "qwenvl", "reference", tiny_config), tensor)
        if entry.op is COPY:
            assert ours is tensor


def test_vision_heads_are_regrouped(tiny_config: QwenVLConfig) -> None:
    """The reference lays out q, k, v of one head after another; ours is all of q, then k, then v."""
    heads, width = tiny_config.visual.heads, tiny_config.visual.width
    size = width // heads
    entry = next(e for e in entries(tiny_config) if e.ours == "visual.blocks.1.attn.in_proj.bias")
    reference = torch.tensor([[h, part, d] for h in range(heads) for part in range(3) for d in range(size)])
    ours = torch.tensor([[h, part, d] for part in range(3) for h in range(heads) for d in range(size)])
    assert entry.translate(reference, "reference", "qwenvl", tiny_config).tolist() == ours.tolist()


def test_key_projection_only_where_widths_differ(tiny_config: QwenVLConfig) -> None:
    """A resampler as wide as the vision tower has no kv_proj."""
    name = "transformer.visual.attn_pool.kv_proj.weight"
    assert name in reference_names(tiny_config)
    same = replace(tiny_config, visual=replace(tiny_config.visual, width=tiny_config.hidden_size))
    assert name not in reference_names(same)


def test_sizes_that_cannot_be_packed(int4_config: QwenVLConfig) -> None:
    """Eight values share a word: other sizes are refused, not rounded."""
    with pytest.raises(ConfigError, match="multiples of 8"):
        entries(replace(int4_config, intermediate_size=700))
    odd = replace(int4_config, vocab_size=int4_config.vocab_size + 1)
    entries(odd)
    with pytest.raises(ConfigError, match="a packed head needs a vocab_size that is a multiple of 8"):
        entries(replace(odd, quantization_config=QuantizationConfig(lm_head=True)))
