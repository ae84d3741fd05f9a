"""Replies on their way: what was shown is never taken back, and the join is the reply."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import one_line_error, reply_text

from qwenvl.errors import PromptError
from qwenvl.text.stream import ReplyStream
from qwenvl.text.tokenizer import Tokenizer


def stream(
    tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = (), *, strip: bool = True
) -> tuple[list[str], int]:
    """All deltas, until a stop string is complete, and how many ids were taken."""
    reply = ReplyStream(tokenizer, stop, strip=strip)
    deltas, taken = [], 0
    for id_ in ids:
        deltas.append(reply.push(id_))
        taken += 1
        if reply.stopped:
            break
    deltas.append(reply.flush())
    return deltas, taken


def letters(text: str) -> list[int]:
    """Ids of single bytes, the first 256 of every test vocabulary: the finest that a text can arrive."""
    return list(text.encode())


def test_whole_characters_only(small: Tokenizer) -> None:
    """No delta ends inside a character, whatever the ids; a reply that ends in one shows U+FFFD at the end."""
    deltas, _ = stream(small, letters("a你😀b"))
    assert deltas == ["a", "", "", "你", "", "", "", "😀", "b", ""]
    deltas, _ = stream(small, letters("a你")[:-1])
    assert "".join(deltas) == "a\ufffd"
    assert deltas[-1] == "\ufffd"


def test_nothing_is_held_without_need(small: Tokenizer) -> None:
    """Text appears with the id that completes it; only white space waits, for it may be the last."""
    assert stream(small, letters("ab c \n"))[0] == ["a", "b", "", " c", "", "", ""]
    assert stream(small, letters("ab c \n"), strip=False)[0] == ["a", "b", " ", "c", " ", "\n", ""]


def test_tags_are_kept(small: Tokenizer) -> None:
    """Boxes and phrases are part of a reply, as the ids spell them."""
    ids = [small.ref_start_id, *letters("a dog"), small.ref_end_id, small.box_start_id, *letters("(1,2)")]
    assert "".join(stream(small, ids)[0]) == "<ref>a dog</ref><box>(1,2)"


@pytest.mark.parametrize(
    ("text", "stop", "reply", "taken"),
    [
        ("one STOP two", ("STOP",), "one", 8),
        ("one STOP two", ("ST", "STOP"), "one", 6),
        ("one STO", ("STOP",), "one STO", 7),
        ("aab", ("ab",), "a", 3),
        ("STOP", ("STOP",), "", 4),
        ("a\n\nb", ("\n\n",), "a", 3),
        ("\n\nb", ("\n\n",), "", 2),
        (" \n\nb", ("\n\n",), "", 3),
        ("\n b", ("\n\n",), "b", 3),
        ("  b ", (" b",), "", 3),
        ("a Human: b", ("Human:",), "a", 8),
        ("x你好", ("你好",), "x", 7),
    ],
)
@pytest.mark.parametrize("strip", [True, False])
def test_stop_strings(small: Tokenizer, text: str, stop: tuple[str, ...], reply: str, taken: int, strip: bool) -> None:
    """The reply ends before the first complete stop string, also where it is white space that stripping would eat.

    Leading white space used to be dropped before it could become a stop string, so that two newlines were found in one
    token and missed in two.
    """
    deltas, count = stream(small, letters(text), stop, strip=strip)
    joined = "".join(deltas)
    assert (joined if strip else joined.strip()) == reply
    assert count == taken


def test_after_the_stop_nothing_comes(small: Tokenizer) -> None:
    """What is pushed behind a stop string, and the flush, are empty."""
    reply = ReplyStream(small, ("b",))
    assert [reply.push(i) for i in letters("abc d")] == ["a", "", "", "", ""]
    assert reply.flush() == ""
    assert reply.stopped


@pytest.mark.parametrize("stop", [("",), ("a", ""), (5,), (None,)])
def test_stop_strings_are_checked(small: Tokenizer, stop: tuple[str, ...]) -> None:
    """An empty stop string would end every reply before it begins."""
    with one_line_error(PromptError, "at least one character", repr(stop[-1])):
        ReplyStream(small, stop)


def expected(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...]) -> tuple[str, int]:
    """The same by looking at the whole text again after every id."""
    for taken in range(1, len(ids) + 1):
        text = b"".join(tokenizer.token_bytes(i) for i in ids[:taken]).decode("utf-8", "replace")
        if any(s in text for s in stop):
            return reply_text(tokenizer, ids[:taken], (), stop), taken
    return reply_text(tokenizer, ids, (), ()), len(ids)


TEXTS = st.text(alphabet="ab \n<你", max_size=12)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, stop=st.lists(TEXTS.filter(bool).map(lambda s: s[:3]), max_size=2), fine=st.booleans())
def test_streamed_is_blocking(small: Tokenizer, text: str, stop: list[str], fine: bool) -> None:
    """However the text is cut into ids, the deltas join to what the whole ids say, and each is final."""
    ids = letters(text) if fine else small.encode(text)
    deltas, taken = stream(small, ids, tuple(stop))
    assert ("".join(deltas), taken) == expected(small, ids, tuple(stop))


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 480), max_size=30))
def test_any_ids(small: Tokenizer, ids: list[int]) -> None:
    """Ids that spell no text at all, as an untrained model gives them, stream to the same as they decode to."""
    assert "".join(stream(small, ids)[0]) == small.decode(ids).strip()
    assert "".join(stream(small, ids, strip=False)[0]) == small.decode(ids)


@pytest.mark.parametrize("text", ["the quick", "xxxxxxxxx", "         "])
def test_stop_strings_cost_little(small: Tokenizer, text: str) -> None:
    """Sixteen long ones took a millisecond of the thread that computes for all, with every id."""
    stop = tuple("x" * 199 + letter for letter in "abcdefghijklmnop")
    begun = time.process_time()
    deltas, _ = stream(small, letters(text * 300), stop)
    assert "".join(deltas) == (text * 300).strip()
    assert time.process_time() - begun < 1
