"""How much memory training needs, by arithmetic on the configuration: nothing is loaded, torch neither.

    Workload   what is trained, and on how much at a time
    Memory     bytes on each device, by what they are for
    estimate   the one from the other
    QWEN_VL    the published model's sizes

What there is during an update, in bytes; s is a weight's width, b the width that is computed in:

    weights      every parameter; frozen int4 linears as they are packed
    gradients    4 for every trained parameter, and optimizer 8: AdamW keeps two moments, all in float32
    activations  what the backward pass needs of the forward pass. A decoder block keeps for each token

                     C (6 b + 8)  +  3 F b                     attention, both norms' inputs in float32, SwiGLU
                   + C (2 s + 2 b)  +  F b                     where its own weights are trained: the linears' inputs
                   + (b + mask) in  +  b r                     for each LoRA linear with `in` inputs

                 and with activation checkpointing its input alone, C s, while one block at a time has all of it, and
                 2 F b + C s of gradients
    logits       12 V for each token: logits, log-probabilities and their gradient, or their like in 16 bits and 32

A token is any position of the padded batch. Vision blocks and the resampler keep something only where they are trained.
The peak is at the loss, or when the last gradient is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from ..config import REFERENCE_GRID, QwenVLConfig, VisionConfig

Method = Literal["full", "lora", "qlora"]

QWEN_VL = QwenVLConfig(
    vocab_size=151936,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    intermediate_size=22016,
    visual=VisionConfig(),
)
FLOAT, HALF = 4, 2  # bytes of a number in 32 and in 16 bits
MOMENTS = 2  # of AdamW
LOGITS = 12


@dataclass(frozen=True)
class Workload:
    """What is trained, and what one forward pass of one device sees.

    rows and tokens are those of a padded batch [B,T], images the pictures in it. weight_bytes and compute_bytes are a
    number's width in the weights that are not packed, and in the products: 4, or 2 for 16 bits (autocast, if the
    weights have 4). rank, targets and train_embeddings are LoRA's. accumulates says that gradients of one piece wait
    for the next. mask_bytes is a dropped element's width: 1 on CUDA, on a CPU that of the weights.
    """

    method: Method
    rows: int
    tokens: int
    images: int
    weight_bytes: int
    compute_bytes: int
    rank: int = 64
    targets: Sequence[str] = ()
    train_embeddings: bool = False
    train_vision: bool = False
    checkpointing: bool = False
    accumulates: bool = False
    ranks: int = 1
    mask_bytes: int = 1


@dataclass(frozen=True)
class Memory:
    """Bytes on each device. activations and logits are those of the fullest moment, beside the gradients then there."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.states + self.activations + self.logits

    @property
    def states(self) -> int:
        """What is there whatever the batch: the least that a device must have."""
        return self.weights + self.gradients + self.optimizer

    def __str__(self) -> str:
        """The total and its parts, in GB of 10^9 bytes."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        listed = ", ".join(f"{name} {_gigabytes(count)}" for name, count in parts.items() if count)
        return f"{_gigabytes(self.total)} GB ({listed})"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f}" if count >= 1e9 else f"{count / 1e9:.2g}"


def block_linears(config: QwenVLConfig) -> dict[str, tuple[int, int]]:
    """The linears of one decoder block by their names in the reference: inputs and outputs."""
    hidden, inner = config.hidden_size, config.mlp_width
    return {
        "attn.c_attn": (hidden, 3 * hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.w1": (hidden, inner),
        "mlp.w2": (hidden, inner),
        "mlp.c_proj": (inner, hidden),
    }


def adapted_linears(config: QwenVLConfig, targets: Sequence[str]) -> list[tuple[int, int]]:
    """Inputs and outputs of every linear that LoRA's targets name, in all layers; `lora.matches` without torch."""
    return [
        sizes
        for layer in range(config.num_hidden_layers)
        for name, sizes in block_linears(config).items()
        if any(f".transformer.h.{layer}.{name}".endswith(f".{target}") for target in targets)
    ]


def parameter_counts(config: QwenVLConfig) -> dict[str, int]:
    """Parameters of each part; those of the resampler's output, which is frozen with the tower, by themselves."""
    vision, hidden = config.visual, config.hidden_size
    width, inner = vision.width, vision.mlp_width
    linears = sum(inputs * outputs for inputs, outputs in block_linears(config).values())
    vision_block = 4 * width * width + 2 * width * inner + 9 * width + inner
    vision_rest = width * (3 * vision.patch_size**2 + REFERENCE_GRID**2 + 2)
    kv_proj = 0 if width == hidden else width * hidden
    return {
        "tower": vision.layers * vision_block + vision_rest,
        "positions": vision.n_queries * hidden,
        "resampler": vision.n_queries * hidden + kv_proj + 4 * hidden * hidden + 8 * hidden,
        "resampler's output": hidden * hidden + 2 * hidden,
        "embeddings": 2 * config.vocab_size * hidden,
        "blocks": config.num_hidden_layers * (linears + 5 * hidden),
        "final norm": hidden,
    }


def trained_parameters(config: QwenVLConfig, work: Workload) -> int:
    """How many parameters get gradients."""
    counts = parameter_counts(config)
    if work.method != "full":
        adapters = sum(work.rank * (inputs + outputs) for inputs, outputs in adapted_linears(config, work.targets))
        return adapters + (counts["embeddings"] if work.train_embeddings else 0)
    frozen = {"positions"} if work.train_vision else {"positions", "tower", "resampler's output"}
    return sum(count for part, count in counts.items() if part not in frozen)


def weight_bytes(config: QwenVLConfig, width: int) -> int:
    """Bytes of a checkpoint's weights, of `width` bytes each where they are not packed."""
    parameters = sum(parameter_counts(config).values())
    if (quantization := config.quantization_config) is None:
        return width * parameters
    linears = [*block_linears(config).items()] * config.num_hidden_layers
    if quantization.lm_head:
        linears.append(("lm_head", (config.hidden_size, config.vocab_size)))
    packed = 0
    for name, (inputs, outputs) in linears:
        groups = quantization.groups(inputs)
        biases = 0 if name == "attn.c_attn" else outputs  # which always has them: counted above
        # words and zero points, scales in 16 bits, the group of each input
        codes = (inputs + groups) * outputs * quantization.bits // 8
        packed += codes + 2 * groups * outputs + 4 * inputs + width * biases
        parameters -= inputs * outputs
    return width * parameters + packed


def estimate(config: QwenVLConfig, work: Workload) -> Memory:
    """What an update needs at its fullest, on each of `work.ranks` devices."""
    counts, trained, ranks = parameter_counts(config), trained_parameters(config, work), work.ranks
    full, block = work.method == "full", counts["blocks"] // config.num_hidden_layers
    weights = weight_bytes(config, work.weight_bytes) + (0 if full else FLOAT * trained)
    if work.train_embeddings:  # they are float32 themselves, and not beside a copy in 16 bits
        weights -= work.weight_bytes * counts["embeddings"]
    gradients = FLOAT * trained // ranks
    # While the first block is at work, the gradients of the token table and its own are still to come.
    at_first_block = gradients - (FLOAT * (counts["embeddings"] // 2 + block) // ranks if full else 0)
    waiting = gradients if work.accumulates else 0
    kept, one_block, passing = _activations(config, work)
    logits = LOGITS * config.vocab_size * work.rows * work.tokens
    # Of what is spread over ranks, the embeddings stay gathered, and so do a block and the one that comes next.
    gathered = work.compute_bytes * (counts["embeddings"] + 2 * block) if ranks > 1 else 0
    moments = [  # gradients, activations, logits
        (waiting, kept + _cached_casts(config, work), logits),  # at the loss
        (waiting, kept + passing + (one_block if work.checkpointing else 0), 0),  # in the last block
        (max(waiting, at_first_block), one_block + passing, 0),  # in the first one
        (gradients, 0, 0),  # at the end
    ]
    own, activations, logits = max(moments, key=sum)
    return Memory(weights // ranks, own, MOMENTS * gradients, gathered + activations, logits)


def _activations(config: QwenVLConfig, work: Workload) -> tuple[int, int, int]:
    """Bytes kept at the loss, what one block keeps if it is not computed again, and gradients that pass through it."""
    width, computed = work.weight_bytes, work.compute_bytes
    hidden, inner, layers = config.hidden_size, config.mlp_width, config.num_hidden_layers
    tokens = work.rows * work.tokens
    full = work.method == "full"
    block = tokens * (hidden * (6 * computed + 8) + 3 * inner * computed)
    if full:
        block += tokens * (2 * hidden * (width + computed) + inner * computed)
    adapted = adapted_linears(config, () if full else work.targets)
    by_adapters = sum((computed + work.mask_bytes) * inputs + computed * work.rank for inputs, _ in adapted)
    block += tokens * by_adapters // layers  # averaged, should targets name some layers only
    block += _casts(config, work, adapted)
    passing = tokens * (2 * inner * computed + hidden * width)
    ends = tokens * hidden * (2 * FLOAT + computed)  # what goes into the blocks and the final norm, what leaves it
    kept = layers * (tokens * hidden * width if work.checkpointing else block) + ends + _vision_kept(config, work)
    return kept, block, passing


def _cached_casts(config: QwenVLConfig, work: Workload) -> int:
    """Copies of trained weights that autocast keeps until the loss is there, beside those that a block keeps anyway."""
    if work.method != "full" or work.compute_bytes == work.weight_bytes:
        return 0
    counts = parameter_counts(config)
    return work.compute_bytes * (counts["embeddings"] // 2 + (counts["blocks"] if work.checkpointing else 0))


def _casts(config: QwenVLConfig, work: Workload, adapted: Sequence[tuple[int, int]]) -> int:
    """Bytes of one block's weights in the width that is computed in, where they are wider."""
    casts = 0
    if work.compute_bytes < work.weight_bytes:
        casts += sum(inputs * outputs for inputs, outputs in block_linears(config).values())
    if work.compute_bytes < FLOAT:
        casts += work.rank * sum(inputs + outputs for inputs, outputs in adapted) // config.num_hidden_layers
    return work.compute_bytes * casts


def _vision_kept(config: QwenVLConfig, work: Workload) -> int:
    """What the tower and the resampler keep, where they are trained."""
    if work.method != "full":
        return 0
    vision, hidden, computed = config.visual, config.hidden_size, work.compute_bytes
    patches = work.images * vision.grid**2
    kept = patches * (vision.width * computed + 6 * hidden * computed) + work.images * vision.n_queries * 4 * hidden
    if work.train_vision:
        block = patches * (vision.width * (8 + 6 * computed) + 2 * vision.mlp_width * computed)
        stream = patches * vision.width * work.weight_bytes
        kept += vision.layers * stream + block if work.checkpointing else vision.layers * block
    return kept
