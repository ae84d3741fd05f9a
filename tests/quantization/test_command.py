"""`qwenvl quantize`: from the command line to a folder that others can load, and every way to get it wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ENVIRONMENT
from PIL import Image
from safetensors.torch import load_file
from support import small_config
from torch import Tensor

import qwenvl
from qwenvl import cli
from qwenvl.adapt.packed import PackedLinear
from qwenvl.config import QuantizationConfig, QwenVLConfig
from qwenvl.quantization import checkpoint
from qwenvl.quantization.examples import examples_for_tiny
from qwenvl.weights import write
from qwenvl.weights.checkpoint import Checkpoint
from qwenvl.weights.convert import convert
from qwenvl.weights.hub import embedded
from qwenvl.weights.keymap import entries, reference_names

Outcome = tuple[int, str, str]
Run = Callable[..., Outcome]
FEW = ("--samples", "4")
# What the published checkpoint's files say; `config.json` says `quant_method`, too.
PUBLISHED = {
    "bits": 4,
    "group_size": 128,
    "damp_percent": 0.01,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "model",
}
PACKED = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `qwenvl quantize --quiet` here; returns its status, what it printed, and its remarks."""

    def run_here(*words: str | Path) -> Outcome:
        try:
            status = cli.main(["quantize", *map(str, words), "--quiet"])
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return run_here


def succeeded(outcome: Outcome) -> dict[str, Any]:
    """The JSON object of a command that must have succeeded."""
    status, out, err = outcome
    assert status == 0, err
    assert out.count("\n") == 1
    facts: dict[str, Any] = json.loads(out)
    return facts


def mistaken(outcome: Outcome, *says: str) -> None:
    """It must have ended with status 2, nothing on stdout and one line on stderr that holds each of `says`."""
    status, out, err = outcome
    assert (status, out) == (2, ""), err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    assert not [word for word in says if word not in err], err


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, read by the safetensors library alone."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# ---- what comes of it


def test_folder_is_the_published_layout(int4: Path) -> None:
    """Names, dtypes, configuration files and biases of zeros are those of the published Int4; all else is untouched."""
    source, stored = embedded("tiny"), tensors_of(int4)
    config = QwenVLConfig.load(int4)
    assert config.quantization_config == QuantizationConfig(group_size=64)
    assert stored.keys() == set(reference_names(config))
    assert json.loads((int4 / "model.safetensors.index.json").read_text())["weight_map"].keys() == stored.keys()
    how = PUBLISHED | {"group_size": 64}
    assert json.loads((int4 / "quantize_config.json").read_text()) == how
    told = json.loads((int4 / "config.json").read_text())
    assert list(told.pop("quantization_config").items()) == list((how | {"quant_method": "gptq"}).items())
    assert told == json.loads((source / "config.json").read_text())
    assert told["note"]
    for name in ("qwen.tiktoken", "generation_config.json"):
        assert (int4 / name).read_bytes() == (source / name).read_bytes()
    for entry, plain in Checkpoint(source).stream("reference"):
        if entry.reference in stored:
            assert stored[entry.reference].dtype == plain.dtype
            assert torch.equal(stored[entry.reference], plain)
    for name, tensor in stored.items():
        if name.endswith((".qweight", ".qzeros", ".g_idx", ".scales")):
            assert tensor.dtype == (torch.float16 if name.endswith(".scales") else torch.int32)
        if name.endswith(("attn.c_proj.bias", "w1.bias", "w2.bias")) and ".visual." not in name:
            assert not tensor.any()


def test_others_read_the_same_weight(int4: Path) -> None:
    """The layout as AutoGPTQ reads it, unpacked here by hand: close to the weight, and what the library computes."""
    stored, source = tensors_of(int4), {e.reference: t for e, t in Checkpoint(embedded("tiny")).stream("reference")}
    name = "transformer.h.2.mlp.w2"
    words, zeros, scales, groups = (stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    inputs, outputs = len(groups), words.shape[1]
    weight = torch.empty(inputs, outputs)
    for i in range(inputs):
        for o in range(0, outputs, 37):
            code = (int(words[i // 8, o]) >> 4 * (i % 8)) & 15
            zero = ((int(zeros[groups[i], o // 8]) >> 4 * (o % 8)) & 15) + 1
            weight[i, o] = float(scales[groups[i], o]) * (code - zero)
    layer = qwenvl.load(int4, "cpu", "float32", quiet=True).model.decoder.blocks[2].mlp.w2
    assert isinstance(layer, PackedLinear)
    seen = slice(None, None, 37)
    assert torch.equal(layer.weight_in(torch.float32)[seen], weight.T[seen])
    plain = source[f"{name}.weight"].float()[seen]
    assert (weight.T[seen] - plain).norm() / plain.norm() < 0.2


def test_it_is_loaded_and_speaks(int4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command opens the folder."""
    picture = str(tmp_path / "picture.png")
    Image.new("RGB", (60, 60), "red").save(picture)
    words = ["chat", "--model", str(int4), "--image", picture, "--max-new-tokens", "4", "What is it?", "--quiet"]
    assert cli.main(words) == 0
    assert cli.main(["info", str(int4)]) == 0
    assert "int4 (groups of 64)" in capsys.readouterr().out


def test_either_layout(run: Run, tmp_path: Path) -> None:
    """The reference's layout, converted to ours, is what `--to qwenvl` writes."""
    theirs, ours, converted = (tmp_path / name for name in ("theirs", "ours", "converted"))
    assert run("tiny", theirs, *FEW)[0] == 0
    assert run("tiny", ours, *FEW, "--to", "qwenvl")[0] == 0
    convert(theirs, converted, quiet=True)
    assert [Checkpoint(folder).layout for folder in (theirs, ours)] == ["reference", "qwenvl"]
    assert contents(ours) == contents(converted)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), QuantizationConfig()),
        (("--bits", "8", "--group-size", "-1"), QuantizationConfig(8, -1)),
        (("--bits", "8", "--lm-head"), QuantizationConfig(8, lm_head=True)),
        (("--asymmetric", "--desc-act", "--group-size", "32"), QuantizationConfig(4, 32, sym=False, desc_act=True)),
        (("--method", "rtn", "--lm-head", "--group-size", "64"), QuantizationConfig(4, 64, lm_head=True)),
    ],
    ids=["default", "int8", "int8 with the head", "act-order", "rtn with the head"],
)
def test_every_kind_is_loaded(run: Run, tmp_path: Path, flags: Sequence[str], expected: QuantizationConfig) -> None:
    """What flags ask for is what the folder says and holds; the model that is loaded stays close to the original."""
    folder = tmp_path / "packed"
    facts = succeeded(run("tiny", folder, *FEW, *flags, "--json"))
    config = QwenVLConfig.load(folder)
    assert config.quantization_config == expected
    assert ("lm_head" in json.loads((folder / "quantize_config.json").read_text())) == expected.lm_head
    kinds = (*PACKED, "lm_head") if expected.lm_head else PACKED
    assert tuple(facts["linears"]) == kinds
    assert (
        facts["bytes_after"] == Checkpoint(folder).bytes < facts["bytes_before"] == Checkpoint(embedded("tiny")).bytes
    )
    model = qwenvl.load(folder, "cpu", "float32", quiet=True).model
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == len(facts["layers"])
    example = next(examples_for_tiny(Checkpoint(embedded("tiny")), seed=7))
    with torch.no_grad():
        ours = model(example.input_ids, example.pixels)
        plain = qwenvl.load("tiny", "cpu", "float32", quiet=True).model(example.input_ids, example.pixels)
    assert (ours - plain).norm() / plain.norm() < (0.02 if expected.bits == 8 else 0.25)


def test_table_and_json_say_the_same(run: Run, tmp_path: Path) -> None:
    """A line for every kind of linear with its errors and bytes, which add up to what the files take."""
    facts = succeeded(run("tiny", tmp_path / "one", *FEW, "--json"))
    status, out, err = run("tiny", tmp_path / "two", *FEW)
    assert (status, err) == (0, "")
    for name, kind in facts["linears"].items():
        (line,) = [line for line in out.splitlines() if line.startswith(f"{name} ")]
        before, after = f"{kind['bytes_before']:,}", f"{kind['bytes_after']:,}"
        assert line.split() == [name, f"{kind['error']:.2%}", f"{kind['worst']:.2%}", before, after]
        errors = [error for path, error in facts["layers"].items() if path.endswith(f".{name}")]
        assert kind["error"] == pytest.approx(sum(errors) / 4)
        assert kind["worst"] == max(errors)
    saved = sum(kind["bytes_before"] - kind["bytes_after"] for kind in facts["linears"].values())
    assert facts["bytes_before"] - facts["bytes_after"] == saved
    assert f"{facts['bytes_before']:,}" in out
    assert "outputs off by" in out
    assert f"gptq on 4 examples of {facts['tokens']:,} tokens" in out
    assert facts["quantization"]["bits"] == 4


def test_the_same_again(run: Run, tmp_path: Path) -> None:
    """One seed gives the same bytes, another one other weights."""
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert run("tiny", tmp_path / name, *FEW, "--seed", seed)[0] == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert not same(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "c"))


# ---- conversations of one's own


def write_data(folder: Path, count: int = 6) -> Path:
    """Conversations about one picture, as JSON lines."""
    Image.new("RGB", (40, 30), "red").save(folder / "picture.png")
    path = folder / "data.jsonl"
    lines = []
    for number in range(count):
        asked = {"from": "user", "value": f"Picture 1: <img>picture.png</img>\nwhat is {number}"}
        lines.append({"conversations": [asked, {"from": "assistant", "value": f"the dog {number}"}]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_data(run: Run, chat_folder: Path, tmp_path: Path) -> None:
    """Any checkpoint is calibrated on a file of conversations; the seed says which of them, if there are more."""
    data = write_data(tmp_path)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "data.jsonl").write_text(data.read_text())
    groups = ("--group-size", "32", "--json")
    all_of_them = succeeded(run(chat_folder, tmp_path / "a", "--data", data, *groups))
    assert all_of_them["examples"] == 6
    again = ("--data", moved / "data.jsonl", "--image-root", tmp_path)
    assert succeeded(run(chat_folder, tmp_path / "b", *again, *groups))["layers"] == all_of_them["layers"]
    two, other = (
        succeeded(run(chat_folder, tmp_path / name, "--data", data, *groups, "--samples", "2", "--seed", seed))
        for name, seed in (("c", "0"), ("d", "3"))
    )
    assert two["examples"] == 2
    assert two["layers"] != other["layers"]


def test_rounding_needs_no_data(run: Run, chat_folder: Path, tmp_path: Path) -> None:
    """Round to nearest works for any checkpoint as it is; the table then tells of weights."""
    facts = succeeded(run(chat_folder, tmp_path / "a", "--method", "rtn", "--group-size", "32", "--json"))
    assert (facts["examples"], facts["tokens"]) == (0, 0)
    assert 0.02 < facts["linears"]["mlp.w1"]["error"] < 0.2
    out = run(chat_folder, tmp_path / "b", "--method", "rtn", "--group-size", "32")[1]
    assert "weights off by" in out
    assert out.splitlines()[-1].startswith("rtn, ")


# ---- mistakes and interruptions


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tiny"], ["required: destination"]),
        (["tiny", "there", "--bits", "3"], ["--bits", "invalid choice: 3"]),
        (["tiny", "there", "--group-size", "0"], ["group_size must be a positive whole number, or -1", "not 0"]),
        (["tiny", "there", "--group-size", "-5"], ["group_size", "not -5"]),
        (["tiny", "there", "--method", "awq"], ["invalid choice: 'awq'"]),
        (["tiny", "there", "--samples", "0"], ["samples must be a whole number from 1 up"]),
        (["tiny", "there", "--seed", "-1"], ["seed must be a whole number from 0 up"]),
        (["tiny", "there", "--device", "cuda:99"], ["no device cuda:99"]),
        (["tiny", "there", "--method", "rtn", "--desc-act"], ["act-order", "round to nearest"]),
        (["tiny", "there", "--image-root", "."], ["image_root", "name a file"]),
        (["tiny", "there", "--data", "missing.jsonl"], ["cannot read missing.jsonl"]),
        (["tiny", "there", "--data", "lost.jsonl"], ["1 of 1 records", "there is no picture"]),
        (["tiny", "there", "--data", "broken.jsonl"], ["broken.jsonl:1", "broken.png"]),
        (["tiny", "full"], ["full exists already; remove it or name another folder"]),
        (["tiny", "notes.txt"], ["notes.txt exists already"]),
        (["tiny", "notes.txt/there"], ["notes.txt is not a folder"]),
        (["nothing", "there"], ["there is no folder nothing"]),
        (["CHAT", "there"], ["GPTQ is calibrated on conversations", "--data", "--method rtn"]),
        (["INT4", "there"], ["is packed to 4 bits already", "16-bit checkpoint"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistake(
    run: Run,
    int4: Path,
    chat_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: Sequence[str],
    says: Sequence[str],
) -> None:
    """A user's mistake is one line and status 2, told before anything is computed, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "quantize_decoder", None)
    good = write_data(tmp_path, 1).read_text()
    for name in ("lost", "broken"):
        (tmp_path / f"{name}.jsonl").write_text(good.replace("picture.png", f"{name}.png"))
    for name in ("broken.png", "notes.txt"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    before = sorted(tmp_path.rglob("*"))
    folders = {"CHAT": chat_folder, "INT4": int4}
    mistaken(run(*(folders.get(word, word) for word in words)), *says)
    assert sorted(tmp_path.rglob("*")) == before


def test_sizes_that_cannot_be_packed(run: Run, tmp_path: Path) -> None:
    """Eight values share a word: a model whose sizes do not divide is told so before it is loaded."""
    config = small_config(intermediate_size=200)
    tensors = {entry.ours: torch.zeros(entry.our_shape) for entry in entries(config)}
    write.save(tensors, tmp_path / "odd", config, quiet=True)
    mistaken(run(tmp_path / "odd", tmp_path / "there", "--method", "rtn"), "must be multiples of 8")
    assert not (tmp_path / "there").exists()


def test_device_that_is_full(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory is one line that says how much is needed and what to do."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(checkpoint, "quantize_decoder", full)
    mistaken(run("tiny", tmp_path / "there", *FEW), "too little memory", "GB", "--device cpu")
    assert not list(tmp_path.iterdir())


def test_no_vocabulary(run: Run, chat_folder: Path, tmp_path: Path) -> None:
    """Conversations need a tokenizer; a folder without one can still be rounded."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in chat_folder.iterdir():
        if path.name != "qwen.tiktoken":
            (bare / path.name).write_bytes(path.read_bytes())
    mistaken(run(bare, tmp_path / "there", "--data", write_data(tmp_path)), "has no qwen.tiktoken")
    assert run(bare, tmp_path / "there", "--method", "rtn", "--group-size", "32")[0] == 0


def test_interrupted(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while it computes leaves nothing behind."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "quantize_decoder", stop)
    assert run("tiny", tmp_path / "there", *FEW)[0] == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_and_repeated(run: Run, tmp_path: Path) -> None:
    """Killed before the folder has its name, none can be loaded; the same command again gives what it would have."""
    killed = (
        "import os, signal, sys\n"
        "from qwenvl import cli\n"
        "from qwenvl.weights import write\n"
        "write.os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "cli.main(sys.argv[1:])\n"
    )
    words = ["quantize", "tiny", str(tmp_path / "there"), *FEW, "--quiet"]
    done = subprocess.run([sys.executable, "-c", killed, *words], env=ENVIRONMENT, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["there.partial"]
    assert run("tiny", tmp_path / "there", *FEW)[0] == 0
    assert run("tiny", tmp_path / "other", *FEW)[0] == 0
    assert contents(tmp_path / "there") == contents(tmp_path / "other")
    assert not list(tmp_path.glob("*.partial"))
