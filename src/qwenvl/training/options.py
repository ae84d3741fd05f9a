"""How a model is trained, as one frozen dataclass that is valid once it exists.

TrainingOptions    every number of a run
learning_rate_at   the schedule: linear warm-up, then half a cosine
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..checks import is_number, is_whole
from ..errors import ConfigError

PRECISIONS = ("auto", "float32", "bfloat16")
WARMUP = 0.01  # of all steps, where the options do not say; the reference's scripts do so


def _require(condition: bool, name: str, wanted: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {wanted}, not {value!r}")


@dataclass(frozen=True)
class TrainingOptions:
    """What a run does; the defaults are those of the reference's scripts for full fine-tuning, where it has them.

    steps                     updates of the weights; or
    epochs                    passes over the data, not necessarily whole; one if neither is given
    batch_size                samples that one update sees, over all ranks and accumulation steps together
    accumulation              pieces, one after the other, into which a rank's share of a batch is cut to save memory
    learning_rate             at its peak
    final_ratio               the learning rate towards which it falls, as a part of the peak
    warmup_steps              updates until the peak is reached; None is one in a hundred of all
    weight_decay              of matrices; norms, biases, the token table and position tables have none
    betas                     of AdamW
    clip                      largest norm of the whole gradient; 0 is off
    precision                 "float32", "bfloat16" (autocast over float32 weights), "auto": bfloat16 on CUDA
    activation_checkpointing  compute the blocks' activations twice rather than keep them
    seed                      of the data's order and of every random number drawn in training
    workers                   processes that decode pictures; 0 decodes between updates
    log_every                 updates from one line of the log to the next
    evaluate_every            updates from one evaluation to the next; 0 evaluates at the end alone
    save_every                updates from one checkpoint to the next; 0 saves at the end alone
    keep                      checkpoints that are kept, the newest ones
    max_minutes               the run stops after this long, with a checkpoint, and the next call goes on; None is never

    Raises ConfigError.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 1e-5
    final_ratio: float = 0.0
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    precision: str = "auto"
    activation_checkpointing: bool = False
    seed: int = 0
    workers: int = 2
    log_every: int = 10
    evaluate_every: int = 500
    save_every: int = 500
    keep: int = 3
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(f"steps {self.steps!r} and epochs {self.epochs!r} are two lengths of one run: give one")
        for name in ("batch_size", "accumulation", "log_every", "keep"):
            value = getattr(self, name)
            _require(is_whole(value) and value > 0, name, "a positive whole number", value)
        for name in ("seed", "workers", "evaluate_every", "save_every"):
            value = getattr(self, name)
            _require(is_whole(value) and 0 <= value < 2**63, name, "a whole number from 0 up", value)
        for name in ("weight_decay", "clip"):
            value = getattr(self, name)
            _require(is_number(value) and value >= 0, name, "a number from 0 up", value)
        for name in ("epochs", "learning_rate", "max_minutes"):
            value = getattr(self, name)
            optional = value is None and name != "learning_rate"
            _require(optional or (is_number(value) and value > 0), name, "a number above 0", value)
        for name in ("steps", "warmup_steps"):
            value, least = getattr(self, name), 1 if name == "steps" else 0
            _require(value is None or (is_whole(value) and value >= least), name, f"whole, from {least} up", value)
        _require(is_number(self.final_ratio) and 0 <= self.final_ratio <= 1, "final_ratio", "0 to 1", self.final_ratio)
        _require(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}", self.precision)
        checkpointing = self.activation_checkpointing
        _require(isinstance(checkpointing, bool), "activation_checkpointing", "true or false", checkpointing)
        betas: Any = self.betas
        fits = isinstance(betas, (list, tuple)) and len(betas) == 2 and all(is_number(b) and 0 <= b < 1 for b in betas)
        _require(fits, "betas", "two numbers from 0 to below 1", betas)
        object.__setattr__(self, "betas", tuple(betas))  # TOML has lists
        if self.steps is not None:
            self._check_warmup(self.steps)

    def _check_warmup(self, steps: int) -> None:
        if self.warmup_steps is not None and self.warmup_steps >= steps:
            raise ConfigError(f"warmup_steps {self.warmup_steps} must be below the run's {steps} steps")

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """What `precision` means on a device."""
        if self.precision == "bfloat16" or (self.precision == "auto" and device.type == "cuda"):
            return torch.bfloat16
        return torch.float32

    def total_steps(self, count: int) -> int:
        """Updates of the whole run over `count` samples. Raises ConfigError if the warm-up does not fit into it."""
        if self.steps is not None:
            return self.steps
        steps = math.ceil((1 if self.epochs is None else self.epochs) * count / self.batch_size)
        self._check_warmup(steps)
        return steps

    def piece_size(self, ranks: int) -> int:
        """Samples of one forward on one of `ranks` devices. Raises ConfigError if batches do not divide into them."""
        if self.batch_size % (ranks * self.accumulation):
            raise ConfigError(
                f"batch_size {self.batch_size} counts all devices and must be a multiple of devices x accumulation, "
                f"{ranks} x {self.accumulation}"
            )
        return self.batch_size // (ranks * self.accumulation)


def learning_rate_at(step: int, steps: int, options: TrainingOptions) -> float:
    """The learning rate of update `step`, from 0, of `steps`.

    Up in a line to the peak, which the last update of the warm-up has, then down along half a cosine towards
    `final_ratio` of it.
    """
    warmup = math.ceil(WARMUP * steps) if options.warmup_steps is None else options.warmup_steps
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    height = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
    return options.learning_rate * (options.final_ratio + (1 - options.final_ratio) * height)
