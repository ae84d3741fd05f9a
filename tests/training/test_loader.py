"""Workers: they outlive the signals that the run outlives, and nothing of them is left when it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from training_runs import options, samples, small_model

from qwenvl.training.batches import Batch
from qwenvl.training.errors import TrainingError
from qwenvl.training.loader import batches
from qwenvl.training.loop import fit
from qwenvl.training.objective import next_token_loss


def endless() -> Iterator[list[int]]:
    """Batches of one sample without end."""
    number = 0
    while True:
        yield [number % 24]
        number += 1


def test_workers_outlive_signals() -> None:
    """Ctrl-C and SIGTERM reach the whole group and leave it at work, until the run has saved itself."""
    ahead = batches(samples(), len, endless(), workers=1)
    assert next(ahead) == 1
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
        time.sleep(0.1)
        assert [next(ahead) for _ in range(20)] == [1] * 20
    ahead.close()
    assert not multiprocessing.active_children()


class Faulty(list[int]):
    """A dataset with a bug."""

    def __getitem__(self, index: Any) -> Any:
        raise ZeroDivisionError


def test_no_worker_is_left(tmp_path: Path) -> None:
    """When a run ends with an error that somebody keeps, be it a bug of the dataset, its workers have ended too.

    Left to the exit, they made Python wait for them without end.
    """

    def failing(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, count = next_token_loss(model, batch)
        return loss * float("inf"), count

    kept = []
    for data, error in ((samples(), TrainingError), (Faulty(range(24)), ZeroDivisionError)):
        with pytest.raises(error) as caught:
            fit(small_model(), data, options(workers=1), tmp_path, objective=failing, quiet=True)
        kept.append(caught)
        assert not multiprocessing.active_children()


def test_evaluation_leaves_no_worker(tmp_path: Path) -> None:
    """Nor does an evaluation that fails half way."""

    def failing(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        if not model.training:
            raise ZeroDivisionError
        return next_token_loss(model, batch)

    with pytest.raises(ZeroDivisionError) as kept:
        fit(
            small_model(),
            samples(),
            options(workers=1, evaluate_every=1),
            tmp_path,
            objective=failing,
            evaluation_dataset=samples(),
            quiet=True,
        )
    assert kept.value
    assert not multiprocessing.active_children()
