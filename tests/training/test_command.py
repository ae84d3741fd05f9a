"""`qwenvl train`: from the command line to a folder that the other commands open, and every way to get it wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ENVIRONMENT, outside
from PIL import Image
from safetensors.torch import load_file
from support import chat_config, one_line_error, random_model, write_checkpoint

import qwenvl
from qwenvl import cli
from qwenvl.adapt.int4 import quantize_structure
from qwenvl.config import QwenVLConfig
from qwenvl.errors import CheckpointError, ConfigError
from qwenvl.model.qwenvl import QwenVL
from qwenvl.text.tokenizer import VOCABULARY_FILE, Tokenizer
from qwenvl.training import loop
from qwenvl.training.memory import QWEN_VL, Workload, estimate
from qwenvl.training.settings import TrainSettings, read_toml
from qwenvl.weights.hub import embedded

Train = Callable[..., tuple[int, str, str]]
SHORT = ("--max-new-tokens", "4", "--greedy", "--quiet")
FLAGS = (
    "--max-length",
    "256",
    "--steps",
    "3",
    "--batch-size",
    "2",
    "--learning-rate",
    "0.01",
    "--log-every",
    "1",
    "--workers",
    "0",
)


def write_data(folder: Path) -> Path:
    """Four conversations about one picture, as JSON lines."""
    Image.new("RGB", (40, 30), "red").save(folder / "picture.png")
    lines = [
        {
            "conversations": [
                {"from": "user", "value": f"Picture 1: <img>picture.png</img>\nwhat is {number}"},
                {"from": "assistant", "value": f"the dog {number}"},
            ]
        }
        for number in range(4)
    ]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def train(chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    """Run `qwenvl train` with LoRA over a small model into tmp_path/run; later flags win."""
    data = write_data(tmp_path)

    def run(*flags: str) -> tuple[int, str, str]:
        usual = ("--model", str(chat_folder), "--data", str(data), "--output", str(tmp_path / "run"), "--lora-r", "4")
        return command(capsys, "train", *usual, *FLAGS, *flags, "--quiet")

    return run


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run any command here; returns its status, what it printed, and its remarks."""
    try:
        status = cli.main(words)
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, *capsys.readouterr()


def told(outcome: tuple[int, str, str]) -> dict[str, Any]:
    """The JSON object of a command that must have succeeded."""
    status, out, err = outcome
    assert status == 0, err
    assert out.count("\n") == 1
    facts: dict[str, Any] = json.loads(out)
    return facts


def mistaken(outcome: tuple[int, str, str], *says: str) -> None:
    """It must have ended with status 2, nothing on stdout and one line on stderr that holds each of `says`."""
    status, out, err = outcome
    assert (status, out) == (2, ""), err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    assert not [word for word in says if word not in err], err


def losses(folder: Path) -> dict[int, float]:
    """The losses in the log, by update."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def same_adapters(*runs: Path) -> bool:
    """Whether two runs have the same adapter, to the bit."""
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# ---- what comes of it


def test_lora(train: Train, chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run leaves an adapter, alone and merged, that every command opens; both and `convert --adapter` are one."""
    run, converted = tmp_path / "run", tmp_path / "converted"
    facts = told(train("--merge", "--json", "--evaluation-data", str(tmp_path / "data.jsonl")))
    assert facts["finished"]
    assert (facts["steps"], facts["stopped"]) == (3, "finished")
    assert facts["written"] == {"adapter": str(run / "adapter"), "merged": str(run / "merged")}
    assert facts["evaluation"]["loss"] < 10
    assert facts["memory_bytes"] > 1_000_000
    assert list(losses(run)) == [1, 2, 3]

    ask = ("generate", "the dog", *SHORT)
    plain = command(capsys, *ask, "--model", str(chat_folder))
    beside = command(capsys, *ask, "--model", str(chat_folder), "--adapter", str(run / "adapter"))
    assert beside == command(capsys, *ask, "--model", str(run / "merged"))
    assert beside[0] == 0
    assert beside != plain

    words = ("convert", str(chat_folder), str(converted), "--adapter", str(run / "adapter"), "--quiet")
    assert command(capsys, *words)[:2] == (0, f"wrote {converted}\n")
    assert command(capsys, *words)[:2] == (0, f"{converted} already is this conversion, whole\n")
    for file in (run / "merged").iterdir():
        assert (converted / file.name).read_bytes() == file.read_bytes()
    words = (*words[:2], str(tmp_path / "reference"), *words[3:], "--to", "reference")
    assert command(capsys, *words)[0] == 0
    assert command(capsys, *ask, "--model", str(tmp_path / "reference")) == beside


def test_full(train: Train, chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Full fine-tuning leaves a whole checkpoint: the tower as it was, the rest trained, vocabulary and all."""
    folder = Path(told(train("--method", "full", "--json"))["written"]["model"])
    assert folder == tmp_path / "run" / "model"
    before, after = (qwenvl.load(name, "cpu", "float32", quiet=True) for name in (chat_folder, folder))
    then = before.model.state_dict()
    moved = {name for name, tensor in after.model.state_dict().items() if not torch.equal(tensor, then[name])}
    assert not any(name.startswith(("visual.", "resampler.proj", "resampler.ln_post")) for name in moved)
    assert {"decoder.wte.weight", "decoder.lm_head.weight", "resampler.query"} <= moved
    assert "resampler.pos_embed" not in moved
    assert after.generation_config == before.generation_config
    assert command(capsys, "chat", "the dog", "--model", str(folder), *SHORT)[0] == 0


def test_train_vision(train: Train, tmp_path: Path, chat_folder: Path) -> None:
    """`--train-vision` trains the tower, too."""
    told(train("--method", "full", "--train-vision", "--json"))
    name = "visual.conv1.weight"
    before, after = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (chat_folder, tmp_path / "run" / "model")
    )
    assert not torch.equal(before[name], after[name])


def test_full_keeps_dtypes_and_drops_the_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained in float32, written in the dtypes of the base; its note was about other weights and is not taken over."""
    data = write_data(tmp_path)
    tokenizer = Tokenizer(embedded("tiny"))
    config = QwenVLConfig.from_dict({**chat_config(tokenizer).to_dict(), "note": "untrained"})
    vocabulary = embedded("tiny") / VOCABULARY_FILE
    write_checkpoint(tmp_path / "base", random_model(config).bfloat16(), vocabulary, {"chat_format": "chatml"})
    words = ["--model", str(tmp_path / "base"), "--data", str(data), "--output", str(tmp_path / "run")]
    told(command(capsys, "train", *words, "--method", "full", *FLAGS, "--json", "--quiet"))
    (shard,) = (tmp_path / "run" / "model").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(shard).values()} == {torch.bfloat16}
    assert "note" not in json.loads((tmp_path / "run" / "model" / "config.json").read_text())


def packed_base(folder: Path) -> Path:
    """A small chat checkpoint in 4 bits."""
    vocabulary = embedded("tiny") / VOCABULARY_FILE
    config = chat_config(Tokenizer(vocabulary)).to_dict()
    packed = QwenVLConfig.from_dict({**config, "quantization_config": {"group_size": 32}})
    torch.manual_seed(0)
    model = QwenVL(packed)
    quantize_structure(model, packed)
    for name, buffer in model.named_buffers():
        if name.endswith("qweight"):
            buffer.copy_(torch.randint(-(2**31), 2**31, buffer.shape).to(torch.int32))
        elif name.endswith("scales"):
            buffer.fill_(0.01)
    return write_checkpoint(folder, model, vocabulary, {"chat_format": "chatml"})


def test_qlora(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over 4 bits an adapter is trained and used beside the weights; it is told which method goes with which base."""
    base = packed_base(tmp_path / "packed")
    folder = told(train("--model", str(base), "--method", "qlora", "--json"))["written"]["adapter"]
    assert command(capsys, "chat", "the", "--model", str(base), "--adapter", folder, *SHORT)[0] == 0
    mistaken(train("--model", str(base), "--output", str(tmp_path / "other")), "packed to a few bits", "method qlora")
    mistaken(train("--method", "qlora", "--output", str(tmp_path / "other")), "not packed to a few bits")
    words = ("convert", str(base), str(tmp_path / "merged"), "--adapter", folder, "--quiet")
    mistaken(command(capsys, *words), "cannot be merged", "a few bits")
    assert not list(tmp_path.glob("merged*"))


def test_base_model_in_16_bits(train: Train, tmp_path: Path) -> None:
    """LoRA with embeddings over bfloat16 weights computes in bfloat16 where `precision` leaves it open."""
    assert train("--dtype", "bfloat16", "--lora-train-embeddings", "--activation-checkpointing", "--json")[0] == 0
    clash = ("--dtype", "bfloat16", "--precision", "float32", "--output", str(tmp_path / "other"))
    mistaken(train(*clash), "dtype bfloat16 and precision float32")


# ---- going on


def test_goes_on_and_ends(train: Train, tmp_path: Path) -> None:
    """A run that its time stopped goes on with the same command; once finished, nothing is done again."""
    run = tmp_path / "run"
    status, out, _ = train("--max-minutes", "1e-9")
    assert (status, out) == (0, "stopped after update 1; the same command goes on\n")
    assert not (run / "adapter").exists()
    facts = told(train("--json"))
    assert (facts["finished"], facts["steps"]) == (True, 3)
    assert list(losses(run)) == [1, 2, 3]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    status, out, _ = train()
    assert status == 0
    assert out.splitlines()[0] == f"{run} is finished already"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert set(told(train("--merge", "--json"))["written"]) == {"adapter", "merged"}  # what is missing is added


def test_stopped_run_equals_one_that_was_not(train: Train, tmp_path: Path) -> None:
    """Stopped after one update and gone on, the adapter is to the bit that of a run in one go."""
    train("--max-minutes", "1e-9")
    train()
    train("--output", str(tmp_path / "straight"))
    assert same_adapters(tmp_path / "run", tmp_path / "straight")


def test_interrupted(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends a run after the update at hand, with a checkpoint and status 130; the same command then finishes."""
    update = loop._Run.update

    def interrupted(*arguments: Any) -> loop.Update:
        os.kill(os.getpid(), signal.SIGINT)
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "update", interrupted)
        assert train()[:2] == (130, "stopped after update 1; the same command goes on\n")
    assert train()[0] == 0
    assert list(losses(tmp_path / "run")) == [1, 2, 3]


def test_settings_are_kept(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """train.toml in the output folder is the whole run: from it alone the same adapter comes again."""
    train()
    stored = tmp_path / "run" / "train.toml"
    assert TrainSettings(**read_toml(stored)).learning_rate == 0.01
    assert command(capsys, "train", str(stored), "--output", str(tmp_path / "again"), "--quiet")[0] == 0
    assert same_adapters(tmp_path / "run", tmp_path / "again")


def test_flags_override_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--print-config` prints the settings as they come out, as TOML that gives the same again."""
    path = tmp_path / "a.toml"
    path.write_text('steps = 5\nseed = 3\nlora_targets = ["w1"]\n')
    words = ("train", str(path), "--seed", "4", "--lora-targets", "w1", "w2", "--betas", "0.5", "0.6", "--print-config")
    status, out, _ = command(capsys, *words)
    assert status == 0
    path.write_text(out)
    settings = TrainSettings(**read_toml(path))
    assert settings == TrainSettings(steps=5, seed=4, lora_targets=("w1", "w2"), betas=(0.5, 0.6))
    assert command(capsys, "train", str(path), "--print-config")[1] == out
    _, out, _ = command(
        capsys, "train", str(path), "--epochs", "2", "--print-config"
    )  # one length takes the other's place
    path.write_text(out)
    settings = TrainSettings(**read_toml(path))
    assert (settings.steps, settings.epochs) == (None, 2)


def test_dry_run(train: Train, tmp_path: Path, chat_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--dry-run` checks data and settings, tells the memory, and writes nothing."""
    facts = told(train("--dry-run", "--json"))
    assert (facts["stopped"], facts["finished"]) == ("dry run", False)
    assert facts["memory_bytes"] > 0
    assert not (tmp_path / "run").exists()
    words = ("--model", str(chat_folder), "--data", str(tmp_path / "data.jsonl"), "--output", str(tmp_path / "run"))
    long = ("--epochs", "1", "--warmup-steps", "50", "--max-length", "256", "--dry-run", "--quiet")
    mistaken(command(capsys, "train", *words, *long), "warmup_steps 50")
    (tmp_path / "picture.png").unlink()
    mistaken(train("--dry-run"), "4 of 4 records", "data.jsonl:1: there is no picture")


def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`--example` writes data and settings that can be trained on as they are, and overwrites nothing."""
    monkeypatch.chdir(tmp_path)
    status, out, _ = command(capsys, "train", "--example", "example")
    assert (status, out) == (0, "wrote example: qwenvl train example/train.toml\n")
    told(command(capsys, "train", "example/train.toml", "--dry-run", "--json", "--quiet"))
    mistaken(command(capsys, "train", "--example", "example"), "scene.png", "already")


# ---- mistakes


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["no.toml"], ["cannot read no.toml"]),
        (["bad.toml"], ["bad.toml", "'learning_rat'", "'learning_rate'"]),
        (["--steps", "0"], ["steps must be whole, from 1 up"]),
        (["--lora-r", "0"], ["LoRA's r must be a positive whole number"]),
        (["--lora-targets", "qkv"], ["qkv", "names no linear"]),
        (["--batch-size", "3", "--accumulation", "2"], ["batch_size 3", "multiple"]),
        (["--model", "nothing"], ["there is no folder nothing"]),
        (["--data", "missing.jsonl"], ["cannot read missing.jsonl"]),
        (["--data", "masked.jsonl"], ["1 of 1 records", "masked.jsonl:1", "nothing can be learned"]),
        (["--data", "lost.jsonl"], ["2 of 3 records", "lost.jsonl:2: there is no picture", "lost.jsonl:3"]),
        (["--max-length", "9999"], ["max_length must be 1 to"]),
        (["--dtype", "float16"], ["dtype must be auto or float32 or bfloat16"]),
        (["--method", "full", "--dtype", "bfloat16"], ["dtype must be auto or float32 for method full"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--device", "cuda:99", "--dry-run"], ["cuda:99"]),
        (["--lora-targets", "qkv", "--dry-run"], ["qkv", "names no linear"]),
        (["--output", "full"], ["full holds something else"]),
        (["--output", "."], [". holds something else"]),
        (["--output", "data.jsonl"], ["data.jsonl cannot be the output folder"]),
        (["--output", "data.jsonl/run"], ["data.jsonl/run"]),
    ],
)
def test_mistake(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: Sequence[str], says: Sequence[str]
) -> None:
    """A user's mistake is one line and status 2, told before anything is trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text("learning_rat = 1")
    (tmp_path / "train.toml").write_text("")  # a configuration of the user's own does not make a folder a run's
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    good = (tmp_path / "data.jsonl").read_text().splitlines()[0]
    lost = [good.replace("picture.png", name) for name in ("a.png", "b.png")]
    (tmp_path / "lost.jsonl").write_text("\n".join([good, *lost]))
    (tmp_path / "masked.jsonl").write_text('{"conversations": [{"from": "user", "value": "what"}]}')
    mistaken(train(*flags), *says)
    assert not list(tmp_path.rglob("checkpoints"))


@pytest.mark.parametrize("name", ["data", "output"])
def test_needed(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without data or output it says which flag is missing."""
    other = {"data": ["--output", str(tmp_path / "run")], "output": ["--data", "x.json"]}[name]
    mistaken(command(capsys, "train", *other), f"--{name}")


def test_bad_records_can_be_skipped(train: Train, tmp_path: Path) -> None:
    """With `--on-error skip`, what is wrong is left out."""
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text() + "{\n")
    mistaken(train(), "1 of 5 records", "data.jsonl:5")
    assert train("--on-error", "skip")[0] == 0


def test_loss_that_is_no_number(train: Train, tmp_path: Path) -> None:
    """The run stops with the batch's samples in a file, and the checkpoint before is there to go on from."""
    mistaken(train("--learning-rate", "1e38", "--clip", "0", "--warmup-steps", "0", "--save-every", "1"), "loss nan")
    failed = json.loads((tmp_path / "run" / "failed-batch.json").read_text())
    assert len(failed["sources"]) == 2
    assert all(source.startswith("data.jsonl:") for source in failed["sources"])
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_was_learned_before_a_loss_that_is_no_number(
    train: Train, tmp_path: Path, chat_folder: Path, method: str
) -> None:
    """It is written under another name than a finished run's, also when the same command fails again."""
    flags = ("--method", method, "--learning-rate", "1e38", "--clip", "0", "--warmup-steps", "0")
    kind = "adapter" if method == "lora" else "model"
    for _ in range(2):
        mistaken(train(*flags), "update 2 has loss nan", f"learned before is in {tmp_path / 'run'}/{kind}-1")
    kept = str(tmp_path / "run" / f"{kind}-1")
    qwenvl.load(chat_folder if method == "lora" else kept, adapter=kept if method == "lora" else None, quiet=True)
    assert not (tmp_path / "run" / kind).exists()


def test_killed_while_the_settings_were_written(train: Train, tmp_path: Path) -> None:
    """The half of a file that this leaves is nobody else's."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.toml.tmp").write_text("stee")
    assert train("--dry-run")[0] == 0


def test_output_of_another_run(train: Train, tmp_path: Path) -> None:
    """A folder with a checkpoint takes no other settings; without one, nothing is lost by new ones."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.toml").write_text("seed = 9")  # a run that ended before its first checkpoint
    train("--max-minutes", "1e-9")
    mistaken(train("--lora-alpha", "3"), "lora_alpha was 16 and is 3.0", "another output folder")
    mistaken(train("--learning-rate", "0.02"), "learning_rate was 0.01 and is 0.02")
    assert train()[0] == 0
    mistaken(train("--seed", "1"), "seed was 0 and is 1")  # a finished one neither


def test_checkpoint_of_another_architecture(train: Train, tmp_path: Path, chat_folder: Path) -> None:
    """A base model that was replaced under its name is noticed, and the checkpoint of the other one is kept."""
    base = tmp_path / "base"
    shutil.copytree(chat_folder, base)
    train("--model", str(base), "--max-minutes", "1e-9")
    tokenizer = Tokenizer(chat_folder)
    shutil.rmtree(base)
    larger = random_model(chat_config(tokenizer, num_hidden_layers=3))
    write_checkpoint(base, larger, chat_folder / VOCABULARY_FILE, {"chat_format": "chatml"})
    mistaken(train("--model", str(base)), "another architecture")
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_adapter_of_another_base(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter that does not belong is refused wherever one can be named; so is a folder without one."""
    adapter = told(train("--json"))["written"]["adapter"]
    for words in (("chat", "hi"), ("generate", "hi"), ("convert", "tiny", str(tmp_path / "there"))):
        mistaken(command(capsys, *words, "--adapter", adapter, "--quiet"), adapter, "adapter")
    mistaken(command(capsys, "chat", "hi", "--adapter", "nowhere", "--quiet"), "there is no folder nowhere")
    mistaken(command(capsys, "chat", "hi", "--adapter", str(tmp_path), "--quiet"), "adapter_config.json")
    assert not list(tmp_path.glob("there*"))


def test_load_with_an_adapter(train: Train, chat_folder: Path) -> None:
    """`load(..., adapter=)` folds it in: plain linears, other answers; a folder that is not there is said at once."""
    adapter = told(train("--json"))["written"]["adapter"]
    plain, adapted = (qwenvl.load(chat_folder, "cpu", adapter=folder, quiet=True) for folder in (None, adapter))
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.equal(plain.model(ids), adapted.model(ids))
    assert adapted.model.state_dict().keys() == plain.model.state_dict().keys()
    with one_line_error(ConfigError, "nowhere"):
        qwenvl.load("tiny", adapter="nowhere")
    with one_line_error(CheckpointError, "another base model"):
        other = chat_folder.parent / "other"
        if not other.exists():
            vocabulary = chat_folder / VOCABULARY_FILE
            write_checkpoint(other, random_model(qwenvl.load(chat_folder).config, seed=1), vocabulary, None)
        qwenvl.load(other, "cpu", adapter=adapter, quiet=True)


def test_too_little_memory(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot fit into a GPU is refused before the weights are read; what may not fit is only told."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 2000))
    mistaken(train(), "are free", "do not fit")
    assert not (tmp_path / "run").exists()
    needed = told(train("--dry-run", "--json", "--device", "cpu"))["memory_bytes"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (needed // 2, needed))
    assert train("--dry-run")[0] == 0


# ---- processes of their own


def test_help_computes_the_memory_without_torch() -> None:
    """Help answers without the heavy imports, and says what LoRA over the published weights needs."""
    script = """
import sys
from qwenvl.cli import main
try:
    main(["train", "--help"])
except SystemExit:
    pass
heavy = {"torch", "numpy", "PIL", "tiktoken", "safetensors", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert done.returncode == 0, done.stderr
    real = Workload("lora", 1, 2048, 1, 2, 2, 64, TrainSettings().lora_targets, checkpointing=True, accumulates=True)
    assert f"{estimate(QWEN_VL, real)}" in done.stdout
    assert 19.3e9 < estimate(QWEN_VL, real).weights < 20e9


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_torchrun(chat_folder: Path, tmp_path: Path, method: str) -> None:
    """Two processes train what one does, of which one prints and writes; a mistake is told once."""
    data = write_data(tmp_path)
    words = ["--model", str(chat_folder), "--data", str(data), *FLAGS, "--method", method, "--lora-dropout", "0"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def two(*flags: str) -> subprocess.CompletedProcess[str]:
        process = [*torchrun, "-m", "qwenvl.cli", "train", *words, *flags, "--quiet"]
        return subprocess.run(process, capture_output=True, text=True, env=ENVIRONMENT, timeout=240)

    done = two("--output", str(tmp_path / "two"), "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert outside("train", *words, "--output", str(tmp_path / "one"), "--quiet").returncode == 0
    file = "adapter/adapter_model.safetensors" if method == "lora" else "model/model-00001-of-00001.safetensors"
    both, one = (load_file(tmp_path / name / file) for name in ("two", "one"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    for name, tensor in one.items():  # AdamW's first updates make much of a gradient's last digits
        torch.testing.assert_close(both[name], tensor, atol=2e-3, rtol=0)
    done = two("--output", str(tmp_path / "three"), "--data", "nothing.json")
    assert (done.returncode != 0, done.stdout) == (True, "")
    assert done.stderr.count("cannot read nothing.json") == 1
