"""LoRA and QLoRA: which linears, what is trained, what an adapter computes, and that it folds away."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import one_line_error, random_model, small_config
from torch import Tensor, nn

from qwenvl.adapt.int4 import Int4Linear, quantize_structure
from qwenvl.adapt.lora import LoraLinear, LoraOptions, add_lora, decoder_linears, lora_layers, merge_lora, put_module
from qwenvl.config import QuantizationConfig
from qwenvl.errors import ConfigError
from qwenvl.model.qwenvl import QwenVL
from qwenvl.weights.keymap import COPY, entries

SMALL = LoraOptions(r=4)
DEFAULTS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2")


def some_ids(rows: int = 2, length: int = 24) -> Tensor:
    """Ordinary ids [B,T] of the small configuration, always the same."""
    return torch.randint(0, 60, (rows, length), generator=torch.Generator().manual_seed(5))


def fill(model: QwenVL, seed: int = 1) -> None:
    """Give every adapter a B that is not zero, and embeddings that are trained another value: it says something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith("lora_A"):
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def adapted(options: LoraOptions = SMALL, dtype: torch.dtype = torch.float32, **changes: Any) -> QwenVL:
    """A small model with adapters that say something."""
    model = random_model(small_config(**changes)).to(dtype)
    add_lora(model, options)
    fill(model)
    return model


def packed_model(seed: int = 0) -> QwenVL:
    """A small model whose decoder linears are random int4 words, in eval mode."""
    config = replace(small_config(), quantization_config=QuantizationConfig(group_size=32))
    model = random_model(config, seed)
    quantize_structure(model, config)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Int4Linear):
            words = torch.randint(-(2**31), 2**31, module.qweight.shape, generator=generator)
            module.qweight.copy_(words.to(torch.int32))
            module.qzeros.fill_(0x77777777)  # zero points of 8
            module.scales.fill_(0.015)
    return model.eval()


def train(model: QwenVL, steps: int, precision: torch.dtype | None = None) -> list[float]:
    """The losses of some steps of AdamW on one batch, over what requires a gradient."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    ids, losses = some_ids(), []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            logits = model(ids)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def changed(model: QwenVL, before: dict[str, Tensor]) -> set[str]:
    """The last part of the names of all tensors that are not what they were."""
    return {name.split(".")[-1] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def copied(model: QwenVL) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- options and targets --------------------------------------------------------------------------------------------


def test_defaults_are_the_references() -> None:
    """REFERENCE section 7; attention's `c_proj` is adapted and the MLP's, of the same name, is not."""
    options = LoraOptions()
    assert (options.r, options.alpha, options.dropout, options.train_embeddings) == (64, 16, 0.05, False)
    model = random_model(small_config())
    add_lora(model, options)
    assert list(lora_layers(model)) == [f"decoder.blocks.{i}.{name}" for i in range(2) for name in DEFAULTS]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("r", value) for value in (0, -1, 1.5, True, None)],
        *[("alpha", value) for value in (0, -1, float("nan"), "16", None)],
        *[("dropout", value) for value in (1, 1.5, -0.1, float("nan"), True)],
        *[("targets", value) for value in ((), "c_attn", (1,), None)],
        ("train_embeddings", 1),
    ],
)
def test_wrong_options(name: str, value: Any) -> None:
    """One line that names the option, when the options are made and not when they are used."""
    with one_line_error(ConfigError, name, repr(value)):
        LoraOptions(**{name: value})


def test_targets_by_the_end_of_their_path() -> None:
    """A target may name one layer's linear; a list, as TOML has it, is as good as a tuple."""
    options = LoraOptions(targets=["h.1.mlp.c_proj", "w1"])  # type: ignore[arg-type]
    model = random_model(small_config())
    add_lora(model, options)
    assert set(lora_layers(model)) == {f"decoder.blocks.{end}" for end in ("0.mlp.w1", "1.mlp.w1", "1.mlp.c_proj")}
    assert hash(options)


@pytest.mark.parametrize("target", ["q_proj", "h.2.mlp.w1", "1", "lm_head", "out_proj", "c_fc", "roj", "ln_1"])
def test_targets_that_name_no_linear_of_the_decoder(target: str) -> None:
    """Neither vision nor resampler, embeddings or norms can be adapted; the error lists what can, nothing changes."""
    model = random_model(small_config())
    with one_line_error(ConfigError, target, *DEFAULTS, "mlp.c_proj"):
        add_lora(model, LoraOptions(targets=("c_attn", target)))
    assert not lora_layers(model)


def test_the_decoders_tensors_are_the_references() -> None:
    """What lets adapters be exchanged by renaming alone: no tensor operation between the layouts in the decoder."""
    config = small_config()
    assert all(entry.op is COPY for entry in entries(config) if entry.ours.startswith("decoder."))
    packed = replace(config, quantization_config=QuantizationConfig())
    assert decoder_linears(config) == decoder_linears(packed)
    assert len(decoder_linears(config)) == 2 * 5


# --- what is trained ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embeddings", [False, True], ids=["plain", "with embeddings"])
def test_training_begins_at_the_base_and_changes_adapters_only(embeddings: bool) -> None:
    """Logits are the base's to the bit; steps change A, B (and the embeddings, if asked for), and the loss falls."""
    model = random_model(small_config())
    before = model(some_ids())
    add_lora(model, replace(SMALL, train_embeddings=embeddings))
    assert torch.equal(model(some_ids()), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tables = {"decoder.wte.weight", "decoder.lm_head.weight"} if embeddings else set()
    assert trained == tables | {f"{path}.lora_{letter}" for path in lora_layers(model) for letter in "AB"}
    state = copied(model)
    losses = train(model, 6)
    assert losses[-1] < losses[0] - 0.1
    assert {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])} == trained


def test_base_tensors_keep_one_name_each() -> None:
    """The state dict is the base's, tensor by tensor, under `base`, and two tensors more for each adapter."""
    model = random_model(small_config())
    plain = copied(model)
    add_lora(model, SMALL)
    state = model.state_dict()
    adapters = [name for name in state if "lora_" in name]
    assert len(adapters) == 2 * len(lora_layers(model))
    assert {name.replace(".base.", ".") for name in state if name not in adapters} == plain.keys()


def test_one_seed_gives_the_same_adapters() -> None:
    """A is drawn from torch's default generator, within the bound of a linear's own first weights; B is zero."""
    torch.manual_seed(3)
    first = random_model(small_config(), seed=3)
    add_lora(first, SMALL)
    second = random_model(small_config(), seed=3)
    add_lora(second, SMALL)
    for one, other in zip(lora_layers(first).values(), lora_layers(second).values(), strict=True):
        assert torch.equal(one.lora_A, other.lora_A)
        bound = one.in_features**-0.5
        assert 0.9 * bound < one.lora_A.abs().max() <= bound
        assert not one.lora_B.any()


def test_dropout_is_for_training_and_for_the_adapter_alone() -> None:
    """Nothing is dropped in eval mode, nor of the base's own output in training mode."""
    model = random_model(small_config())
    add_lora(model, replace(SMALL, dropout=0.5))
    assert not any(layer.training for layer in lora_layers(model).values()), "the model was in eval mode"
    base = model(some_ids())
    assert torch.equal(model.train()(some_ids()), model(some_ids())), "B is zero: there is nothing to drop"
    fill(model)
    assert not torch.equal(model(some_ids()), model(some_ids()))
    model.eval()
    assert torch.equal(model(some_ids()), model(some_ids()))
    assert not torch.allclose(model(some_ids()), base)


def test_adapters_stay_float32_beside_a_bfloat16_base() -> None:
    """A step of 1e-5 on a bfloat16 weight of 0.02 would be rounded away. Trained under autocast, as is usual."""
    model = random_model(small_config()).to(torch.bfloat16)
    add_lora(model, SMALL)
    assert model(some_ids()).dtype == torch.bfloat16, "without autocast, too"
    state = copied(model)
    losses = train(model, 6, torch.bfloat16)
    assert losses[-1] < losses[0] - 0.1
    assert changed(model, state) == {"lora_A", "lora_B"}
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


def test_embeddings_of_a_bfloat16_base_are_trained_in_float32() -> None:
    """They get the model's dtype back when the adapter is merged, rounded once."""
    model = random_model(small_config()).to(torch.bfloat16)
    add_lora(model, replace(SMALL, train_embeddings=True))
    state = copied(model)
    train(model, 2, torch.bfloat16)
    assert changed(model, state) == {"lora_A", "lora_B", "weight"}
    tables = [table.weight.detach().clone() for table in (model.decoder.wte, model.decoder.lm_head)]
    assert {table.dtype for table in tables} == {torch.float32}
    merge_lora(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for table, trained in zip((model.decoder.wte, model.decoder.lm_head), tables, strict=True):
        assert torch.equal(table.weight, trained.bfloat16())
    assert model.eval()(some_ids()).isfinite().all()


# --- merging --------------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(
    r=st.integers(1, 40),
    alpha=st.sampled_from([0.5, 8, 32]),
    targets=st.sets(st.sampled_from([*DEFAULTS, "mlp.c_proj", "h.1.attn.c_attn"]), min_size=1),
    embeddings=st.booleans(),
)
def test_merged_equals_unmerged(r: int, alpha: float, targets: set[str], embeddings: bool) -> None:
    """In float32 to 1e-5, for any rank, scale and targets; the merged model is a plain one, with the plain names."""
    options = LoraOptions(r=r, alpha=alpha, targets=tuple(targets), train_embeddings=embeddings)
    model = adapted(options)
    plain = random_model(small_config())
    assert not torch.allclose(model(some_ids()), plain(some_ids()), atol=1e-3)
    with torch.no_grad():  # of a size at which rounding is not what is measured
        for layer in lora_layers(model).values():
            layer.lora_B *= 0.1 / layer.scale
    unmerged = model(some_ids())
    merge_lora(model)
    torch.testing.assert_close(model(some_ids()), unmerged, atol=1e-5, rtol=0)
    assert not lora_layers(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert {type(module) for module in model.decoder.blocks.modules()} == {
        type(module) for module in plain.decoder.blocks.modules()
    }


def test_merging_into_bfloat16_rounds_once() -> None:
    """The sum is made in float32 and rounded to the dtype of the base."""
    model = adapted(dtype=torch.bfloat16)
    expected = {
        path: (layer.base.weight.double() + 16 / 4 * layer.lora_B.double() @ layer.lora_A.double()).bfloat16()
        for path, layer in lora_layers(model).items()
        if isinstance(layer.base, nn.Linear)
    }
    merge_lora(model)
    for path, weight in expected.items():
        got = model.get_submodule(path).get_parameter("weight")
        assert got.dtype == torch.bfloat16
        assert (got != weight).float().mean() < 1e-3, "float32 and float64 may round a tie to either side"


def test_merging_keeps_the_layout_in_memory() -> None:
    """A weight that lies by columns, which a CPU reads faster, still does when the adapter has been folded in."""
    model = random_model(small_config())
    weight = model.decoder.blocks[0].mlp.w1.weight
    weight.data = weight.data.T.contiguous().T
    add_lora(model, SMALL)
    merge_lora(model)
    assert model.decoder.blocks[0].mlp.w1.weight.stride() == (1, weight.shape[0])


def test_mistakes() -> None:
    """Adapters over adapters, and merging where there is nothing to merge."""
    model = random_model(small_config())
    with one_line_error(ConfigError, "no LoRA adapters to merge"):
        merge_lora(model)
    add_lora(model, SMALL)
    with one_line_error(ConfigError, "has LoRA adapters already", "merge_lora"):
        add_lora(model, SMALL)


# --- over packed weights --------------------------------------------------------------------------------------------


def unpacked(model: QwenVL) -> None:
    """Put plain linears with the same weights into the place of the packed ones."""
    for path in decoder_linears(model.config).values():
        packed = model.get_submodule(path)
        assert isinstance(packed, Int4Linear)
        plain = nn.Linear(packed.in_features, packed.out_features)
        plain.weight.data, plain.bias.data = packed.weight_in(torch.float32).contiguous(), packed.bias.clone()
        put_module(model, path, plain.eval())


def test_qlora_has_the_gradients_of_the_unpacked_model() -> None:
    """Through the dequantised weights, down to the first layer and what the image became."""
    gradients = []
    for prepare in (lambda model: None, unpacked):
        model = packed_model()
        prepare(model)
        torch.manual_seed(0)
        add_lora(model, SMALL)
        fill(model)
        features = torch.randn(1, 4, 128, generator=torch.Generator().manual_seed(2), requires_grad=True)
        ids = torch.tensor([[5, 60, 0, 0, 0, 0, 61, 7, 8, 9]])
        model(ids, image_features=features).square().mean().backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        gradients.append({"features": features.grad, **grads})
    packed, plain = gradients
    assert packed.keys() == plain.keys()
    assert len(packed) == 1 + 2 * 8
    for name, gradient in packed.items():
        assert gradient is not None
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_qlora_changes_adapters_only(precision: torch.dtype | None) -> None:
    """Steps over packed weights: the loss falls, and every packed word, scale, zero point and bias stays."""
    model = packed_model()
    add_lora(model, SMALL)
    state = copied(model)
    assert any(tensor.dtype == torch.int32 for tensor in state.values())
    losses = train(model, 6, precision)
    assert losses[-1] < losses[0] - 0.1
    assert changed(model, state) == {"lora_A", "lora_B"}


def test_qlora_keeps_no_unpacked_weight_for_the_backward_pass() -> None:
    """Autograd used to hold every layer's unpacked weight, and QLoRA took a 16-bit model's memory: it unpacks twice."""
    model = packed_model()
    add_lora(model, SMALL)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    packed = [module for module in model.modules() if isinstance(module, Int4Linear)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(some_ids())
    weights = {4 * layer.in_features * layer.out_features for layer in packed}
    assert packed
    assert not weights & set(kept.values())


def test_merging_into_packed_weights_is_refused() -> None:
    """One line that says what to do; the model is as it was."""
    model = packed_model()
    add_lora(model, SMALL)
    fill(model)
    before = model(some_ids())
    with one_line_error(ConfigError, "packed to a few bits", "16-bit checkpoint"):
        merge_lora(model)
    assert torch.equal(model(some_ids()), before)
    assert all(isinstance(layer, LoraLinear) for layer in lora_layers(model).values())


def test_packed_head_cannot_be_trained() -> None:
    """Embeddings are trained in full, head included: over a packed head that is a mistake; other targets are not."""
    config = replace(small_config(), quantization_config=QuantizationConfig(group_size=32, lm_head=True))
    model = random_model(config)
    quantize_structure(model, config)
    with one_line_error(ConfigError, "head is packed", "train_embeddings"):
        add_lora(model, LoraOptions(r=4, train_embeddings=True))
    assert not lora_layers(model)
    add_lora(model, SMALL)
    model(some_ids())


def test_print() -> None:
    """`print(model)` says rank and scale."""
    assert "r=4, scale=4" in repr(adapted())
