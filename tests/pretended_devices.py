"""Devices that are not there, pretended: every tensor has a label, is computed on the CPU, and must not meet another's.

Unlike fake tensors, these have values, so code that looks at them runs, and so does indexing, which a torch without
CUDA refuses for fake CUDA tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

CPU = torch.device("cpu")
# What torch lets host tensors take part in; the rest raises on a GPU.
MEETING = {Tensor.copy_, Tensor.__getitem__, Tensor.__setitem__}


class MixedDevices(RuntimeError):
    """What torch says of tensors on two devices."""


def label_of(tensor: Tensor) -> torch.device:
    """The device that a tensor is on, for as much as anybody can tell."""
    label: torch.device = getattr(tensor, "_label", CPU)
    return label


def put(model: nn.Module, device_of: Callable[[str], torch.device]) -> None:
    """Label a model's weights."""
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        weight._label = device_of(name)  # type: ignore[union-attr]


class PretendedDevices(TorchFunctionMode):
    """Within it, tensors are made where they are asked for and stay where they are moved to."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return label_of(args[0])
        tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        asked = kwargs.pop("device", None)
        if func is Tensor.to:
            where = [leaf for leaf in args[1:] if isinstance(leaf, (torch.device, Tensor))]
            args = [args[0], *(leaf.dtype if isinstance(leaf, Tensor) else leaf for leaf in args[1:])]
            args = [leaf for leaf in args if not isinstance(leaf, torch.device)]
            if where:
                asked = label_of(where[0]) if isinstance(where[0], Tensor) else where[0]
            label = label_of(args[0]) if asked is None else torch.device(asked)
        else:
            label = torch.device(asked) if asked is not None else self._common(func, tensors)
        result = func(*args, **kwargs)
        if func is Tensor.to and result is args[0] and label != label_of(result):
            result = result.view_as(result)
        if label != CPU:
            tree_map(lambda leaf: setattr(leaf, "_label", label) if isinstance(leaf, Tensor) else None, result)
        return result

    def _common(self, func: Any, tensors: Sequence[Tensor]) -> torch.device:
        labels = {label_of(tensor) for tensor in tensors}
        host = [tensor for tensor in tensors if label_of(tensor) == CPU and tensor.dim() > 0]
        devices = labels - {CPU}
        if len(devices) > 1 or (devices and host and func not in MEETING):
            raise MixedDevices(f"{getattr(func, '__name__', func)} was given tensors on {sorted(map(str, labels))}")
        return label_of(tensors[0]) if func in MEETING and tensors else next(iter(devices), CPU)
