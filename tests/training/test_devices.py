"""Devices: one process is a run of its own; two ranks under torchrun make the same run as one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_runs
from safetensors.torch import load_file
from support import one_line_error
from training_runs import PARTLY, half_options, log_lines, partly_trained, rank_options, samples, small_model

import qwenvl
from qwenvl.adapt.adapters import ADAPTER_FILE, save_adapter
from qwenvl.training.devices import Devices, export, fingerprint, joined, shard
from qwenvl.training.errors import TrainingError
from qwenvl.training.loop import fit
from qwenvl.weights.write import save

SOURCE = Path(qwenvl.__file__).parents[1]


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchrun, or with one process of it, there is one rank, and no process group."""
    for environment in ({}, {"WORLD_SIZE": "1"}):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with joined() as devices:
            assert (devices.rank, devices.ranks, devices.first) == (0, 1, True)
            assert devices.sum([1, 2.5]) == [1, 2.5]
            assert devices.gathered("a") == ["a"]
            assert not torch.distributed.is_initialized()


def test_export_is_a_state_dict(tmp_path: Path) -> None:
    """It has every tensor, shares no memory with the model, can be cast, and loads as a checkpoint."""
    model = small_model()
    state = export(model)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    state["decoder.wte.weight"].zero_()
    assert model.decoder.wte.weight.abs().max() > 0
    half = export(model, torch.bfloat16)
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    save(half, tmp_path / "half", model.config, quiet=True)
    loaded = qwenvl.load(tmp_path / "half", dtype="bfloat16", device="cpu", quiet=True).model
    assert all(torch.equal(half[name], tensor) for name, tensor in loaded.state_dict().items())


def test_fingerprints_tell_apart() -> None:
    """Names, shapes, dtypes, values and what is given beside; not the order of names."""
    tensors = {"a": torch.zeros(3, 4), "b": torch.ones(100)}
    changed = [
        {"a": torch.zeros(4, 3), "b": torch.ones(100)},
        {"a": torch.zeros(3, 4).half(), "b": torch.ones(100)},
        {"a": torch.zeros(3, 4), "b": torch.full((100,), 1.5)},
        {"a": torch.zeros(3, 4), "c": torch.ones(100)},
    ]
    digests = {fingerprint(tensors), fingerprint(tensors, 1), *map(fingerprint, changed)}
    assert len(digests) == 6
    assert fingerprint(dict(reversed(tensors.items()))) == fingerprint(tensors)


def test_ranks_that_begin_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that differ between ranks would be mixed, piece by piece: refused before that."""
    monkeypatch.setattr(Devices, "gathered", lambda self, value: [value, "other"])
    with one_line_error(TrainingError, "different weights", "seed"):
        shard(small_model(), Devices(0, 2, torch.device("cpu")))


def check_partly_trained(method: str, folder: Path) -> None:
    """Two ranks left their log and their adapter in a folder of this name: those of one rank are the same."""
    model, alone = partly_trained(method), folder / f"{method}-alone"
    fit(model, samples(), rank_options(5), alone, quiet=True)
    for ours, theirs in zip(log_lines(folder / method), log_lines(alone), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5), method
    if method != "frozen":
        save_adapter(model, alone / "adapter")
        one, other = (load_file(where / "adapter" / ADAPTER_FILE) for where in (folder / method, alone))
        assert one.keys() == other.keys()
        assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-4, method


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path: Path) -> None:
    """Losses, evaluation and weights of two gloo ranks are those of one; each goes on from the other's checkpoint.

    So are those of LoRA, of LoRA over 4 bits and of a frozen vision tower, with the adapters that come out.

    Samples differ in length, so the ranks count different numbers of labels, and some pieces have no picture.
    """
    fit(small_model(), samples(), half_options(), tmp_path / "half-alone", quiet=True)
    alone, begun = tmp_path / "alone", tmp_path / "theirs"
    model = small_model()
    result = fit(model, samples(), rank_options(5), alone, evaluation_dataset=samples(5, seed=1), quiet=True)
    expected = model.state_dict()
    shutil.copytree(alone, begun)
    shutil.rmtree(begun / "checkpoints" / "step-00000005")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), str(Path(training_runs.__file__).parent)])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*command, training_runs.__file__, str(tmp_path), '{"ranks": 2}'], env=environment, check=True, timeout=600
    )

    def check(folder: Path, weights: dict[str, torch.Tensor], loss: float | None, found: dict[str, float]) -> None:
        assert [line["step"] for line in log_lines(folder)] == [1, 2, 3, 4, 5, 5]
        for ours, theirs in zip(log_lines(folder)[:5], log_lines(alone)[:5], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)
        assert loss == pytest.approx(result.loss, abs=1e-5)
        assert found == pytest.approx(dict(result.evaluation), abs=1e-4)
        for name, tensor in weights.items():
            # Not the largest: the bias of a key has no gradient but rounding, which AdamW scales up.
            assert (tensor - expected[name]).abs().median() < 1e-5, name

    for method in PARTLY:
        check_partly_trained(method, tmp_path)
    halves = [log_lines(tmp_path / name)[0]["loss"] for name in ("half", "half-alone")]
    assert halves[0] == pytest.approx(halves[1], rel=1e-5)  # AdamW enlarges what rounding does to later ones
    for name in ("own", "theirs"):
        loss, evaluation = json.loads((tmp_path / name / "result.json").read_text())
        check(tmp_path / name, torch.load(tmp_path / name / "weights.pt"), loss, evaluation)
    resumed = small_model()
    again = fit(
        resumed, samples(), rank_options(5), tmp_path / "own", evaluation_dataset=samples(5, seed=1), quiet=True
    )
    check(tmp_path / "own", resumed.state_dict(), again.loss, dict(again.evaluation))
