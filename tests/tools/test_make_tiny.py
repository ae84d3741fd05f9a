"""The embedded checkpoint: made by one command, always the same, small, and honest."""

import functools
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

import qwenvl
from qwenvl.text.tokenizer import SPECIALS, Tokenizer
from qwenvl.weights.hub import embedded

SIDE_FILES = ("config.json", "generation_config.json", "qwen.tiktoken", "model.safetensors.index.json")
LIMIT = 3_000_000  # bytes, for it is in every clone and every wheel


@pytest.fixture(scope="module")
def make_tiny() -> ModuleType:
    """tools/make_tiny.py, which is a script and no part of the package."""
    path = Path(__file__).parents[2] / "tools" / "make_tiny.py"
    spec = importlib.util.spec_from_file_location("make_tiny", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.bpe_train = functools.cache(module.bpe_train)  # type: ignore[attr-defined] # seconds, and always the same
    return module


def make(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run it as the command line would."""
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", *arguments])
    return int(module.main())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_same_command_same_bytes(make_tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice gives the same bytes, whatever was drawn in between; these are the committed files; a seed changes them.

    Weights are compared by value with the committed ones (another processor may round a last bit otherwise), the other
    files byte for byte.
    """
    first, second, other = tmp_path / "first", tmp_path / "second", tmp_path / "other"
    assert make(make_tiny, monkeypatch, str(first)) == 0
    torch.rand(5)
    assert make(make_tiny, monkeypatch, str(second)) == 0
    assert contents(first) == contents(second)
    committed = embedded("tiny")
    assert {name: (first / name).read_bytes() for name in SIDE_FILES} == {
        name: (committed / name).read_bytes() for name in SIDE_FILES
    }
    ours, theirs = (load_file(next(folder.glob("*.safetensors"))) for folder in (first, committed))
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype == torch.bfloat16
        torch.testing.assert_close(tensor, theirs[name], msg=lambda why, name=name: f"{name}: {why}")  # type: ignore[misc]
    assert make(make_tiny, monkeypatch, str(other), "--seed", "1") == 0
    assert contents(other)["qwen.tiktoken"] == contents(first)["qwen.tiktoken"]
    assert contents(other)["model-00001-of-00001.safetensors"] != contents(first)["model-00001-of-00001.safetensors"]


def test_mistake(
    make_tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that holds something else is not touched; the mistake is one line and status 2."""
    (tmp_path / "mine.txt").write_text("keep me")
    assert make(make_tiny, monkeypatch, str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert list(contents(tmp_path)) == ["mine.txt"]


def test_help(make_tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` shows an example."""
    with pytest.raises(SystemExit) as stop:
        make(make_tiny, monkeypatch, "--help")
    assert stop.value.code == 0
    assert "python tools/make_tiny.py weights/tiny" in capsys.readouterr().out


def test_committed_checkpoint_is_small() -> None:
    """It stays below its limit, all files together."""
    assert sum(len(content) for content in contents(embedded("tiny")).values()) < LIMIT


def test_committed_checkpoint_fits_together() -> None:
    """It loads; its vocabulary fits its logits; its image ids and its end are what the tokenizer calls them."""
    vl = qwenvl.load("tiny", "cpu", quiet=True)
    tokenizer, config = Tokenizer(embedded("tiny")), vl.config
    assert tokenizer.n_vocab <= config.vocab_size < tokenizer.n_vocab + 16
    ids, visual = tokenizer.special_ids, config.visual
    assert [ids["<img>"], ids["</img>"], ids["<imgpad>"]] == [
        visual.image_start_id,
        visual.image_end_id,
        visual.image_pad_id,
    ]
    assert vl.generation_config.eos_token_ids == (ids["<|endoftext|>"],)
    assert len(set(ids.values())) == len(SPECIALS)


def test_committed_checkpoint_is_honest() -> None:
    """As long as nobody trained it, its configuration says so where every command shows it."""
    note = json.loads((embedded("tiny") / "config.json").read_text())["note"]
    assert note.startswith("untrained: random weights")


def test_vocabulary_is_of_use() -> None:
    """The words of its questions take few tokens, and every text comes back as it was."""
    tokenizer = Tokenizer(embedded("tiny"))
    question = "What colour is the triangle? 图中有几个正方形？"
    assert len(tokenizer.encode(question)) < len(question) / 2
    for text in (question, "Zoë 😀 \x00\n\t", "<|im_start|><img>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
