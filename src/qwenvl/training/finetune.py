"""A fine-tuning run from its settings: data, a model, an adapter, the loop, and a result that can be loaded.

    train     one call; the same call goes on with what it finds
    Outcome   how it ended

The output folder holds train.toml (the settings), log.jsonl, checkpoints/ and, in the end, model/ (full) or adapter/
(lora, qlora), and merged/ where that is asked for. All that can be wrong is looked for before the weights are read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from ..adapt.adapters import save_adapter
from ..adapt.lora import add_lora, check_fits
from ..errors import CheckpointError, ConfigError, QwenVLError
from ..files import TEMPORARY, whole_file
from ..loading import choose_device, load
from ..pipeline import Pipeline
from ..text.tokenizer import VOCABULARY_FILE, Tokenizer
from ..weights.checkpoint import Checkpoint
from ..weights.hub import resolve
from . import randomness
from .data import ConversationDataset
from .devices import Devices, export, joined
from .errors import TrainingError
from .log import LOG_FILE
from .loop import CHECKPOINT_FOLDER, LOCK_FILE, FitResult, Stop, fit
from .memory import FLOAT, HALF, Memory, Workload, estimate
from .options import TrainingOptions
from .parameters import trainable_for_fine_tuning
from .results import merge_adapter, write_model
from .settings import SETTINGS_FILE, TrainSettings, read_toml, to_toml

MODEL, ADAPTER, MERGED = "model", "adapter", "merged"


@dataclass(frozen=True)
class Outcome:
    """How a call ended. steps: updates in all; None if this call made none. written: folders of results, by kind."""

    output: str
    stopped: Literal["finished", "finished earlier", "dry run"] | Stop
    steps: int | None = None
    loss: float | None = None
    evaluation: Mapping[str, float] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)
    memory_bytes: int | None = None

    @property
    def finished(self) -> bool:
        """Whether the results are there; if not, the same call goes on."""
        return bool(self.written)


def train(settings: TrainSettings, *, quiet: bool = False, dry_run: bool = False) -> Outcome:
    """Train as the settings say, from where the output folder stands; under torchrun, every rank calls this.

    dry_run: check data and memory only; nothing is written. Raises ConfigError, DataError, CheckpointError,
    TrainingError; what was finished by then is kept.
    """
    for name in ("data", "output"):
        if getattr(settings, name) is None:
            raise ConfigError(f"there is no {name}: give --{name}, or put it into the TOML file")
    output = Path(settings.output or "")
    _check_output(output, settings)
    kinds = [MODEL] if settings.method == "full" else [ADAPTER, MERGED] if settings.merge else [ADAPTER]
    results = {kind: str(output / kind) for kind in kinds}
    if not dry_run and all(os.path.isdir(folder) for folder in results.values()):
        return Outcome(str(output), "finished earlier", written=results)
    with joined() as devices:
        run = _prepared(settings, output, devices, quiet or not devices.first)
        if dry_run:
            return Outcome(str(output), "dry run", memory_bytes=run.memory.total)
        result = run.train()
    if result.finished and settings.merge and devices.first:  # for which the others need not wait
        merge_adapter(run.checkpoint.folder, results[ADAPTER], results[MERGED], quiet=run.quiet)
    written = results if result.finished else {}
    found = dict(result.evaluation)
    return Outcome(str(output), result.stopped, result.steps, result.loss, found, written, run.memory.total)


def _check_output(output: Path, settings: TrainSettings) -> None:
    """Raise CheckpointError if the output folder is another run's, or no run's."""
    try:
        names = (
            {path.name for path in output.iterdir()} - {LOCK_FILE, SETTINGS_FILE + TEMPORARY}
            if output.exists()
            else set()
        )
    except OSError as error:
        raise CheckpointError(f"{output} cannot be the output folder: {error.strerror}") from None
    # Settings alone are left by a run that ended before its first update; beside other files, they are a user's own.
    if names and not (SETTINGS_FILE in names and (LOG_FILE in names or names == {SETTINGS_FILE})):
        raise CheckpointError(f"{output} holds something else than a training run; name another output folder")
    if names & {CHECKPOINT_FOLDER, MODEL, ADAPTER}:  # there is something to go on with, or to keep
        earlier = TrainSettings(**read_toml(output / SETTINGS_FILE))
        if different := settings.differences(earlier):
            raise CheckpointError(
                f"{output} holds a run with other settings ({', '.join(different)}): set them back, or name another "
                "output folder"
            )


def _prepared(settings: TrainSettings, output: Path, devices: Devices, quiet: bool) -> _Run:
    """The run, if every rank can make it. Otherwise the first rank raises what is wrong and the others leave."""
    run, error = None, None
    try:
        run = _Run(settings, output, devices, quiet)
    except QwenVLError as caught:
        error = caught
    told = devices.gathered(None if error is None else str(error))
    if error is not None and devices.first:
        raise error
    for rank, message in enumerate(told):
        if message is not None:
            raise TrainingError(f"rank {rank}: {message}") if devices.first else SystemExit(2)
    assert run is not None
    return run


class _Run:
    """One call: data and memory are checked when it is made, the weights are read when it trains."""

    def __init__(self, settings: TrainSettings, output: Path, devices: Devices, quiet: bool) -> None:
        self.settings, self.output, self.devices, self.quiet = settings, output, devices, quiet
        self.options = settings.training
        folder = resolve(settings.model, revision=settings.revision, cache_dir=settings.cache_dir, quiet=quiet)
        self.checkpoint = Checkpoint(folder)
        self.cuda = choose_device(settings.device).type == "cuda"
        if settings.method != "full":
            check_fits(self.checkpoint.config, settings.lora)
        self.dtype = self._dtype()
        self.data = self._dataset(settings.data or "")
        self.evaluation_data = None if settings.evaluation_data is None else self._dataset(settings.evaluation_data)
        self.options.total_steps(len(self.data))
        self.memory = self._memory()
        self._check_memory()

    def _dtype(self) -> str:
        """What the weights are read as: those that are trained in float32, frozen ones as small as computes well."""
        given, method = self.settings, self.settings.method
        packed = self.checkpoint.config.quantization_config is not None
        if packed != (method == "qlora"):
            advice = "method qlora trains over it" if packed else "method qlora needs one that is"
            raise ConfigError(f"{given.model} is {'' if packed else 'not '}packed to a few bits: {advice}")
        allowed = ["auto", "float32"] if method == "full" else ["auto", "float32", "bfloat16"]
        if given.dtype not in allowed:
            raise ConfigError(f"dtype must be {' or '.join(allowed)} for method {method}, not {given.dtype!r}")
        if given.dtype == "bfloat16" and given.precision == "float32":
            raise ConfigError("dtype bfloat16 and precision float32 do not go together: leave one of them at auto")
        if given.dtype != "auto":
            return given.dtype
        if method == "full" or given.precision == "float32":
            return "float32"
        return "bfloat16" if self.cuda else "auto"

    def _dataset(self, path: str) -> ConversationDataset:
        folder, given = self.checkpoint.folder, self.settings
        if not (folder / VOCABULARY_FILE).is_file():
            raise ConfigError(f"{folder} has no {VOCABULARY_FILE}, and conversations cannot be read without")
        return ConversationDataset(
            path,
            Tokenizer(folder),
            self.checkpoint.config,
            max_length=given.max_length,
            on_error=given.on_error,
            image_root=given.image_root,
            quiet=self.quiet,
        )

    def _memory(self) -> Memory:
        given, rows = self.settings, self.options.piece_size(self.devices.ranks)
        width = HALF if self.dtype == "bfloat16" else FLOAT
        device = torch.device("cuda" if self.cuda else "cpu")
        work = Workload(
            given.method,
            rows=rows,
            tokens=max(self.data.lengths),
            images=rows,
            weight_bytes=width,
            compute_bytes=min(width, self.options.dtype_on(device).itemsize),
            rank=given.lora_r,
            targets=given.lora_targets,
            train_embeddings=given.lora_train_embeddings,
            train_vision=given.train_vision,
            checkpointing=given.activation_checkpointing,
            accumulates=given.accumulation > 1,
            ranks=self.devices.ranks,
            mask_bytes=1 if self.cuda else width,
        )
        return estimate(self.checkpoint.config, work)

    def _check_memory(self) -> None:
        """Say what is needed; refuse what cannot fit, whatever the batch."""
        told = f"needs about {self.memory} on {'each' if self.devices.ranks > 1 else 'the'} device"
        if not self.quiet:
            print(told, file=sys.stderr)
        if not self.cuda:
            return
        named = "cuda" if self.settings.device == "auto" else self.settings.device
        free, _ = torch.cuda.mem_get_info(self.devices.device or named)
        if self.memory.states > free:
            raise ConfigError(
                f"{told}, and {free / 1e9:.1f} GB are free: weights and optimizer alone do not fit; use method lora or "
                "qlora, a lower rank, or more devices"
            )
        if self.memory.total > free and not self.quiet:
            advice = "should it fail, raise accumulation, lower max_length or set activation_checkpointing"
            print(f"only {free / 1e9:.1f} GB are free: {advice}", file=sys.stderr)

    def train(self) -> FitResult:
        """Read the weights, adapt, fit, and write what came of it."""
        self._write_settings()
        device = "cpu" if self.devices.ranks > 1 else self.settings.device  # from where each rank takes its part
        vl = load(self.checkpoint.folder, device, self.dtype, quiet=self.quiet)
        for parameter in vl.model.parameters():  # some are laid out by columns, which cannot be spread over ranks
            parameter.data = parameter.data.contiguous()
        if self.settings.method == "full":
            trainable_for_fine_tuning(vl.model, train_vision=self.settings.train_vision)
        else:
            randomness.seed(self.options.seed)  # for the adapters' first values, alike on all ranks
            add_lora(vl.model, self.settings.lora)
        data, evaluation, quiet = self.data, self.evaluation_data, self.quiet
        try:
            result = fit(vl.model, data, self._options_for(vl), self.output, evaluation_dataset=evaluation, quiet=quiet)
        except TrainingError as error:
            if error.updates:  # what they taught would else be lost, since this run can only fail again
                kept = self._write_result(vl, f"-{error.updates}")
                raise TrainingError(f"{error}; what was learned before is in {kept}") from None
            raise
        if result.finished:
            self._write_result(vl)
        return result

    def _write_settings(self) -> None:
        if self.devices.first:
            try:
                self.output.mkdir(parents=True, exist_ok=True)
                with whole_file(self.output / SETTINGS_FILE) as file:
                    file.write(to_toml(self.settings).encode())
            except OSError as error:
                raise CheckpointError(f"cannot write {self.output}: {error.strerror}") from None
        self.devices.wait()

    def _options_for(self, vl: Pipeline) -> TrainingOptions:
        """The options; over 16-bit weights, `auto` means to compute in 16 bits, too, whatever the device."""
        options, dtype = self.options, vl.model.decoder.ln_f.weight.dtype  # embeddings that are trained are float32
        wanted = options.dtype_on(self.devices.device or vl.device)
        return options if dtype in (torch.float32, wanted) else replace(options, precision="bfloat16")

    def _write_result(self, vl: Pipeline, suffix: str = "") -> Path:
        """Every rank must call this, and the first one writes; what an earlier call wrote is kept. Returns where."""
        folder = self.output / ((MODEL if self.settings.method == "full" else ADAPTER) + suffix)
        if self.settings.method == "full":
            state = export(vl.model)
            if self.devices.first:
                write_model(state, self.checkpoint, folder, quiet=self.quiet)
        elif not folder.is_dir():
            save_adapter(vl.model, folder, self.settings.model)
        self.devices.wait()
        return folder
