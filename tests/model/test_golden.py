"""The golden models against the reference's own numbers: every stored tensor, every greedy id."""

from collections.abc import Iterable

import pytest
import torch
from support import TOLERANCE, Golden
from torch import Tensor

import qwenvl
from qwenvl.model.cache import KVCache

CASES = ["text", "one_image", "two_images", "cross_boundary", "long", "long_image", "left_padded"]
Differences = dict[str, dict[str, float]]


def largest(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest absolute difference; tensors of different shapes are a failure, never a broadcast."""
    worst = 0.0
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        worst = max(worst, (ours - theirs).abs().max().item())
    return worst


def test_every_stored_case_is_tested(golden: Golden) -> None:
    """No golden case is left out by a name that this file does not know."""
    assert [case["name"] for case in golden.facts["cases"]] == CASES


@torch.no_grad()
def test_image_to_features(golden: Golden, differences: Differences) -> None:
    """Pixels, patch embeddings, transformer, resampler and features are the reference's, each stage by itself."""
    model, names = golden.model, golden.facts["images"]
    first = golden.pictures(names[0])
    pairs = {
        "pixels0_every_7th": first[0, :, ::7, ::7],
        "ln_pre0": model.visual.embed_patches(first)[0, ::5],
        "transformer0": model.visual(first)[0, ::5],
        "attn_pool0": model.resampler.attend(model.visual(first))[0],
        "features": model.encode_images(golden.pictures(*names)),
    }
    assert {f"vision.{name}" for name in pairs} == {name for name in golden.tensors if name.startswith("vision.")}
    for name, ours in pairs.items():
        theirs = golden.tensors[f"vision.{name}"]
        difference = largest([(ours, theirs)])
        differences[golden.name][name] = difference
        assert difference <= TOLERANCE, name


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_logits(golden: Golden, differences: Differences, name: str) -> None:
    """The last logits, and logsumexp and argmax at every real position, are the reference's."""
    case = golden.case(name)
    logits = golden.model(**case.inputs)
    assert logits.shape == (*case.input_ids.shape, golden.model.config.vocab_size)
    real = case.mask
    kept = real[:, -case.kept :]  # padding inside the kept columns has no meaning
    difference = largest(
        [
            (logits[:, -case.kept :][kept], case.stored["logits_last"][kept]),
            (logits.logsumexp(-1)[real], case.stored["logsumexp"][real]),
        ]
    )
    differences[golden.name][name] = difference
    assert difference <= TOLERANCE
    assert torch.equal(logits.argmax(-1)[real], case.stored["argmax"][real].long())


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_greedy_continuation(golden: Golden, differences: Differences, name: str) -> None:
    """Cached, token by token, the ids are the reference's, and so are the logits that chose the last of them."""
    model, case = golden.model, golden.case(name)
    batch, width = case.input_ids.shape
    count = len(case.greedy[0])
    cache = KVCache.allocate(model.config, batch, width + count)
    logits = model(**case.inputs, cache=cache)[:, -1]
    ids = [logits.argmax(-1)]
    for _ in range(count - 1):
        logits = model(ids[-1][:, None], cache=cache)[:, -1]
        ids.append(logits.argmax(-1))
    assert torch.stack(ids, 1).tolist() == case.greedy
    assert cache.host_lengths.tolist() == (case.mask.sum(1) + count - 1).tolist()
    difference = largest([(logits, case.stored["final_logits"])])
    differences[golden.name][f"{name} decoded"] = difference
    assert difference <= TOLERANCE


@torch.no_grad()
def test_residual_stream(golden: Golden, differences: Differences) -> None:
    """`return_hidden` gives what goes into each block, and the last one behind `ln_f`, as the reference's."""
    case = golden.case("text")
    layers = golden.model.config.num_hidden_layers
    assert {f"hidden{i}" for i in range(layers + 1)} == {name for name in case.stored if name.startswith("hidden")}
    output = golden.model(**case.inputs, return_hidden=True)
    assert len(output.hidden_states) == layers + 1
    difference = largest((ours, case.stored[f"hidden{i}"]) for i, ours in enumerate(output.hidden_states))
    differences[golden.name]["hidden"] = difference
    assert difference <= TOLERANCE


@torch.no_grad()
def test_bfloat16(golden: Golden, differences: Differences) -> None:
    """In bfloat16 the logits stray from the reference's bfloat16 logits by at most 2% of their norm."""
    case = golden.case("one_image")
    model = qwenvl.load(golden.folder, dtype="bfloat16", device="cpu", quiet=True).model
    ours = model(**case.inputs, logits_to_keep=case.kept)
    assert ours.dtype == torch.bfloat16
    theirs = case.stored["logits_last_bf16"].float()
    assert ours.shape == theirs.shape
    difference = ((ours.float() - theirs).norm() / theirs.norm()).item()
    differences[golden.name]["bfloat16 (relative norm)"] = difference
    assert difference <= 2e-2
