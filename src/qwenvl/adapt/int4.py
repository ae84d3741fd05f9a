"""Run a checkpoint whose decoder linears are packed (GPTQ), without unpacking the model.

Int4Linear, Int8Linear   a linear layer over words of 4 or 8 bits
quantize_structure       put it in the place of the decoder's linears
arrange                  have a loaded model's packed layers as the kernel for CPUs reads them
"""

from __future__ import annotations

from torch import nn
from tqdm import tqdm

from ..config import QwenVLConfig
from ..errors import ConfigError
from ..weights.keymap import entries
from .packed import PackedLinear


class Int4Linear(PackedLinear):
    """Four bits."""


class Int8Linear(PackedLinear):
    """Eight bits."""


def quantize_structure(model: nn.Module, config: QwenVLConfig) -> None:
    """Replace the linears that the checkpoint holds packed, five in every decoder block and perhaps the head, by packed
    ones, in place.

    The new layers are empty: made for a model on the meta device that a packed checkpoint fills. Raises ConfigError if
    the configuration has no `quantization_config`.
    """
    if config.quantization_config is None:
        raise ConfigError("config.json has no quantization_config: these weights are not packed")
    kind = Int4Linear if config.quantization_config.bits == 4 else Int8Linear
    names = (entry.ours for entry in entries(config))
    for path in [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]:
        old = model.get_submodule(path)
        assert isinstance(old, nn.Linear), f"{path} is a {type(old).__name__}"
        with old.weight.device:
            new = kind(old.in_features, old.out_features, config.quantization_config)
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, new)


def arrange(model: nn.Module, *, quiet: bool = False) -> None:
    """Have the packed layers of a loaded model ready for one token at a time, where the device wants that."""
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    for layer in tqdm(layers, desc="arranging", unit="layer", leave=False, disable=True if quiet else None):
        layer.arrange()
