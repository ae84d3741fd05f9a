"""What a figure was measured with: weights, versions, device, date.

fingerprint   a name for a model's weights
versions      of everything that could change an answer
"""

from __future__ import annotations

import datetime
import hashlib
import platform

import numpy as np
import PIL
import torch
from torch import nn

from .. import __version__
from ..bench.device import processor

SAMPLED = 8  # elements of each tensor that its fingerprint takes: enough to tell checkpoints apart, and quick


def fingerprint(model: nn.Module) -> str:
    """A name for the weights, from some elements of every tensor and its shape."""
    seen = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        some = tensor.detach().flatten()[:SAMPLED].float().cpu().numpy()
        seen.update(f"{name} {tuple(tensor.shape)}".encode() + some.tobytes())
    return seen.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of this library and what it computes with."""
    return {
        "qwenvl": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """The device, as people call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def today() -> str:
    """The date, for a figure to carry."""
    return datetime.date.today().isoformat()
