"""The one loop through a real model: greedy, sampled, batched, stopped, searched, scored; against uncached texts."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from captured import pretend
from support import Golden, one_line_error, padded, random_model, small_config
from torch import Tensor

import qwenvl
from qwenvl.config import GenerationConfig
from qwenvl.errors import ConfigError, PromptError, QwenVLError
from qwenvl.generation.beam import BeamOptions, beam_search
from qwenvl.generation.decode import NewIds, decode, prefill, score
from qwenvl.generation.sampling import SamplingOptions
from qwenvl.model.cache import KVCache
from qwenvl.model.qwenvl import QwenVL
from qwenvl.model.rope import ntk_alpha
from qwenvl.pipeline import Pipeline

ROWS = [60, 5, 90, 64]  # prompt lengths around `seq_length` 64


@pytest.fixture(scope="module")
def vl() -> Pipeline:
    """A small random model without a vocabulary; 64 ids, 512 positions, spans of 4."""
    return Pipeline(random_model(small_config()), None, GenerationConfig(eos_token_id=(7, 63), max_new_tokens=9))


@pytest.fixture(scope="module")
def spoken(chat_folder: Path) -> Pipeline:
    """A small random model with a vocabulary."""
    return qwenvl.load(chat_folder, dtype="float32", device="cpu", quiet=True)


@pytest.fixture(autouse=True, params=["eager", "captured"])
def stepping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for steps that are told kernel by kernel, and for those that a GPU replays."""
    if request.param == "captured":
        pretend(monkeypatch)


def rows() -> list[Tensor]:
    """Prompts of the lengths above."""
    return [torch.randint(0, 60, (n,), generator=torch.Generator().manual_seed(n)) for n in ROWS]


@torch.no_grad()
def next_logits(model: QwenVL, prompt: Tensor, new: list[int]) -> Tensor:
    """Logits [V] behind a prompt [T] and new ids, computed from nothing under the prompt's alpha."""
    text = torch.cat((prompt, torch.tensor(new, dtype=torch.long)))
    alpha = ntk_alpha(len(prompt), model.config.seq_length)
    embeddings = model.decoder.wte(text[None])  # a generated `<img>` is an ordinary id, so no span is looked for
    return model(None, embeddings=embeddings, ntk_alpha=alpha)[0, -1]


def greedy(model: QwenVL, prompt: Tensor, count: int) -> list[int]:
    """What greedy decoding is: the most likely id, again and again, without a cache."""
    new: list[int] = []
    for _ in range(count):
        new.append(int(next_logits(model, prompt, new).argmax()))
    return new


# --- greedy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["text", "one_image", "two_images", "cross_boundary", "long", "long_image", "left_padded"]
)
def test_greedy_ids_are_the_references(golden: Golden, name: str) -> None:
    """`generate_ids` without any option: the reference's ids, new ones only, batches and images included."""
    case = golden.case(name)
    count = len(case.greedy[0])
    ids = golden.vl.generate_ids(case.input_ids, case.pixels, case.mask, max_new_tokens=count, stop_ids=())
    assert ids == case.greedy


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_ragged_batch_is_each_row_alone(vl: Pipeline, side: str) -> None:
    """Whatever the padding, each row's ids are those of its uncached text, past the boundary under its own alpha."""
    ids, mask = padded(rows(), side, pad_id=60)  # padding that would open image spans, if it were looked at
    found = vl.generate_ids(ids, None, mask, max_new_tokens=12, stop_ids=())
    assert found == [greedy(vl.model, row, 12) for row in rows()]


def test_greedy_whatever_the_checkpoint_says(vl: Pipeline) -> None:
    """`generate_ids` samples only when told to; the length alone is the checkpoint's."""
    config = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=5.0, max_new_tokens=6)
    sampling = Pipeline(vl.model, None, config)
    prompt = rows()[0]
    assert sampling.generate_ids(prompt[None]) == [greedy(vl.model, prompt, 6)]


def test_images_of_a_batch_are_in_reading_order(tiny_112: Golden) -> None:
    """Pixels or features: row by row, as alone."""
    vl, names = tiny_112.vl, ["b.png", "a.png"]
    alone = [tiny_112.prompt(9, names[0], 30, names[1], 4, seed=1), tiny_112.prompt(names[1], 5, seed=2)]
    ids, mask = padded(alone)
    pixels = tiny_112.pictures(*names, names[1])
    found = vl.generate_ids(ids, pixels, mask, max_new_tokens=6, stop_ids=())
    with torch.no_grad():
        features = vl.model.encode_images(pixels)
    assert vl.generate_ids(ids, attention_mask=mask, image_features=features, max_new_tokens=6, stop_ids=()) == found
    assert vl.generate_ids(alone[0][None], pixels[:2], max_new_tokens=6, stop_ids=()) == found[:1]
    assert vl.generate_ids(alone[1][None], pixels[2:], max_new_tokens=6, stop_ids=()) == found[1:]


# --- sampling -------------------------------------------------------------------------------------------------------


def test_sampled_rows_are_each_row_alone(vl: Pipeline) -> None:
    """Row i of a batch seeded with s draws what it draws alone, seeded with s + i."""
    ids, mask = padded(rows())
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "top_k": 30, "stop_ids": ()}
    found = vl.generate_ids(ids, None, mask, seed=5, **options)
    alone = [vl.generate_ids(row[None], seed=5 + i, **options)[0] for i, row in enumerate(rows())]
    assert found == alone
    assert found != [greedy(vl.model, row, 9) for row in rows()]


def test_the_same_seed_gives_the_same_ids(vl: Pipeline) -> None:
    """And another one others; without a seed, every call is new."""
    prompt = rows()[2][None]

    def draw(seed: int | None) -> list[list[int]]:
        return vl.generate_ids(prompt, do_sample=True, temperature=2.0, seed=seed, stop_ids=(), max_new_tokens=20)

    assert draw(3) == draw(3)
    assert len({tuple(draw(seed)[0]) for seed in (3, 4, None, None)}) == 4


def test_global_generators_are_left_alone(vl: Pipeline) -> None:
    """Sampling neither reads nor moves torch's default generator."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = vl.generate_ids(rows()[0][None], do_sample=True, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert vl.generate_ids(rows()[0][None], do_sample=True, seed=1) == first


def test_a_low_temperature_is_greedy(vl: Pipeline) -> None:
    """The options reach the sampler."""
    prompt = rows()[0]
    found = vl.generate_ids(prompt[None], do_sample=True, temperature=1e-4, stop_ids=())
    assert found == [greedy(vl.model, prompt, 9)]


def test_processors_see_the_row_without_padding(vl: Pipeline) -> None:
    """Penalty and n-grams count a row's own ids; padding with an id that the model likes changes nothing."""
    for options in ({"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}):
        options |= {"max_new_tokens": 20}
        alone = [vl.generate_ids(row[None], stop_ids=(), **options)[0] for row in rows()[:2]]
        assert alone != [greedy(vl.model, row, 20) for row in rows()[:2]]
        for pad_id in (alone[1][0], alone[1][1]):
            ids, mask = padded(rows()[:2], pad_id=pad_id)
            assert vl.generate_ids(ids, None, mask, stop_ids=(), **options) == alone


def test_no_id_twice(vl: Pipeline) -> None:
    """With n-grams of size 1 no id of the prompt or the answer comes again, until none is left: then one line."""
    prompt = rows()[1]
    (new,) = vl.generate_ids(prompt[None], stop_ids=(), no_repeat_ngram_size=1, max_new_tokens=40)
    assert len({*new, *prompt.tolist()}) == 40 + len(set(prompt.tolist()))
    with one_line_error(QwenVLError, "row 0", "no_repeat_ngram_size"):
        vl.generate_ids(prompt[None], stop_ids=(), no_repeat_ngram_size=1, max_new_tokens=64)


# --- where rows end -------------------------------------------------------------------------------------------------


def test_rows_end_at_their_own_stop_ids(vl: Pipeline) -> None:
    """Each row ends with its first stop id, which it keeps; the others go on unchanged."""
    prompts = rows()
    ids, mask = padded(prompts)
    free = [greedy(vl.model, row, 12) for row in prompts]
    stops = (free[0][2], free[1][5], free[3][9])
    expected = [text[: next((i + 1 for i, id_ in enumerate(text) if id_ in stops), 12)] for text in free]
    assert len({len(text) for text in expected}) > 2
    assert vl.generate_ids(ids, None, mask, max_new_tokens=12, stop_ids=stops) == expected


def test_stop_ids_of_the_configuration(vl: Pipeline) -> None:
    """None means the configured ones, () means never."""
    prompt = rows()[0]
    free = greedy(vl.model, prompt, 9)
    configured = Pipeline(vl.model, None, GenerationConfig(eos_token_id=[free[3], 63], max_new_tokens=9))
    end = free.index(free[3]) + 1
    assert configured.generate_ids(prompt[None]) == [free[:end]]
    assert configured.generate_ids(prompt[None], stop_ids=None) == [free[:end]]
    assert configured.generate_ids(prompt[None], stop_ids=()) == [free]
    assert configured.generate_ids(prompt[None], stop_ids=[free[0]]) == [free[:1]]


def test_minimum_and_maximum(vl: Pipeline) -> None:
    """Stop ids are forbidden before `min_new_tokens`; `max_new_tokens` ends a row that met none, last id included."""
    prompt = rows()[0]
    free = greedy(vl.model, prompt, 9)
    (found,) = vl.generate_ids(prompt[None], stop_ids=(free[0],), min_new_tokens=5, max_new_tokens=8)
    assert len(found) >= 6 or len(found) == 8
    assert free[0] not in found[:5]
    assert len(vl.generate_ids(prompt[None], stop_ids=(), max_new_tokens=1)[0]) == 1
    assert len(vl.generate_ids(prompt[None], stop_ids=())[0]) == 9


def test_stop_strings_end_a_row(spoken: Pipeline) -> None:
    """A row ends with the id that completes a stop string; rows without it go on to the end."""
    assert spoken.tokenizer is not None
    prompts = [torch.tensor(spoken.tokenizer.encode(text)) for text in ("the dog", "what is in this box")]
    ids, mask = padded(prompts)
    free = spoken.generate_ids(ids, None, mask, max_new_tokens=20, stop_ids=())
    texts = [spoken.tokenizer.decode([i]) for i in free[0]]
    stop = texts[3] + texts[4]  # spans two ids
    assert stop not in spoken.tokenizer.decode(free[1])
    found = spoken.generate_ids(ids, None, mask, max_new_tokens=20, stop_ids=(), stop=("never said", stop))
    assert stop in spoken.tokenizer.decode(found[0])
    assert stop not in spoken.tokenizer.decode(found[0][:-1])
    assert found[0] == free[0][: len(found[0])]
    assert found[1] == free[1]


def test_ids_beyond_the_vocabulary_are_never_emitted(spoken: Pipeline) -> None:
    """The head is wider than the tokenizer: its surplus ids are not chosen, greedy, sampled or searched."""
    assert spoken.tokenizer is not None
    n_vocab, model = spoken.tokenizer.n_vocab, spoken.model
    prompt = torch.tensor([spoken.tokenizer.encode("the cat")])
    with torch.no_grad():
        surplus = model.decoder.lm_head.weight[n_vocab:].clone()
        try:
            hidden = model(prompt, return_hidden=True).hidden_states[-1][0, -1]
            model.decoder.lm_head.weight[n_vocab:] = hidden  # what the model would say next, and again
            assert int(model(prompt)[0, -1].argmax()) >= n_vocab
            for options in ({}, {"do_sample": True, "seed": 1}, {"beams": BeamOptions(3)}):
                (found,) = spoken.generate_ids(prompt, max_new_tokens=8, stop_ids=(), **options)
                assert len(found) == 8
                assert max(found) < n_vocab
        finally:
            model.decoder.lm_head.weight[n_vocab:] = surplus


def test_the_models_last_position(vl: Pipeline) -> None:
    """An answer ends where the positions do; a prompt that takes them all is refused."""
    positions = vl.config.max_position_embeddings
    prompt = torch.randint(0, 60, (1, positions), generator=torch.Generator().manual_seed(0))
    (found,) = vl.generate_ids(prompt[:, :-3], stop_ids=(), max_new_tokens=50)
    assert len(found) == 3
    assert len(vl.generate_ids(prompt[:, :-1], stop_ids=())[0]) == 1
    with one_line_error(PromptError, positions):
        vl.generate_ids(prompt)
    with one_line_error(PromptError, positions, positions + 1):
        vl.generate_ids(torch.cat((prompt, prompt[:, :1]), dim=1))


def test_padding_takes_no_position(vl: Pipeline) -> None:
    """More columns than the model has positions are no matter, if the real tokens are fewer."""
    row = rows()[0]
    ids = torch.cat((torch.zeros(600, dtype=torch.long), row))[None]
    mask = torch.arange(660)[None] >= 600
    assert vl.generate_ids(ids, None, mask, stop_ids=()) == [greedy(vl.model, row, 9)]


def test_a_short_row_is_not_cut_off_by_a_long_one(vl: Pipeline) -> None:
    """The long row runs out of positions and ends; the short one answers as long as it would alone."""
    long, short = torch.randint(0, 60, (509,), generator=torch.Generator().manual_seed(0)), rows()[1]
    ids, mask = padded([long, short, long[:500]])
    found = vl.generate_ids(ids, None, mask, stop_ids=(), max_new_tokens=20)
    assert [len(row) for row in found] == [3, 20, 12]
    assert found[1] == greedy(vl.model, short, 20)
    assert found[0] == vl.generate_ids(long[None], stop_ids=(), max_new_tokens=20)[0]
    assert found[2] == vl.generate_ids(long[None, :500], stop_ids=(), max_new_tokens=20)[0]


# --- log-probabilities and scoring ----------------------------------------------------------------------------------


def test_log_probabilities_are_the_models_own(vl: Pipeline) -> None:
    """Before any processor, one for each new id of each row, equal to a recomputed log_softmax."""
    ids, mask = padded(rows())
    free = greedy(vl.model, rows()[0], 3)
    found, likely = vl.generate_ids(
        ids,
        None,
        mask,
        return_log_probabilities=True,
        do_sample=True,
        temperature=1.7,
        repetition_penalty=1.3,
        seed=0,
        stop_ids=(free[0], 3, 9, 11),
    )
    assert [len(row) for row in likely] == [len(row) for row in found]
    assert len({len(row) for row in found}) > 1
    for prompt, new, told in zip(rows(), found, likely, strict=True):
        for at, id_ in enumerate(new):
            expected = next_logits(vl.model, prompt, new[:at]).log_softmax(-1)[id_].item()
            assert told[at] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("length", [60, 90])
def test_scores_of_continuations(vl: Pipeline, length: int) -> None:
    """One prefill, then each continuation, of any length, as its uncached log_softmax; the cache is left as it was."""
    prompt = torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(length))
    cache = KVCache.allocate(vl.config, 1, length + 10)
    logits = prefill(vl.model, cache, prompt[None])
    continuations = [[5], [6, 7, 8, 9], [60, 61, 5], [5, 4, 3, 2, 1, 0, 1, 2, 3, 4]]
    for told, ids in zip(score(vl.model, cache, logits, continuations), continuations, strict=True):
        expected = [next_logits(vl.model, prompt, ids[:at]).log_softmax(-1)[id_] for at, id_ in enumerate(ids)]
        assert told == pytest.approx([value.item() for value in expected], abs=1e-4)
    assert cache.lengths.tolist() == [length]
    with one_line_error(PromptError, "continuation 2"):
        score(vl.model, cache, logits, [[5], []])


# --- the loop by itself ---------------------------------------------------------------------------------------------


def steps(vl: Pipeline, prompt: Tensor, **more: Any) -> tuple[KVCache, list[NewIds]]:
    """Run the loop over one prompt."""
    cache = KVCache.allocate(vl.config, 1, 200)
    logits = prefill(vl.model, cache, prompt[None])
    return cache, list(decode(vl.model, cache, logits, prompt[None], SamplingOptions(max_new_tokens=5), **more))


def test_the_cache_holds_all_but_the_last_id(vl: Pipeline) -> None:
    """So that a next round can go on from it."""
    prompt = rows()[0]
    cache, found = steps(vl, prompt)
    assert len(found) == 5
    assert cache.lengths.tolist() == [64]
    new = [step.ids[0] for step in found]
    with torch.no_grad():
        logits = vl.model(torch.tensor([[new[-1]]]), cache=cache)[0, -1]
    torch.testing.assert_close(logits, next_logits(vl.model, prompt, new), atol=2e-5, rtol=0)


def test_a_callback_can_end_a_row(vl: Pipeline) -> None:
    """`should_stop` is asked once for every new id."""
    asked: list[tuple[int, int]] = []

    def third(row: int, id_: int) -> bool:
        asked.append((row, id_))
        return len(asked) == 3

    _, found = steps(vl, rows()[0], should_stop=third)
    assert [(0, step.ids[0]) for step in found] == asked
    assert len(asked) == 3


def test_rows_that_have_ended_say_none(vl: Pipeline) -> None:
    """Streaming a batch shows which rows still speak."""
    prompts = rows()
    ids, mask = padded(prompts)
    free = [greedy(vl.model, row, 5) for row in prompts]
    cache = KVCache.allocate(vl.config, 4, 200)
    logits = prefill(vl.model, cache, ids, attention_mask=mask)
    options = SamplingOptions(max_new_tokens=5)
    found = [
        step.ids for step in decode(vl.model, cache, logits, ids, options, history_mask=mask, stop_ids=free[1][:1])
    ]
    assert [step[1] for step in found[1:]] == [None] * (len(found) - 1)
    assert found[0][1] == free[1][0]


def test_no_gradients_are_kept(vl: Pipeline) -> None:
    """The loop keeps no graph, also where the caller trains; nor does it leave gradients switched off."""
    prompt = rows()[0]
    cache = KVCache.allocate(vl.config, 1, 200)
    logits = prefill(vl.model, cache, prompt[None])
    assert not logits.requires_grad
    for _ in decode(vl.model, cache, logits, prompt[None], SamplingOptions(max_new_tokens=3)):
        assert torch.is_grad_enabled()
    assert not cache.keys.requires_grad


# --- beam search ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("beams", [BeamOptions(3), BeamOptions(4, length_penalty=0.0, num_return_sequences=3)], ids=str)
def test_beam_search_is_the_same_without_a_cache(vl: Pipeline, beams: BeamOptions) -> None:
    """Ragged rows across the boundary: reordering the cache gives what computing every text from nothing gives."""
    prompts = rows()
    ids, mask = padded(prompts)
    stops = (3, 9, 11, 20, 31)
    options = SamplingOptions(max_new_tokens=8, repetition_penalty=1.2)
    texts: list[tuple[int, list[int]]] = [(row, []) for row in range(len(prompts))]

    def uncached() -> Tensor:
        return torch.stack([next_logits(vl.model, prompts[row], new) for row, new in texts])

    def step(source: list[int], new: Tensor) -> Tensor:
        texts[:] = [(texts[s][0], [*texts[s][1], i]) for s, i in zip(source, new.tolist(), strict=True)]
        return uncached()

    expected = [
        [*text.ids, *([] if text.stop_id is None else [text.stop_id])]
        for row in beam_search(uncached(), step, ids, beams, options, prompt_mask=mask, stop_ids=stops)
        for text in row
    ]
    found = vl.generate_ids(ids, None, mask, beams=beams, stop_ids=stops, max_new_tokens=8, repetition_penalty=1.2)
    assert found == expected
    assert len(found) == len(prompts) * beams.num_return_sequences
    assert found != vl.generate_ids(ids, None, mask, stop_ids=stops, max_new_tokens=8, repetition_penalty=1.2)


@torch.no_grad()
def test_a_wide_beam_finds_the_best_text(vl: Pipeline) -> None:
    """Two tokens over a beam as wide as the vocabulary: the pair of the highest probability of all."""
    prompt = rows()[1]
    first = next_logits(vl.model, prompt, []).log_softmax(-1)
    pairs = {(a, b): math.nan for a in range(64) for b in range(64)}
    for a in range(64):
        second = next_logits(vl.model, prompt, [a]).log_softmax(-1)
        pairs |= {(a, b): (first[a] + second[b]).item() for b in range(64)}
    best = max(pairs, key=pairs.__getitem__)
    found = vl.generate_ids(prompt[None], beams=BeamOptions(64), stop_ids=(), max_new_tokens=2)
    assert vl.generate_ids(prompt[None], beams=64, stop_ids=(), max_new_tokens=2) == found
    assert found == [list(best)]


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line(vl: Pipeline, spoken: Pipeline) -> None:
    """Every wrong argument of `generate_ids` says what it is."""
    ids = torch.tensor([[5, 6, 7]])
    with one_line_error(PromptError, "[1, 0]"):
        vl.generate_ids(ids[:, :0])
    with one_line_error(PromptError, "[3]"):
        vl.generate_ids(ids[0])
    with one_line_error(PromptError, "[1, 4]", "[1, 3]"):
        vl.generate_ids(ids, attention_mask=torch.ones(1, 4))
    with one_line_error(PromptError, "row 1", "padding"):
        vl.generate_ids(ids.repeat(2, 1), attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))
    with one_line_error(PromptError, "1 image spans", "0 images"):
        vl.generate_ids(torch.tensor([[60, 1, 1, 1, 1, 61]]))
    with one_line_error(PromptError, "0 to 63"):
        vl.generate_ids(torch.tensor([[5, 64]]))
    with one_line_error(PromptError, "vocabulary", "qwen.tiktoken"):
        vl.generate_ids(ids, stop=["x"])
    with one_line_error(PromptError, "at least one character"):
        spoken.generate_ids(ids, stop=[""])
    with one_line_error(ConfigError, "temprature", "temperature"):
        vl.generate_ids(ids, temprature=1.0)
    with one_line_error(ConfigError, "max_new_tokens", 0):
        vl.generate_ids(ids, max_new_tokens=0)
    for wrong in ({"do_sample": True}, {"return_log_probabilities": True}):
        with one_line_error(PromptError, "beam search"):
            vl.generate_ids(ids, beams=BeamOptions(2), **wrong)
    with one_line_error(PromptError, "beam search"):
        spoken.generate_ids(ids, beams=BeamOptions(2), stop=["x"])


def test_logits_that_are_not_finite_are_one_line() -> None:
    """An overflow in the model is said as such, with what to do, not as an index error."""
    vl = Pipeline(random_model(small_config()), None)
    with torch.no_grad():
        vl.model.decoder.lm_head.weight.fill_(float("nan"))
    with one_line_error(QwenVLError, "row 0", "not finite", "float32"):
        vl.generate_ids(torch.tensor([[5, 6, 7]]))


def test_beams_end_row_by_row() -> None:
    """A short row of a beam batch was once cut off where the longest ran out of positions."""
    model = random_model(small_config(max_position_embeddings=100))
    alone = Pipeline(model, None, GenerationConfig(max_new_tokens=20))
    long, short = (torch.randint(0, 60, (n,), generator=torch.Generator().manual_seed(n)) for n in (97, 30))
    ids = torch.stack((long, torch.cat((torch.zeros(67, dtype=torch.long), short))))
    mask = torch.ones_like(ids)
    mask[1, :67] = 0
    found = alone.generate_ids(ids, attention_mask=mask, beams=2, stop_ids=())
    assert [len(row) for row in found] == [3, 20]
    assert found[1:] == alone.generate_ids(short[None], beams=2, stop_ids=())
