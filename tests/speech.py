"""Put words into the embedded model's mouth: tests want certain boxes, or an interruption, whatever it would say."""

from collections.abc import Iterator
from typing import Any

import pytest

import qwenvl.generation.session
from qwenvl.generation.decode import NewIds
from qwenvl.text.tokenizer import REGION_TAGS, Tokenizer
from qwenvl.weights.hub import embedded

DOG = "<ref>the dog</ref><box>(100,200),(500,600)</box>"  # what a good model says
DOG_PLACE = "(100,200),(500,600)</box>"  # and what it goes on with when it is asked with an open <box>

Reply = str | tuple[str, type[BaseException]]  # a tuple says something and is then interrupted


def speak(monkeypatch: pytest.MonkeyPatch, *replies: Reply) -> None:
    """The next answers are `replies`, one after the other. All but the choice of ids runs as it does otherwise."""
    tokenizer, waiting = Tokenizer(embedded("tiny")), list(replies)

    def say(*_: Any, **__: Any) -> Iterator[NewIds]:
        reply = waiting.pop(0)
        text, interruption = reply if isinstance(reply, tuple) else (reply, None)
        for id_ in tokenizer.encode_tagged(text, REGION_TAGS):
            yield NewIds([id_])
        if interruption is not None:
            raise interruption

    monkeypatch.setattr(qwenvl.generation.session, "decode", say)
