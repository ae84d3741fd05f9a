"""Batches, made ahead of time by worker processes.

    Dataset    what can be trained on
    batches    an iterator over batches of given samples

Workers change nothing but the speed: which samples make a batch is decided before it is asked for.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from ..errors import QwenVLError


class Dataset(Protocol):
    """Samples by number, shuffled anew for every pass.

    One that also has `lengths`, each sample's tokens, gets batches of like lengths; one whose `in_order` is true is not
    shuffled, as a curriculum wants it. A run that is gone on with must find the same `fingerprint`, where there is one.

    What a number gives must not depend on random generators: a worker process has its own.
    """

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def __getitem__(self, index: int, /) -> Any:  # noqa: ANN401 - a Sample, or whatever `collate` takes
        """A sample; an index from 0."""
        ...


Collate = Callable[[Sequence[Any]], Any]


class _Batches:
    """What `DataLoader` takes for a dataset: whole batches by their samples' numbers.

    An error that is a user's to fix comes back as the batch: thrown inside a worker, it would arrive as a traceback.
    """

    def __init__(self, dataset: Dataset, collate: Collate) -> None:
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, indices: Sequence[int]) -> Any:  # noqa: ANN401 - whatever `collate` makes
        try:
            return self.collate([self.dataset[index] for index in indices])
        except QwenVLError as error:
            return error


def _as_is(batch: Any) -> Any:  # noqa: ANN401
    return batch


def _ignore_signals(_: int) -> None:
    """Ctrl-C, and the SIGTERM of a job's end, reach all processes; the one that trains decides when the workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def batches(
    dataset: Dataset, collate: Collate, indices: Iterable[Sequence[int]], workers: int
) -> Generator[Any, None, None]:
    """The batch of each list of sample numbers, in order. Raises what the dataset raises.

    Whoever does not take all of them closes it, which ends the workers.
    """
    loader: DataLoader[Any] = DataLoader(
        _Batches(dataset, collate),  # type: ignore[arg-type]  # it needs no more of a Dataset than this
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # else it would draw from the generator that training draws from
    )
    iterator: Any = iter(loader)
    try:
        for batch in iterator:
            if isinstance(batch, QwenVLError):
                raise batch
            yield batch
    finally:
        # Not when the last reference goes, which a traceback may hold until the exit: there Python sends SIGTERM, and
        # waits for the workers that ignore it.
        if workers:
            iterator._shutdown_workers()
