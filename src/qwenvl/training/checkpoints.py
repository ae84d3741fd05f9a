"""Checkpoints of a run: whole or not there, and enough to go on as if nothing had happened.

    Checkpoints   the folder that holds a run's checkpoints
    Progress      where a run stands
    Reader        torch's reader of their files, without the code that a pickle may hold

    checkpoints/step-00000100/
        *.distcp, .metadata   trained parameters and optimizer state (torch.distributed.checkpoint), every rank its part
        random-0.json ...     the random generators of each rank
        run.json              where the run stands, and what must be the same to go on

One rank reads what many wrote, and many what one wrote. Frozen parameters are not in it; their fingerprint is.
`.metadata` is a pickle, as torch writes it; one that names anything but what torch puts there is refused unread.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..config import read_json
from ..errors import CheckpointError, ConfigError
from ..files import flush_folder, whole_file
from . import randomness
from .devices import Devices

PARTIAL = ".partial"  # what a folder's name ends in while it grows, and again before it goes
RUN_FILE = "run.json"
METADATA_FILE = ".metadata"  # torch's name for it
_NAME = re.compile(r"step-\d{8,}")
# What torch writes into `.metadata`, beside its dtypes: plain records, none of which does anything when it is made.
_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),  # where Python 3.13 has them
}


@dataclass
class Progress:
    """Updates made so far, and sums over those since the log's last line."""

    step: int = 0
    since_log: dict[str, float] = field(default_factory=dict)

    def add(self, loss_sum: float, terms: float, gradient_norm: float) -> None:
        """One more update."""
        self.step += 1
        new = {"updates": 1, "loss": loss_sum, "terms": terms, "gradient_norm": gradient_norm}
        self.since_log = {name: self.since_log.get(name, 0.0) + value for name, value in new.items()}

    def means(self) -> dict[str, float]:
        """Loss of a term and gradient norm of an update since the last call; call it when a line is logged."""
        sums, self.since_log = self.since_log, {}
        return {"loss": sums["loss"] / sums["terms"], "gradient_norm": sums["gradient_norm"] / sums["updates"]}


@dataclass
class Checkpoints:
    """The newest `keep` checkpoints of one run.

    model and optimizer are what is saved and restored: parameters `names`. `course` is what must be the same for a
    resumed run to be the run that was begun: options by name, and fingerprints.
    """

    folder: Path
    devices: Devices
    model: nn.Module
    optimizer: torch.optim.Optimizer
    names: frozenset[str]
    course: Mapping[str, Any]
    keep: int

    def save(self, progress: Progress) -> None:
        """Write a checkpoint and remove those that are too many. Raises CheckpointError if it cannot be written."""
        final = self.folder / f"step-{progress.step:08}"
        partial = final.with_name(final.name + PARTIAL)
        with _explained(f"{final} cannot be written; earlier checkpoints are as they were"):
            if self.devices.first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.devices.wait()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that one process is one process
                save(self._parameters() | self._optimizer_state(), checkpoint_id=str(partial))
            _write_json(partial / _random_file(self.devices.rank), randomness.state())
            self.devices.wait()
            if self.devices.first:
                facts = {"step": progress.step, "since_log": progress.since_log, "ranks": self.devices.ranks}
                _write_json(partial / RUN_FILE, {**facts, "course": self.course})
                os.rename(partial, final)
                flush_folder(self.folder)
                for old in self._all()[: -self.keep]:
                    _remove(old)
            self.devices.wait()

    def resume(self) -> Progress | None:
        """Put the newest checkpoint's numbers into the model, the optimizer and the random generators; None without.

        What a killed run left half-written is removed. Raises CheckpointError if the checkpoint is of another
        architecture, another run or damaged.
        """
        if self.devices.first:
            with _explained(f"{self.folder} cannot be swept of what a killed run left"):
                for leftover in self.folder.glob(f"*{PARTIAL}"):
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        self.devices.wait()
        found = self._all()
        if not found:
            return None
        newest = found[-1]
        advice = "remove it to go on from the one before, or begin anew"
        with _explained(f"{newest} cannot be read; {advice}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            facts = _facts(newest / RUN_FILE)
            known = self.devices.rank < facts["ranks"]
            generators = read_json(newest / _random_file(self.devices.rank)) if known else {}
            self._check_course(newest, facts["course"])
            state, slots = self._parameters(), self._empty_optimizer_state(newest)
            load(state | slots, storage_reader=Reader(str(newest)))
            if known:
                _set_generators(generators, newest / _random_file(self.devices.rank))
            else:  # more ranks than before
                randomness.seed(self.course["seed"], self.devices.rank, facts["step"])
        self._fill_optimizer(slots)
        return Progress(facts["step"], facts["since_log"])

    def _all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted((path for path in found if _NAME.fullmatch(path.name)), key=lambda path: int(path.name[5:]))

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if name in self.names}

    def _parameters(self) -> dict[str, Tensor]:
        return {f"model.{name}": parameter.detach() for name, parameter in self._trained().items()}

    def _optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors under `optimizer.<parameter>.<field>`."""
        return {
            f"optimizer.{name}.{key}": value
            for name, parameter in self._trained().items()
            for key, value in self.optimizer.state[parameter].items()
        }

    def _empty_optimizer_state(self, folder: Path) -> dict[str, Tensor]:
        """Tensors for what the optimizer had stored, spread as the parameters are spread now."""
        stored = Reader(str(folder)).read_metadata().state_dict_metadata
        trained = self._trained()
        slots: dict[str, Tensor] = {}
        for key, entry in stored.items():
            name, _, _ = key.removeprefix("optimizer.").rpartition(".")
            if key.startswith("optimizer.") and isinstance(entry, TensorStorageMetadata):
                like = trained[name]
                device = like.device if self.optimizer.defaults["fused"] else "cpu"  # of scalars
                whole = entry.size == like.shape and like.dim() > 0
                slots[key] = torch.zeros_like(like) if whole else torch.zeros(entry.size, device=device)
        return slots

    def _fill_optimizer(self, slots: Mapping[str, Tensor]) -> None:
        trained = self._trained()
        for key, value in slots.items():
            name, _, field_name = key.removeprefix("optimizer.").rpartition(".")
            self.optimizer.state[trained[name]][field_name] = value.detach()

    def _check_course(self, folder: Path, stored: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(self.course))
        differing = [name for name in now if stored.get(name) != now[name]]
        advice = "name another folder, or remove this one to begin anew"
        if "architecture" in differing:
            raise CheckpointError(f"{folder} is of another architecture or trains other parameters: {advice}")
        if "frozen" in differing:
            raise CheckpointError(f"{folder} was trained over other frozen weights: {advice}")
        if differing:
            was = ", ".join(f"{name} was {stored.get(name)!r} and is {now[name]!r}" for name in differing)
            raise CheckpointError(f"{folder} cannot be gone on from, as {was}: set it back, or {advice}")


class Reader(FileSystemReader):
    """Reads what torch.distributed.checkpoint wrote. A pickle that names other things is an UnpicklingError."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ANN401 - as torch declares it
        """What is stored, under which names."""
        with (Path(self.path) / METADATA_FILE).open("rb") as file:
            _Unpickler(file).load()
        return super().read_metadata(*args, **kwargs)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - as pickle declares it
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in _RECORDS.get(module, ()):
            raise pickle.UnpicklingError(f"{METADATA_FILE} names {module}.{name}, which torch does not write there")
        return super().find_class(module, name)


def _set_generators(state: Any, path: Path) -> None:  # noqa: ANN401 - parsed JSON
    try:
        randomness.set_state(state)
    except (LookupError, TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{path} does not hold the state of the random generators") from None


def _facts(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its run. Raises ConfigError if something is missing."""
    facts = read_json(path)
    kinds = {"step": int, "since_log": dict, "ranks": int, "course": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(facts, dict) or type(facts.get(name)) is not kind]
    if wrong:
        raise ConfigError(f"{path} does not tell {', '.join(wrong)}")
    return dict(facts)


def _random_file(rank: int) -> str:
    return f"random-{rank}.json"


def _write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - anything that JSON takes
    with whole_file(path) as file:
        file.write(json.dumps(value).encode())


def _remove(folder: Path) -> None:
    """Remove a checkpoint that, half removed, cannot be taken for one."""
    doomed = folder.with_name(folder.name + PARTIAL)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


@contextmanager
def _explained(told: str) -> Iterator[None]:
    """What goes wrong with files becomes one line that begins with `told`."""
    try:
        yield
    except CheckpointException as error:  # of any rank, with its traceback as text
        reason: BaseException = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{told}: {_line(reason)}") from None
    except (OSError, EOFError, pickle.UnpicklingError, ConfigError) as error:
        raise CheckpointError(f"{told}: {_line(error)}") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
