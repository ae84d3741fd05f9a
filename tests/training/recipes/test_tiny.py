"""The small model's recipe from end to end, shortened: one command, stopped or not, gives one and the same model."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import write_vocabulary

import qwenvl
from qwenvl.config import GenerationConfig, QwenVLConfig
from qwenvl.errors import CheckpointError
from qwenvl.model.qwenvl import QwenVL
from qwenvl.text.tokenizer import SPECIALS, Tokenizer
from qwenvl.training.loop import fit
from qwenvl.training.recipes import tiny, tiny_evaluate
from qwenvl.training.recipes.tiny import Student
from qwenvl.training.recipes.tiny_guidance import LAYERS, POINTING_HEADS, TALLYING_HEADS
from qwenvl.training.recipes.tiny_scenes import Split

FOLDERS = ["1-sight", "2-captions", "3-tasks", "4-chat"]
WEIGHTS = "model-00001-of-00001.safetensors"
CONFIG = tiny.config


@dataclass
class Workshop:
    """A folder for runs of the recipe, shortened.

    `changed` says for each call of `fit`, by folder and tensor, whether it moved.
    """

    folder: Path
    changed: dict[str, dict[str, bool]] = field(default_factory=dict)

    @property
    def whole(self) -> Path:
        """Where the run is that nothing disturbed."""
        return self.folder / "whole"

    def run(self, name: str, *arguments: str) -> int:
        """The command, writing into the folder `name`."""
        return tiny.main(["--out", str(self.folder / name), "--device", "cpu", "--quiet", *arguments])

    def fit(self, student: Student, data: Any, options: Any, folder: Path, **more: Any) -> Any:
        """`fit`, watched."""
        before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        result = fit(student, data, options, folder, **more)
        moved = {name: not torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items()}
        self.changed.setdefault(folder.name, moved)
        return result


def shorten(patch: pytest.MonkeyPatch, workshop: Workshop, words: Path) -> None:
    """Phases of two updates of two sequences, few layers, another vocabulary, and few, short answers."""

    def short(phase: tiny.Phase) -> tiny.Phase:
        more = {"steps": 2, "batch_size": 2, "warmup_steps": 0, "workers": 0, "log_every": 1, "save_every": 1}
        return replace(phase, options=replace(phase.options, **more))

    def config() -> QwenVLConfig:
        real = CONFIG()
        return replace(real, num_hidden_layers=1 + max(LAYERS), visual=replace(real.visual, layers=1))

    patch.setattr(tiny, "vocabulary", words.read_bytes)
    patch.setattr(tiny, "MERGES", len(words.read_bytes().splitlines()))
    patch.setattr(tiny, "config", config)
    patch.setattr(tiny, "PHASES", tuple(map(short, tiny.PHASES)))
    patch.setattr(tiny, "MEASURED", 1)
    patch.setattr(tiny, "WATCHED", 1)
    patch.setattr(tiny, "fit", workshop.fit)
    patch.setattr(tiny_evaluate, "LONGEST", 4)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary's file."""
    return write_vocabulary(tmp_path_factory.mktemp("words"), "Where is the red circle square box user assistant")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, words: Path) -> Workshop:
    """With a run that nothing disturbed."""
    made = Workshop(tmp_path_factory.mktemp("workshop"))
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch, made, words)
        assert made.run("whole") == 0
    return made


@pytest.fixture
def workshop(finished: Workshop, words: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """The same, and the recipe is shortened for this test too."""
    shorten(monkeypatch, finished, words)
    return finished


# The architecture


def test_size() -> None:
    """At most 7.5 million parameters, a bfloat16 file under 15 MiB, queries as many as patches, ids that fit."""
    config = tiny.config()
    model = QwenVL(config)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 7_500_000
    assert sum(2 * tensor.numel() + 200 for tensor in model.state_dict().values()) < 15 * 2**20
    assert config.visual.n_queries == config.visual.grid**2
    assert config.visual.image_size in (112, 168)
    assert config.visual.image_pad_id == tiny.MERGES + len(SPECIALS) - 1 < config.vocab_size
    assert QwenVLConfig.from_dict(config.to_dict()) == config
    assert max(LAYERS) < config.num_hidden_layers
    assert max(heads.stop for heads in (POINTING_HEADS, *TALLYING_HEADS)) <= config.num_attention_heads


def test_the_papers_stages() -> None:
    """Sight stands for the pretrained tower; then the paper's three, of which the last freezes the vision tower."""
    names = list(dict(Student(tiny.config()).named_parameters()))
    trained = {phase.name: {name for name in names if phase.rates(name) > 0} for phase in tiny.PHASES}
    assert [f"{number}-{name}" for number, name in enumerate(trained, 1)] == FOLDERS
    assert not any("decoder" in name for name in trained["sight"])
    assert trained["captions"] == trained["tasks"] == set(names)
    assert set(names) - trained["chat"] == {name for name in names if name.startswith("model.visual.")}
    for phase in tiny.PHASES[1:]:
        assert {phase.rates(name) for name in names if ".decoder." in name} == {1.0}
        assert max(phase.rates(name) for name in names if ".decoder." not in name) < 1
    for phase in tiny.PHASES:
        assert set(phase.rows) <= set(tiny_evaluate.ROWS)


def test_sight_sees_everything_from_the_beginning() -> None:
    """No curriculum of shapes, which is for phrases, and a word in most pictures: letters take the longest to see."""
    stages = {phase.name: phase.stage for phase in tiny.PHASES}
    assert stages["sight"].ramp == 0
    captions = next(phase for phase in tiny.PHASES if phase.name == "captions")
    assert 0 < captions.stage.ramp <= captions.sequences  # which reaches its end
    assert stages["sight"].words > 0.5 > max(stage.words for name, stage in stages.items() if name != "sight")


# A run


def test_a_run_leaves_everything(finished: Workshop) -> None:
    """Logs of all phases, the checkpoint, the scores with their table, and the curves."""
    whole = finished.whole
    for folder in FOLDERS:
        lines = [json.loads(line) for line in (whole / folder / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    evaluation = [line["evaluation"] for line in lines if "evaluation" in line][-1]
    assert list(evaluation) == ["box", "box IoU", "count", "relation", "text", "exists"]
    scores = json.loads((whole / "scores.json").read_text())
    assert (scores["split"], scores["each"]) == ("test", 1)
    assert set(scores["scores"]) == set(tiny_evaluate.ROWS)
    assert scores["table"].startswith("| | English | Chinese |")
    with Image.open(whole / "curves.png") as picture:
        assert picture.format == "PNG"
    assert sorted(p.name for p in whole.iterdir()) == sorted(
        [*FOLDERS, "checkpoint", "curves.png", "qwen.tiktoken", "scores.json"]
    )


def test_the_checkpoint(workshop: Workshop) -> None:
    """It loads, in bfloat16, with its own vocabulary and generation config, without the heads of training."""
    folder = workshop.whole / "checkpoint"
    vl = qwenvl.load(folder, "cpu", quiet=True)
    assert set(vl.model.state_dict()) == set(QwenVL(tiny.config()).state_dict())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert not [name for name in index["weight_map"] if "heads" in name]
    parameters = sum(tensor.numel() for tensor in vl.model.state_dict().values())
    assert 2 * parameters < (folder / WEIGHTS).stat().st_size < 2 * parameters + 100_000
    assert vl.config == replace(tiny.config(), note=tiny.NOTE)
    assert vl.tokenizer is not None
    assert vl.tokenizer.image_start_id == vl.config.visual.image_start_id
    eos = vl.tokenizer.eos_id
    assert vl.generation_config == GenerationConfig(eos_token_id=eos, max_new_tokens=tiny.LONGEST)
    assert json.loads((folder / "generation_config.json").read_text())["pad_token_id"] == eos
    reply, _ = vl.chat([{"image": Image.new("RGB", (50, 50))}, {"text": "Box the red circle."}], max_new_tokens=3)
    assert isinstance(reply, str)


def test_what_each_phase_trains(finished: Workshop) -> None:
    """Sight leaves the decoder alone, the stages train everything, chat leaves the vision tower as it is to the bit."""
    constant = "model.resampler.pos_embed"
    moved = {
        folder: {name for name, was in names.items() if was and "heads" not in name}
        for folder, names in finished.changed.items()
    }
    everything = {name for name in finished.changed["1-sight"] if "heads" not in name} - {constant}
    assert list(moved) == FOLDERS
    assert moved["1-sight"] == {name for name in everything if "decoder" not in name}
    assert moved["2-captions"] == moved["3-tasks"] == everything
    assert moved["4-chat"] == {name for name in everything if not name.startswith("model.visual.")}
    assert finished.changed["1-sight"]["patch_heads.kind.weight"]


@pytest.mark.slow
def test_stopped_again_and_again(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped after every update and given again, the command ends with the same bytes as the run at once."""
    calls = 0
    while calls < 12:
        calls += 1
        assert workshop.run("stopped", "--max-minutes", "1e-9") == 0
        if "stopped before the end: the same command goes on" not in capsys.readouterr().out:
            break
        assert not (workshop.folder / "stopped" / "checkpoint").exists()
    assert calls == 5  # the second update of a phase and the first of the next
    for file in (f"checkpoint/{WEIGHTS}", "checkpoint/config.json", "scores.json"):
        assert (workshop.folder / "stopped" / file).read_bytes() == (workshop.whole / file).read_bytes(), file


def test_given_again_after_the_end(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is trained or written over; the table is printed once more."""
    whole = workshop.whole
    before = (whole / "checkpoint" / WEIGHTS).stat()
    scores = (whole / "scores.json").read_bytes()
    assert workshop.run("whole") == 0
    assert (whole / "checkpoint" / WEIGHTS).stat().st_mtime_ns == before.st_mtime_ns
    assert (whole / "scores.json").read_bytes() == scores
    assert "| box |" in capsys.readouterr().out


def test_no_picture_is_seen_twice(workshop: Workshop, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each phase begins with the picture after the last that the phase before could take, and takes all of its own."""
    assert workshop.whole.is_dir()
    taken: list[Any] = []

    def noted(student: Student, data: Any, options: Any, folder: Path, **more: Any) -> Any:
        del student, options, folder, more
        taken.append(range(data.first, data.first + 2 * len(data)))
        assert data.split is Split.TRAIN

        class Finished:
            finished = True

        return Finished()

    monkeypatch.setattr(tiny, "fit", noted)
    assert tiny.train(Student(tiny.config()), Tokenizer(words), Path("nowhere"), None, True)
    assert taken == [range(8), range(8, 16), range(16, 24), range(24, 32)]


# Mistakes


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """All that stands on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("device", ["banana", "cuda:99"])
def test_a_device_that_is_not_there(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, before anything takes long or is written."""
    assert tiny.main(["--out", str(tmp_path / "out"), "--device", device]) == 2
    assert device in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    """A file in the way is one line that names it."""
    (workshop.folder / "file").write_text("")
    assert workshop.run("file/out") == 2
    line = one_line(capsys)
    assert line.startswith("error: ")
    assert "file" in line


def test_a_full_disk(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the disk is full at the end, one line says so, and what was finished is still there."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "curves.png")

    monkeypatch.setattr(tiny, "plot", full)
    monkeypatch.setattr(tiny, "train", lambda *_: True)
    assert workshop.run("full") == 2
    assert one_line(capsys) == "error: curves.png: No space left on device; what was finished is kept"


def test_another_vocabulary(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with some other model's words is not trained on: its ids would be other tokens."""
    folder = workshop.folder / "other"
    folder.mkdir()
    write_vocabulary(folder, "a")
    assert workshop.run("other") == 2
    assert "vocabulary of another model" in one_line(capsys)


def test_without_matplotlib(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said at once, not after hours, when the curves are to be drawn; and the pictures would have one font."""
    monkeypatch.setattr(tiny, "find_spec", lambda name: None)
    assert workshop.run("nothing") == 2
    assert "qwenvl[train]" in one_line(capsys)


def test_a_run_of_another_recipe(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder whose run had another learning rate is not gone on with: the one line says what differs."""
    first = tiny.PHASES[0]
    changed = replace(first, options=replace(first.options, learning_rate=0.5))
    monkeypatch.setattr(tiny, "PHASES", (changed, *tiny.PHASES[1:]))
    assert workshop.run("whole") == 2
    assert "learning_rate" in one_line(capsys)


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "soon"])
def test_minutes(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A time that is none is refused."""
    with pytest.raises(SystemExit) as stopped:
        tiny.main([f"--max-minutes={minutes}"])
    assert stopped.value.code == 2
    assert "--max-minutes" in capsys.readouterr().err


def test_control_c(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In training the update at hand is saved and the run ends well; elsewhere one line and status 130."""

    def interrupted(phase: tiny.Phase) -> tiny.Phase:
        def objective(student: Student, batch: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return phase.objective(student, batch)

        return replace(phase, objective=objective)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "PHASES", tuple(map(interrupted, tiny.PHASES)))
        assert workshop.run("interrupted") == 0
    assert "the same command goes on" in capsys.readouterr().out
    assert (workshop.folder / "interrupted" / "1-sight" / "checkpoints" / "step-00000001").is_dir()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "train", stop)
    assert workshop.run("interrupted") == 130
    assert one_line(capsys) == "stopped: the same command goes on"


def test_errors_of_the_library_are_one_line(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What training refuses is told as every command tells it."""

    def refuse(*_: Any) -> None:
        raise CheckpointError("it cannot\nbe read")

    monkeypatch.setattr(tiny, "train", refuse)
    assert workshop.run("refused") == 2
    assert one_line(capsys) == "error: it cannot be read"
