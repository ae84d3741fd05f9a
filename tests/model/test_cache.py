"""The cache by itself: who owns which memory, lengths and alphas, and what cannot be done."""

import warnings

import pytest
import torch
from support import TOLERANCE, Golden, one_line_error, random_model, small_config

from qwenvl.config import QwenVLConfig
from qwenvl.errors import CacheError
from qwenvl.model.cache import KVCache
from qwenvl.model.qwenvl import QwenVL


@pytest.fixture(scope="module")
def config() -> QwenVLConfig:
    """Small, with the boundary at 64 tokens."""
    return small_config()


@pytest.fixture(scope="module")
def model(config: QwenVLConfig) -> QwenVL:
    """Random weights."""
    return random_model(config).requires_grad_(False)


def some_ids(batch: int, width: int, seed: int = 0) -> torch.Tensor:
    """Ordinary ids [B,T]."""
    return torch.randint(0, 60, (batch, width), generator=torch.Generator().manual_seed(seed))


def test_allocation_is_once_and_exact(config: QwenVLConfig, model: QwenVL) -> None:
    """Keys and values are [L,B,H,S,D] from the start and stay where they are; a new cache is empty."""
    cache = KVCache.allocate(config, 3, 70)
    assert cache.keys.shape == cache.values.shape == (2, 3, 4, 70, 32)
    assert (cache.batch, cache.max_length, cache.is_empty) == (3, 70, True)
    places = cache.keys.data_ptr(), cache.values.data_ptr()
    for width in (1, 40, 1):
        model(some_ids(3, width), cache=cache)
    assert (cache.keys.data_ptr(), cache.values.data_ptr()) == places
    assert (cache.is_empty, cache.lengths.tolist()) == (False, [42] * 3)


def test_a_bucket_is_a_view(config: QwenVLConfig) -> None:
    """What attention reads is the cache's own memory, never a copy."""
    cache = KVCache.allocate(config, 2, 10)
    new = torch.ones(2, 4, 3, 32)
    keys, values = cache.append(1, new, new * 2, torch.arange(3), bucket=3)
    assert keys.shape == (2, 4, 3, 32)
    assert keys.data_ptr() == cache.keys[1].data_ptr()
    assert values.data_ptr() == cache.values[1].data_ptr()
    assert torch.equal(keys, new)
    assert cache.keys[0].abs().max() == 0
    assert cache.lengths.tolist() == [0, 0]  # until all layers have written


def test_slots_of_each_row(config: QwenVLConfig, model: QwenVL) -> None:
    """Rows of different lengths: every token lies in the slot of its position, as in a cache of the row alone."""
    rows = [some_ids(1, n, seed=n) for n in (7, 2)]
    together = KVCache.allocate(config, 2, 12)
    ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.bool)
    for row, text in enumerate(rows):
        ids[row, 7 - text.shape[1] :], mask[row, 7 - text.shape[1] :] = text[0], True
    more = some_ids(2, 3, seed=9)
    model(ids, attention_mask=mask, cache=together)
    model(more, cache=together)
    for row, text in enumerate(rows):
        alone = KVCache.allocate(config, 1, 12)
        model(text, cache=alone)
        model(more[row : row + 1], cache=alone)
        held = text.shape[1] + 3
        for ours, its in ((together.keys, alone.keys), (together.values, alone.values)):
            torch.testing.assert_close(ours[:, row, :, :held], its[:, 0, :, :held], atol=TOLERANCE, rtol=0)


def test_rows_share_memory(config: QwenVLConfig, model: QwenVL) -> None:
    """A view of some rows is filled for them alone, and the whole cache then holds what the view was given."""
    cache = KVCache.allocate(config, 3, 80)
    ids = some_ids(1, 70)
    view = cache.rows(slice(1, 2))
    logits = model(ids, cache=view)
    assert cache.lengths.tolist() == cache.host_lengths.tolist() == [0, 70, 0]
    assert cache.alphas.tolist() == [0, 3, 0]
    assert not cache.is_empty
    assert cache.rows(slice(2, 3)).is_empty
    assert view.keys.data_ptr() == cache.keys[:, 1:].data_ptr()
    assert cache.keys[:, [0, 2]].abs().max() == 0
    torch.testing.assert_close(logits, model(ids), atol=TOLERANCE, rtol=0)
    view.rewind([0])
    assert (cache.lengths.tolist(), cache.alphas.tolist()) == ([0, 0, 0], [0, 0, 0])


def test_reorder_moves_whole_rows(config: QwenVLConfig, model: QwenVL) -> None:
    """Rows are spread, swapped and dropped with their lengths and alphas, and each goes on as its source would."""
    texts = [some_ids(1, n, seed=n) for n in (70, 5, 40)]
    cache = KVCache.allocate(config, 3, 80)
    for row, text in enumerate(texts):
        model(text, cache=cache.rows(slice(row, row + 1)))
    view = cache.reorder([2, 0, 0])
    assert view.lengths.tolist() == view.host_lengths.tolist() == cache.lengths.tolist() == [40, 70, 70]
    assert cache.alphas.tolist() == [1, 3, 3]
    step = model(torch.tensor([[1], [2], [3]]), cache=view)
    for row, source in enumerate((2, 0, 0)):
        alone = torch.cat((texts[source], torch.tensor([[row + 1]])), dim=1)
        alpha = [3, 1, 1][source]
        torch.testing.assert_close(step[row], model(alone, ntk_alpha=alpha)[0, -1:], atol=TOLERANCE, rtol=0)
    fewer = cache.reorder([1])
    assert (fewer.batch, fewer.lengths.tolist()) == (1, [71])
    assert fewer.keys.data_ptr() == cache.keys.data_ptr()


def test_reorder_may_widen(config: QwenVLConfig, model: QwenVL) -> None:
    """Beam search spreads one prefilled row over empty ones."""
    cache = KVCache.allocate(config, 4, 20)
    model(some_ids(1, 9), cache=cache.rows(slice(1)))
    view = cache.reorder([0, 0, 0, 0])
    assert view.lengths.tolist() == [9] * 4
    step = model(torch.full((4, 1), 3), cache=view)
    assert (step - step[:1]).abs().max() < 1e-6


def test_declaring_twice_changes_nothing(config: QwenVLConfig) -> None:
    """A row's alpha is fixed by the first declared length, and rows that have one keep it."""
    cache = KVCache.allocate(config, 2, 10)
    cache.declare([64, 65])
    before = cache.frequencies.clone()
    cache.declare([500, 1])
    assert cache.alphas.tolist() == [1, 3]
    assert torch.equal(cache.frequencies, before)
    assert not torch.equal(before[0], before[1])


def test_fits_knows_the_boundaries(config: QwenVLConfig) -> None:
    """Whether a longer prompt would have the alpha under which a row was filled."""
    cache = KVCache.allocate(config, 1, 10)
    assert not cache.fits(0, 10)  # nothing is fixed yet
    cache.declare([65])
    assert [cache.fits(0, length) for length in (64, 65, 128, 129)] == [False, True, True, False]


def test_rewind_does_not_warn_where_nothing_differs(config: QwenVLConfig, model: QwenVL) -> None:
    """Within one alpha, to nothing, or for a declared prompt length of the same alpha, a rewind is silent."""
    cache = KVCache.allocate(config, 1, 120)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(some_ids(1, 100), cache=cache)
        cache.rewind([100])
        cache.rewind([70])
        cache.rewind([10], prompt_lengths=[70])
        cache.rewind([0])


def test_a_refused_rewind_changes_nothing(config: QwenVLConfig, model: QwenVL) -> None:
    """When one row cannot be rewound, the others keep lengths and alphas: they used to forget their alpha."""
    cache = KVCache.allocate(config, 2, 70)
    model(some_ids(2, 70), cache=cache)
    with one_line_error(CacheError, "row 1", 70, 71):
        cache.rewind([0, 71])
    with one_line_error(CacheError, "row 1", 70, -1):
        cache.rewind([0, -1])
    with one_line_error(CacheError, 1, 2):
        cache.rewind([0])
    with one_line_error(CacheError, 1, 2):
        cache.rewind([0, 1], prompt_lengths=[1])
    assert cache.alphas.tolist() == [3, 3]
    assert cache.lengths.tolist() == cache.host_lengths.tolist() == [70, 70]


def test_declare_counts_its_rows(config: QwenVLConfig) -> None:
    """A length for each row, no more and no fewer."""
    with one_line_error(CacheError, 3, 2):
        KVCache.allocate(config, 2, 10).declare([1, 2, 3])


def test_two_caches_over_one_model(tiny_112: Golden) -> None:
    """A cache belongs to its caller: two caches over one model do not disturb each other."""
    model, ids = tiny_112.model, [tiny_112.prompt(40, seed=seed)[None] for seed in range(2)]
    caches = [KVCache.allocate(model.config, 1, 40) for _ in ids]
    with torch.no_grad():
        for at in range(0, 40, 10):
            parts = [model(text[:, at : at + 10], cache=cache) for text, cache in zip(ids, caches, strict=True)]
        for part, text in zip(parts, ids, strict=True):
            torch.testing.assert_close(part, model(text)[:, -10:], atol=TOLERANCE, rtol=0)


def test_a_row_of_padding_gets_no_alpha(config: QwenVLConfig, model: QwenVL) -> None:
    """A row that was only padding at first once kept the alpha of 0 tokens: its long prompt then came out wrong."""
    cache = KVCache.allocate(config, 2, 200)
    model(some_ids(2, 20), attention_mask=torch.tensor([[1] * 20, [0] * 20]), cache=cache)
    assert cache.alphas.tolist() == [1, 0]
    late = some_ids(2, 180)
    logits = model(late, attention_mask=torch.tensor([[0] * 180, [1] * 180]), cache=cache)
    torch.testing.assert_close(logits[1], model(late)[1], atol=TOLERANCE, rtol=0)


def test_padding_needs_no_slots(config: QwenVLConfig, model: QwenVL) -> None:
    """Rows of 50 and 10 tokens in 60 slots take 2 and 40 more: padding once asked for slots of its own."""
    first, more = some_ids(2, 50), some_ids(2, 40, seed=1)
    cache = KVCache.allocate(config, 2, 60)
    model(first, attention_mask=torch.tensor([[1] * 50, [0] * 40 + [1] * 10]), cache=cache)
    logits = model(more, attention_mask=torch.tensor([[0] * 38 + [1] * 2, [1] * 40]), cache=cache)
    assert cache.lengths.tolist() == [52, 50]
    for row, real in ((0, torch.cat((first[0], more[0, 38:]))), (1, torch.cat((first[1, 40:], more[1])))):
        torch.testing.assert_close(logits[row, -1], model(real[None])[0, -1], atol=TOLERANCE, rtol=0)
    assert cache.keys[:, 0, :, 52:].abs().max() == cache.keys[:, 1, :, 50:].abs().max() == 0


def test_a_cache_from_inference_mode_is_written_elsewhere(config: QwenVLConfig, model: QwenVL) -> None:
    """Tensors of inference mode cannot be changed outside it; a cache must not be made of them."""
    with torch.inference_mode():
        cache = KVCache.allocate(config, 1, 8)
    model(some_ids(1, 4), cache=cache)
    assert cache.lengths.tolist() == [4]


def test_autocast(config: QwenVLConfig, model: QwenVL) -> None:
    """Under autocast keys, and features of pictures, have another dtype than what they are written into."""
    ids = torch.tensor([[5, 60, 62, 62, 62, 62, 61, 6]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    exact = model(ids, pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids, pixels, cache=KVCache.allocate(config, 1, 8))
    assert (logits - exact).norm() < 0.05 * exact.norm()


def test_bookkeeping_stays_on_the_host(config: QwenVLConfig) -> None:
    """With another default device, Python would wait for it at every step, and float64 is not everywhere."""
    with torch.device("meta"):
        cache = KVCache.allocate(config, 1, 8, device="cpu")
    assert cache.host_lengths.device.type == cache.alphas.device.type == "cpu"


def test_a_cache_of_another_model(model: QwenVL) -> None:
    """One line, not a complaint about sizes from inside an operator; nor one about a cache without room at all."""
    cache = KVCache.allocate(small_config(num_attention_heads=2, kv_channels=64), 1, 8)
    with one_line_error(CacheError, "another model"):
        model(some_ids(1, 4), cache=cache)
    with one_line_error(CacheError, "-5"):
        KVCache.allocate(model.config, 1, -5)
