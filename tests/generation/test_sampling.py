"""Processors, warpers and the choice of an id, against the reference's numbers and against their definitions."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from qwenvl.config import GenerationConfig
from qwenvl.errors import ConfigError, QwenVLError
from qwenvl.generation.sampling import (
    NO_ID,
    SamplingOptions,
    keep_top_k,
    keep_top_p,
    log_probabilities,
    process,
    require_ids,
    row_generators,
    sample,
    warp,
)

FOLDER = Path(__file__).parents[1] / "goldens" / "sampling"
CASES = json.loads((FOLDER / "logits_cases.json").read_text())["logits_cases"]
CONFIG_OPTIONS = ("temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens")


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """Logits, ids and the reference's results of every case."""
    return load_file(FOLDER / "cases.safetensors")


def options_of(params: dict[str, Any]) -> SamplingOptions:
    """The options of a golden case; null there means "not set"."""
    given_options = {name: params[name] for name in CONFIG_OPTIONS if name in params}
    return SamplingOptions.from_config(GenerationConfig(), do_sample=True, **given_options)


def eos_ids(case: dict[str, Any]) -> list[int]:
    """The end ids of a golden case: none, one or several."""
    eos = case["eos_token_id"]
    return [] if eos is None else eos if isinstance(eos, list) else [eos]


@pytest.mark.parametrize("case", CASES, ids=[f"{c['case']} {c['name']}" for c in CASES])
def test_reference_case(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Scores after the processors and warpers, and probabilities, are those of transformers 4.32."""
    logits, ids, processors, warpers, probs = (
        tensors[f"{case['case']}.{name}"]
        for name in ("logits", "input_ids", "after_processors", "after_warpers", "probs")
    )
    options, before = options_of(case["params"]), logits.clone()
    n_generated = ids.shape[1] - case["prompt_len"]
    processed = process(logits, ids, options, n_generated=n_generated, stop_ids=eos_ids(case))
    warped = warp(processed, options, min_keep=2 if case["params"]["num_beams"] > 1 else 1)
    assert torch.equal(logits, before), "the caller's logits were changed"
    torch.testing.assert_close(processed, processors, rtol=1e-6, atol=0)
    assert warped.isfinite().sum(-1).tolist() == case["kept_per_row"]
    if not case["tie_order_unspecified"]:
        torch.testing.assert_close(warped, warpers, rtol=1e-6, atol=0)
        torch.testing.assert_close(warped.softmax(-1), probs, rtol=1e-6, atol=1e-7)


def test_padding_is_neither_penalized_nor_part_of_an_ngram() -> None:
    """A left-padded row is processed as it would be alone, though its padding repeats an id and makes n-grams."""
    options = SamplingOptions(repetition_penalty=1.5, no_repeat_ngram_size=2)
    logits = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[3, 3, 3, 5, 3], [1, 5, 3, 2, 5]])
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    batch = process(logits, ids, options, n_generated=0, history_mask=mask)
    alone = process(logits[:1], ids[:1, 3:], options, n_generated=0)
    assert torch.equal(batch[:1], alone)
    assert batch[0].isfinite().all()
    assert batch[1, 3] == -math.inf  # "5 3" is there already
    assert process(logits, ids, options, n_generated=0)[0, 5] == -math.inf  # without the mask "3 5" is there too
    ids[0, :3] = 0
    assert process(logits, ids, options, n_generated=0, history_mask=mask)[0, 0] == logits[0, 0]


def test_padding_before_a_text_shorter_than_the_ngram() -> None:
    """The n-gram that a short row would complete reaches into its padding: nothing is forbidden."""
    options = SamplingOptions(no_repeat_ngram_size=3)
    logits = torch.zeros(1, 8)
    ids, mask = torch.tensor([[0, 5, 1, 0, 5]]), torch.tensor([[0, 0, 0, 0, 1]])
    assert process(logits, ids, options, n_generated=0)[0, 1] == -math.inf
    assert torch.equal(process(logits, ids, options, n_generated=0, history_mask=mask), logits)


def test_repeated_ngrams_equal_a_plain_search() -> None:
    """On random texts, an id is forbidden exactly if appending it would make an n-gram that is there already."""
    generator = torch.Generator().manual_seed(3)
    for size in (1, 2, 3, 4):
        ids = torch.randint(0, 4, (6, 14), generator=generator)
        scores = process(torch.zeros(6, 5), ids, SamplingOptions(no_repeat_ngram_size=size), n_generated=0)
        for row, text in zip(scores, ids.tolist(), strict=True):
            there = {tuple(text[i : i + size]) for i in range(len(text) - size + 1)}
            ending = tuple(text[len(text) - size + 1 :])
            assert [score == -math.inf for score in row.tolist()] == [(*ending, i) in there for i in range(5)]


def test_ids_the_tokenizer_lacks_are_never_emitted() -> None:
    """The head is wider than the vocabulary: the surplus is forbidden, greedy and sampling, however likely it is."""
    logits = torch.zeros(4, 20)
    logits[:, 15:] = 50.0
    history = torch.full((4, 3), 17)  # a prompt may hold any id
    for n_vocab, limit in ((15, 15), (20, 20), (25, 20), (None, 20)):
        scores = process(logits, history, SamplingOptions(), n_generated=0, n_vocab=n_vocab)
        assert scores[:, :limit].isfinite().all()
        assert (scores[:, limit:] == -math.inf).all()
    scores = process(logits, history, SamplingOptions(repetition_penalty=0.1), n_generated=0, n_vocab=15)
    assert sample(scores).max() < 15
    generators = row_generators(0, 4, "cpu")
    assert max(int(sample(warp(scores, SamplingOptions()), generators).max()) for _ in range(200)) < 15


def test_stop_ids_outside_the_vocabulary_are_ignored() -> None:
    """A small model may be configured with the real model's end id; minimum new tokens must not index beyond V."""
    scores = process(
        torch.zeros(1, 5),
        torch.zeros(1, 1).long(),
        SamplingOptions(min_new_tokens=1),
        n_generated=0,
        stop_ids=(2, 151643),
    )
    assert scores.tolist() == [[0, 0, -math.inf, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), p=st.floats(0, 0.999), vocab=st.integers(1, 200), scale=st.floats(0.01, 20))
def test_top_p_keeps_the_smallest_set_that_reaches_p(seed: int, p: float, vocab: int, scale: float) -> None:
    """What stays reaches p, without its least likely id it would not, and nothing likelier was dropped."""
    scores = scale * torch.randn(2, vocab, generator=torch.Generator().manual_seed(seed))
    kept = keep_top_p(scores, p).isfinite()
    probs = scores.double().softmax(-1)
    for row, stays in zip(probs, kept, strict=True):
        assert stays.any()
        assert row[stays].sum() >= p - 1e-5
        assert row[stays].sum() - row[stays].min() <= p + 1e-5
        assert not (~stays).any() or row[~stays].max() <= row[stays].min()


def test_tiny_top_p_keeps_one() -> None:
    """Even p = 0 leaves the most likely id; of tied ids the highest."""
    assert keep_top_p(torch.tensor([[1.0, 3.0, 2.0]]), 0.0).isfinite().tolist() == [[False, True, False]]
    assert keep_top_p(torch.zeros(1, 300), 1e-6).isfinite().nonzero().tolist() == [[0, 299]]


def test_top_k_keeps_ties() -> None:
    """Every score equal to the k-th stays, and k above the vocabulary keeps everything."""
    assert keep_top_k(torch.tensor([[3.0, 1.0, 2.0, 2.0]]), 2).isfinite().tolist() == [[True, False, True, True]]
    assert keep_top_k(torch.zeros(1, 3), 9).isfinite().all()


def test_low_precision_logits_are_computed_in_float32() -> None:
    """Half-precision logits come out as float32 with the same values as if they had been cast first."""
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    options = SamplingOptions(temperature=0.7, top_k=9, top_p=0.8, repetition_penalty=1.2)
    ids = torch.arange(6).view(2, 3)
    low = warp(process(logits, ids, options, n_generated=0), options)
    assert low.dtype == torch.float32
    assert torch.equal(low, warp(process(logits.float(), ids, options, n_generated=0), options))


def test_greedy_is_argmax_and_the_first_of_ties() -> None:
    """Greedy decoding is exact and takes no generator."""
    assert sample(torch.tensor([[0.0, 2.0, 2.0], [5.0, 2.0, 2.0]])).tolist() == [1, 0]


def test_a_row_samples_what_it_would_alone() -> None:
    """Row i of a batch draws with seed + i, whatever stands in the other rows; the same seed gives the same ids."""
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(5))

    def draw(rows: Tensor, seed: int) -> Tensor:
        generators = row_generators(seed, len(rows), "cpu")
        return torch.stack([sample(rows, generators) for _ in range(20)], dim=1)

    batch = draw(scores, 7)
    assert torch.equal(batch, draw(scores, 7))
    assert not torch.equal(batch, draw(scores, 8))
    for i in range(3):
        assert torch.equal(batch[i : i + 1], draw(scores[i : i + 1], 7 + i))


def test_no_seed_draws_afresh() -> None:
    """Without a seed two calls differ, and so do the rows of one."""
    scores = torch.zeros(4, 100_000)
    first, second = (sample(scores, row_generators(None, 4, "cpu")).tolist() for _ in range(2))
    assert len(set(first + second)) > 6


def test_sampling_follows_the_probabilities() -> None:
    """40,000 draws fit the softmax, and an id that was dropped is never drawn."""
    scores = torch.tensor([0.0, 1.0, 2.0, -math.inf, -1.0])
    ids = sample(scores.repeat(40_000, 1), [torch.Generator().manual_seed(11)] * 40_000)
    counts = ids.bincount(minlength=5)
    assert counts[3] == 0
    expected = 40_000 * scores.softmax(-1)
    chi_squared = ((counts - expected) ** 2 / expected.clamp_min(1e-9)).sum()
    assert chi_squared < 16.3  # three degrees of freedom: one seed in a thousand exceeds it


def test_a_draw_of_zero_noise_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exponential noise can be exactly zero on some devices: that must neither make NaN nor draw a dropped id."""
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda noise, generator: noise.zero_())
    assert sample(torch.tensor([[-math.inf, 0.0, 1.0]]), row_generators(0, 1, "cpu")).tolist() == [2]


def test_a_generator_per_row_is_required() -> None:
    """Too few generators is a bug of the caller, never silently a shared one."""
    with pytest.raises(ValueError, match="zip"):
        sample(torch.zeros(2, 3), row_generators(0, 1, "cpu"))


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("sampling", [False, True])
def test_nothing_to_choose_is_an_error_of_that_row(value: float, sampling: bool) -> None:
    """NaN logits, or every id forbidden, must not become an id; the error is one line that names the row."""
    scores = torch.stack([torch.zeros(4), torch.full((4,), value)])
    ids = sample(scores, row_generators(0, 2, "cpu") if sampling else None).tolist()
    assert ids[0] != NO_ID
    assert ids[1] == NO_ID
    with pytest.raises(QwenVLError, match=r"^row 1: no next id can be chosen[^\n]*$"):
        require_ids(ids)
    require_ids(ids[:1])


def test_log_probabilities_are_the_models_own() -> None:
    """They are the log-softmax of the raw logits in float32, for a step [B, V] and for a whole text [B, T, V]."""
    logits = torch.randn(2, 3, 30, generator=torch.Generator().manual_seed(2)).half()
    ids = torch.randint(0, 30, (2, 3))
    expected = logits.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0].float()
    torch.testing.assert_close(log_probabilities(logits, ids), expected, rtol=0, atol=1e-5)
    assert torch.equal(log_probabilities(logits[:, 0], ids[:, 0]), log_probabilities(logits, ids)[:, 0])


BAD: dict[str, list[Any]] = {
    "do_sample": [1, 0, "yes", None],
    "temperature": [0, 0.0, -1.0, math.nan, math.inf, "1", True, None, 1e39, 10**40],
    "top_k": [-1, 1.0, True, "5", None],
    "top_p": [-0.1, 1.5, math.nan, True, "0.5", None],
    "repetition_penalty": [0, 0.0, -2, math.nan, math.inf, True, None],
    "frequency_penalty": [-2.1, 2.5, math.nan, math.inf, -math.inf, "1", True, None],
    "presence_penalty": [-2.1, 2.5, math.nan, math.inf, -math.inf, "1", True, None],
    "no_repeat_ngram_size": [-1, 2.0, True, None],
    "min_new_tokens": [-1, 1.5, False, None],
    "max_new_tokens": [0, -1, 2.0, True, None],
    "seed": [-1, 2**63 - 1 + 1, 1.0, True, "0"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_option(name: str, value: object) -> None:
    """Each option refuses what it could not honour, in one line that names it."""
    with pytest.raises(ConfigError, match=rf"^{name} must be [^\n]*$"):
        SamplingOptions(**{name: value})


def test_every_option_has_bad_values_tested() -> None:
    """An option added later needs its bad values listed above."""
    assert set(BAD) == {field.name for field in dataclasses.fields(SamplingOptions)}


def test_whole_numbers_are_numbers() -> None:
    """temperature=2 and repetition_penalty=1 are what people type; the edges of each range are allowed."""
    SamplingOptions(temperature=2, repetition_penalty=1, top_p=1, seed=2**63 - 1, max_new_tokens=1)
    SamplingOptions(top_p=0)
    SamplingOptions(frequency_penalty=-2, presence_penalty=2)
    SamplingOptions(frequency_penalty=2.0, presence_penalty=-2.0)
    row_generators(2**63 - 1, 2, "cpu")


def test_options_come_from_the_checkpoint_and_the_call() -> None:
    """The generation config gives the values, the call overrides them, None means "not given"."""
    config = GenerationConfig(do_sample=True, top_p=0.3, max_new_tokens=64, repetition_penalty=1.1)
    options = SamplingOptions.from_config(config, top_p=0.5, temperature=None, seed=3, max_new_tokens=None)
    assert options == SamplingOptions(do_sample=True, top_p=0.5, max_new_tokens=64, repetition_penalty=1.1, seed=3)
    assert SamplingOptions.from_config(GenerationConfig()) == SamplingOptions()


def test_an_unknown_option_lists_the_known_ones() -> None:
    """A misspelt option is one line that says what there is."""
    with pytest.raises(ConfigError, match=r"^unknown option topp: [^\n]*top_p[^\n]*seed$"):
        SamplingOptions.from_config(GenerationConfig(), topp=0.3)
    with pytest.raises(ConfigError, match="temperature must be"):
        SamplingOptions.from_config(GenerationConfig(), temperature=0)
