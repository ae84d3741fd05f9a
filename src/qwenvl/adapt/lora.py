"""LoRA (arXiv 2106.09685), put around the decoder's linears and taken away again; over packed linears it is QLoRA.

    LoraOptions   rank, scale, dropout and which linears; the defaults are those of the reference's fine-tuning
    add_lora      wrap the linears, freeze all else
    merge_lora    fold the adapters into plain linears
    LoraLinear    one adapted linear

`adapters.py` writes adapters to disk and reads them. The vision tower and the resampler are never adapted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import is_number, is_whole
from ..config import QwenVLConfig
from ..errors import ConfigError
from ..model.qwenvl import QwenVL
from ..weights.folder import few
from ..weights.keymap import entries
from .packed import PackedLinear


@dataclass(frozen=True)
class LoraOptions:
    """What is adapted and how: W x becomes W x + alpha / r * B A dropout(x).

    r                 rank: A is [r, in], B is [out, r]
    alpha             scale, divided by r
    dropout           share of the adapter's inputs, from 0 to below 1, that is dropped in training
    targets           the decoder's linears by their names in the reference, or by the end of their path:
                      "attn.c_proj" is attention's in every layer, "h.3.mlp.w1" that of one layer
    train_embeddings  train the token table and the head in full, too: the reference does so for the base model, which
                      has not learned the chat format's special tokens

    Raises ConfigError for a value that cannot be used.
    """

    r: int = 64
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ("c_attn", "attn.c_proj", "w1", "w2")
    train_embeddings: bool = False

    def __post_init__(self) -> None:
        if not (is_whole(self.r) and self.r > 0):
            raise ConfigError(f"LoRA's r must be a positive whole number, not {self.r!r}")
        if not (is_number(self.alpha) and self.alpha > 0):
            raise ConfigError(f"LoRA's alpha must be a number above 0, not {self.alpha!r}")
        if not (is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ConfigError(f"LoRA's dropout must be a number from 0 to below 1, not {self.dropout!r}")
        if isinstance(self.targets, list):  # as TOML has it; a frozen dataclass wants something hashable
            object.__setattr__(self, "targets", tuple(self.targets))
        if not (isinstance(self.targets, tuple) and self.targets and all(isinstance(t, str) for t in self.targets)):
            raise ConfigError(f"LoRA's targets must be a list of names of linears, not {self.targets!r}")
        if not isinstance(self.train_embeddings, bool):
            raise ConfigError(f"LoRA's train_embeddings must be true or false, not {self.train_embeddings!r}")


class LoraLinear(nn.Module):
    """A frozen linear, plain or packed, and the low-rank correction that is trained beside it.

    `base` is the linear itself, `lora_A` [r, in] and `lora_B` [out, r] are float32 whatever its dtype: a step of AdamW
    is often smaller than half the distance between two neighbouring bfloat16 numbers, and would be rounded away.
    """

    def __init__(self, base: nn.Linear | PackedLinear, options: LoraOptions) -> None:
        super().__init__()
        self.base, self.options = base, options
        self.in_features, self.out_features = base.in_features, base.out_features
        device = base.qweight.device if isinstance(base, PackedLinear) else base.weight.device
        # Drawn on the CPU, so that one seed gives the same adapters on every device. B is zero: training begins at W.
        initial = torch.empty(options.r, base.in_features, device="cpu")
        nn.init.kaiming_uniform_(initial, a=math.sqrt(5))
        self.lora_A = nn.Parameter(initial.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, options.r, device=device))
        self.train(base.training)

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.options.alpha / self.options.r

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]. The correction is computed in the dtype of `x`, as under autocast."""
        dropped = F.dropout(x, self.options.dropout, self.training)
        narrow = F.linear(dropped, self.lora_A.to(x.dtype))  # [..., r]
        plain: Tensor = self.base(x)
        return plain + self.scale * F.linear(narrow, self.lora_B.to(x.dtype))

    def extra_repr(self) -> str:
        """Rank and scale, for `print(model)`."""
        return f"r={self.options.r}, scale={self.scale:g}"


def matches(target: str, path: str) -> bool:
    """Whether a target names the module at `path`, by PEFT's rule: it is the path or the end of it."""
    return path == target or path.endswith(f".{target}")


def decoder_linears(config: QwenVLConfig) -> dict[str, str]:
    """The linears that can be adapted, packed or not, layer by layer: path in the reference -> path in our model."""
    return {
        entry.reference.rpartition(".")[0]: entry.ours.rpartition(".")[0]
        for entry in entries(config)
        if entry.ours.startswith("decoder.blocks.") and entry.ours.endswith((".weight", ".qweight"))
        if len(entry.our_shape) == 2
    }


def target_paths(config: QwenVLConfig, targets: Iterable[str]) -> dict[str, str]:
    """The linears that `targets` name: path in the reference -> path in our model.

    Raises ConfigError for a target that names none.
    """
    linears = decoder_linears(config)
    if lost := [target for target in targets if not any(matches(target, path) for path in linears)]:
        names = dict.fromkeys(path.split(".", 3)[-1] for path in linears)
        raise ConfigError(f"LoRA target {few(lost)} names no linear of the decoder, which has {', '.join(names)}")
    return {path: ours for path, ours in linears.items() if any(matches(target, path) for target in targets)}


def check_fits(config: QwenVLConfig, options: LoraOptions) -> None:
    """Raise ConfigError if a target names no linear, or if embeddings are to be trained and the head is packed."""
    target_paths(config, options.targets)
    if options.train_embeddings and config.quantization_config is not None and config.quantization_config.lm_head:
        raise ConfigError("this checkpoint's head is packed, so train_embeddings cannot train it: leave that off")


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted linears of a model by their paths, in order; none if it has no adapter."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` in the place of the one at `path`."""
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, module)


@torch.no_grad()
def put_weight(owner: nn.Module, name: str, value: Tensor, dtype: torch.dtype) -> None:
    """Give a module a new parameter with this value, laid out in memory, placed and frozen as the old one was.

    A new one rather than a new value in the old, by which a session notices that its cache is out of date.
    """
    old = owner.get_parameter(name)
    setattr(owner, name, nn.Parameter(torch.empty_like(old, dtype=dtype).copy_(value), requires_grad=old.requires_grad))


def wrap_linears(model: QwenVL, options: LoraOptions) -> None:
    """Put a `LoraLinear` around every target, in place. Raises ConfigError as `add_lora` does."""
    if lora_layers(model):
        raise ConfigError("the model has LoRA adapters already: merge them first (merge_lora), or load the model anew")
    check_fits(model.config, options)
    for path in target_paths(model.config, options.targets).values():
        base = model.get_submodule(path)
        assert isinstance(base, (nn.Linear, PackedLinear)), f"{path} is a {type(base).__name__}"
        put_module(model, path, LoraLinear(base, options))


def add_lora(model: QwenVL, options: LoraOptions) -> None:
    """Adapt the targets, in place, and freeze all but the adapters (and the embeddings, with `train_embeddings`).

    The model computes what it did before, since every B is zero; A is drawn from torch's default generator. Do it
    before `fully_shard` and before the optimizer is made. With `train_embeddings`, the token table and the head become
    float32, for the reason that `LoraLinear` gives; a model that is otherwise in 16 bits then runs under autocast only,
    until `merge_lora`.

    Raises ConfigError if a target names no linear of the decoder, if the model has adapters already, or if embeddings
    are to be trained and the head is packed.
    """
    wrap_linears(model, options)
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    if options.train_embeddings:
        for table in (model.decoder.wte, model.decoder.lm_head):
            put_weight(table, "weight", table.weight, torch.float32)
            table.weight.requires_grad_(True)


def check_mergeable(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise ConfigError if one of the linears at `paths`, adapted or not yet, is packed."""
    modules = [model.get_submodule(path) for path in paths]
    if any(isinstance(m.base if isinstance(m, LoraLinear) else m, PackedLinear) for m in modules):
        raise ConfigError(
            "an adapter cannot be merged into weights that are packed to a few bits: keep it beside them, or load it "
            "over the 16-bit checkpoint that they were packed from and merge it there"
        )


@torch.no_grad()
def merge_lora(model: QwenVL) -> None:
    """Fold every adapter into its linear, W + alpha / r * B A, in place: the model has plain linears again.

    The sum is made in float32 and rounded to the dtype of W; embeddings that were trained get the model's dtype back.
    What is frozen stays frozen. Raises ConfigError if there is nothing to merge, or for linears that are packed to 4
    bits; the model is unchanged then.
    """
    layers = lora_layers(model)
    if not layers:
        raise ConfigError("the model has no LoRA adapters to merge")
    check_mergeable(model, layers)
    for path, layer in layers.items():
        base = layer.base
        assert isinstance(base, nn.Linear)
        merged = base.weight.float() + layer.scale * (layer.lora_B @ layer.lora_A)
        put_weight(base, "weight", merged, base.weight.dtype)
        put_module(model, path, base)
    dtype = model.decoder.ln_f.weight.dtype
    for table in (model.decoder.wte, model.decoder.lm_head):
        if table.weight.dtype != dtype:
            put_weight(table, "weight", table.weight, dtype)
