"""Many requests over one model: each is answered as it would be alone, and what has been computed is used again."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from captured import pretend
from schedules import asked, differs, mixed
from support import Golden, one_line_error, random_model, small_config
from torch import Tensor

from qwenvl.errors import CacheError, ConfigError, PromptError
from qwenvl.generation import prompts
from qwenvl.generation.engine import Engine, _chunk_for
from qwenvl.generation.request import Request
from qwenvl.generation.sampling import SamplingOptions
from qwenvl.model.qwenvl import QwenVL
from qwenvl.pipeline import Pipeline
from qwenvl.training.memory import QWEN_VL

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


@pytest.fixture
def columns(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of the decoder computes."""
    seen: list[int] = []
    forward = model.decoder.forward

    def counted(embeddings: Tensor, *args: object, **more: object) -> Tensor:
        seen.append(embeddings.shape[1])
        return forward(embeddings, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(model.decoder, "forward", counted)
    return seen


@pytest.fixture
def encoded(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of the vision tower sees."""
    seen: list[int] = []
    encode = model.encode_images

    def counted(pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(model, "encode_images", counted)
    return seen


def picture(seed: int = 0) -> Tensor:
    """[1,3,28,28]."""
    return torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def some_ids(count: int, seed: int = 0) -> list[int]:
    """Ordinary ids."""
    found: list[int] = torch.randint(1, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found


# --- the same as alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "chunk"), [(1, 2048), (3, 40), (8, 7), (8, 2048)])
@pytest.mark.parametrize("name", ["tiny_112", "tiny_448"])
def test_the_references_greedy_ids(name: str, rows: int, chunk: int, way: str, request: pytest.FixtureRequest) -> None:
    """All golden prompts at once, in few rows and many, in chunks and whole: the ids that the reference chose."""
    golden: Golden = request.getfixturevalue(name)
    engine = Engine(golden.model, rows=rows, chunk=chunk, max_length=2048)
    running = []
    for facts in golden.facts["cases"]:
        case = golden.case(facts["name"])
        at = 0
        for row, expected in enumerate(case.greedy):
            shown = len(facts["images"][row])
            pixels = case.pixels[at : at + shown] if case.pixels is not None and shown else None
            at += shown
            running.append(
                (engine.submit(case.input_ids[row][case.mask[row]], pixels, max_new_tokens=len(expected)), expected)
            )
    assert len(running) > 6
    for answer, expected in running:
        assert answer.result() == expected
    assert way == "eager" or max(engine._scheduler._steppers) > min(rows - 1, 1)


OPTIONS = [
    {"do_sample": True, "temperature": 1.3, "seed": 5},
    {"do_sample": True, "top_k": 7, "top_p": 0.8, "seed": 6},
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2},
    {"do_sample": True, "seed": 7, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    {"min_new_tokens": 6},
    {"frequency_penalty": 0.9},
    {"do_sample": True, "seed": 8, "frequency_penalty": -0.4, "presence_penalty": 1.3},
    {},
]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("lookup", [0, 3])
def test_everyone_has_options_of_their_own(model: QwenVL, lookup: int) -> None:
    """Sampling draws from each request's own seed, whatever else runs; processors look at its own text alone."""
    engine = Engine(model, rows=5, chunk=16, lookup=lookup, max_length=128)
    stop = (some_ids(1, 9)[0], 4)
    prompts = [some_ids(10 + 9 * number, number) for number in range(len(OPTIONS))]
    answers = [
        engine.submit(prompt, max_new_tokens=20, stop_ids=stop, with_log_probabilities=True, **options)
        for prompt, options in zip(prompts, OPTIONS, strict=True)
    ]
    vl = Pipeline(model, None)
    for prompt, options, answer in zip(prompts, OPTIONS, answers, strict=True):
        chosen = SamplingOptions(max_new_tokens=20, **options)  # type: ignore[arg-type]
        ids, likely = vl.generate_ids(
            torch.tensor([prompt]), stop_ids=stop, return_log_probabilities=True, **options, max_new_tokens=20
        )
        assert chosen == answer.options
        assert answer.result() == ids[0]
        assert answer.log_probabilities == pytest.approx(likely[0], abs=1e-4)
        assert answer.finish_reason == ("stop" if ids[0][-1] in stop else "length")


def test_ids_come_as_they_are_computed(model: QwenVL) -> None:
    """Who iterates over one request moves the others on as well, and gets each id as soon as it is there."""
    engine = Engine(model, rows=2, stop_ids=())
    first, second = (engine.submit(some_ids(9, seed), max_new_tokens=6) for seed in (1, 2))
    ids = [next(first), next(first), next(first)]
    assert len(second.ids) == len(first.ids) == 3
    assert first.finish_reason is None
    assert ids + list(first) == first.ids == asked(model, some_ids(9, 1), new_tokens=6).alone
    assert second.finish_reason == "length"  # in the same steps
    assert list(second) == second.ids
    assert engine.load.active == engine.load.waiting == engine.load.tokens == 0


@pytest.mark.usefixtures("way")
def test_threads_drive_together(model: QwenVL) -> None:
    """Each of many threads iterates over its own request, as in a server: nobody hangs, nobody gets another's ids."""
    engine = Engine(model, rows=3, chunk=16, max_length=256)
    requests = mixed(model, 12, 60, seed=3)
    answers: dict[int, list[int]] = {}

    def run(number: int) -> None:
        answers[number] = list(requests[number].submit(engine))

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not [
        differs(model, requests[number], ids)
        for number, ids in answers.items()
        if differs(model, requests[number], ids)
    ]
    assert len(answers) == len(requests)


@pytest.mark.usefixtures("way")
def test_every_reader_sees_ids_as_they_come(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever does not drive is woken after every step: threads once saw all of their ids at the very end."""
    engine = Engine(model, rows=4)
    requests = [engine.submit(some_ids(9, seed), max_new_tokens=25, stop_ids=()) for seed in range(4)]
    behind: list[int] = []
    step = engine._scheduler.step

    def slowly() -> None:
        time.sleep(0.004)  # the others' turn, as where a step takes long
        step()

    monkeypatch.setattr(engine._scheduler, "step", slowly)

    def read(request: Request) -> None:
        behind.extend(len(request.ids) - number for number, _ in enumerate(request, 1))

    threads = [threading.Thread(target=read, args=(request,), daemon=True) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(behind) == 100
    assert sum(behind) / len(behind) < 3  # of 25


def test_neighbours_in_one_step_keep_their_options(model: QwenVL) -> None:
    """Requests that differ in one option alone are chosen apart: the other's top_p or stop ids would show."""
    prompt = some_ids(9)
    alone = asked(model, prompt, new_tokens=6).alone
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"do_sample": True, "seed": 1, "top_p": 1.0}, {"do_sample": True, "seed": 1, "top_p": 0.1}),
        ({"do_sample": True, "seed": 1, "top_k": 0}, {"do_sample": True, "seed": 1, "top_k": 1}),
        ({"min_new_tokens": 4, "stop_ids": alone[:1]}, {"min_new_tokens": 4, "stop_ids": [63]}),
    ]
    for pair in pairs:
        together = Engine(model, rows=2)
        answers = [together.submit(prompt, max_new_tokens=6, **options) for options in pair]
        expected = [Engine(model, rows=1).submit(prompt, max_new_tokens=6, **options).result() for options in pair]
        assert [answer.result() for answer in answers] == expected
        assert expected[0] != expected[1]


# --- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("way")
def test_an_answer_ends_where_its_row_does(model: QwenVL) -> None:
    """An answer that would not fit into the row ends there, with the ids that fit; its neighbour goes on."""
    engine = Engine(model, rows=2, max_length=40)
    short = engine.submit(some_ids(36), max_new_tokens=20)
    other = engine.submit(some_ids(10, 1), max_new_tokens=20)
    assert short.result() == asked(model, some_ids(36), new_tokens=4).alone
    assert short.finish_reason == "length"
    assert other.result() == asked(model, some_ids(10, 1), new_tokens=20).alone


@pytest.mark.usefixtures("way")
def test_should_stop_ends_its_own_request(model: QwenVL) -> None:
    """A stop string is found by looking at ids: the one with which it is complete is the last."""
    engine = Engine(model, rows=2)
    alone = asked(model, some_ids(12), new_tokens=12).alone
    seen: list[int] = []

    def third(id_: int) -> bool:
        seen.append(id_)
        return len(seen) == 3

    stopped, other = (
        engine.submit(some_ids(12), max_new_tokens=12, should_stop=third),
        engine.submit(some_ids(12), max_new_tokens=12),
    )
    assert stopped.result() == seen == alone[:3]
    assert stopped.finish_reason == "stop"
    assert other.result() == alone


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_cancelled_request_frees_its_row_with_the_next_step(model: QwenVL, after: int) -> None:
    """Whoever hangs up gives the row to the next in the queue, one step later; iterating over it ends."""
    engine = Engine(model, rows=1, chunk=8)
    gone, following = engine.submit(some_ids(20), max_new_tokens=50), engine.submit(some_ids(5, 1), max_new_tokens=3)
    for _ in range(after):
        engine.step()
    gone.cancel()
    assert gone.finish_reason == "cancelled"
    engine.step()
    assert following.row == 0 or following.finish_reason
    assert list(gone) == gone.ids == asked(model, some_ids(20), new_tokens=50).alone[: len(gone.ids)]
    assert following.result() == asked(model, some_ids(5, 1), new_tokens=3).alone
    gone.cancel()
    following.cancel()
    assert following.finish_reason == "length"  # too late


def test_what_cannot_be_answered_is_refused_at_once(model: QwenVL) -> None:
    """One line says what is wrong, before anything is computed, and the engine has nothing to do."""
    engine = Engine(model, rows=1, max_length=30)
    with one_line_error(PromptError, "31 tokens", "30", "max_length"):
        engine.submit(some_ids(30))
    with one_line_error(PromptError, "at least one id"):
        engine.submit([])
    with one_line_error(PromptError, "0 to 63"):
        engine.submit([1, 64])
    with one_line_error(PromptError, "whole numbers"):
        engine.submit([1.5])  # type: ignore[list-item]
    with one_line_error(PromptError, "1 image spans", "0 images"):
        engine.submit([*SPAN, 5])
    with one_line_error(PromptError, "0 image spans", "1 images"):
        engine.submit([5], picture())
    with one_line_error(ConfigError, "temprature"):
        engine.submit([5], temprature=1)
    with one_line_error(PromptError, "continuations"):
        engine.score([5], [])
    with one_line_error(PromptError, "continuation 2"):
        engine.score([5], [[4], []])
    with one_line_error(PromptError, "32 tokens"):
        engine.score(some_ids(30), [[4, 5, 6]])
    assert not engine.step()
    assert (
        engine.submit(np.array(some_ids(29)), max_new_tokens=5).result()
        == asked(model, some_ids(29), new_tokens=1).alone
    )
    for name, value in {"rows": 0, "max_length": 1, "chunk": -5, "lookup": "a"}.items():
        with one_line_error(CacheError, name, value):
            Engine(model, **{name: value})  # type: ignore[arg-type]
    with one_line_error(PromptError, "3 ids wide"):
        engine.submit([*SPAN[:3], *SPAN[4:], 5, 6, 7, 8], picture())
    with one_line_error(PromptError, "pixels must be"):
        engine.submit([*SPAN, 5], torch.randn(1, 3, 14, 14))
    with one_line_error(PromptError, "whole numbers"):
        engine.submit(torch.ones(2, 3, dtype=torch.int64))


# --- what has been computed is used again ---------------------------------------------------------------------------


@pytest.mark.usefixtures("way")
def test_a_further_round_computes_what_is_new(model: QwenVL, columns: list[int], encoded: list[int]) -> None:
    """A conversation's earlier rounds are in a row that its last request left: neither they nor the picture are
    computed again, and the answer is the same.
    """
    engine = Engine(model, rows=3)
    first = [*some_ids(5), *SPAN, *some_ids(9, 1)]
    reply = engine.submit(first, picture(), max_new_tokens=4).result()
    second = [*first, *reply, *some_ids(6, 2)]
    columns.clear()
    answer = engine.submit(second, picture(), max_new_tokens=4)
    next(answer)
    assert columns[0] == 1 + 6  # the reply's last id had not entered the cache
    assert answer.reused == len(first) + 3
    assert encoded == [1]
    columns.clear()
    assert answer.result() == asked(model, second, picture(), 4).alone


def test_another_picture_is_not_the_same_text(model: QwenVL, encoded: list[int]) -> None:
    """The ids inside an image span say nothing of the picture: what follows another picture is computed anew."""
    engine = Engine(model, rows=2)
    text = [*some_ids(5), *SPAN, *some_ids(9, 1)]
    engine.submit(text, picture(0), max_new_tokens=2).result()
    answer = engine.submit(text, picture(1), max_new_tokens=8)
    assert answer.result() == asked(model, text, picture(1), 8).alone
    assert answer.reused == 5 + 1 - 1  # up to <img>, which stays with its span
    assert encoded[:2] == [1, 1]


def test_the_longest_beginning_wherever_it_is(model: QwenVL) -> None:
    """Of two texts left in rows and one still being answered, the one that shares most is copied, and none is lost."""
    engine = Engine(model, rows=4)
    base = some_ids(40)
    for shared in (10, 30):
        engine.submit([*base[:shared], *some_ids(9, shared)], max_new_tokens=2).result()
    going = engine.submit([*base[:20], *some_ids(9, 20)], max_new_tokens=30)
    next(going)
    answers = [engine.submit([*base[:end], 59, 59], max_new_tokens=6) for end in (35, 22, 12)]
    for end, answer in zip((35, 22, 12), answers, strict=True):
        assert answer.result() == asked(model, [*base[:end], 59, 59], new_tokens=6).alone
    assert answers[0].reused == 30
    assert answers[1].reused == 22  # of which the first answer's row has most
    again = engine.submit([*base[:30], *some_ids(9, 30), 7], max_new_tokens=1)
    again.result()
    assert going.result() == asked(model, [*base[:20], *some_ids(9, 20)], new_tokens=30).alone


def test_a_stretched_rotation_is_not_reused(model: QwenVL) -> None:
    """A prompt of another NTK alpha turns every key by other angles: nothing of a shorter one's is of use."""
    engine = Engine(model, rows=2, max_length=128)
    short, long = some_ids(60), some_ids(70)
    engine.submit(short, max_new_tokens=2).result()
    answer = engine.submit(long, max_new_tokens=8)
    assert answer.result() == asked(model, long, new_tokens=8).alone
    assert answer.reused == 0
    further = engine.submit([*long, 5, 6], max_new_tokens=8)
    assert further.result() == asked(model, [*long, 5, 6], new_tokens=8).alone
    assert further.reused == 70


def test_equal_prompts_at_once_are_computed_once(model: QwenVL, columns: list[int]) -> None:
    """Several answers to one prompt, or many prompts with the same examples: the first computes, the others copy."""
    engine = Engine(model, rows=4, chunk=512)
    prompt = some_ids(60)
    answers = [engine.submit(prompt, max_new_tokens=3, do_sample=True, seed=seed) for seed in range(4)]
    for seed, answer in enumerate(answers):
        assert answer.result() == asked(model, prompt, new_tokens=3, do_sample=True, seed=seed).alone
    assert [answer.reused for answer in answers] == [0, 59, 59, 59]
    assert sum(columns[: columns.index(1)]) == 60


def test_many_pictures_are_encoded_once(model: QwenVL, encoded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """More pictures on their way than are kept: none is dropped before it is used, and later ones drop them."""
    monkeypatch.setattr(prompts, "FEATURES_KEPT", 3)
    engine = Engine(model, rows=4, chunk=4)
    shown = [torch.cat([picture(10 * row + n) for n in range(4)]) for row in range(4)]
    text = [id_ for _ in range(4) for id_ in (*SPAN, 7)]
    answers = [engine.submit([row + 1, *text], pixels, max_new_tokens=2) for row, pixels in enumerate(shown)]
    for answer in answers:
        assert len(answer.result()) == 2
        assert answer.pictures == ()
    assert sum(encoded) == 16
    assert len(engine._scheduler._prompts._features) <= 4
    assert answers[3].ids == asked(model, [4, *text], shown[3], 2).alone


def test_a_buffer_may_be_filled_again(model: QwenVL) -> None:
    """Pixels are read when they are encoded, which is later: a caller's own buffer may hold another picture by then."""
    engine = Engine(model, rows=2)
    buffer, expected = picture(0), asked(model, [*SPAN, *some_ids(5)], picture(0), 8).alone
    answer = engine.submit([*SPAN, *some_ids(5)], buffer, max_new_tokens=8)
    buffer.copy_(picture(1))
    assert answer.result() == expected


@pytest.mark.usefixtures("way")
def test_weights_that_change_under_a_request() -> None:
    """What a request that is going on computed with the old weights serves nobody, neither now nor when it has ended;
    and steps that were captured over them are not replayed for others.
    """
    model = random_model(small_config(), seed=4).requires_grad_(False)
    engine = Engine(model, rows=2)
    base = some_ids(30)
    going = engine.submit(base, max_new_tokens=12)
    for _ in range(4):
        engine.step()
    steppers = list(engine._scheduler._steppers.values())
    model.decoder.blocks[0].attn.c_attn.weight.mul_(-1)
    beside = engine.submit([*base[:29], 7], max_new_tokens=8)
    assert beside.result() == asked(model, [*base[:29], 7], new_tokens=8).alone
    going.result()
    after = engine.submit([*base, 7], max_new_tokens=8)
    assert after.result() == asked(model, [*base, 7], new_tokens=8).alone
    assert not beside.reused
    assert not set(steppers) & set(engine._scheduler._steppers.values())


def test_a_picture_is_encoded_once(model: QwenVL, encoded: list[int]) -> None:
    """Features are kept by the hash of the pixels, whoever shows them and wherever in the text."""
    engine = Engine(model, rows=2)
    both = torch.cat((picture(0), picture(1)))
    engine.submit([*SPAN, 5, *SPAN], both, max_new_tokens=1).result()
    for text, pixels in (([4, *SPAN, 5], picture(1)), ([*SPAN, 9, *SPAN, 8], both.flip(0))):
        expected = asked(model, text, pixels, 3).alone
        encoded.clear()
        assert engine.submit(text, pixels, max_new_tokens=3).result() == expected
        assert encoded == []


def test_new_weights_make_what_was_computed_useless() -> None:
    """After a weight has been written to, neither rows nor features of before are taken."""
    model = random_model(small_config(), seed=4).requires_grad_(False)
    engine = Engine(model, rows=1)
    text = [*SPAN, *some_ids(12)]
    engine.submit(text, picture(), max_new_tokens=4).result()
    model.visual.conv1.weight.mul_(1.5)
    model.decoder.blocks[0].attn.c_attn.weight.mul_(0.7)
    answer = engine.submit(text, picture(), max_new_tokens=8)
    assert answer.result() == asked(model, text, picture(), 8).alone
    assert answer.reused == 0


# --- fairness -------------------------------------------------------------------------------------------------------


def test_a_long_prompt_does_not_hold_others_up(model: QwenVL) -> None:
    """While a long prompt is computed in chunks, those that decode get an id in every step, and a short prompt that
    comes later begins before it.
    """
    engine = Engine(model, rows=3, chunk=10, max_length=256)
    going = engine.submit(some_ids(5), max_new_tokens=40)
    next(going)
    long = engine.submit(some_ids(200, 1), max_new_tokens=2)
    engine.step()
    short = engine.submit(some_ids(8, 2), max_new_tokens=2)
    before = len(going.ids)
    for steps in range(1, 15):
        engine.step()
        assert len(going.ids) == before + steps
        assert bool(short.ids) == (steps >= 2)
    assert not long.ids
    assert long.result() == asked(model, some_ids(200, 1), new_tokens=2).alone


def test_what_is_left_of_a_chunk_is_for_whole_prompts(model: QwenVL, columns: list[int]) -> None:
    """A few tokens of the next prompt would read all weights for little: it begins with the next step's chunk."""
    engine = Engine(model, rows=3, chunk=10)
    for number, tokens in enumerate((6, 8, 4)):
        engine.submit(some_ids(tokens, number), max_new_tokens=3)
    engine.step()
    assert columns == [6]


def test_a_stop_id_at_the_very_end_is_a_stop(model: QwenVL) -> None:
    """The last id that was asked for is the stop id: the answer is complete, not cut off."""
    alone = asked(model, some_ids(9), new_tokens=4).alone
    end = alone.index(alone[3]) + 1
    request = Engine(model, rows=1).submit(some_ids(9), max_new_tokens=end, stop_ids=alone[3:4])
    assert request.result() == alone[:end]
    assert request.finish_reason == "stop"


def test_pictures_take_turns_too(model: QwenVL, encoded: list[int]) -> None:
    """Many pictures in one prompt are encoded a few to a step: a picture is as much work as its patches."""
    engine = Engine(model, rows=1, chunk=8)  # each has 4 patches
    pixels = torch.cat([picture(seed) for seed in range(5)])
    answer = engine.submit([id_ for _ in range(5) for id_ in (*SPAN, 7)], pixels, max_new_tokens=1)
    engine.step()
    assert encoded == [2]
    answer.result()
    assert encoded == [2, 2, 1]


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [0, 3])
def test_scores_are_those_of_an_uncached_forward(model: QwenVL, others: int, columns: list[int]) -> None:
    """The mean loss of each continuation, with its prompt computed once, while others are answered."""
    prompt, options = [*some_ids(30), *SPAN, 9], [[4, 5, 6], [7], some_ids(12, 3)]
    expected = []
    for ids in options:
        logits = model(torch.tensor([[*prompt, *ids]]), picture(), logits_to_keep=len(ids) + 1, ntk_alpha=1.0)
        expected.append(float(torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(ids))))
    engine = Engine(model, rows=2, chunk=16)
    running = [asked(model, some_ids(20, seed), new_tokens=9) for seed in range(others)]
    answers = [one.submit(engine) for one in running]
    columns.clear()
    assert engine.score(prompt, options, picture()) == pytest.approx(expected, abs=2e-5)
    assert others or sum(columns) == len(prompt) + sum(len(ids) - 1 for ids in options)
    assert [answer.result() for answer in answers] == [one.alone for one in running]
    request = engine.submit_score(prompt, options, picture())
    request.result()
    assert [len(found) for found in request.scores] == [3, 1, 12]
    assert request.reused == len(prompt) - 1


# --- prompt lookup --------------------------------------------------------------------------------------------------


def test_lookup_takes_fewer_steps_for_the_same_ids(model: QwenVL, columns: list[int]) -> None:
    """A text that repeats itself is guessed, several ids to a step, and nothing else is said."""
    monologue = asked(model, some_ids(4, 5), new_tokens=56)
    prompt, expected = [*monologue.ids, *monologue.alone[:44]], monologue.alone[44:]
    assert len(set(expected)) <= 2  # here it says the same again and again
    plain: list[int] = []
    guessed: list[int] = []
    for lookup, counted in ((0, plain), (5, guessed)):
        columns.clear()
        engine = Engine(model, rows=1, lookup=lookup, max_length=128)
        assert engine.submit(prompt, max_new_tokens=len(expected)).result() == expected
        counted += columns
    assert len(plain) == len(expected)
    assert len(guessed) < len(plain) / 2
    assert max(guessed[1:]) == 6


def test_lookup_beside_others(model: QwenVL) -> None:
    """Rows with guesses and without, some right and some wrong, share the steps."""
    requests = mixed(model, 12, 90, seed=8)
    engine = Engine(model, rows=4, chunk=32, lookup=4, max_length=256)
    answers = [one.submit(engine) for one in requests]
    assert [differs(model, one, answer.result()) for one, answer in zip(requests, answers, strict=True)] == [""] * len(
        answers
    )


# --- defaults -------------------------------------------------------------------------------------------------------


def test_defaults(model: QwenVL) -> None:
    """Rows are as long as the model was trained for, and stop ids are the engine's unless a request has its own."""
    engine = Engine(model, rows=2)
    assert engine.load.slots == 2 * model.config.seq_length
    assert Engine(model, rows=2, max_length=10_000).load.slots == 2 * model.config.max_position_embeddings
    alone = asked(model, some_ids(9), new_tokens=6).alone
    stopping = Engine(model, rows=2, stop_ids=alone[1:2])
    end = alone.index(alone[1]) + 1
    assert stopping.submit(some_ids(9), max_new_tokens=6).result() == alone[:end]
    assert stopping.submit(some_ids(9), max_new_tokens=6, stop_ids=()).result() == alone


def test_the_default_chunk_grows_with_the_device() -> None:
    """About 15 ms of a GPU and 300 of a CPU: 576 tokens of the published model there, all of a small prompt here."""
    assert _chunk_for(QWEN_VL, torch.device("cuda")) == 576
    assert _chunk_for(QWEN_VL, torch.device("cpu")) == 64
    assert _chunk_for(small_config(), torch.device("cpu")) == 2048


def test_a_thread_that_only_steps_can_wait(model: QwenVL) -> None:
    """It sleeps until something is submitted, and is told that there was nothing when its time is up."""
    engine = Engine(model, rows=1)
    assert not engine.wait(0.01)
    threading.Timer(0.05, lambda: engine.submit(some_ids(9), max_new_tokens=1)).start()
    assert engine.wait(30)


def test_load_tells_what_is_in_use(model: QwenVL) -> None:
    """Those with a row, those without, and the tokens held: what a server reports."""
    engine = Engine(model, rows=1)
    first, _ = engine.submit(some_ids(9), max_new_tokens=6), engine.submit(some_ids(7, 1), max_new_tokens=2)
    assert (engine.load.active, engine.load.waiting, engine.load.rows) == (0, 2, 1)
    next(first)
    assert (engine.load.active, engine.load.waiting, engine.load.tokens) == (1, 1, 9)
    for _ in range(5):
        engine.submit(some_ids(3)).cancel()
    engine.step()
    assert engine.load.waiting == 1  # who has hung up does not wait
