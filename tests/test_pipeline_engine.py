"""Conversations through an engine: many at once, and each as it would be by itself."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from PIL import Image
from support import one_line_error

import qwenvl
from qwenvl.errors import PromptError
from qwenvl.pipeline import Pipeline

QUESTIONS = ["the dog", "what is in this picture", "where is the cat", "what is this box"]


@pytest.fixture(scope="module")
def loaded(chat_folder: Path) -> Pipeline:
    """The checkpoint, loaded once; tests take a pipeline of their own from it."""
    return qwenvl.load(chat_folder, dtype="float32", device="cpu", quiet=True)


@pytest.fixture
def alone(loaded: Pipeline) -> Pipeline:
    """One answer at a time."""
    return Pipeline(loaded.model, loaded.tokenizer, loaded.generation_config)


@pytest.fixture
def many(loaded: Pipeline) -> Pipeline:
    """Answers through an engine."""
    vl = Pipeline(loaded.model, loaded.tokenizer, loaded.generation_config)
    vl.start_engine(rows=3, max_length=512, chunk=32)
    return vl


def picture(number: int) -> Image.Image:
    """A small one, all of one colour."""
    return Image.new("RGB", (40, 30), (60 * number, 20, 200 - 50 * number))


def query(number: int) -> list[qwenvl.pipeline.Part]:  # type: ignore[name-defined]
    """A picture and a question."""
    return [{"image": picture(number)}, {"text": QUESTIONS[number]}]


def test_streams_are_computed_together(alone: Pipeline, many: Pipeline) -> None:
    """All streams are under way as soon as they are asked for, and each says what it says alone, two rounds long."""
    assert many.engine is not None
    options = {"max_new_tokens": 12, "do_sample": True, "seed": 3}
    expected = [alone.chat(query(number), **options) for number in range(4)]
    streams = [many.chat_stream(query(number), **options) for number in range(4)]
    assert many.engine.load.waiting == 4
    assert "".join(streams[3]) == expected[3][0]
    assert ["".join(stream) for stream in streams[:3]] == [reply for reply, _ in expected[:3]]
    assert [stream.history for stream in streams] == [history for _, history in expected]
    further = [many.chat_stream("and the cat", stream.history, **options) for stream in streams]
    for (_, history), stream in zip(expected, further, strict=True):
        assert "".join(stream) == alone.chat("and the cat", history, **options)[0]
    assert many.engine.load.active == 0


def test_everything_goes_through_the_engine(alone: Pipeline, many: Pipeline) -> None:
    """generate, ground and score as well; a stop text ends the request itself, not only what is read of it."""
    assert many.engine is not None
    prompt = [{"image": picture(1)}, {"text": "the dog is in"}]
    text = alone.generate(prompt, max_new_tokens=30, do_sample=False)
    assert many.generate(prompt, max_new_tokens=30, do_sample=False) == text
    assert "".join(many.generate_stream(prompt, max_new_tokens=30, do_sample=False)) == text
    stop = text[len(text) // 2 :][:3]
    cut = many.generate_stream(prompt, max_new_tokens=30, do_sample=False, stop=stop)
    assert (
        "".join(cut)
        == alone.generate(prompt, max_new_tokens=30, do_sample=False, stop=stop)
        == text[: text.index(stop)]
    )
    assert many.ground(picture(2), "the dog") == alone.ground(picture(2), "the dog")
    for ours, theirs in zip(
        many.score("the", [" dog", " cat is"]), alone.score("the", [" dog", " cat is"]), strict=True
    ):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert not many.engine.step()


def test_a_closed_stream_frees_its_row(many: Pipeline) -> None:
    """Who stops reading closes the stream, begun or not: the engine has nothing to do for it any more."""
    assert many.engine is not None
    streams = [many.chat_stream(query(number), max_new_tokens=200) for number in range(4)]
    next(streams[0])
    for stream in streams:
        stream.close()
    assert not many.engine.step()
    assert streams[0].reply
    assert streams[0].history[-1].reply == streams[0].reply
    assert list(streams[1]) == []


def test_threads(alone: Pipeline, many: Pipeline) -> None:
    """A pipeline with an engine serves any number of threads."""
    replies: dict[int, str] = {}

    def ask(number: int) -> None:
        replies[number] = many.chat(query(number % 4), max_new_tokens=10, do_sample=False)[0]

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    expected = [alone.chat(query(number), max_new_tokens=10, do_sample=False)[0] for number in range(4)]
    assert replies == {number: expected[number % 4] for number in range(8)}


def test_a_prompt_that_does_not_fit_is_refused(many: Pipeline) -> None:
    """The engine's rows are shorter than the model's positions: the line says which limit it is."""
    with one_line_error(PromptError, "512", "max_length"):
        many.generate("the dog " * 300)


def test_a_long_conversation_goes_on(alone: Pipeline, many: Pipeline) -> None:
    """A row is shorter than the checkpoint's window of history: the oldest turns are left out, with room to answer."""
    history: list[qwenvl.Turn] = []
    for number in range(30):
        _, history = many.chat(f"what is in this box {number}", history, max_new_tokens=20, do_sample=False)
    assert len(history) == 30
    assert many.engine is not None
    short = alone.chat("the dog", history, max_new_tokens=5, do_sample=False, max_window_size=300)
    assert many.chat("the dog", history, max_new_tokens=5, do_sample=False, max_window_size=300) == short
    assert many.score("the dog", []) == alone.score("the dog", []) == []
