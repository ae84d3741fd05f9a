"""Checkpoints: a killed run that goes on is the run that was never killed, and nothing half-written is believed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import training_runs
from support import one_line_error, random_model, small_config
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from training_runs import log_lines, small_model, train

import qwenvl
from qwenvl.errors import CheckpointError
from qwenvl.training import checkpoints
from qwenvl.training.checkpoints import Progress
from qwenvl.training.errors import TrainingError

SOURCE = Path(qwenvl.__file__).parents[1]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights and optimizer state."""
    metadata = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    state = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in metadata.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process is one process
        load(state, checkpoint_id=str(folder))
    return state


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder)
    return folder


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped after one update; not to be changed."""
    folder = tmp_path_factory.mktemp("begun")
    train(folder, max_minutes=1e-9)
    return folder


@pytest.fixture
def own(begun: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(begun, tmp_path / "own"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs that SIGKILL ended, by where it struck."""
    folders = {kill: tmp_path_factory.mktemp(kill) for kill in ("update", "save")}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), str(Path(training_runs.__file__).parent)])}
    processes = [
        subprocess.Popen(
            [sys.executable, training_runs.__file__, str(folder), json.dumps({"kill": kill})], env=environment
        )
        for kill, folder in folders.items()
    ]
    assert [process.wait() for process in processes] == [-signal.SIGKILL] * 2
    return folders


@pytest.mark.parametrize("kill", ["update", "save"])
def test_killed_and_resumed_is_never_killed(kill: str, killed: dict[str, Path], uninterrupted: Path) -> None:
    """To the bit: weights, optimizer state, random generators, log; the half-written checkpoint is ignored and gone."""
    folder = killed[kill]
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == (
        {"step-00000004", "step-00000008.partial"} if kill == "save" else {"step-00000004", "step-00000008"}
    )
    assert max(line["step"] for line in log_lines(folder)) > (4 if kill == "save" else 8)  # to be cut off
    _, result = train(folder)
    assert (result.steps, result.finished) == (12, True)
    assert log_lines(folder) == log_lines(uninterrupted)
    last = "checkpoints/step-00000012"
    ours, theirs = stored(folder / last), stored(uninterrupted / last)
    assert ours.keys() == theirs.keys()
    assert {name.split(".")[0] for name in ours} == {"model", "optimizer"}
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    random = "random-0.json"
    assert (folder / last / random).read_bytes() == (uninterrupted / last / random).read_bytes()
    assert not list((folder / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("forgotten", ["random generators", "optimizer", "sums of the log"])
def test_what_is_restored_matters(
    forgotten: str, uninterrupted: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the test above: each of these, left out, leads elsewhere."""
    if forgotten == "random generators":
        monkeypatch.setattr(checkpoints.randomness, "set_state", lambda state: None)
    elif forgotten == "optimizer":
        monkeypatch.setattr(checkpoints.Checkpoints, "_fill_optimizer", lambda self, slots: None)
    else:
        monkeypatch.setattr(checkpoints, "Progress", lambda step, since_log: Progress(step))
    train(own, save_every=0)
    assert log_lines(own) != log_lines(uninterrupted)


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    """`keep` checkpoints remain, the newest, the end's among them even if it is between two."""
    train(tmp_path, steps=5, save_every=1, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000005"]


def test_what_a_kill_left_is_swept(own: Path) -> None:
    """A half-written checkpoint, though its step be later, is neither gone on from nor kept."""
    partial = own / "checkpoints" / "step-00000009.partial"
    shutil.copytree(own / "checkpoints" / "step-00000001", partial)
    assert train(own, max_minutes=1e-9)[1].steps == 2
    assert not partial.exists()


def test_frozen_weights_are_not_stored(tmp_path: Path) -> None:
    """A checkpoint holds what is trained; a resumed run needs the same frozen weights, and says so if they differ."""
    model = small_model()
    model.visual.requires_grad_(False)
    train(tmp_path, model, max_minutes=1e-9)
    names = stored(tmp_path / "checkpoints" / "step-00000001")
    assert "model.decoder.wte.weight" in names
    assert not [name for name in names if "visual" in name]
    other = small_model(seed=1)
    other.visual.requires_grad_(False)
    with one_line_error(CheckpointError, "frozen weights", "step-00000001", "name another folder"):
        train(tmp_path, other)


def test_another_architecture(begun: Path) -> None:
    """Another model, or another choice of what is trained, does not fit."""
    with one_line_error(CheckpointError, "another architecture", "step-00000001"):
        train(begun, random_model(small_config(num_hidden_layers=3)))
    frozen = small_model()
    frozen.visual.requires_grad_(False)
    with one_line_error(CheckpointError, "trains other parameters"):
        train(begun, frozen)


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 0.5), ("seed", 7), ("steps", 13), ("batch_size", 8), ("precision", "bfloat16")],
)
def test_another_course(name: str, value: object, begun: Path) -> None:
    """An option that changes the course is refused with both values."""
    with one_line_error(CheckpointError, f"{name} was", f"is {value!r}", "set it back"):
        train(begun, **{name: value})


def test_what_may_change(own: Path, uninterrupted: Path) -> None:
    """How often to save, evaluate or log, how to cut batches, how many workers: free to change in between."""
    assert train(own, workers=1, keep=1, save_every=0, evaluate_every=1, activation_checkpointing=True)[1].finished
    assert log_lines(own) == log_lines(uninterrupted)
    (only,) = (own / "checkpoints").iterdir()
    assert only.name == "step-00000012"


@pytest.mark.parametrize("damaged", [".metadata", "__0_0.distcp", "run.json"])
def test_a_damaged_checkpoint(damaged: str, own: Path) -> None:
    """One line that names it and says how to go on."""
    path = own / "checkpoints" / "step-00000001" / damaged
    path.write_bytes(path.read_bytes()[:100])
    with one_line_error(CheckpointError, "step-00000001 cannot be read", "remove it"):
        train(own)


@pytest.mark.parametrize("text", ["{}", "[]"])
def test_a_run_file_that_tells_nothing(text: str, own: Path) -> None:
    """Valid JSON that is no account of a run is damage too, not a KeyError."""
    (own / "checkpoints" / "step-00000001" / "run.json").write_text(text)
    with one_line_error(CheckpointError, "step-00000001 cannot be read", "course"):
        train(own)


def test_missing_random_generators(own: Path) -> None:
    """Without its generators a run would go on as another one, and nobody would know."""
    (own / "checkpoints" / "step-00000001" / "random-0.json").unlink()
    with one_line_error(CheckpointError, "step-00000001 cannot be read", "random-0.json"):
        train(own)


@pytest.mark.parametrize("text", ["{}", '{"python": [3, [], null]}'])
def test_random_generators_that_cannot_be_read(text: str, own: Path) -> None:
    """Valid JSON that is no generators' state is damage too, not a KeyError."""
    (own / "checkpoints" / "step-00000001" / "random-0.json").write_text(text)
    with one_line_error(CheckpointError, "step-00000001 cannot be read", "random generators"):
        train(own)


class Harmful:
    """What a stranger may put into a pickle."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        """Run a command when it is read."""
        return os.system, ("touch harmed",)


def test_a_pickle_with_code_in_it(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `.metadata` of a checkpoint is a pickle, and resuming used to run whatever code it held."""
    monkeypatch.chdir(tmp_path)
    (own / "checkpoints" / "step-00000001" / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with one_line_error(CheckpointError, "step-00000001 cannot be read", "system", "torch does not write"):
        train(own)
    assert not (tmp_path / "harmed").exists()


def test_one_run_in_a_folder(tmp_path: Path) -> None:
    """A second process in a run's folder, which would sweep its checkpoints away, is refused, and leaves no trace."""
    tmp_path.joinpath("checkpoints", "step-00000001.partial").mkdir(parents=True)
    code = "import sys, pathlib; sys.path.insert(0, sys.argv[1]); from qwenvl.files import held\n"
    code += "with held(pathlib.Path(sys.argv[2])) as ours: print(ours, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(SOURCE), str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"True\n"
        with one_line_error(TrainingError, "another run", str(tmp_path)):
            train(tmp_path)
        other.kill()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001.partial"]
    train(tmp_path)


def test_other_data_of_the_same_size(tmp_path: Path) -> None:
    """What a dataset says of its content is part of a run; without it, equal counts would pass for the same data."""

    class Known(list[Any]):
        def __init__(self, fingerprint: str) -> None:
            super().__init__(training_runs.samples())
            self.fingerprint = fingerprint

    train(tmp_path, data=Known("one"), steps=1)
    with one_line_error(CheckpointError, "fingerprint one", "fingerprint two"):
        train(tmp_path, data=Known("two"), steps=1)


def test_a_file_where_a_half_written_checkpoint_would_be(own: Path) -> None:
    """It is swept as a folder is."""
    (own / "checkpoints" / "step-00000007.partial").write_text("")
    assert train(own, max_minutes=1e-9)[1].steps == 2
    assert not list((own / "checkpoints").glob("*.partial"))


def test_a_damaged_line_in_the_log(own: Path, uninterrupted: Path) -> None:
    """A crash of the machine leaves zeros and halves of lines: they go, and the run goes on."""
    with (own / "log.jsonl").open("ab") as file:
        file.write(b'\0\0\n{"step": 1, "lo\n[]\n\xff\n')
    train(own)
    assert log_lines(own) == log_lines(uninterrupted)


def test_a_full_disk(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be written is said in one line, and the checkpoint before it stays the one to go on from."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "_write_json", full)
        with one_line_error(CheckpointError, "step-00000004 cannot be written", "No space left"):
            train(own)
    checkpoint = own / "checkpoints" / "step-00000001"
    assert checkpoint.is_dir()
    assert train(own, max_minutes=1e-9)[1].steps == 2
