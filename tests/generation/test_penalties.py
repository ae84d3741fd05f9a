"""Frequency and presence penalties: what they take off, and that they count a text's own new ids wherever it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captured import pretend
from schedules import asked
from support import one_line_error, padded, random_model, small_config
from torch import Tensor

from qwenvl.errors import ConfigError
from qwenvl.generation.beam import BeamOptions
from qwenvl.generation.engine import Engine
from qwenvl.generation.sampling import SamplingOptions, process
from qwenvl.model.qwenvl import QwenVL
from qwenvl.model.rope import ntk_alpha
from qwenvl.pipeline import Pipeline

BOTH = {"frequency_penalty": 0.4, "presence_penalty": 0.7}


@pytest.fixture(scope="module")
def model() -> QwenVL:
    """Random weights, whose greedy text soon repeats itself; a prompt of more than 64 ids stretches its rotation."""
    return random_model(small_config()).requires_grad_(False)


@pytest.fixture(params=["eager", "late"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Steps as a CPU takes them, and as a GPU does: captured, their ids read late."""
    if request.param == "late":
        pretend(monkeypatch)
    return str(request.param)


def some_ids(count: int, seed: int = 0) -> list[int]:
    """Ordinary ids."""
    found: list[int] = torch.randint(1, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found


@torch.no_grad()
def plainly(model: QwenVL, prompt: list[int], count: int, frequency: float, presence: float) -> list[int]:
    """A greedy text with penalties, without a cache, in Python's own numbers."""
    new: list[int] = []
    alpha = ntk_alpha(len(prompt), model.config.seq_length)
    for _ in range(count):
        embeddings = model.decoder.wte(torch.tensor([[*prompt, *new]]))
        scores: list[float] = model(None, embeddings=embeddings, ntk_alpha=alpha)[0, -1].tolist()
        for id_ in set(new):
            scores[id_] -= frequency * new.count(id_) + presence
        new.append(scores.index(max(scores)))
    return new


# --- what they take off ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frequency", "presence"), [(0.5, 0.0), (0.0, 1.5), (-2.0, 0.25), (2.0, -2.0)])
def test_each_time_and_at_all(frequency: float, presence: float) -> None:
    """Of each row's new ids: so much for each time, and so much once. The prompt's own do not count."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 9, generator=generator)
    history = torch.randint(0, 9, (4, 20), generator=generator)
    options = SamplingOptions(frequency_penalty=frequency, presence_penalty=presence)
    for n_generated in (0, 1, 13):
        scores = process(logits, history, options, n_generated=n_generated)
        for row, (before, after) in enumerate(zip(logits.tolist(), scores.tolist(), strict=True)):
            new = history[row, 20 - n_generated :].tolist()
            expected = [
                score - frequency * new.count(id_) - presence * (id_ in new) for id_, score in enumerate(before)
            ]
            assert after == pytest.approx(expected, abs=1e-5)


def test_they_follow_the_repetition_penalty() -> None:
    """Which would else divide what they have made negative, and multiply it: and what is forbidden stays so."""
    options = SamplingOptions(repetition_penalty=2.0, min_new_tokens=5, **BOTH)  # type: ignore[arg-type]
    logits = torch.tensor([[1.5, -1.0, 3.0, 0.5]])
    scores = process(logits, torch.tensor([[1, 0, 0]]), options, n_generated=2, stop_ids=[2])
    assert scores[0].tolist() == pytest.approx([0.75 - 0.8 - 0.7, -2.0, -torch.inf, 0.5])


# --- in the loop ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("frequency", "presence"), [(0.4, 0.7), (-0.5, 0.0), (0.0, -1.0), (2.0, 0.0)])
def test_a_row_of_a_batch_counts_its_own_ids(model: QwenVL, frequency: float, presence: float) -> None:
    """Padded, and beside rows that have ended: each is the plain text of its prompt alone."""
    prompts = [some_ids(length, length) for length in (60, 5, 70, 30)]
    expected = [plainly(model, prompt, 24, frequency, presence) for prompt in prompts]
    assert any(new != asked(model, prompt, new_tokens=24).alone for new, prompt in zip(expected, prompts, strict=True))
    stop = (expected[0][3], expected[2][9])
    ends = [next((n for n, id_ in enumerate(new, 1) if id_ in stop), 24) for new in expected]
    assert len(set(ends)) > 2
    for side in ("left", "right"):
        ids, mask = padded([torch.tensor(prompt) for prompt in prompts], side, pad_id=expected[1][0])
        found = Pipeline(model, None).generate_ids(
            ids,
            None,
            mask,
            stop_ids=stop,
            max_new_tokens=24,
            frequency_penalty=frequency,
            presence_penalty=presence,
        )
        assert found == [new[:end] for new, end in zip(expected, ends, strict=True)]


# --- in an engine ---------------------------------------------------------------------------------------------------


MIX: list[dict[str, Any]] = [
    BOTH,
    {},
    {"frequency_penalty": -0.3},
    BOTH,
    {"presence_penalty": 1.9, "do_sample": True, "seed": 3},
    {"frequency_penalty": 1.1, "presence_penalty": -0.5, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    {"do_sample": True, "seed": 4, "top_k": 9},
]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("rows", "lookup"), [(1, 0), (3, 0), (7, 0), (4, 3)])
def test_in_any_mix_each_is_what_it_would_be_alone(model: QwenVL, rows: int, lookup: int) -> None:
    """Neighbours with other penalties, and with none, change nothing; nor do guesses."""
    requests = [
        asked(model, some_ids(9 + 11 * number, number), None, 30, **options) for number, options in enumerate(MIX)
    ]
    engine = Engine(model, rows=rows, chunk=32, lookup=lookup, max_length=128)
    answers = [one.submit(engine) for one in requests]
    assert [answer.result() for answer in answers] == [one.alone for one in requests]
    assert requests[0].alone == plainly(model, requests[0].ids, 30, 0.4, 0.7)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("memory", [True, False])
def test_what_was_said_before_it_was_put_back_counts(
    model: QwenVL, memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text that is computed anew, from behind what it had said, goes on counting that as new ids."""
    requests = [asked(model, some_ids(9 + seed, seed), None, 30, **BOTH) for seed in range(3)]
    engine = Engine(model, rows=3)
    answers = [one.submit(engine) for one in requests]
    for _ in range(12):
        engine.step()
    said = [len(answer.ids) for answer in answers]
    assert min(said) > 8
    forward = model.decoder.ln_f.forward
    failures = iter([torch.OutOfMemoryError("CUDA out of memory") if memory else KeyboardInterrupt()])

    def fails(x: Tensor) -> Tensor:
        for failure in failures:
            raise failure
        return forward(x)

    monkeypatch.setattr(model.decoder.ln_f, "forward", fails)
    try:
        engine.step()
    except KeyboardInterrupt:
        assert not memory
    assert engine.load.waiting > 0
    assert [answer.result() for answer in answers] == [one.alone for one in requests]


# --- in a beam search -----------------------------------------------------------------------------------------------


def test_beams_count_their_own_ids(model: QwenVL) -> None:
    """Each beam's new ids, not the prompt's nor another beam's, come off its log-probabilities."""
    prompt, count = some_ids(20), 3
    vl = Pipeline(model, None)
    options: dict[str, Any] = {"max_new_tokens": count, "stop_ids": ()}
    (plain,) = vl.generate_ids(torch.tensor([prompt]), beams=BeamOptions(64), **options)
    (found,) = vl.generate_ids(torch.tensor([prompt]), beams=BeamOptions(64), **options, **BOTH)
    (forbidden,) = vl.generate_ids(
        torch.tensor([prompt]), beams=BeamOptions(64), **options, frequency_penalty=2, presence_penalty=2
    )

    @torch.no_grad()
    def total(new: list[int], frequency: float, presence: float) -> float:
        logits = model(None, embeddings=model.decoder.wte(torch.tensor([[*prompt, *new]])), ntk_alpha=1.0)[0]
        likely = logits.log_softmax(-1)[len(prompt) - 1 :]
        return sum(
            float(likely[at, id_]) - frequency * new[:at].count(id_) - presence * (id_ in new[:at])
            for at, id_ in enumerate(new)
        )

    texts = (plain, found, forbidden)
    assert max(texts, key=lambda new: total(new, 0, 0)) == plain
    assert max(texts, key=lambda new: total(new, 0.4, 0.7)) == found
    assert max(texts, key=lambda new: total(new, 2, 2)) == forbidden
    assert plain != forbidden


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
def test_beams_take_no_reward(model: QwenVL, name: str) -> None:
    """A search ends when no open text can catch up: what raises a total as the text grows would make that false."""
    with one_line_error(ConfigError, name, "beam search", "-0.5"):
        Pipeline(model, None).generate_ids(torch.tensor([some_ids(9)]), beams=2, **{name: -0.5})
