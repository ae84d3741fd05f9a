"""Training options: defaults that are valid, one line for each mistake, and the schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import one_line_error

from qwenvl.errors import ConfigError
from qwenvl.training.options import TrainingOptions, learning_rate_at


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 2.5),
        ("epochs", 0),
        ("epochs", float("nan")),
        ("batch_size", 0),
        ("batch_size", True),
        ("accumulation", -1),
        ("learning_rate", 0),
        ("learning_rate", "1e-5"),
        ("learning_rate", None),
        ("final_ratio", 1.5),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("betas", (0.9, 1.0)),
        ("betas", 0.9),
        ("clip", -1),
        ("precision", "float16"),
        ("activation_checkpointing", 1),
        ("seed", -1),
        ("workers", 1.0),
        ("log_every", 0),
        ("evaluate_every", -1),
        ("save_every", None),
        ("keep", 0),
        ("max_minutes", 0),
    ],
)
def test_mistakes(name: str, value: Any) -> None:
    """Each is refused where it is made, with its name and value."""
    with one_line_error(ConfigError, name, repr(value)):
        TrainingOptions(**{name: value})


def test_two_lengths_of_one_run() -> None:
    """Steps and epochs together say two things."""
    with one_line_error(ConfigError, "steps 10", "epochs 2", "give one"):
        TrainingOptions(steps=10, epochs=2)


def test_length() -> None:
    """Steps as given; epochs of so many samples, the last batch filled up; one epoch by default."""
    assert TrainingOptions(steps=7).total_steps(1000) == 7
    assert TrainingOptions(epochs=2, batch_size=16).total_steps(100) == 13
    assert TrainingOptions(epochs=0.5, batch_size=16).total_steps(100) == 4
    assert TrainingOptions(batch_size=16).total_steps(100) == 7


def test_a_warmup_longer_than_the_run() -> None:
    """Found when the options are made, or when the data's size is known."""
    with one_line_error(ConfigError, "warmup_steps 10", "10 steps"):
        TrainingOptions(steps=10, warmup_steps=10)
    with one_line_error(ConfigError, "warmup_steps 10", "7 steps"):
        TrainingOptions(warmup_steps=10).total_steps(100)


def test_batches_divide() -> None:
    """The batch size is of all devices and pieces together."""
    options = TrainingOptions(batch_size=12, accumulation=3)
    assert [options.piece_size(ranks) for ranks in (1, 2, 4)] == [4, 2, 1]
    with one_line_error(ConfigError, "batch_size 12", "5 x 3"):
        options.piece_size(5)


def test_precision() -> None:
    """`auto` follows the device, the others are what they say."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    found = [TrainingOptions(precision=p).dtype_on(d) for p in ("auto", "float32", "bfloat16") for d in (cpu, cuda)]
    assert found == [torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]


def test_betas_of_a_file() -> None:
    """TOML has lists; a frozen dataclass has a tuple."""
    assert TrainingOptions(betas=[0.8, 0.9]).betas == (0.8, 0.9)  # type: ignore[arg-type]


def test_schedule() -> None:
    """Up in a line to the peak, down along half a cosine towards the final rate; no update is without one."""
    options = TrainingOptions(steps=14, warmup_steps=4, learning_rate=1.0, final_ratio=0.1)
    rates = [learning_rate_at(step, 14, options) for step in range(14)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[9] == pytest.approx(0.55)  # half way
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0.1 < rates[-1] < 0.13
    assert learning_rate_at(14, 14, options) == pytest.approx(0.1)
    assert learning_rate_at(0, 1, TrainingOptions(steps=1, warmup_steps=0, learning_rate=0.5)) == 0.5


def test_default_warmup() -> None:
    """One update in a hundred, rounded up."""
    options = TrainingOptions(learning_rate=1.0)
    assert [learning_rate_at(step, 150, options) for step in (0, 1)] == [0.5, 1.0]
