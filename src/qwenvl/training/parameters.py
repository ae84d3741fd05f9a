"""Which parameters are trained, how fast, and by what.

trainable_for_fine_tuning   freeze what the reference freezes
selected                    what one run trains, by name
optimizer_for               AdamW over it
transformer_blocks          the repeated layers: what is recomputed, and what is spread over devices, one by one
recomputed_activations      activation checkpointing, from outside
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError
from ..model.decoder import Block
from ..model.qwenvl import QwenVL
from ..model.vision import VisionBlock
from .errors import TrainingError
from .options import TrainingOptions

POSITIONS = "resampler.pos_embed"  # a constant table
FROZEN = ("visual.", "resampler.ln_post.", "resampler.proj.")  # the reference's `visual`, without its `attn_pool`
TABLES = ("wte.weight", "positional_embedding", "pos_embed", "resampler.query")  # matrices by shape, not by use

# A factor on the learning rate for a parameter's name; 0 or False leaves the parameter as it is.
Rates: TypeAlias = Callable[[str], float]


def trainable_for_fine_tuning(model: QwenVL, *, train_vision: bool = False) -> list[str]:
    """Freeze what the reference's full fine-tuning freezes, thaw the rest, and return the names that are trained.

    Frozen are the vision tower and the resampler's output (`ln_post`, `proj`), unless `train_vision`, and always the
    table of positions. Raises ConfigError for an int4 model, whose packed weights cannot be trained.
    """
    if model.config.quantization_config is not None:
        raise ConfigError("packed int4 weights cannot be trained in full: train a LoRA adapter over them")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name != POSITIONS and (train_vision or not name.startswith(FROZEN)))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@contextmanager
def selected(model: nn.Module, rates: Rates | None) -> Iterator[dict[str, float]]:
    """Names of the parameters that are trained inside the block, with the factor on the learning rate of each.

    They are those that require gradients and have a factor above 0; the others require none while the block lasts.
    Raises TrainingError if there is none.
    """
    thawed = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    factors = {name: 1.0 if rates is None else float(rates(name)) for name in thawed}
    chosen = {name: factor for name, factor in factors.items() if factor > 0}
    if not chosen:
        raise TrainingError("no parameter is to be trained: all are frozen or left out")
    _require_gradients(model, chosen)
    try:
        yield chosen
    finally:
        _require_gradients(model, factors)


def _require_gradients(model: nn.Module, names: Mapping[str, float]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Matrices decay; norms, biases and tables of embeddings or positions do not."""
    return parameter.dim() > 1 and not name.endswith(TABLES)


def optimizer_for(model: nn.Module, factors: Mapping[str, float], options: TrainingOptions) -> torch.optim.AdamW:
    """AdamW over the named parameters, in groups that share weight decay and `factor`, their part of the rate."""
    groups: defaultdict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if name in factors:
            groups[factors[name], options.weight_decay if _decays(name, parameter) else 0.0].append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay, "factor": factor} for (factor, decay), group in groups.items()],
        lr=options.learning_rate,
        betas=options.betas,
        fused=next(model.parameters()).device.type in ("cpu", "cuda"),
    )


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of the decoder and of the vision tower, wherever in `model` they are."""
    return [module for module in model.modules() if isinstance(module, (Block, VisionBlock))]


@contextmanager
def recomputed_activations(model: nn.Module, on: bool) -> Iterator[None]:
    """If `on`, blocks keep their input only, inside this block, and compute the rest again in the backward pass.

    Their `forward` is wrapped, not the module: names in the state dict stay as they are.
    """
    blocks = transformer_blocks(model) if on else []
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
