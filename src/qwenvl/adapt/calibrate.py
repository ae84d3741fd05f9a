"""The decoder quantised block by block, each on what the blocks before it, quantised already, make of real prompts.

    Example            one prompt to calibrate with
    quantize_decoder   every linear of the decoder, and the head if the configuration says so
    output_errors      how far the outputs of quantised linears are off, on other prompts

Only one Hessian is held at a time, on the model's device, and the hidden states of all examples on the CPU. Within a
block, too, linears come in order: what `attn.c_proj` is calibrated on has passed through the quantised `attn.c_attn`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..config import QuantizationConfig
from ..errors import ConfigError
from ..model.decoder import AttentionContext, Decoder
from ..model.qwenvl import QwenVL
from .lora import put_weight
from .quantize import Packed, curvature, energy, gptq, round_to_nearest

Method = Literal["gptq", "rtn"]
# The linears of a block in the order of its forward pass; those in one row have the same inputs.
SHARING = (("attn.c_attn",), ("attn.c_proj",), ("mlp.w1", "mlp.w2"), ("mlp.c_proj",))
HEAD = "decoder.lm_head"
OUTPUTS = 32768  # quantised at once, to bound the memory that the head takes; a multiple of the values in a word


@dataclass(frozen=True)
class Example:
    """A prompt with its answer: input_ids [1,T], and pixels [N,3,S,S] of its images, None if it has none."""

    input_ids: Tensor
    pixels: Tensor | None


@dataclass(frozen=True)
class QuantizedDecoder:
    """By path ("decoder.blocks.0.mlp.w1"): the packed linears, on the CPU, and the relative error of each.

    That is the norm of the outputs' difference over the norm of the outputs, biases left out, on the calibration inputs
    as the quantised blocks before make them; without examples it is the weight's. `tokens` counts those inputs.
    """

    packed: dict[str, Packed] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    tokens: int = 0


class _Enough(Exception):
    """What was waited for has been seen, and nobody needs the rest of the forward pass."""


@torch.no_grad()
def quantize_decoder(
    model: QwenVL,
    quantization: QuantizationConfig,
    examples: Iterable[Example] = (),
    *,
    method: Method = "gptq",
    quiet: bool = False,
) -> QuantizedDecoder:
    """Quantise the decoder's linears, in place: each weight becomes what its packed form stands for.

    method: "gptq", or "rtn", round to nearest, which needs examples for the errors alone. The result follows from the
    weights and the examples; nothing is drawn. Raises ConfigError if there is no example for GPTQ, if activations or
    weights are no numbers, PromptError for an example that does not fit the model.
    """
    stream = _block_inputs(model, examples, quiet)
    if method == "gptq" and not stream:
        raise ConfigError("GPTQ needs examples to calibrate with; round to nearest (rtn) does without")
    found = QuantizedDecoder(tokens=sum(x.shape[1] for x, _ in stream))
    decoder, layers = model.decoder, len(model.decoder.blocks)
    with tqdm(total=layers + quantization.lm_head, desc="quantizing", unit="layer", disable=quiet or None) as bar:
        for layer, block in enumerate(decoder.blocks):
            calls = [partial(_through, block, x, context, layer) for x, context in stream]
            for names in SHARING:
                paths = [f"decoder.blocks.{layer}.{name}" for name in names]
                _quantize_linears(model, paths, calls, quantization, method, found)
            stream = [(call().cpu(), context) for call, (_, context) in zip(calls, stream, strict=True)]
            _advance(bar, found.errors, f"decoder.blocks.{layer}.")
        if quantization.lm_head:
            calls = [partial(_to_logits, decoder, x) for x, _ in stream]
            _quantize_linears(model, [HEAD], calls, quantization, method, found)
            _advance(bar, found.errors, HEAD)
    return found


@torch.no_grad()
def output_errors(model: QwenVL, packed: Mapping[str, Packed], examples: Iterable[Example]) -> dict[str, float]:
    """The relative error of each linear's outputs with its packed weight, on the inputs that `model` makes itself.

    model: the one that was quantised, with its own weights (`quantize_decoder` changes those that it is given).
    Errors are as in `QuantizedDecoder`, one linear at a time: none includes that of those before it.
    """
    sums = {path: [0.0, 0.0] for path in packed}  # squared norms of difference and outputs

    def measure(_: nn.Module, given: tuple[Tensor], path: str) -> None:
        inputs = given[0].float().flatten(0, -2)  # [tokens,in]
        weight = model.get_parameter(f"{path}.weight").float()
        changed = packed[path].to(weight.device).weight()
        sums[path][0] += float((inputs @ (changed - weight).T).square().sum())
        sums[path][1] += float((inputs @ weight.T).square().sum())

    hooks = [_receiver(model, path).register_forward_pre_hook(partial(measure, path=path)) for path in packed]
    try:
        for example in examples:
            model(example.input_ids, example.pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: _relative(*both) for path, both in sums.items()}


def _block_inputs(model: QwenVL, examples: Iterable[Example], quiet: bool) -> list[tuple[Tensor, AttentionContext]]:
    """What the first block is given for each example: hidden states [1,T,C], and the context of all blocks."""
    stream = []
    for example in tqdm(examples, desc="reading examples", unit="example", disable=quiet or None):
        given = _seen(model.decoder.blocks[0], partial(model, example.input_ids, example.pixels, logits_to_keep=1))
        stream.append((given[0].cpu(), given[1]))
    return stream


def _through(block: nn.Module, x: Tensor, context: AttentionContext, layer: int) -> Tensor:
    out: Tensor = block(x.to(context.cos.device), context, layer)
    return out


def _to_logits(decoder: Decoder, x: Tensor) -> Tensor:
    logits: Tensor = decoder.lm_head(decoder.ln_f(x.to(decoder.ln_f.weight.device)))
    return logits


def _seen(module: nn.Module, call: Callable[[], object]) -> tuple[Any, ...]:
    """The arguments that `call` gives to `module`; what would come behind that is left out."""
    seen: list[tuple[Any, ...]] = []

    def stop(_: nn.Module, given: tuple[Any, ...]) -> None:
        seen.append(given)
        raise _Enough

    hook = module.register_forward_pre_hook(stop)
    try:
        call()
    except _Enough:
        pass
    finally:
        hook.remove()
    return seen[0]


def _receiver(model: QwenVL, path: str) -> nn.Module:
    """The module that a linear's inputs are given to.

    Of `w1` and `w2` that is the MLP around them, which may compute the two as one product (`adapt/fuse.py`).
    """
    return model.get_submodule(path.removesuffix(".w1").removesuffix(".w2"))


def _hessian(receiver: nn.Module, calls: Sequence[Callable[[], object]]) -> Tensor | None:
    """2 X^T X, [in,in] float32, over all that `calls` give to a module; None if there is no call."""
    hessian: Tensor | None = None
    for call in calls:
        inputs = _seen(receiver, call)[0].float().flatten(0, -2)  # [tokens,in]
        product = 2 * inputs.T @ inputs
        hessian = product if hessian is None else hessian.add_(product)
    return hessian


def _quantize_linears(
    model: QwenVL,
    paths: Sequence[str],
    calls: Sequence[Callable[[], object]],
    quantization: QuantizationConfig,
    method: Method,
    found: QuantizedDecoder,
) -> None:
    """Quantise linears that have the same inputs, and note what became of them."""
    hessian = _hessian(_receiver(model, paths[0]), calls)
    quantize: Callable[[Tensor, QuantizationConfig], Packed] = round_to_nearest
    try:
        if method == "gptq" and hessian is not None:
            quantize = partial(gptq, curved=curvature(hessian, desc_act=quantization.desc_act))
        for path in paths:
            linear = model.get_submodule(path)
            weight = linear.get_parameter("weight")
            parts, changed, wrong, whole = [], [], 0.0, 0.0
            for outputs in torch.split(weight, OUTPUTS):
                part = quantize(outputs, quantization)
                changed.append(part.weight())
                wrong += energy(changed[-1] - outputs.float(), hessian)
                whole += energy(outputs.float(), hessian)
                parts.append(part.to("cpu"))
            put_weight(linear, "weight", torch.cat(changed), weight.dtype)
            found.packed[path], found.errors[path] = Packed.join(parts), _relative(wrong, whole)
    except ConfigError as error:
        raise ConfigError(f"{', '.join(paths)}: {error}") from None


def _relative(wrong: float, whole: float) -> float:
    """A ratio of norms from their squares, none of which is below zero but by rounding; 0 if there is nothing."""
    return math.sqrt(max(wrong, 0.0) / whole) if whole > 0 else 0.0


def _advance(bar: tqdm, errors: Mapping[str, float], prefix: str) -> None:
    """Count a layer, and show by how much its outputs are off."""
    own = [error for path, error in errors.items() if path.startswith(prefix)]
    bar.set_postfix_str(f"error {sum(own) / len(own):.2%}")
    bar.update()
