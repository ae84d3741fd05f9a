"""Run a checkpoint whose decoder linears are packed to 4 bits (GPTQ), without unpacking the model.

Int4Linear           a linear layer over packed words
quantize_structure   put it in the place of the decoder's linears
"""

from __future__ import annotations

from torch import nn

from ..config import QwenVLConfig
from ..errors import ConfigError
from ..weights.keymap import entries
from .packed import PackedLinear


class Int4Linear(PackedLinear):
    """Four bits."""


def quantize_structure(model: nn.Module, config: QwenVLConfig) -> None:
    """Replace the linears that the checkpoint holds packed, five in every decoder block and perhaps the head, by
    `Int4Linear`, in place.

    The new layers are empty: made for a model on the meta device that a packed checkpoint fills. Raises ConfigError if
    the configuration has no `quantization_config`.
    """
    if config.quantization_config is None:
        raise ConfigError("config.json has no quantization_config: these weights are not packed")
    names = (entry.ours for entry in entries(config))
    for path in [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]:
        old = model.get_submodule(path)
        assert isinstance(old, nn.Linear), f"{path} is a {type(old).__name__}"
        with old.weight.device:
            new = Int4Linear(old.in_features, old.out_features, config.quantization_config)
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, new)
