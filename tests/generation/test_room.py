"""Where a device has too little memory: what would fit is said, and nothing that was held is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from captured import pretend
from commands import Run
from support import one_line_error, random_model, small_config

import qwenvl
from qwenvl.adapt.capture import Stepper
from qwenvl.config import QuantizationConfig
from qwenvl.errors import CacheError
from qwenvl.generation import batch, room, session
from qwenvl.generation.batch import generate_batch
from qwenvl.generation.beam import BeamOptions
from qwenvl.generation.decode import decode
from qwenvl.generation.room import allocate, bounded
from qwenvl.generation.sampling import SamplingOptions
from qwenvl.generation.session import Session, start
from qwenvl.model.cache import KVCache
from qwenvl.model.qwenvl import QwenVL

pytest_plugins = ("command_fixtures",)

TOKEN = 2 * 2 * 128 * 4  # bytes that the cache of one token takes: keys and values, 2 layers, 128 wide, float32
PASSING = (12 * 128 + 4 * 128) * 4  # and, roughly, what it takes on its way through a block


@pytest.fixture
def model() -> QwenVL:
    """Random weights, 1,100 positions."""
    return random_model(small_config(max_position_embeddings=1100)).requires_grad_(False)


def no_more_than(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """A device whose memory takes caches of so many tokens, and says so."""
    real = KVCache.allocate

    def limited(config: object, rows: int, slots: int, *more: object) -> KVCache:
        if rows * slots > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
        return real(config, rows, slots, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(KVCache, "allocate", limited)
    monkeypatch.setattr(room, "_free_bytes", lambda _: tokens * (TOKEN + PASSING))


def failing(function: Callable[..., object], calls: list[int], at: int) -> Callable[..., object]:
    """`function`, whose call number `at` runs out of memory after it has done its work."""

    def fails(*given: object, **named: object) -> object:
        calls.append(1)
        done = function(*given, **named)
        if len(calls) == at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return done

    return fails


def test_a_cache_that_does_not_fit(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it takes, what there is, and how many tokens or rows would fit."""
    no_more_than(monkeypatch, 300)
    with one_line_error(CacheError, "1000 tokens", f"{1000 * TOKEN / 1e9:.2f} GB", "about 300 tokens would fit"):
        allocate(model, 1, 1000)
    with one_line_error(CacheError, "8 x 100 tokens", "about 37 tokens a row would fit, or 3 rows of as many"):
        allocate(model, 8, 100)
    assert allocate(model, 3, 100).batch == 3


def test_the_advice(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never as much as has just failed; packed weights are not offered to those who have them."""

    def message() -> str:
        with pytest.raises(CacheError) as caught, bounded(model, 1, 100):
            raise torch.OutOfMemoryError("no room")
        return str(caught.value)

    assert message().endswith("ask for fewer tokens, or load an int4 checkpoint")
    monkeypatch.setattr(room, "_free_bytes", lambda _: 10**9)
    assert "about 50 tokens would fit" in message()
    packed = QuantizationConfig(group_size=32)
    monkeypatch.setattr(model, "config", replace(model.config, quantization_config=packed))
    assert message().endswith("ask for fewer tokens")


def test_other_errors_are_not_about_memory(model: QwenVL) -> None:
    """They pass as they are."""
    with pytest.raises(ZeroDivisionError), bounded(model, 1, 100):
        raise ZeroDivisionError


def test_a_session_goes_on(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that cannot grow leaves the conversation as it was: a shorter prompt continues from what it holds."""
    talk = Session()
    start(model, talk, list(range(5, 45)), [], 10)
    cache, signs = talk.cache, talk.signs.tolist()
    no_more_than(monkeypatch, 600)
    with one_line_error(CacheError, "1024 tokens", "about 512 tokens would fit"):
        start(model, talk, [5 + n % 40 for n in range(900)], [], 10)
    assert talk.cache is cache
    assert talk.signs.tolist() == signs
    longer = list(range(5, 55))
    logits = start(model, talk, longer, [], 10)
    torch.testing.assert_close(logits, start(model, Session(), longer, [], 10), atol=2e-5, rtol=0)


@pytest.mark.parametrize("where", ["pictures", "prompt", "behind it"])
def test_a_prompt_that_does_not_fit(model: QwenVL, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Memory that runs out before the cache has counted the prompt, or after: the next one is right."""
    talk = Session()
    start(model, talk, list(range(5, 45)), [], 10)
    ids = [*range(5, 40), 60, 62, 62, 62, 62, 61, *range(5, 30)]
    images = [("a", torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(0)))]
    with monkeypatch.context() as patch:
        if where == "pictures":
            patch.setattr(model, "encode_images", failing(model.encode_images, [], 1))
        else:
            prefill = session.prefill if where == "behind it" else (lambda *_, **__: None)
            patch.setattr(session, "prefill", failing(prefill, [], 1))
        with one_line_error(CacheError, "out of memory", "512 tokens"):
            start(model, talk, ids, images, 10)
    for prompt, pictures in ((ids, images), (ids[:35], [])):
        again = start(model, talk, prompt, pictures, 10)
        torch.testing.assert_close(again, start(model, Session(), prompt, pictures, 10), atol=2e-5, rtol=0)


def test_a_batch_that_does_not_fit(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its cache, its prompt, a step, or a step of a search: always the same kind of line."""
    ids = torch.randint(5, 50, (4, 30), generator=torch.Generator().manual_seed(0))
    options = SamplingOptions(max_new_tokens=10)
    with monkeypatch.context() as patch:
        no_more_than(patch, 100)
        with one_line_error(CacheError, "4 x 40 tokens", "about 20 tokens a row"):
            generate_batch(model, ids, options)
    with monkeypatch.context() as patch:
        patch.setattr(batch, "prefill", failing(batch.prefill, [], 1))
        with one_line_error(CacheError, "4 x 40 tokens"):
            generate_batch(model, ids, options)
    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "__call__", failing(Stepper.__call__, [], 3))
        with one_line_error(CacheError, "4 x 40 tokens"):
            generate_batch(model, ids, options)
    with monkeypatch.context() as patch:
        patch.setattr(model.decoder, "forward", failing(model.decoder.forward, [], 3))
        with one_line_error(CacheError, "8 x 40 tokens"):
            generate_batch(model, ids, options, beams=BeamOptions(2))


@pytest.mark.parametrize("captured", [False, True], ids=["steps", "captured steps"])
def test_a_step_that_does_not_fit(model: QwenVL, monkeypatch: pytest.MonkeyPatch, captured: bool) -> None:
    """The loop takes back what it had not yet read: the cache can be gone on from."""
    if captured:
        pretend(monkeypatch)
    talk, prompt = Session(), list(range(5, 45))
    options = SamplingOptions(max_new_tokens=12)
    logits = start(model, talk, prompt, [], 12).clone()
    assert talk.cache is not None
    history = torch.tensor([prompt])
    expected = [new.ids[0] for new in decode(model, talk.cache, logits, history, options, stepper=talk.stepper)]
    start(model, talk, prompt, [], 12)
    kind = type(talk.stepper)
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(kind, "__call__", failing(kind.__call__, [], 8))
        with one_line_error(CacheError, "out of memory"):
            for new in decode(model, talk.cache, logits, history, options, stepper=talk.stepper):
                found.append(new.ids[0])
    assert 0 < len(found) < 12
    assert found == expected[: len(found)]
    assert talk.cache.host_lengths.tolist() == talk.cache.lengths.tolist() == [40 + len(found) - 1]


def test_the_command_says_it_in_one_line(run: Run, shared: qwenvl.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 2, no traceback."""
    assert shared.tokenizer is not None
    no_more_than(monkeypatch, 10)
    status, out, err = run("chat", "Hello", "--quiet")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("error: out of memory on cpu: the cache of ")


@pytest.mark.parametrize(("tokens", "rows"), [(64 * 20, 16), (64 * 5, 4), (64 * 1000, 32), (10, 1)])
def test_an_engine_takes_what_fits(model: QwenVL, tokens: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody says how many rows, a fifth of the free memory stays free, and one row is tried in any case."""
    monkeypatch.setattr(room, "_free_bytes", lambda _: tokens * TOKEN)
    assert room.fitting_rows(model, 64) == rows


@pytest.mark.parametrize(("little", "rows"), [(64 * 20, 20), (64 * 5, 8), (64 * 1000, 32)])
def test_a_small_models_engine_has_more_rows_on_a_cpu(
    model: QwenVL, little: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as take a little memory, and at least 8."""
    monkeypatch.setattr(room, "LITTLE", little * TOKEN)
    assert room.fitting_rows(model, 64) == rows
