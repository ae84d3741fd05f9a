"""From a folder to a pipeline: names of devices and dtypes, what is missing, what does not agree, packed weights."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_layers import packed_tensors
from safetensors.torch import save_file
from support import TOLERANCE, Golden, chat_config, one_line_error, random_model, small_config, write_checkpoint

import qwenvl
from qwenvl import loading
from qwenvl.adapt.int4 import Int4Linear
from qwenvl.config import QuantizationConfig
from qwenvl.errors import CheckpointError, ConfigError
from qwenvl.model.qwenvl import QwenVL
from qwenvl.text.tokenizer import Tokenizer
from qwenvl.weights.gptq import dequantize
from qwenvl.weights.keymap import entries


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small checkpoint without a vocabulary or generation config."""
    return write_checkpoint(tmp_path / "plain", random_model(small_config()), None, None)


# --- devices and dtypes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("float32", torch.float32),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_dtypes(folder: Path, name: Any, dtype: torch.dtype) -> None:
    """By name or as an object; every parameter has it."""
    vl = qwenvl.load(folder, dtype=name, device="cpu", quiet=True)
    assert vl.dtype == dtype
    assert {parameter.dtype for parameter in vl.model.parameters()} == {dtype}
    assert {parameter.device.type for parameter in vl.model.parameters()} == {"cpu"}
    assert not vl.model.training


@pytest.mark.parametrize("name", ["float64", "int8", "fp32", "", torch.float64, torch.int8, None, 32], ids=repr)
def test_wrong_dtypes(folder: Path, name: Any) -> None:
    """Refused with those that there are."""
    with one_line_error(ConfigError, repr(name), "auto", "float32", "float16", "bfloat16"):
        qwenvl.load(folder, dtype=name, device="cpu", quiet=True)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "CPU", None], ids=repr)
def test_wrong_devices(folder: Path, name: Any) -> None:
    """A device that torch does not know is refused with those that there are."""
    with one_line_error(ConfigError, repr(name), "auto", "cpu", "cuda"):
        qwenvl.load(folder, device=name, quiet=True)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", torch.device("cuda"), "mps"], ids=repr)
def test_devices_that_this_machine_lacks(folder: Path, name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known to torch but not there: one line before anything is read, not torch's own traceback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with one_line_error(ConfigError, str(name).split(":")[0], "cpu"):
        qwenvl.load(folder, device=name, dtype="float32", quiet=True)


def test_a_gpu_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second GPU in a machine with one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with one_line_error(ConfigError, "cuda:1", "1"):
        qwenvl.load(folder, device="cuda:1", dtype="float32", quiet=True)


def test_auto_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA, else MPS, else the CPU."""
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert loading.choose_device("auto").type == expected


def test_auto_dtype_falls_to_bfloat16_where_memory_is_short(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU: float32 if it fits, else bfloat16 with one line that says so (none if quiet)."""
    needed = 4 * sum(parameter.numel() for parameter in QwenVL(small_config()).parameters())
    for free, dtype, lines in ((needed + 1, torch.float32, 0), (None, torch.float32, 0), (needed, torch.bfloat16, 1)):
        monkeypatch.setattr(loading, "free_memory", lambda free=free: free)
        assert qwenvl.load(folder, device="cpu").dtype == dtype
        said = "".join(capsys.readouterr()).splitlines()
        assert len([line for line in said if "bfloat16" in line]) == lines
    assert qwenvl.load(folder, device="cpu", quiet=True).dtype == torch.bfloat16
    assert "".join(capsys.readouterr()) == ""
    assert qwenvl.load(folder, device="cpu", dtype="float32", quiet=True).dtype == torch.float32


@pytest.mark.parametrize(
    ("capability", "dtype"), [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)]
)
def test_auto_dtype_on_cuda(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    """bfloat16 where the GPU has it, else float16."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    checkpoint = loading.Checkpoint(folder)
    assert loading._choose_dtype("auto", torch.device("cuda"), checkpoint, True) == dtype


# --- what a folder holds --------------------------------------------------------------------------------------------


def test_a_plain_folder(folder: Path) -> None:
    """Without a vocabulary or generation config: tokenizer None, the defaults, and ids work."""
    vl = qwenvl.load(folder, dtype="float32", device="cpu", quiet=True)
    assert (vl.tokenizer, vl.generation_config) == (None, qwenvl.GenerationConfig())
    assert vl.config == small_config()
    assert len(vl.generate_ids(torch.tensor([[5, 6]]), max_new_tokens=4)[0]) == 4


def test_weights_are_what_was_saved(folder: Path) -> None:
    """Bit by bit, also as a str."""
    saved = random_model(small_config()).state_dict()
    for name in (folder, str(folder)):
        loaded = qwenvl.load(name, dtype="float32", device="cpu", quiet=True).model.state_dict()
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[key], saved[key]) for key in saved)


def test_a_whole_folder(chat_folder: Path) -> None:
    """Vocabulary and generation config are read."""
    vl = qwenvl.load(chat_folder, dtype="float32", device="cpu", quiet=True)
    assert vl.tokenizer is not None
    assert vl.generation_config.max_new_tokens == 40
    assert vl.generation_config.eos_token_ids == (vl.tokenizer.eos_id,)
    assert vl.name == str(chat_folder)


def test_the_embedded_checkpoint() -> None:
    """`load("tiny")` finds what comes with the library, whole, and it chats."""
    vl = qwenvl.load("tiny", dtype="float32", device="cpu", quiet=True)
    assert vl.tokenizer is not None
    vl.chat("Hello", max_new_tokens=2)


def unreachable(*_: object, **__: object) -> None:
    """In place of reading the weights."""
    raise AssertionError("the weights were read before the small files were checked")


def test_a_vocabulary_of_another_model(chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `<img>` has another id: refused with both, before gigabytes are read."""
    tokenizer = Tokenizer(chat_folder)
    config = chat_config(tokenizer, image_start_id=tokenizer.image_start_id - 1)
    other = write_checkpoint(tmp_path / "x", random_model(config), chat_folder / "qwen.tiktoken", None)
    monkeypatch.setattr(loading, "load_into", unreachable)
    with one_line_error(ConfigError, tokenizer.image_start_id - 1, tokenizer.image_start_id, "qwen.tiktoken"):
        qwenvl.load(other, dtype="float32", device="cpu", quiet=True)


@pytest.mark.parametrize(
    ("file", "content", "kind"),
    [
        ("generation_config.json", b'{"top_p": 7}', ConfigError),
        ("generation_config.json", b"{", ConfigError),
        ("config.json", b"{}", ConfigError),
        ("config.json", b'{"visual": 5}', ConfigError),
        ("qwen.tiktoken", b"nonsense", CheckpointError),
        ("qwen.tiktoken", b"", CheckpointError),
    ],
)
def test_a_broken_small_file(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: bytes, kind: Any
) -> None:
    """One line that names it, before gigabytes are read."""
    shutil.copytree(chat_folder, tmp_path / "x")
    (tmp_path / "x" / file).write_bytes(content)
    monkeypatch.setattr(loading, "load_into", unreachable)
    with one_line_error(kind, file):
        qwenvl.load(tmp_path / "x", dtype="float32", device="cpu", quiet=True)


def test_names_that_are_nothing(tmp_path: Path) -> None:
    """No such folder, an empty one, a file: one line each."""
    for name in (tmp_path / "nowhere", tmp_path):
        with one_line_error(CheckpointError, str(name)):
            qwenvl.load(name, quiet=True)
    (tmp_path / "file").write_bytes(b"x")
    with one_line_error(CheckpointError, "is a file"):
        qwenvl.load(tmp_path / "file", quiet=True)


def test_weights_of_another_size(folder: Path) -> None:
    """A config.json that does not fit the tensors is refused with a name and both shapes."""
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "intermediate_size": 512}))
    with one_line_error(CheckpointError, "mlp", 128, 256):
        qwenvl.load(folder, dtype="float32", device="cpu", quiet=True)


def test_both_layouts_are_one_model(tiny_112: Golden, tmp_path: Path) -> None:
    """The reference's folder and our conversion of it give the same bits."""
    from qwenvl.weights.convert import convert

    convert(tiny_112.folder, tmp_path / "ours", quiet=True)
    ours = qwenvl.load(tmp_path / "ours", dtype="float32", device="cpu", quiet=True)
    ids, pixels = tiny_112.prompt(4, "a.png", 5)[None], tiny_112.pictures("a.png")
    with torch.no_grad():
        assert torch.equal(ours.model(ids, pixels), tiny_112.model(ids, pixels))


# --- int4 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "act-order"])
def test_int4_is_the_dequantized_model(tmp_path: Path, shuffled: bool) -> None:
    """A packed folder computes what a dense model with the unpacked weights and the biases computes, and generates."""
    plain = small_config()
    config = dataclasses.replace(plain, quantization_config=QuantizationConfig(group_size=32, desc_act=shuffled))
    tensors = packed_tensors(config, shuffled=shuffled)
    folder = tmp_path / "int4"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    vl = qwenvl.load(folder, dtype="float32", device="cpu", quiet=True)
    layers = {name: module for name, module in vl.model.named_modules() if isinstance(module, Int4Linear)}
    assert len(layers) == 5 * plain.num_hidden_layers
    assert all(layer.scales.dtype == torch.float16 for layer in layers.values())

    dense = random_model(plain)
    state = dense.state_dict()
    for entry in entries(config):
        if entry.ours in state:
            state[entry.ours] = entry.translate(tensors[entry.reference], "reference", "qwenvl", config).float()
    dense.load_state_dict(state)
    for name, layer in layers.items():
        reference = f"transformer.h.{name.removeprefix('decoder.blocks.')}."
        parts = [tensors[reference + part] for part in ("qweight", "qzeros", "scales", "g_idx")]
        linear = dense.get_submodule(name)
        assert isinstance(linear, torch.nn.Linear)
        linear.weight.data = dequantize(parts[0], parts[1], parts[2].float(), parts[3])
        linear.bias = torch.nn.Parameter(tensors[reference + "bias"].float())
        assert layer.in_features == linear.in_features
    ids = torch.tensor([[5, 60, 62, 62, 62, 62, 61, *range(6, 50)]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = vl.model(ids, pixels)
        torch.testing.assert_close(logits, dense(ids, pixels), atol=TOLERANCE, rtol=0)
    assert logits.std() > 0.1
    assert vl.generate_ids(ids, pixels, max_new_tokens=5) == qwenvl.Pipeline(dense, None).generate_ids(
        ids, pixels, max_new_tokens=5
    )


def test_int4_needs_packed_tensors(folder: Path) -> None:
    """A config that says packed over weights that are not: the names of what is missing."""
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "quantization_config": {"bits": 4, "group_size": 32}}))
    with one_line_error(CheckpointError, "qweight"):
        qwenvl.load(folder, dtype="float32", device="cpu", quiet=True)


def test_a_container_has_less_memory_than_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """`dtype="auto"` once looked at the host alone, and the container's limit then killed the process."""
    monkeypatch.setattr(loading, "_container_memory", lambda: 1000)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "MemAvailable: 99999999 kB\n")
    assert loading.free_memory() == 1000


@pytest.mark.parametrize("device", ["meta", "xla"])
def test_devices_that_cannot_hold_a_model(folder: Path, device: str) -> None:
    """A kind of device that torch knows and we do not use is one line."""
    with one_line_error(ConfigError, device):
        qwenvl.load(folder, device=device, quiet=True)
