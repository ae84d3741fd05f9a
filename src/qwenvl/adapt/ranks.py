"""The processes that torchrun started for one model: which of them this is, and what they have to agree on.

    Ranks             this process among the others, and the device that is its own
    join              meet the others: a mesh of their devices
    RankConfig        a configuration as one of several ranks has it
    is_shared         whether a model is spread over ranks
    shared_errors     an error of one rank is raised by all
    of_first          a value as the first rank has it
    common_seed       a seed that all ranks draw with

All ranks run the same code on the same logits, so they choose the same ids and stop at the same one. What could differ
from rank to rank, such as free memory or fresh entropy, goes through here.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..config import QwenVLConfig
from ..errors import ConfigError, QwenVLError

T = TypeVar("T")

FAREWELL = timedelta(minutes=10)  # for a rank that has more to do at the end, such as writing a file
PATIENCE = timedelta(days=7)  # of ranks that wait for the first one, as it waits for somebody to type
_hosts: dist.ProcessGroup | None = None  # of the ranks as processes, by which they tell each other Python values


@dataclass(frozen=True)
class Ranks:
    """This process, `rank` from 0, among `count` of them, of which `local_count` are on this machine."""

    rank: int
    count: int
    local_rank: int
    local_count: int

    @classmethod
    def of_torchrun(cls) -> Ranks:
        """As torchrun tells it. Raises ConfigError if it did not start this process."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if any(name not in os.environ for name in names):
            count = max(torch.cuda.device_count(), 2)
            raise ConfigError(
                "parallel 'tensor' takes a process for each device, which torchrun starts: "
                f"torchrun --nproc-per-node {count} -m qwenvl.cli chat --parallel tensor, or your script in their place"
            )
        return cls(*(int(os.environ[name]) for name in names))

    @property
    def first(self) -> bool:
        """Whether this is the rank that shows progress, prints, and writes files."""
        return self.rank == 0

    def device(self, asked: str | torch.device) -> torch.device:
        """This rank's own device of the kind that was asked for. Raises ConfigError."""
        cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
        kind = ("cuda" if cuda else "cpu") if str(asked) == "auto" else str(asked)
        if kind not in ("cuda", "cpu"):
            raise ConfigError(
                f"with parallel 'tensor' each process takes a device of its own: use auto, cuda or cpu, not {asked}, "
                "and CUDA_VISIBLE_DEVICES to say which GPUs"
            )
        if kind == "cuda" and self.local_count > cuda:
            fewer = f"torchrun --nproc-per-node {cuda}, or " if cuda else ""
            raise ConfigError(
                f"torchrun started {self.local_count} processes on this machine, which has {cuda} GPUs: use {fewer}"
                "device cpu"
            )
        return torch.device("cuda", self.local_rank) if kind == "cuda" else torch.device("cpu")


def join(device: torch.device) -> DeviceMesh:
    """Meet the other ranks: NCCL between GPUs, gloo between CPUs. The group is left when the process ends."""
    global _hosts
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        atexit.register(_leave)
    if alone or _hosts is None:
        _hosts = dist.new_group(backend="gloo", timeout=PATIENCE)
    return init_device_mesh(device.type, (dist.get_world_size(),))


def _leave() -> None:
    """Leave the group together with the others, whose connections would break under them. Not if an error ends this
    process: they may still be waiting for it, and it for them.
    """
    if dist.is_initialized() and not hasattr(sys, "last_type"):
        with suppress(RuntimeError):  # of one that has ended all the same
            dist.monitored_barrier(_hosts, timeout=FAREWELL)
        dist.destroy_process_group()


def end_without_others() -> None:
    """Let this process end at once, for torchrun to end the others."""
    atexit.unregister(_leave)


@dataclass(frozen=True)
class RankConfig(QwenVLConfig):
    """A configuration with the heads of one rank alone: what its KV cache is made for.

    The width of the model stays whole, so heads and width no longer agree, and are not checked again.
    """

    def __post_init__(self) -> None:
        """Valid, as the whole one was."""

    @classmethod
    def of(cls, config: QwenVLConfig, ranks: int) -> RankConfig:
        """The part that each of so many ranks has."""
        return cls(**{**vars(config), "num_attention_heads": config.num_attention_heads // ranks})


def is_shared(model: nn.Module) -> bool:
    """Whether other ranks have the rest of this model (a `QwenVL`)."""
    return isinstance(model.decoder.config, RankConfig)  # type: ignore[union-attr]


@contextmanager
def shared_errors(active: bool = True) -> Iterator[None]:
    """Within it, a QwenVLError of one rank is raised by all, so that none waits for one that has given up."""
    if not active:
        yield
        return
    mine: QwenVLError | None = None
    try:
        yield
    except QwenVLError as error:
        mine = error
    errors: list[QwenVLError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, mine, group=_hosts)
    if mine is not None:
        raise mine
    if other := next((error for error in errors if error is not None), None):
        raise other


def of_first(value: T) -> T:
    """The value that the first rank gives; the others' are dropped."""
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_hosts)
    return values[0]


def common_seed(model: nn.Module, seed: int | None) -> int | None:
    """The seed, or a fresh one where it is None and other ranks have to draw with the same."""
    if seed is not None or not is_shared(model):
        return seed
    return of_first(torch.Generator().seed() % 2**62)
