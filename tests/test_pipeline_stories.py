"""What users of the facade once stumbled over, each told by the test that keeps it from coming back."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import one_line_error

import qwenvl
from qwenvl.config import GenerationConfig
from qwenvl.errors import PromptError
from qwenvl.image import ImagePolicy
from qwenvl.pipeline import Pipeline


@pytest.fixture(scope="module")
def loaded(chat_folder: Path) -> Pipeline:
    """A small chat checkpoint."""
    return qwenvl.load(chat_folder, dtype="float32", device="cpu", quiet=True)


def over(loaded: Pipeline, **changes: Any) -> Pipeline:
    """A pipeline that remembers nothing, over the same weights."""
    config = changes.pop("generation_config", loaded.generation_config)
    return Pipeline(loaded.model, loaded.tokenizer, config, **changes)


def test_the_pipelines_policy_holds_everywhere(loaded: Pipeline) -> None:
    """A larger limit of pixels was once checked against the library's default a second time."""
    large = Image.new("RGB", (10_000, 9_000))
    vl = over(loaded, policy=ImagePolicy(max_pixels=10**9))
    vl.chat([{"image": large}, {"text": "what"}], max_new_tokens=1)
    vl.ground(large, "the dog")


def test_the_window_of_one_call(loaded: Pipeline) -> None:
    """`max_window_size` can be given to a call, as in the reference: the history then counts for nothing here."""
    _, history = over(loaded).chat("the dog", max_new_tokens=4)
    alone, _ = over(loaded).chat("what is this", max_new_tokens=8)
    assert over(loaded).chat("what is this", history, max_window_size=1, max_new_tokens=8)[0] == alone


def test_one_stop_string_is_one(loaded: Pipeline) -> None:
    """A bare text was once taken as as many stop strings as it has letters."""
    plain = over(loaded).generate("the dog", max_new_tokens=12)
    stop = plain[3:6]
    assert over(loaded).generate("the dog", stop=stop, max_new_tokens=12) == plain[: plain.index(stop)]
    for never in (None, plain[0] + "\0"):  # the second begins as the text does, and does not occur in it
        assert over(loaded).generate("the dog", stop=never, max_new_tokens=12) == plain


def test_an_error_keeps_the_conversation(loaded: Pipeline) -> None:
    """A prompt that is too long once threw the cache of the chat away."""
    vl = over(loaded)
    _, history = vl.chat("the dog", max_new_tokens=4)
    session = vl._session
    with one_line_error(PromptError, "positions"):
        vl.chat("word " * 5000, history, max_new_tokens=4)
    assert session is not None
    assert vl._session is session


def test_a_raw_checkpoint_has_no_system_message(loaded: Pipeline) -> None:
    """It was once dropped without a word."""
    vl = over(loaded, generation_config=GenerationConfig(chat_format="raw", max_new_tokens=2))
    with one_line_error(PromptError, "raw", "system"):
        vl.chat("the dog", system="Be brief.")


@pytest.mark.parametrize("wrong", [{"system": 5}, {"history": 5}, {"stop": [""]}], ids=repr)
def test_mistakes_of_a_chat(loaded: Pipeline, wrong: dict[str, Any]) -> None:
    """Each was a traceback, or silence, and is one line."""
    with one_line_error(PromptError, next(iter(wrong))):
        over(loaded).chat("the dog", **wrong)


def test_mistakes_of_other_calls(loaded: Pipeline) -> None:
    """Ids that are no tensor, nothing to find."""
    with one_line_error(PromptError, "input_ids", "list"):
        loaded.generate_ids([[1, 2]])  # type: ignore[arg-type]
    with one_line_error(PromptError, "phrase"):
        loaded.ground(Image.new("RGB", (8, 8)), " ")
