"""What an engine tells beside the ids: how likely they and the others were, and how much it has done."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, astuple
from itertools import pairwise
from typing import Any

import pytest
import torch
from captured import pretend
from schedules import asked
from support import one_line_error, random_model, small_config
from torch import Tensor

from qwenvl.errors import PromptError
from qwenvl.generation import schedule
from qwenvl.generation.engine import Engine, Totals
from qwenvl.generation.request import Request
from qwenvl.generation.sampling import sample, top_log_probabilities
from qwenvl.model.qwenvl import QwenVL
from qwenvl.model.rope import ntk_alpha

SPAN = [60, 62, 62, 62, 62, 61]


@pytest.fixture(scope="module")
def model() -> QwenVL:
    """Random weights; a prompt of more than 64 ids stretches its rotation."""
    return random_model(small_config()).requires_grad_(False)


@pytest.fixture(params=["eager", "late"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Steps as a CPU takes them, and as a GPU does: captured, their ids read a step late."""
    if request.param == "late":
        pretend(monkeypatch)
    return str(request.param)


def some_ids(count: int, seed: int = 0) -> list[int]:
    """Ordinary ids."""
    found: list[int] = torch.randint(1, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found


@torch.no_grad()
def uncached(model: QwenVL, request: Request) -> Tensor:
    """Log-probabilities [T,V] of the ids in the place of each new one, computed from nothing."""
    alpha = ntk_alpha(len(request.prompt), model.config.seq_length)
    embeddings = model.decoder.wte(torch.tensor([request.text[:-1]]))
    return model(None, embeddings=embeddings, ntk_alpha=alpha)[0, len(request.prompt) - 1 :].log_softmax(-1)


def check(model: QwenVL, request: Request, k: int) -> None:
    """One list for each id, which holds what is likeliest there."""
    expected = uncached(model, request)
    assert len(request.top_log_probabilities) == len(request.log_probabilities) == len(request.ids) > 0
    for at, (told, id_) in enumerate(zip(request.top_log_probabilities, request.ids, strict=True)):
        top = expected[at].topk(k)
        assert [other for other, _ in told] == top.indices.tolist()
        assert [likely for _, likely in told] == pytest.approx(top.values.tolist(), abs=1e-4)
        assert request.log_probabilities[at] == pytest.approx(float(expected[at, id_]), abs=1e-4)


# --- the likeliest ids ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_come_in_the_order_of_their_ids(dtype: torch.dtype) -> None:
    """The likeliest first, whatever the sign; of the many equals among 16-bit logits, the lower id, which greedy
    decoding takes as well.
    """
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1] = logits[1].round()
    logits[2, ::2], logits[2, 1::2] = 0.0, -0.0
    logits[3] = -logits[3].abs()
    logits[4, 7:], logits[5, [3, 400]] = -torch.inf, 30.0
    for k in (1, 20, 500, 600):
        ids, likely = top_log_probabilities(logits, k)
        for row, (found, told) in enumerate(zip(ids.tolist(), likely, strict=True)):
            values = logits[row].tolist()
            assert found == sorted(range(500), key=lambda id_: (-values[id_], id_))[:k]
            expected = logits[row].double().log_softmax(-1)[found].float()
            torch.testing.assert_close(told, expected, rtol=0, atol=1e-5)
        assert likely.dtype == torch.float32
        assert ids[:, 0].tolist() == sample(logits).tolist()


ASKED: list[tuple[int, dict[str, Any]]] = [
    (5, {}),
    (0, {"with_log_probabilities": True}),
    (20, {"do_sample": True, "temperature": 2.0, "seed": 3}),
    (0, {}),
    (1, {"frequency_penalty": 1.5, "repetition_penalty": 1.3}),
    (3, {"min_new_tokens": 12}),
]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("rows", "lookup"), [(1, 0), (3, 0), (6, 0), (4, 3)])
def test_they_are_those_of_an_uncached_forward(model: QwenVL, rows: int, lookup: int) -> None:
    """For each id of each request as many as it asked for, before any processor, whoever else runs, and with guesses;
    and who asks for none has none.
    """
    engine = Engine(model, rows=rows, chunk=32, lookup=lookup, max_length=128)
    stop = some_ids(2, 9)
    answers = [
        engine.submit(
            some_ids(9 + 13 * number, number), max_new_tokens=24, stop_ids=stop, top_log_probabilities=k, **options
        )
        for number, (k, options) in enumerate(ASKED)
    ]
    for answer, (k, options) in zip(answers, ASKED, strict=True):
        answer.result()
        if k:
            check(model, answer, k)
        else:
            assert answer.top_log_probabilities == []
            assert len(answer.log_probabilities) == len(answer.ids) * bool(options)


@pytest.mark.usefixtures("way")
def test_a_text_that_repeats_itself(model: QwenVL) -> None:
    """Several ids of a step, where guesses come true: each has its own list."""
    monologue = asked(model, some_ids(4, 5), new_tokens=56)
    prompt = [*monologue.ids, *monologue.alone[:44]]
    engine = Engine(model, rows=2, lookup=5, max_length=128)
    answer = engine.submit(prompt, max_new_tokens=12, top_log_probabilities=4)
    assert answer.result() == monologue.alone[44:]
    assert engine.totals.steps < 12
    check(model, answer, 4)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("failure", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_list_for_every_id_after_it_was_put_back(
    model: QwenVL, after: int, failure: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is computed anew is not told twice, and what had been told stays."""
    engine = Engine(model, rows=3)
    answers = [engine.submit(some_ids(9, seed), max_new_tokens=9, top_log_probabilities=2 + seed) for seed in range(3)]
    for _ in range(after):
        engine.step()
    forward = model.decoder.ln_f.forward
    failures = iter([failure("CUDA out of memory")])

    def fails(x: Tensor) -> Tensor:
        for error in failures:
            raise error
        return forward(x)

    monkeypatch.setattr(model.decoder.ln_f, "forward", fails)
    try:
        engine.step()
    except KeyboardInterrupt:
        assert failure is KeyboardInterrupt
    for seed, answer in enumerate(answers):
        assert answer.result() == asked(model, some_ids(9, seed), new_tokens=9).alone
        check(model, answer, 2 + seed)


def test_an_interruption_between_an_id_and_its_list(model: QwenVL) -> None:
    """Ctrl-C may come anywhere: a list whose id was not noted yet goes, as the id will come again."""

    class Interrupted(list[int]):
        def append(self, id_: int) -> None:
            if len(self) == 3:
                answer.ids = list(self)
                raise KeyboardInterrupt
            super().append(id_)

    engine = Engine(model, rows=1)
    answer = engine.submit(some_ids(9), max_new_tokens=8, top_log_probabilities=2)
    answer.ids = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        answer.result()
    assert answer.result() == asked(model, some_ids(9), new_tokens=8).alone
    check(model, answer, 2)


def test_nothing_is_computed_that_nobody_asked_for(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all rows of a step, as many as the one with most of them wants; not at all where none wants any."""
    counts: list[tuple[int, int]] = []

    def counted(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        counts.append((len(logits), k))
        return top_log_probabilities(logits, k)

    monkeypatch.setattr(schedule, "top_log_probabilities", counted)
    engine = Engine(model, rows=3)
    lengths = ((5, 2), (3, 7), (6, 0))
    answers = [engine.submit(some_ids(9), max_new_tokens=new, top_log_probabilities=k) for new, k in lengths]
    for answer in answers:
        answer.result()
    assert counts[-4:] == [(3, 7), (3, 7), (2, 2), (2, 2)]
    assert len(counts) <= 5 + 2  # for each prompt and for each step


@pytest.mark.parametrize("k", [-1, 21, 1.0, True, "3", None])
def test_as_many_as_there_may_be(model: QwenVL, k: Any) -> None:
    """From 0 to 20, refused at once otherwise; a small vocabulary has no more than it has."""
    engine = Engine(model, rows=1)
    with one_line_error(PromptError, "top_log_probabilities", "0 to 20", repr(k)):
        engine.submit(some_ids(9), top_log_probabilities=k)
    assert not engine.step()


# --- what has been done ---------------------------------------------------------------------------------------------


def test_totals_are_those_of_the_requests(model: QwenVL) -> None:
    """Tokens of prompts, what of them was there already, new ids, and steps; and they cannot be written to."""
    engine = Engine(model, rows=2, chunk=16)
    assert engine.totals == Totals(0, 0, 0, 0)
    first = [*some_ids(5), *SPAN, *some_ids(9, 1)]
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    reply = engine.submit(first, pixels, max_new_tokens=4).result()
    assert engine.totals == Totals(20, 0, 4, 5)  # the prompt took two steps, the second of which gave the first id
    assert not engine.step()
    assert engine.totals.steps == 5  # there was nothing to do
    second = [*first, *reply, *some_ids(6, 2)]
    answers = [engine.submit(second, pixels, max_new_tokens=3), engine.submit(some_ids(9, 3), max_new_tokens=5)]
    unheard = engine.submit(some_ids(9, 4), max_new_tokens=5)
    unheard.cancel()
    seen = [engine.totals]
    while engine.step():
        seen.append(engine.totals)
    assert engine.totals == Totals(20 + 30 + 9, 23, 4 + 3 + 5, 10)
    assert [answer.reused for answer in answers] == [23, 0]
    for before, after in pairwise(seen):
        assert all(a <= b for a, b in zip(astuple(before), astuple(after), strict=True))
    with pytest.raises(FrozenInstanceError):
        engine.totals.steps = 0  # type: ignore[misc]


def test_totals_of_equal_prompts_and_of_scores(model: QwenVL) -> None:
    """What a prompt takes over from one that is computed beside it is reused as well; continuations do not count."""
    engine = Engine(model, rows=4, chunk=512)
    answers = [engine.submit(some_ids(60), max_new_tokens=3, do_sample=True, seed=seed) for seed in range(4)]
    for answer in answers:
        answer.result()
    assert astuple(engine.totals)[:3] == (240, 3 * 59, 12)
    engine.score(some_ids(60), [[4, 5, 6], [7]])
    assert astuple(engine.totals)[:3] == (300, 4 * 59, 12)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("failure", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("at", range(1, 12))
def test_a_prompt_counts_once(
    model: QwenVL, at: int, failure: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is computed: in the middle of it, or behind what had been said. And what a text then has back
    of its own was not reused: the count once went beyond the prompt.
    """
    engine = Engine(model, rows=3, chunk=8)
    requests = [asked(model, some_ids(20 + seed, seed), new_tokens=6) for seed in range(3)]
    answers = [one.submit(engine) for one in requests]
    forward, calls = model.decoder.ln_f.forward, 0

    def fails(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise failure("CUDA out of memory")
        return forward(x)

    monkeypatch.setattr(model.decoder.ln_f, "forward", fails)
    more = True
    while more:
        try:
            more = engine.step()
        except KeyboardInterrupt:
            assert failure is KeyboardInterrupt
    assert calls > at
    assert [answer.result() for answer in answers] == [one.alone for one in requests]
    assert [answer.reused for answer in answers] == [0, 0, 0]
    assert astuple(engine.totals)[:3] == (20 + 21 + 22, 0, 18)
