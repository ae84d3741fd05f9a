"""Two projections as one product: the same numbers, under the same names, in the same memory."""

from __future__ import annotations

import pytest
import torch
from support import random_model, small_config

from qwenvl.adapt.fuse import FusedSwiGLU, fuse
from qwenvl.adapt.int4 import arrange, quantize_structure
from qwenvl.adapt.lora import LoraOptions, add_lora
from qwenvl.config import QwenVLConfig
from qwenvl.model.qwenvl import QwenVL

IDS = torch.tensor([[5, 6, 7]])


def plain() -> QwenVL:
    """Random weights."""
    return random_model(small_config())


def packed() -> QwenVL:
    """Random words, of steps so small that activations stay finite."""
    config = QwenVLConfig.from_dict({**small_config().to_dict(), "quantization_config": {"group_size": 32}})
    model = QwenVL(config).eval()
    quantize_structure(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, buffer in model.named_buffers():
        if name.endswith(("qweight", "qzeros")):
            buffer.random_(-(2**31), 2**31 - 1, generator=generator)
        elif name.endswith("scales"):
            buffer.uniform_(1e-3, 1e-2, generator=generator)
    return model


@pytest.fixture(params=[plain, packed], ids=["plain", "packed"])
def model(request: pytest.FixtureRequest) -> QwenVL:
    """A model of either kind."""
    made: QwenVL = request.param()
    return made


def test_the_same_model(model: QwenVL) -> None:
    """Logits, names, shapes and values stay; every MLP is fused."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(IDS)
        fuse(model)
        assert all(isinstance(block.mlp, FusedSwiGLU) for block in model.decoder.blocks)
        torch.testing.assert_close(model(IDS), expected, atol=1e-5, rtol=0)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_nothing_is_held_twice(model: QwenVL) -> None:
    """The two are views of the one, whose product is the one that is made."""
    fuse(model)
    mlp = model.decoder.blocks[0].mlp
    assert isinstance(mlp, FusedSwiGLU)
    both = mlp._both[0]
    name = "weight" if hasattr(both, "weight") else "qweight"
    storages = {getattr(module, name).untyped_storage().data_ptr() for module in (both, mlp.w1, mlp.w2)}
    assert len(storages) == 1
    called: list[str] = []
    both.register_forward_hook(lambda *_: called.append("both"))
    mlp.w1.register_forward_hook(lambda *_: called.append("w1"))
    with torch.no_grad():
        model(IDS)
    assert called == ["both"]


def test_written_weights_are_seen() -> None:
    """What is written into `w1` is what is computed with: an optimizer, or a loader that copies."""
    model = plain()
    fuse(model)
    with torch.no_grad():
        before = model(IDS)
        model.decoder.blocks[0].mlp.w1.weight.mul_(2)
        after = model(IDS)
        model.decoder.blocks[0].mlp._both.clear()
        torch.testing.assert_close(model(IDS), after, atol=1e-5, rtol=0)
    assert not torch.allclose(before, after)


def test_gradients_reach_both() -> None:
    """In training the two are computed one by one."""
    model, fused = plain(), plain()
    fuse(fused)
    for one in (model, fused):
        one(IDS).sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), fused.parameters(), strict=True):
        if parameter.grad is not None:
            assert other.grad is not None, name
            torch.testing.assert_close(other.grad, parameter.grad)


def test_adapters_and_moves(model: QwenVL) -> None:
    """An adapter in the place of `w1` is heeded; and so are weights of another dtype."""
    fuse(model)
    add_lora(model, LoraOptions(r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        adapted = model.eval()(IDS)
        for block in model.decoder.blocks:
            assert not block.mlp._both
    other = plain()
    fuse(other)
    with torch.no_grad():
        expected = other(IDS)
        other.double()
        assert not any(block.mlp._both for block in other.decoder.blocks)  # which would keep the memory
        assert torch.allclose(other(IDS).float(), expected, atol=1e-4)
    assert not torch.equal(adapted, expected)


def test_different_orders_stay_apart() -> None:
    """Packed weights whose inputs are grouped differently are not one weight."""
    model = packed()
    first = model.decoder.blocks[0].mlp
    first.w1.g_idx.copy_(first.w1.g_idx.flip(0))
    fuse(model)
    assert not isinstance(model.decoder.blocks[0].mlp, FusedSwiGLU)
    assert isinstance(model.decoder.blocks[1].mlp, FusedSwiGLU)


def test_what_is_arranged_stays_apart() -> None:
    """Packed weights that a CPU has arranged hold no words to join; joined all the same, they once broke the model."""
    model = packed()
    with torch.no_grad():
        expected = model(IDS)
        arrange(model, quiet=True)
        fuse(model)
        assert not any(isinstance(block.mlp, FusedSwiGLU) for block in model.decoder.blocks)
        torch.testing.assert_close(model(IDS), expected, atol=1e-4, rtol=1e-4)
