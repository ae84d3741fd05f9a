"""Packed checkpoints that do not agree with their config.json, and GPUs that are too small: one line, status 2."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run
from packed_layers import GROUP, packed_tensors
from safetensors.torch import save_file
from support import one_line_error, random_model, small_config, write_checkpoint

import qwenvl
from qwenvl import loading
from qwenvl.config import QuantizationConfig, QwenVLConfig
from qwenvl.errors import CheckpointError, ConfigError
from qwenvl.weights.checkpoint import Checkpoint

pytest_plugins = ("command_fixtures",)

QUERY = "transformer.h.0.attn.c_attn"


@pytest.fixture
def config() -> QwenVLConfig:
    """Of a small model in groups of GROUP."""
    return replace(small_config(), quantization_config=QuantizationConfig(group_size=GROUP))


def write(folder: Path, config: QwenVLConfig, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    """A packed folder under the reference's names, whose quantization_config says something else."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    data = config.to_dict()
    data["quantization_config"] = {**data["quantization_config"], **changes}
    (folder / "config.json").write_text(json.dumps(data))
    return folder


def mistaken(run: Run, folder: Path, *says: str) -> None:
    """Status 2 and one line, which says this."""
    status, out, err = run("generate", "hi", "--model", str(folder), "--device", "cpu", "--quiet")
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    for words in says:
        assert words in err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits": 3}, ["bits must be 4 or 8, not 3"]),
        ({"bits": 8}, [f"{QUERY}.qweight is [16, 384] where config.json makes it [32, 384]", "bits 8"]),
        ({"group_size": 0}, ["group_size must be a positive whole number, or -1", "not 0"]),
        ({"group_size": 48}, [f"{QUERY}.scales is [4, 384] where config.json makes it [3, 384]", "group_size 48"]),
        ({"group_size": 128}, [f"{QUERY}.scales is [4, 384] where config.json makes it [1, 384]", "group_size 128"]),
        ({"group_size": -1}, ["where config.json makes it [1, 384]", "group_size -1"]),
        ({"quant_method": "awq"}, ["quant_method 'awq' is not supported, only 'gptq'"]),
        ({"checkpoint_format": "gptq_v2"}, ["checkpoint_format 'gptq_v2' is not supported, only 'gptq'"]),
        ({"desc_act": "no"}, ["desc_act must be true or false, not 'no'"]),
    ],
    ids=str,
)
def test_a_config_that_is_not_theirs(
    run: Run, tmp_path: Path, config: QwenVLConfig, changes: dict[str, Any], says: list[str]
) -> None:
    """Bits, group size or method that the tensors do not have: what they are, and what the configuration says."""
    mistaken(run, write(tmp_path / "packed", config, packed_tensors(config), **changes), *says)


def test_a_group_size_of_as_many_groups(run: Run, tmp_path: Path, config: QwenVLConfig) -> None:
    """A wrong size that happens to give the right number of groups is noticed by the groups themselves."""
    wrong = GROUP + 8
    assert {-(-inputs // wrong) for inputs in (128,)} == {128 // GROUP}
    folder = write(tmp_path / "packed", config, packed_tensors(config), group_size=wrong)
    mistaken(run, folder, f"groups of {wrong} in order")


def test_shuffled_groups_that_nobody_spoke_of(run: Run, tmp_path: Path, config: QwenVLConfig) -> None:
    """`desc_act` false over shuffled groups is refused; true is fine over either kind."""
    shuffled = packed_tensors(config, shuffled=True)
    mistaken(run, write(tmp_path / "false", config, shuffled), "g_idx", "desc_act false", f"groups of {GROUP} in order")
    for name, tensors in (("shuffled", shuffled), ("ordered", packed_tensors(config))):
        folder = write(tmp_path / name, config, tensors, desc_act=True)
        assert qwenvl.load(folder, "cpu", "auto", quiet=True).config.quantization_config == replace(
            config.quantization_config or QuantizationConfig(), desc_act=True
        )


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_one_tensor_of_another_shape(run: Run, tmp_path: Path, config: QwenVLConfig, part: str) -> None:
    """It is named, with both shapes."""
    tensors = packed_tensors(config)
    name = f"{QUERY}.{part}"
    shape = list(tensors[name].shape)
    tensors[name] = tensors[name][:-1].clone()
    folder = write(tmp_path / "packed", config, tensors)
    mistaken(run, folder, f"1 tensor wrongly shaped: {name} is {[shape[0] - 1, *shape[1:]]}", f"makes it {shape}")
    with one_line_error(CheckpointError, name):
        Checkpoint(folder)


# --- a GPU that is too small -----------------------------------------------------------------------------------------


@pytest.fixture
def full_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with 0.3 MB left, in a machine with 1 GB."""
    monkeypatch.setattr(loading, "choose_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (300_000, 10**9))
    monkeypatch.setattr(loading, "free_memory", lambda: 10**9)


@pytest.mark.usefixtures("full_gpu")
def test_weights_that_a_gpu_cannot_hold(
    tmp_path: Path, run: Run, config: QwenVLConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is read: what they take, what is free, and what would fit; in one line, with status 2."""
    folder = write_checkpoint(tmp_path / "plain", random_model(small_config()), None, None)
    full, half = (Checkpoint(folder).bytes // width for width in (1, 2))
    needed, halved = f"the weights take {full / 1e6:.1f} MB as float32", f"dtype bfloat16 takes {half / 1e6:.1f} MB"
    with one_line_error(ConfigError, needed, "0.3 MB are free on cuda:0", f"device cpu takes {half / 1e6:.1f} MB"):
        qwenvl.load(folder, "auto", "float32", quiet=True)
    with monkeypatch.context() as changed:
        changed.setattr(loading, "free_memory", lambda: 1000)
        with one_line_error(ConfigError, needed, "more memory"):  # nothing else would fit, and nothing else is said to
            qwenvl.load(folder, "auto", "float32", quiet=True)
    with monkeypatch.context() as changed:
        changed.setattr(torch.cuda, "mem_get_info", lambda _: (half + 1, 10**9))
        with one_line_error(ConfigError, needed, halved, "4 bits (qwenvl quantize"):
            qwenvl.load(folder, "auto", "float32", quiet=True)
    status, out, err = run("generate", "hi", "--model", str(folder), "--dtype", "float32", "--quiet")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert needed in err
    with pytest.raises(ConfigError, match="as bfloat16") as caught:
        qwenvl.load(write(tmp_path / "packed", config, packed_tensors(config)), "auto", "bfloat16", quiet=True)
    assert "4 bits" not in str(caught.value)  # they are


def test_memory_that_is_gone_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There was room by the numbers, and then there was not: the same line, not a traceback."""
    folder = write_checkpoint(tmp_path / "plain", random_model(small_config()), None, None)

    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr(loading, "load_into", fails)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (300_000, 10**9))
    with one_line_error(ConfigError, "the weights take", "0.3 MB are free on cpu"):
        qwenvl.load(folder, "cpu", "float32", quiet=True)
