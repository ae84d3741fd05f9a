"""One device or many: who we are among the ranks, what is spread over them, and what they tell each other.

    Devices          this process among its ranks
    joined           join the ranks that torchrun started, if it did
    shard            spread a model over the ranks (FSDP2)
    export           a model's whole weights on rank 0

`torchrun --nproc-per-node 8 ...` starts as many processes as there are devices and tells each who it is by WORLD_SIZE,
RANK and LOCAL_RANK. Without it there is one rank, and nothing here does anything.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .errors import TrainingError
from .parameters import transformer_blocks

SAMPLED = 16  # elements of each tensor that tell weights apart


@dataclass(frozen=True)
class Devices:
    """This process (`rank`, from 0) among `ranks`, and the device it computes on; None: wherever the model is."""

    rank: int = 0
    ranks: int = 1
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes files and shows progress."""
        return self.rank == 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Each number added up over all ranks."""
        if self.ranks == 1:
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return [float(number) for number in summed]

    def gathered(self, value: Any) -> list[Any]:  # noqa: ANN401 - anything that can be pickled
        """The value of every rank, in order."""
        values = [value] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.ranks > 1:
            dist.barrier()


@contextmanager
def joined() -> Iterator[Devices]:
    """The ranks that torchrun started, or this process alone; NCCL where there is CUDA, else gloo on the CPU.

    May be nested: the outermost leaves the group. What needs all ranks (`export`) belongs inside.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        yield Devices()
        return
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    outermost = not dist.is_initialized()
    if outermost:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    try:
        yield Devices(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if outermost:
            dist.destroy_process_group()


def shard(model: nn.Module, devices: Devices) -> None:
    """Spread parameters, gradients and optimizer state over the ranks, in place: FSDP2, block by block.

    Every rank must have built the same weights; those on the CPU move to the rank's device block by block. Weights are
    gathered as they are, for autocast to compute as on one device, and gradients are added in float32. Raises
    TrainingError if the ranks' weights differ, or if the model is spread already.
    """
    if devices.ranks == 1:
        return
    if isinstance(model, FSDPModule):
        raise TrainingError(
            "this model is spread over the ranks by an earlier run: build it anew (export has its weights)"
        )
    if len(set(devices.gathered(fingerprint(dict(model.named_parameters()))))) > 1:
        raise TrainingError("the ranks begin with different weights: seed the generator before the model is made")
    assert devices.device is not None
    mesh = init_device_mesh(devices.device.type, (devices.ranks,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in transformer_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts that other ranks hold; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def export(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state dict on the CPU, whole, for `weights.write.save`; every rank must call, those but the first get none.

    With `dtype`, floating-point tensors are cast to it.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensor = whole(tensor)
        if not dist.is_initialized() or dist.get_rank() == 0:
            cast = dtype if tensor.is_floating_point() else None
            state[name] = tensor.detach().to("cpu", dtype=cast, copy=True)
    return state


def fingerprint(tensors: Mapping[str, Tensor], *more: object) -> str:
    """A digest of names, shapes, dtypes and some elements of each tensor, and of whatever else is to be told apart.

    Cheap, for it reads sixteen elements of each tensor: enough to notice other weights, not a forgery.
    """
    digest = hashlib.sha256(repr(more).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        if not tensor.is_meta and tensor.numel():
            flat = tensor.detach().flatten()
            places = [i * (len(flat) - 1) // (SAMPLED - 1) for i in range(SAMPLED)]
            digest.update(flat[torch.tensor(places, device=flat.device)].cpu().double().numpy().tobytes())
    return digest.hexdigest()
