"""The decoder block by block: what each linear is calibrated on, what becomes of it, and what is left behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from support import one_line_error, random_model, small_config
from torch import Tensor, nn

import qwenvl
from qwenvl.adapt import calibrate
from qwenvl.adapt.calibrate import HEAD, SHARING, Example, QuantizedDecoder, output_errors, quantize_decoder
from qwenvl.adapt.fuse import FusedSwiGLU, fuse
from qwenvl.adapt.int4 import quantize_structure
from qwenvl.adapt.packed import PackedLinear
from qwenvl.config import QuantizationConfig
from qwenvl.errors import ConfigError, PromptError
from qwenvl.model.qwenvl import QwenVL
from qwenvl.text.tokenizer import Tokenizer
from qwenvl.training.recipes.tiny_data import CHAT, SceneDataset
from qwenvl.training.recipes.tiny_scenes import Split
from qwenvl.weights.hub import embedded
from qwenvl.weights.keymap import entries

GROUPS_OF_32 = QuantizationConfig(group_size=32)
MODEL = small_config(num_hidden_layers=3, vocab_size=72)


def prompts(count: int = 6, seed: int = 0) -> list[Example]:
    """Texts of several lengths; every other one begins with a picture."""
    generator, vision, found = torch.Generator().manual_seed(seed), MODEL.visual, []
    for number in range(count):
        ids = torch.randint(0, 60, (20 + 7 * number,), generator=generator)
        pixels = None
        if number % 2:
            pixels = torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator)
            ids[0], ids[vision.n_queries + 1] = vision.image_start_id, vision.image_end_id
        found.append(Example(ids[None], pixels))
    return found


def quantized(
    model: QwenVL,
    quantization: QuantizationConfig = GROUPS_OF_32,
    examples: Sequence[Example] | None = None,
    **how: str,
) -> QuantizedDecoder:
    """The decoder of `model`, by GPTQ on six prompts unless it is said otherwise."""
    return quantize_decoder(model, quantization, prompts() if examples is None else examples, quiet=True, **how)  # type: ignore[arg-type]


def packed_model(found: QuantizedDecoder, quantization: QuantizationConfig) -> QwenVL:
    """The same model over packed linears."""
    config = replace(MODEL, quantization_config=quantization)
    model = random_model(MODEL)
    biases = {path: linear.bias for path, linear in model.named_modules() if isinstance(linear, nn.Linear)}
    quantize_structure(model, config)
    for path, packed in found.packed.items():
        layer = model.get_submodule(path)
        bias = biases[path]
        layer.load_state_dict({**vars(packed), "bias": torch.zeros_like(layer.bias) if bias is None else bias.detach()})
    return model.eval()


def test_every_packed_linear_has_its_turn_in_order() -> None:
    """What is quantised are the linears that checkpoints hold packed, block by block as the forward pass meets them."""
    for head in (False, True):
        quantization = replace(GROUPS_OF_32, lm_head=head)
        names = [e.ours for e in entries(replace(MODEL, quantization_config=quantization))]
        packed = [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]
        assert list(quantized(random_model(MODEL), quantization).packed) == packed
    assert [name for names in SHARING for name in names] == [path.split(".", 3)[-1] for path in packed[:5]]


@pytest.mark.parametrize(
    "quantization",
    [
        GROUPS_OF_32,
        QuantizationConfig(bits=8, group_size=-1, lm_head=True),
        QuantizationConfig(group_size=48, sym=False, desc_act=True),
    ],
    ids=["int4", "int8 with the head", "act-order"],
)
def test_model_is_left_as_its_packed_form_computes(quantization: QuantizationConfig) -> None:
    """In place, every weight becomes what its packed words stand for, and biases stay."""
    model = random_model(MODEL)
    found = quantized(model, quantization)
    other = packed_model(found, quantization)
    assert sum(isinstance(module, PackedLinear) for module in other.modules()) == len(found.packed)
    for example in prompts(seed=3):
        with torch.no_grad():
            ours, theirs = (one(example.input_ids, example.pixels) for one in (model, other))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_each_linear_is_calibrated_on_what_the_quantised_ones_before_it_make() -> None:
    """The errors that are told are those on the finished model's own inputs: block by block, and in turn within one.

    Had one been calibrated on what the 16-bit model gives it, its inputs in the finished model would be others.
    """
    model, original = random_model(MODEL), random_model(MODEL)
    found = quantized(model, replace(GROUPS_OF_32, lm_head=True))
    inputs: dict[str, list[Tensor]] = {path: [] for path in found.packed}
    for path, seen in inputs.items():
        model.get_submodule(path).register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0][0]))
    for example in prompts():
        with torch.no_grad():
            model(example.input_ids, example.pixels)
    assert found.tokens == sum(example.input_ids.numel() for example in prompts())
    for path, seen in inputs.items():
        weight, x = original.get_parameter(f"{path}.weight").detach(), torch.cat(seen)
        error = (x @ (found.packed[path].weight() - weight).T).norm() / (x @ weight.T).norm()
        assert found.errors[path] == pytest.approx(float(error), rel=1e-3), path


def test_held_out_errors_are_the_outputs_own() -> None:
    """`output_errors` watches the model that was quantised: each linear by itself, on that model's own inputs."""
    original, model = random_model(MODEL), random_model(MODEL)
    found, unseen = quantized(model), prompts(seed=9)
    errors = output_errors(original, found.packed, unseen)
    assert errors.keys() == found.packed.keys()
    path = "decoder.blocks.1.mlp.w2"
    inputs: list[Tensor] = []
    original.get_submodule(path).register_forward_pre_hook(lambda _, given: inputs.append(given[0][0]))
    for example in unseen:
        with torch.no_grad():
            original(example.input_ids, example.pixels)
    weight, x = original.get_parameter(f"{path}.weight").detach(), torch.cat(inputs)
    expected = (x @ (found.packed[path].weight() - weight).T).norm() / (x @ weight.T).norm()
    assert errors[path] == pytest.approx(float(expected), rel=1e-4)


def test_the_same_again() -> None:
    """Nothing is drawn: the same weights and examples give the same words; other examples do not."""
    first, second = (quantized(random_model(MODEL)) for _ in range(2))
    assert all(torch.equal(first.packed[path].qweight, second.packed[path].qweight) for path in first.packed)
    assert first.errors == second.errors
    other = quantized(random_model(MODEL), examples=prompts(seed=4))
    assert not all(torch.equal(first.packed[path].qweight, other.packed[path].qweight) for path in first.packed)


def test_parts_of_a_large_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head is quantised in parts to save memory, which shows in nothing that comes of it."""
    quantization = replace(GROUPS_OF_32, lm_head=True)
    whole = quantized(random_model(MODEL), quantization)
    monkeypatch.setattr(calibrate, "OUTPUTS", 24)
    parts = quantized(random_model(MODEL), quantization)
    for path, packed in whole.packed.items():
        assert all(torch.equal(tensor, getattr(parts.packed[path], name)) for name, tensor in vars(packed).items())
    assert parts.errors == pytest.approx(whole.errors, rel=1e-5)
    assert parts.packed[HEAD].qweight.shape == (MODEL.hidden_size // 8, MODEL.vocab_size)


def test_bfloat16_weights_are_quantised_in_float32() -> None:
    """The steps are those of the weights in float32; the model keeps its dtype."""
    half, whole = random_model(MODEL).bfloat16(), random_model(MODEL).bfloat16().float()
    halved, found = (quantized(model, examples=(), method="rtn") for model in (half, whole))
    assert all(torch.equal(found.packed[path].qweight, halved.packed[path].qweight) for path in found.packed)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    path = "decoder.blocks.0.mlp.w1"
    assert torch.equal(half.get_parameter(f"{path}.weight"), found.packed[path].weight().bfloat16())
    assert quantized(random_model(MODEL).bfloat16()).errors == pytest.approx(
        quantized(random_model(MODEL)).errors, rel=0.2
    )


def test_rounding_needs_no_examples() -> None:
    """Without examples the errors are the weights' own; GPTQ asks for some."""
    original = random_model(MODEL)
    found = quantized(random_model(MODEL), examples=(), method="rtn")
    for path, packed in found.packed.items():
        weight = original.get_parameter(f"{path}.weight").detach()
        assert found.errors[path] == pytest.approx(float((packed.weight() - weight).norm() / weight.norm()), rel=1e-4)
    assert found.tokens == 0
    with one_line_error(ConfigError, "GPTQ needs examples", "rtn"):
        quantized(random_model(MODEL), examples=())


def test_what_cannot_be_quantised_names_its_place() -> None:
    """Activations that are no numbers, and a weight that is none, are told with the linear; no hook stays behind."""
    model = random_model(MODEL)
    with torch.no_grad():
        model.decoder.blocks[1].ln_2.weight.fill_(torch.inf)
    with one_line_error(ConfigError, "decoder.blocks.1.mlp.w1", "activations that are no numbers"):
        quantized(model)
    with torch.no_grad():
        model.decoder.blocks[0].attn.c_attn.weight[3, 3] = torch.nan
    with one_line_error(ConfigError, "decoder.blocks.0.attn.c_attn", "not a number"):
        quantized(model, method="rtn", examples=())
    with pytest.raises(PromptError, match="vocabulary"):
        quantized(random_model(MODEL), examples=[*prompts(1), Example(torch.tensor([[99999]]), None)])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.fixture(scope="module")
def scenes() -> dict[Split, list[Example]]:
    """What the embedded model is calibrated on, and held-out prompts."""
    folder = embedded("tiny")
    tokenizer, config = Tokenizer(folder), qwenvl.QwenVLConfig.load(folder)
    found = {}
    for split, count in ((Split.TRAIN, 32), (Split.VALIDATION, 12)):
        dataset = SceneDataset(tokenizer, config, CHAT, split, count)
        samples = [dataset[index] for index in range(count)]
        found[split] = [Example(torch.tensor([sample.ids]), sample.pixels) for sample in samples]
    return found


def trained() -> QwenVL:
    """The embedded model."""
    return qwenvl.load("tiny", "cpu", "float32", quiet=True).model


@pytest.mark.slow
def test_per_layer_errors_of_the_embedded_model(scenes: dict[Split, list[Example]]) -> None:
    """On held-out prompts every linear of a trained model is closer than rounding makes it, by half on average."""
    quantization, original = QuantizationConfig(group_size=64), trained()
    packed = {
        method: quantized(trained(), quantization, scenes[Split.TRAIN], method=method).packed
        for method in ("gptq", "rtn")
    }
    ours, nearest = (output_errors(original, packed[method], scenes[Split.VALIDATION]) for method in ("gptq", "rtn"))
    assert len(ours) == 20
    ratios = [ours[path] / nearest[path] for path in ours]
    assert max(ratios) < 0.95  # 0.86 when it was written, with a quarter of the usual examples
    assert sum(ratios) / len(ratios) < 0.55  # 0.49
    assert max(ours.values()) < 0.06


def test_a_fused_model_is_quantised_as_any_other() -> None:
    """Loading on a GPU fuses gate and up projection before anyone can quantise: words, errors and outputs are the same.

    The fused product would be blind to a weight that was replaced instead of written to, and its hooks to `w1`'s.
    """
    plain, fused = random_model(MODEL), random_model(MODEL)
    fuse(fused)
    assert all(isinstance(block.mlp, FusedSwiGLU) for block in fused.decoder.blocks)
    found, expected = quantized(fused), quantized(plain)
    assert list(found.packed) == list(expected.packed)
    for path, packed in found.packed.items():
        assert all(torch.equal(part, vars(expected.packed[path])[name]) for name, part in vars(packed).items()), path
        assert found.errors[path] == pytest.approx(expected.errors[path], abs=1e-6)
    with torch.no_grad():
        for example in prompts(2, seed=1):
            logits = fused(example.input_ids, example.pixels)
            torch.testing.assert_close(logits, plain(example.input_ids, example.pixels), atol=2e-5, rtol=0)
