"""One declarative table: the reference's tensor names, ours, their shapes and the operation between them.

    TABLE      what a checkpoint holds, section by section, templated per layer
    DROPS      what older checkpoints hold and nobody needs
    entries    the table written out for one configuration; names, shapes and both directions all come from it

`{i}` counts decoder layers, `{j}` vision blocks. Shapes are the reference's, in these letters:
V vocabulary, C hidden width, F inner width of the decoder's MLP, W vision width, M inner width of the vision MLP,
Q queries, P patch side in pixels, R rows of the stored vision positions; `/w` is the words that so many packed values
take, `/g` one value for each group of `group_size` inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ..config import REFERENCE_GRID, QuantizationConfig, QwenVLConfig
from ..errors import ConfigError

Shape = tuple[int, ...]
Layout = Literal["reference", "qwenvl"]
# "float" follows the model's dtype; "scale" (of packed weights) stays as stored, for they are exact only with it;
# "packed" is int32 words and indices.
Kind = Literal["float", "scale", "packed"]


@dataclass(frozen=True)
class Op:
    """What happens to a tensor on its way from the reference's layout to ours, and on its way back."""

    forward: Callable[[Tensor, QwenVLConfig], Tensor]
    inverse: Callable[[Tensor, QwenVLConfig], Tensor]


def _heads_first_to_thirds(tensor: Tensor, config: QwenVLConfig) -> Tensor:
    """[H * 3 * D, ...] -> [3 * H * D, ...]: q, k, v of each head in turn become q, k, v over the whole width."""
    heads = config.visual.heads
    rows = tensor.reshape(heads, 3, tensor.shape[0] // (3 * heads), *tensor.shape[1:])
    return rows.transpose(0, 1).reshape(tensor.shape)


def _thirds_to_heads_first(tensor: Tensor, config: QwenVLConfig) -> Tensor:
    """[3 * H * D, ...] -> [H * 3 * D, ...], the inverse."""
    heads = config.visual.heads
    rows = tensor.reshape(3, heads, tensor.shape[0] // (3 * heads), *tensor.shape[1:])
    return rows.transpose(0, 1).reshape(tensor.shape)


COPY = Op(lambda tensor, _: tensor, lambda tensor, _: tensor)
TRANSPOSE = Op(lambda tensor, _: tensor.T, lambda tensor, _: tensor.T)
REGROUP = Op(_heads_first_to_thirds, _thirds_to_heads_first)


@dataclass(frozen=True)
class Row:
    """One tensor under its section's prefixes; our name is the reference's unless `ours` says otherwise."""

    name: str
    shape: str
    op: Op = COPY
    ours: str | None = None
    kind: Kind = "float"
    when: Literal["always", "plain", "packed", "plain head", "packed head", "widths differ"] = "always"


@dataclass(frozen=True)
class Section:
    """Rows that share a prefix in the reference and a prefix in ours."""

    reference: str
    ours: str
    rows: tuple[Row, ...]


def _linear(
    name: str,
    outputs: str,
    inputs: str,
    *,
    biased: bool = False,
    plain: Literal["plain", "plain head"] = "plain",
    packed: Literal["packed", "packed head"] = "packed",
) -> tuple[Row, ...]:
    """A decoder linear as the bf16 checkpoints and as packed ones store it; packed ones always have a bias."""
    return (
        Row(f"{name}.weight", f"{outputs} {inputs}", when=plain),
        Row(f"{name}.qweight", f"{inputs}/w {outputs}", kind="packed", when=packed),
        Row(f"{name}.qzeros", f"{inputs}/g {outputs}/w", kind="packed", when=packed),
        Row(f"{name}.scales", f"{inputs}/g {outputs}", kind="scale", when=packed),
        Row(f"{name}.g_idx", inputs, kind="packed", when=packed),
        Row(f"{name}.bias", outputs, when="always" if biased else packed),
    )


TABLE = (
    Section(
        "transformer.visual.",
        "visual.",
        (
            Row("conv1.weight", "W 3 P P"),
            Row("positional_embedding", "R W"),
            Row("ln_pre.weight", "W"),
            Row("ln_pre.bias", "W"),
        ),
    ),
    Section(
        "transformer.visual.transformer.resblocks.{j}.",
        "visual.blocks.{j}.",
        (
            Row("ln_1.weight", "W"),
            Row("ln_1.bias", "W"),
            Row("attn.in_proj.weight", "3W W", REGROUP),
            Row("attn.in_proj.bias", "3W", REGROUP),
            Row("attn.out_proj.weight", "W W"),
            Row("attn.out_proj.bias", "W"),
            Row("ln_2.weight", "W"),
            Row("ln_2.bias", "W"),
            Row("mlp.c_fc.weight", "M W"),
            Row("mlp.c_fc.bias", "M"),
            Row("mlp.c_proj.weight", "W M"),
            Row("mlp.c_proj.bias", "W"),
        ),
    ),
    Section(
        "transformer.visual.attn_pool.",
        "resampler.",
        (
            Row("query", "Q C"),
            Row("pos_embed", "Q C"),
            Row("kv_proj.weight", "C W", when="widths differ"),
            Row("ln_q.weight", "C"),
            Row("ln_q.bias", "C"),
            Row("ln_kv.weight", "C"),
            Row("ln_kv.bias", "C"),
            Row("attn.in_proj_weight", "3C C"),
            Row("attn.in_proj_bias", "3C"),
            Row("attn.out_proj.weight", "C C"),
            Row("attn.out_proj.bias", "C"),
        ),
    ),
    Section(
        "transformer.visual.",
        "resampler.",
        (
            Row("ln_post.weight", "C"),
            Row("ln_post.bias", "C"),
            # The reference multiplies by it un-transposed; ours is a linear layer, which transposes.
            Row("proj", "C C", TRANSPOSE, ours="proj.weight"),
        ),
    ),
    Section("transformer.", "decoder.", (Row("wte.weight", "V C"),)),
    Section(
        "transformer.h.{i}.",
        "decoder.blocks.{i}.",
        (
            Row("ln_1.weight", "C"),
            *_linear("attn.c_attn", "3C", "C", biased=True),
            *_linear("attn.c_proj", "C", "C"),
            Row("ln_2.weight", "C"),
            *_linear("mlp.w1", "F", "C"),
            *_linear("mlp.w2", "F", "C"),
            *_linear("mlp.c_proj", "C", "F"),
        ),
    ),
    Section("transformer.", "decoder.", (Row("ln_f.weight", "C"),)),
    Section("", "decoder.", _linear("lm_head", "V", "C", plain="plain head", packed="packed head")),
)

# Causal masks and rotary frequencies that older checkpoints carry: constants that the model computes itself.
DROPS = (
    "transformer.rotary_emb.inv_freq",
    "transformer.h.{i}.attn.rotary_emb.inv_freq",
    "transformer.h.{i}.attn.bias",
    "transformer.h.{i}.attn.masked_bias",
)


@dataclass(frozen=True)
class Entry:
    """One tensor of one configuration: its name and shape in both layouts, and the way between them."""

    reference: str
    ours: str
    reference_shape: Shape
    our_shape: Shape
    op: Op
    kind: Kind

    def name(self, layout: Layout) -> str:
        """The tensor's name in a layout."""
        return self.reference if layout == "reference" else self.ours

    def shape(self, layout: Layout) -> Shape:
        """The tensor's shape in a layout."""
        return self.reference_shape if layout == "reference" else self.our_shape

    def translate(self, tensor: Tensor, stored: Layout, wanted: Layout, config: QwenVLConfig) -> Tensor:
        """The tensor as `wanted` has it, given as `stored` has it. A tensor that is right already is not copied."""
        if stored == wanted:
            return tensor
        return (self.op.forward if stored == "reference" else self.op.inverse)(tensor, config)


def _sizes(config: QwenVLConfig) -> dict[str, int]:
    """The numbers behind the shape letters."""
    vision, hidden, inner = config.visual, config.hidden_size, config.mlp_width
    sizes = {"3": 3, "V": config.vocab_size, "C": hidden, "3C": 3 * hidden, "F": inner}
    sizes |= {"W": vision.width, "3W": 3 * vision.width, "M": vision.mlp_width}
    sizes |= {"Q": vision.n_queries, "P": vision.patch_size, "R": REFERENCE_GRID**2}
    if (quantization := config.quantization_config) is not None:
        for letter in ("C", "3C", "F", "V"):
            sizes[f"{letter}/w"] = sizes[letter] // quantization.per_word
            sizes[f"{letter}/g"] = quantization.groups(sizes[letter])
    return sizes


def _expand(config: QwenVLConfig) -> Iterator[Entry]:
    quantization, sizes = config.quantization_config, _sizes(config)
    if quantization is not None:
        _check_words(config, quantization)
    head = quantization is not None and quantization.lm_head
    holds = {
        "always": True,
        "plain": quantization is None,
        "packed": quantization is not None,
        "plain head": not head,
        "packed head": head,
        "widths differ": config.visual.width != config.visual.output_dim,
    }
    for section in TABLE:
        for prefix, our_prefix in zip(
            _per_layer(section.reference, config), _per_layer(section.ours, config), strict=True
        ):
            for row in section.rows:
                if holds[row.when]:
                    shape = tuple(sizes[term] for term in row.shape.split())
                    our_shape = tuple(row.op.forward(torch.empty(shape, device="meta"), config).shape)
                    ours = row.name if row.ours is None else row.ours
                    yield Entry(prefix + row.name, our_prefix + ours, shape, our_shape, row.op, row.kind)


def _check_words(config: QwenVLConfig, quantization: QuantizationConfig) -> None:
    per_word = quantization.per_word
    if config.hidden_size % per_word or config.mlp_width % per_word:
        raise ConfigError(
            f"{per_word} values of {quantization.bits} bits go into a word: hidden_size {config.hidden_size} and half "
            f"of intermediate_size {config.intermediate_size} must be multiples of {per_word}"
        )
    if quantization.lm_head and config.vocab_size % per_word:
        raise ConfigError(
            f"{per_word} values of {quantization.bits} bits go into a word: a packed head needs a vocab_size that is a "
            f"multiple of {per_word}, not {config.vocab_size}"
        )


def _per_layer(template: str, config: QwenVLConfig) -> list[str]:
    if "{i}" in template:
        return [template.replace("{i}", str(i)) for i in range(config.num_hidden_layers)]
    if "{j}" in template:
        return [template.replace("{j}", str(j)) for j in range(config.visual.layers)]
    return [template]


@lru_cache(maxsize=8)
def entries(config: QwenVLConfig) -> tuple[Entry, ...]:
    """Every tensor of a checkpoint with this configuration, image to logits, layer by layer.

    Packed names are there if and only if the configuration has a `quantization_config`, the head's if that says so.
    Raises ConfigError for sizes that cannot be packed.
    """
    return tuple(_expand(config))


def dropped_names(config: QwenVLConfig) -> frozenset[str]:
    """The reference's names that are left out on purpose; a checkpoint may have any of them or none."""
    return frozenset(name for template in DROPS for name in _per_layer(template, config))


def reference_names(config: QwenVLConfig) -> list[str]:
    """The reference's tensor names, in the table's order."""
    return [entry.reference for entry in entries(config)]


def our_names(config: QwenVLConfig) -> list[str]:
    """Our tensor names, in the table's order: what `QwenVL(config).state_dict()` holds."""
    return [entry.ours for entry in entries(config)]
