"""One model over several devices at once, each with a part of every layer (tensor parallel, arXiv 1909.08053).

    check_ranks      whether so many ranks can share a model
    TensorParallel   what each rank has of a model: its structure, and its part of every tensor
    Columns, Rows    the two ways to share a linear layer, plain or packed

A rank has some of the attention heads and some of the MLP's inner channels: the first linears of both are shared by
outputs, the second by inputs, and what these give is added up over the ranks, twice in each block. So a rank keeps the
keys and values of its own heads alone. The blocks of the vision tower are shared in the same way, if their heads
divide. The token table is shared by channels and the head by ids, and what they give is put together again, so every
rank has the same logits, to the bit. Norms, positions, the patch convolution and the resampler are on all ranks.

The parts are plain tensors in the layers that were there, so what adapts layers afterwards (fusing, tables for a CPU,
captured steps) does with them as with whole ones. DTensors, which torch's own styles make, would have to be unwrapped
for each of these, and take longer to dispatch than a small product takes. A shared model is for inference: no gradient
flows between ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from ..config import QwenVLConfig
from ..errors import ConfigError
from ..model.qwenvl import QwenVL
from .fuse import OUTPUTS
from .packed import PackedLinear
from .ranks import RankConfig


def check_ranks(config: QwenVLConfig, ranks: int) -> None:
    """Raise ConfigError if so many ranks cannot have equally many attention heads. All else is filled up with zeros."""
    if _divides(config, ranks):
        return
    heads, per_word = config.num_attention_heads, _per_word(config)
    packed = f" of {config.kv_channels} channels, {per_word} to a packed word," if config.kv_channels % per_word else ""
    fitting = [str(count) for count in range(1, heads + 1) if _divides(config, count)]
    counts = f"{', '.join(fitting[:-1])} or {fitting[-1]}" if fitting[1:] else "".join(fitting) or "no number"
    raise ConfigError(
        f"{ranks} processes cannot have equally many of the model's {heads} attention heads{packed}: "
        f"{counts} of them (--nproc-per-node) would work"
    )


def _divides(config: QwenVLConfig, ranks: int) -> bool:
    heads = config.num_attention_heads
    return heads % ranks == 0 and heads // ranks * config.kv_channels % _per_word(config) == 0


def _per_word(config: QwenVLConfig) -> int:
    return 1 if config.quantization_config is None else config.quantization_config.per_word


def _equal(size: int, ranks: int, unit: int) -> int:
    """The smallest multiple of `unit` of which so many ranks together have `size`."""
    return -(-size // (ranks * unit)) * unit


class Share(ParallelStyle):
    """How the ranks of a mesh share a layer: what part each has of a tensor, and what they tell each other."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.rank, self.ranks, self.group = mesh.get_local_rank(), mesh.size(), mesh.get_group()

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """What this rank has of the layer's tensor of this name. All ranks' parts have one shape."""
        raise NotImplementedError

    def connect(self, layer: nn.Module) -> None:
        """Correct the sizes of a layer that has this rank's parts, and have its outputs meet the other ranks'."""
        raise NotImplementedError

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:  # noqa: ARG002 - known since __init__
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            part = self.part(name, tensor)
            setattr(module, name, nn.Parameter(part, False) if isinstance(tensor, nn.Parameter) else part)
        self.connect(module)
        return module

    def cut(self, tensor: Tensor, dim: int, size: int) -> Tensor:
        """This rank's `size` places along a dimension, with zeros for those beyond its end."""
        first = min(self.rank * size, tensor.shape[dim])
        share = tensor.narrow(dim, first, min(size, tensor.shape[dim] - first))
        missing = list(share.shape)
        missing[dim] = size - share.shape[dim]
        return torch.cat((share, share.new_zeros(missing)), dim) if missing[dim] else share

    def gathered(self, part: Tensor, dim: int) -> Tensor:
        """The parts of all ranks, one behind the other."""
        sent = _as_sent(part)
        parts = [torch.empty_like(sent) for _ in range(self.ranks)]
        dist.all_gather(parts, sent, group=self.group)
        return torch.cat(parts, dim).to(part.dtype)

    def added(self, part: Tensor) -> Tensor:
        """The sum over all ranks."""
        sent = _as_sent(part)
        dist.all_reduce(sent, group=self.group)
        return sent.to(part.dtype)


def _as_sent(part: Tensor) -> Tensor:
    """Contiguous, and on a CPU in float32: not every gloo knows bfloat16."""
    if part.requires_grad:
        raise ConfigError("a model that is shared by ranks is for inference: no gradient flows between them")
    return (part if part.is_cuda else part.float()).contiguous()


class Columns(Share):
    """By outputs: each rank has its share of each of `thirds` equal parts, in multiples of `unit`.

    `gather`: the outputs of all ranks are put together again.
    """

    def __init__(self, mesh: DeviceMesh, *, thirds: int = 1, gather: bool = False, unit: int = 1) -> None:
        super().__init__(mesh)
        self.thirds, self.gather, self.unit = thirds, gather, unit

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """All but `g_idx`, which is the inputs'."""
        if name not in OUTPUTS:
            return tensor
        dim, unit = OUTPUTS[name], 1 if name == "qzeros" else self.unit  # which has them in words already
        thirds = tensor.chunk(self.thirds, dim)
        parts = [self.cut(third, dim, _equal(third.shape[dim], self.ranks, unit)) for third in thirds]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def connect(self, layer: Any) -> None:  # noqa: ANN401 - a linear, plain or packed
        """One linear, whose outputs may be gathered."""
        whole = layer.out_features
        layer.out_features = layer.qweight.shape[1] if isinstance(layer, PackedLinear) else layer.weight.shape[0]
        if self.gather:
            layer.register_forward_hook(lambda _layer, _x, y: self.gathered(y, -1)[..., :whole])


class Channels(Share):
    """An embedding, by channels."""

    def part(self, name: str, tensor: Tensor) -> Tensor:  # noqa: ARG002 - it has its table alone
        """[V,C] to [V,C/ranks]."""
        return tensor.chunk(self.ranks, 1)[self.rank]

    def connect(self, layer: Any) -> None:  # noqa: ANN401 - an embedding
        """Its rows are put together again."""
        layer.embedding_dim = layer.weight.shape[1]
        layer.register_forward_hook(lambda _layer, _ids, rows: self.gathered(rows, -1))


class Rows(Share):
    """By inputs, which is how outputs shared by `Columns` come; what the ranks compute is added up.

    If a cut goes through a group of a packed layer, all groups are made smaller, to stay of one size, and their scales
    stand several times. Where act-order has shuffled the groups, a rank keeps the scales of all of them.
    """

    def __init__(self, mesh: DeviceMesh, inputs: int, config: QwenVLConfig) -> None:
        super().__init__(mesh)
        quantization, self.per_word = config.quantization_config, _per_word(config)
        self.inputs = _equal(inputs, self.ranks, self.per_word)
        self.in_order = quantization is not None and not quantization.desc_act
        size = -1 if quantization is None else quantization.group_size
        self.whole_group, self.group_size = (inputs, self.inputs) if size == -1 else (size, math.gcd(size, self.inputs))

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """The bias is the first rank's alone, as it is to be added once."""
        if name == "bias":
            return tensor if self.rank == 0 else torch.zeros_like(tensor)
        if name == "weight":
            return self.cut(tensor, 1, self.inputs)
        if name == "qweight":
            return self.cut(tensor, 0, self.inputs // self.per_word)
        if not self.in_order:
            return self.cut(tensor, 0, self.inputs) if name == "g_idx" else tensor
        inputs = torch.arange(self.inputs, device=tensor.device)
        if name == "g_idx":
            return (inputs // self.group_size).to(tensor.dtype)
        groups = (inputs[:: self.group_size] + self.rank * self.inputs) // self.whole_group
        return tensor.index_select(0, groups.clamp(max=len(tensor) - 1))

    def connect(self, layer: Any) -> None:  # noqa: ANN401 - a linear, plain or packed
        """Its outputs are sums over the ranks."""
        layer.in_features = self.inputs
        layer.register_forward_hook(lambda _layer, _x, y: self.added(y))


class TensorParallel:
    """What this rank of a mesh has of a model. Raises ConfigError if the ranks cannot share it evenly."""

    def __init__(self, config: QwenVLConfig, mesh: DeviceMesh) -> None:
        check_ranks(config, mesh.size())
        self.config, self.mesh, self.ranks = config, mesh, mesh.size()
        self.styles = self._plan()

    def _plan(self) -> dict[str, Share]:
        config, mesh, vision = self.config, self.mesh, self.config.visual
        packed_head = config.quantization_config is not None and config.quantization_config.lm_head
        unit, plain = _per_word(config), replace(config, quantization_config=None)
        styles: dict[str, Share] = {"decoder.wte": Channels(mesh)}
        for i in range(config.num_hidden_layers):
            block = f"decoder.blocks.{i}"
            styles |= {
                f"{block}.attn.c_attn": Columns(mesh, thirds=3, unit=unit),
                f"{block}.attn.c_proj": Rows(mesh, config.hidden_size, config),
                f"{block}.mlp.w1": Columns(mesh, unit=unit),
                f"{block}.mlp.w2": Columns(mesh, unit=unit),
                f"{block}.mlp.c_proj": Rows(mesh, config.mlp_width, config),
            }
        styles["decoder.lm_head"] = Columns(mesh, gather=True, unit=unit if packed_head else 1)
        for j in range(vision.layers if self._vision_divides() else 0):
            block = f"visual.blocks.{j}"
            styles |= {
                f"{block}.attn.in_proj": Columns(mesh, thirds=3),
                f"{block}.attn.out_proj": Rows(mesh, vision.width, plain),
                f"{block}.mlp.c_fc": Columns(mesh),
                f"{block}.mlp.c_proj": Rows(mesh, vision.mlp_width, plain),
            }
        return styles

    def _vision_divides(self) -> bool:
        return self.config.visual.heads % self.ranks == 0

    def apply(self, model: QwenVL) -> None:
        """Give a whole model on the meta device the structure of this rank's part, in place."""
        model.requires_grad_(False)
        parallelize_module(model, self.mesh, dict(self.styles))
        model.decoder.config = RankConfig.of(self.config, self.ranks)
        for block in model.decoder.blocks:
            attention: Any = block.attn
            attention.heads //= self.ranks
            attention.register_forward_hook(_whole_maps(self.styles["decoder.wte"]))
        for block in model.visual.blocks if self._vision_divides() else ():
            vision_attention: Any = block.attn
            vision_attention.heads //= self.ranks

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """What this rank has of the whole model's tensor of this name."""
        owner, _, leaf = name.rpartition(".")
        return self.styles[owner].part(leaf, tensor) if owner in self.styles else tensor


def _whole_maps(style: Share) -> Callable[..., None]:
    """A hook of `Attention`, behind which its attention map [B,H,T,S] has the heads of all ranks."""

    def gather(_attention: nn.Module, given: tuple[Any, ...], _mixed: Tensor) -> None:
        if (maps := given[3]) is not None:
            maps[-1] = style.gathered(maps[-1], 1)

    return gather
