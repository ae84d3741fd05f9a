"""The research hooks: residual stream, attention maps, features and embeddings of one's own, fewer logits."""

from typing import Any

import pytest
import torch
from support import TOLERANCE, Golden, padded, random_model, small_config
from torch import Tensor

from qwenvl.model.cache import KVCache
from qwenvl.model.decoder import RMSNorm
from qwenvl.model.qwenvl import Output, QwenVL

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients() -> object:
    """None of these tests trains."""
    with torch.no_grad():
        yield


def near(ours: Tensor, theirs: Tensor) -> None:
    """Equal shapes, and no element further apart than the tolerance."""
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def test_plain_calls_return_a_tensor(tiny_112: Golden) -> None:
    """Logits alone, unless more is asked for; then exactly what was asked for."""
    ids = tiny_112.prompt(8)[None]
    assert isinstance(tiny_112.model(ids), Tensor)
    both = tiny_112.model(ids, return_hidden=True, return_attentions=True)
    hidden = tiny_112.model(ids, return_hidden=True)
    maps = tiny_112.model(ids, return_attentions=True)
    assert isinstance(both, Output)
    assert (hidden.attentions, maps.hidden_states) == (None, None)
    assert (len(both.hidden_states), len(both.attentions)) == (4, 3)
    assert torch.equal(hidden.logits, tiny_112.model(ids))


def test_the_head_stands_on_the_last_hidden_state(tiny_112: Golden) -> None:
    """hidden[0] is the embeddings, hidden[-1] what `lm_head` takes; columns are the caller's, padding included."""
    model = tiny_112.model
    ids, mask = padded([tiny_112.prompt(30), tiny_112.prompt(9)], ["left", "both"])
    output = model(ids, attention_mask=mask, return_hidden=True)
    assert torch.equal(output.hidden_states[0], model.embed(ids))
    assert torch.equal(model.decoder.lm_head(output.hidden_states[-1]), output.logits)


def check_maps(output: Output, fast: Tensor, real: Tensor) -> None:
    """Maps are float32 [B,H,T,S] per layer, their rows sum to one, and with them the logits are the fast path's."""
    assert output.attentions is not None
    for weights in output.attentions:
        assert weights.dtype == torch.float32
        near(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert weights.min() >= 0
    near(output.logits[real], fast[real])


def rebuild(model: QwenVL, output: Output, layer: int) -> Tensor:
    """What follows a block [B,T,C], from the residual stream before it and its attention map alone."""
    assert output.hidden_states is not None
    assert output.attentions is not None
    block, x = model.decoder.blocks[layer], output.hidden_states[layer]
    values = block.attn.c_attn(block.ln_1(x)).chunk(3, -1)[2].unflatten(-1, (block.attn.heads, -1)).transpose(1, 2)
    x = x + block.attn.c_proj((output.attentions[layer] @ values).transpose(1, 2).flatten(2))
    return x + block.mlp(block.ln_2(x))


@pytest.mark.parametrize("length", [24, 512, 700])
def test_attention_maps(golden: Golden, length: int) -> None:
    """On both sides of `seq_length`: rows sum to one, nothing looks ahead, and the maps rebuild the output."""
    model, ids = golden.model, golden.prompt(length)[None]
    output = model(ids, return_attentions=True, return_hidden=True)
    fast = model(ids, return_hidden=True)
    check_maps(output, fast.logits, torch.ones_like(ids, dtype=torch.bool))
    layers = len(output.attentions)
    for layer, weights in enumerate(output.attentions):
        assert weights.shape == (1, model.config.num_attention_heads, length, length)
        assert weights.triu(1).abs().max() == 0
        following = rebuild(model, output, layer)
        near(following if layer + 1 < layers else model.decoder.ln_f(following), fast.hidden_states[layer + 1])


@pytest.mark.parametrize("sides", ["left", "right", ["left", "both", "right"]], ids=str)
def test_attention_maps_of_padded_rows(tiny_112: Golden, sides: Any) -> None:
    """In the caller's columns: a real token sees real tokens up to itself only, as the row alone does; images too."""
    rows = [tiny_112.prompt(5, "a.png", 300), tiny_112.prompt(7), tiny_112.prompt("b.png", 3)]
    ids, mask = padded(rows, sides)
    pixels = tiny_112.pictures("a.png", "b.png")
    output = tiny_112.model(ids, pixels, attention_mask=mask, return_attentions=True, return_hidden=True)
    check_maps(output, tiny_112.model(ids, pixels, attention_mask=mask), mask)
    for row, images in enumerate((pixels[:1], None, pixels[1:])):
        alone = tiny_112.model(rows[row][None], images, return_attentions=True)
        for weights, own in zip(output.attentions, alone.attentions, strict=True):
            near(weights[row][:, mask[row]][:, :, mask[row]], own[0])
            assert weights[row][:, mask[row]][:, :, ~mask[row]].abs().sum() == 0
    for layer in range(2):
        near(rebuild(tiny_112.model, output, layer)[mask], output.hidden_states[layer + 1][mask])


def test_attention_maps_with_a_cache(tiny_112: Golden) -> None:
    """Keys are then the cache's slots: chunk, step and ragged rows agree with the maps of the whole text."""
    model = tiny_112.model
    rows = [tiny_112.prompt(600, seed=1), tiny_112.prompt(40, seed=2)]
    ids, mask = padded(rows)
    cache = KVCache.allocate(model.config, 2, 700)
    first = model(ids, attention_mask=mask, cache=cache, return_attentions=True)
    more = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    outputs = [model(part, cache=cache, return_attentions=True) for part in more.split([1, 3], dim=1)]
    for row, start in enumerate(rows):
        length = len(start)
        whole = model(torch.cat((start, more[row]))[None], ntk_alpha=cache.alphas[row].item(), return_attentions=True)
        for layer, own in enumerate(whole.attentions):
            prompt = first.attentions[layer][row][:, mask[row]]
            near(prompt[:, :, :length], own[0, :, :length, :length])
            for output, begin, end in zip(outputs, (0, 1), (1, 4), strict=True):
                weights = output.attentions[layer][row]
                near(weights.sum(-1), torch.ones(weights.shape[:-1]))
                near(weights[:, :, : length + end], own[0, :, length + begin : length + end, : length + end])
                assert weights[:, :, length + end :].abs().sum() == 0
        near(torch.cat([output.logits[row] for output in outputs]), whole.logits[0, -4:])


def test_precomputed_features_are_pixels(tiny_112: Golden) -> None:
    """`encode_images` once, then its result in place of the pixels: the same bits, also of a lower precision."""
    model = tiny_112.model
    ids, mask = padded([tiny_112.prompt(5, "a.png", 4), tiny_112.prompt("b.png", 30)])
    pixels = tiny_112.pictures("a.png", "b.png")
    features = model.encode_images(pixels)
    assert features.shape == (2, 256, 128)
    logits = model(ids, pixels, attention_mask=mask)
    assert torch.equal(model(ids, image_features=features, attention_mask=mask), logits)
    assert torch.equal(model(ids, image_features=features.double(), attention_mask=mask), logits)
    near(torch.cat([model.encode_images(image[None]) for image in pixels]), features)


def test_embeddings_in_place_of_ids(tiny_112: Golden) -> None:
    """`embed`, and then `forward(None, embeddings=...)`, is `forward` of the ids; `<img>` ids are not looked for."""
    model = tiny_112.model
    ids, mask = padded([tiny_112.prompt(5, "a.png", 4), tiny_112.prompt("b.png", 300)])
    pixels = tiny_112.pictures("a.png", "b.png")
    embeddings = model.embed(ids, pixels, attention_mask=mask)
    logits = model(ids, pixels, attention_mask=mask)
    assert torch.equal(model(None, embeddings=embeddings, attention_mask=mask), logits)
    assert torch.equal(model(ids, embeddings=embeddings, attention_mask=mask), logits)
    features = model.encode_images(pixels)
    assert torch.equal(model.embed(ids, image_features=features, attention_mask=mask), embeddings)
    plain = model.decoder.wte(ids)  # the spans not yet filled: ids then say where they are
    assert torch.equal(model(ids, pixels, embeddings=plain, attention_mask=mask), logits)


def test_gradients_reach_embeddings_and_pixels(tiny_112: Golden) -> None:
    """What comes in can be optimised: saliency, soft prompts, adversarial pictures."""
    ids, pixels = tiny_112.prompt(3, "a.png", 4)[None], tiny_112.pictures("a.png").requires_grad_()
    with torch.enable_grad():
        embeddings = tiny_112.model.embed(ids, pixels)
        embeddings.retain_grad()
        tiny_112.model(None, embeddings=embeddings)[0, -1, 7].backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().max() > 0
    assert embeddings.grad is not None
    assert (embeddings.grad[0].abs().amax(-1) > 0).all()
    tiny_112.model.zero_grad()


@pytest.mark.parametrize("keep", [0, 1, 7, 30, 99])
def test_logits_to_keep(tiny_112: Golden, keep: int) -> None:
    """The last so many columns of the input, as they are in the whole; none for 0, all for more than there are."""
    ids, mask = padded([tiny_112.prompt(30), tiny_112.prompt(12)], ["right", "left"])
    whole = tiny_112.model(ids, attention_mask=mask)
    kept = tiny_112.model(ids, attention_mask=mask, logits_to_keep=keep)
    assert kept.shape == (2, min(keep, 30), 320)
    near(kept, whole[:, 30 - min(keep, 30) :])


def test_the_norm_rounds_in_the_references_order() -> None:
    """float32, cast back, then the weight: in bfloat16 another order gives other bits."""
    torch.manual_seed(0)
    norm = RMSNorm(64, eps=1e-6).bfloat16()
    norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(8, 64).bfloat16() * 3
    wide = x.float()
    normal = wide * torch.rsqrt((wide**2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(x), normal.bfloat16() * norm.weight)
    assert not torch.equal(norm(x), (normal * norm.weight.float()).bfloat16())


def test_maps_in_bfloat16_are_float32() -> None:
    """The softmax of the maps is float32 whatever the model is."""
    model = random_model(small_config()).bfloat16()
    output = model(torch.randint(0, 60, (2, 70)), return_attentions=True)
    for weights in output.attentions:
        assert weights.dtype == torch.float32
        near(weights.sum(-1), torch.ones(weights.shape[:-1]))
