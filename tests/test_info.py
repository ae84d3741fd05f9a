"""What `qwenvl info` says of a checkpoint, checked against the tensors themselves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import qwenvl
from qwenvl import cli
from qwenvl.config import QuantizationConfig, QwenVLConfig
from qwenvl.info import PARTS, describe, summarize
from qwenvl.weights.hub import embedded
from qwenvl.weights.keymap import Entry, entries

DTYPES = {"float": torch.bfloat16, "scale": torch.float16, "packed": torch.int32}


def write(folder: Path, config: QwenVLConfig) -> Path:
    """A checkpoint of zeros in the reference's layout."""
    tensors = {e.reference: torch.zeros(e.reference_shape, dtype=DTYPES[e.kind]) for e in entries(config)}
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_counts_are_the_models_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters and bytes of every part are those of the loaded model's state dict, and the parts are all of it."""
    vl = qwenvl.load("tiny", "cpu", "bfloat16", quiet=True)
    model = vl.model
    assert cli.main(["info", "tiny", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    state = model.state_dict()
    counts = {part: sum(t.numel() for n, t in state.items() if n.startswith(names)) for part, names in PARTS.items()}
    assert {part: sizes["parameters"] for part, sizes in facts["parts"].items()} == counts
    assert {part: sizes["bytes"] for part, sizes in facts["parts"].items()} == {p: 2 * n for p, n in counts.items()}
    assert facts["parameters"] == sum(t.numel() for t in state.values()) == sum(p.numel() for p in model.parameters())
    assert facts["bytes"] == 2 * facts["parameters"]
    assert facts["tensors"] == len(state)
    assert facts["dtypes"] == ["BF16"]
    assert facts["note"] == vl.config.note


def test_cache_size_is_the_caches_own() -> None:
    """The bytes of KV cache a token are those of a cache that was allocated."""
    config = QwenVLConfig.load(embedded("tiny"))
    cache = qwenvl.KVCache.allocate(config, 1, 10, torch.float16, torch.device("cpu"))
    taken = cache.keys.nbytes + cache.values.nbytes
    assert summarize(embedded("tiny"))["kv_cache_bytes_per_token_16_bit"] * 10 == taken


def test_text_has_the_same_numbers() -> None:
    """The table for people shows every part with its numbers, the note, and the sum."""
    facts = summarize(embedded("tiny"))
    lines = describe(facts).splitlines()
    for part, sizes in [*facts["parts"].items(), ("all", facts)]:
        (line,) = [line for line in lines if line.startswith(part + " ")]
        assert line.split()[-2:] == [f"{sizes['parameters']:,}", f"{sizes['bytes']:,}"]
    assert f"note: {facts['note']}" in lines
    assert "qwenvl layout, chatml, BF16" in lines[0]


def test_int4_counts(tmp_path: Path) -> None:
    """A packed checkpoint has the parameters of the plain one, and one bias more for each linear that had none.

    Each packed word holds eight; scales, zero points and group indices are not parameters, but they are bytes.
    """
    plain = replace(QwenVLConfig.load(embedded("tiny")), note=None)
    packed = replace(plain, quantization_config=QuantizationConfig(group_size=32))
    facts = summarize(write(tmp_path, packed))
    biases_a_layer = 2 * plain.hidden_size + 2 * plain.mlp_width  # c_proj of both, w1, w2; c_attn has one anyway
    expected = sum(torch.Size(e.our_shape).numel() for e in entries(plain)) + plain.num_hidden_layers * biases_a_layer
    assert facts["parameters"] == expected
    assert facts["bytes"] == sum(torch.Size(e.our_shape).numel() * DTYPES[e.kind].itemsize for e in entries(packed))
    assert sum(part["bytes"] for part in facts["parts"].values()) == facts["bytes"]
    assert facts["dtypes"] == ["BF16", "F16", "I32"]
    assert (facts["layout"], facts["note"]) == ("reference", None)
    text = describe(facts)
    assert "reference layout, chatml, int4 (groups of 32)" in text
    assert "note" not in text


def test_packed_head(tmp_path: Path) -> None:
    """A packed head is said to be one, and has its parameters and a bias."""
    plain = QwenVLConfig.load(embedded("tiny"))
    quantization = QuantizationConfig(bits=8, group_size=-1, lm_head=True)
    facts = summarize(write(tmp_path, replace(plain, quantization_config=quantization)))
    assert facts["parts"]["head"]["parameters"] == (plain.hidden_size + 1) * plain.vocab_size
    assert "int8 (one scale an output, the head too)" in describe(facts)


def test_every_tensor_is_in_one_part() -> None:
    """No tensor is counted twice or forgotten, packed or not."""
    plain = QwenVLConfig.load(embedded("tiny"))

    def homes(entry: Entry) -> list[Any]:
        return [part for part, names in PARTS.items() if entry.ours.startswith(names)]

    for config in (plain, replace(plain, quantization_config=QuantizationConfig())):
        assert all(len(homes(entry)) == 1 for entry in entries(config))


def test_note_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stranger's checkpoint cannot send escape sequences through its note."""
    write(tmp_path, replace(QwenVLConfig.load(embedded("tiny")), note="\x1b[31mred"))
    assert cli.main(["info", str(tmp_path)]) == 0
    assert "\x1b" not in capsys.readouterr().out
