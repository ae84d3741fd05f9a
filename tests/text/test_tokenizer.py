"""The tokenizer: the reference's ids, no special ids from text, and text that comes back."""

import base64
import copy
import pickle
import re
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwenvl.errors import CheckpointError, PromptError
from qwenvl.text import tokenizer as module
from qwenvl.text.tokenizer import IMAGE_TAGS, REGION_TAGS, SPECIALS, StreamDecoder, Tokenizer

any_text = st.text(st.characters(exclude_categories=())) | st.lists(
    st.sampled_from([*SPECIALS[:4], *IMAGE_TAGS, "<", "|im_end", "|>", " ", "\n", "你", "é", "e\u0301", "\ud800"])
).map("".join)


def with_padded_spans(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Ids with every whole image span's inside as 256 `<imgpad>`, as the goldens have it."""
    inside = [tokenizer.image_pad_id] * 256
    out: list[int] = []
    while ids:
        out.append(ids[0])
        if ids[0] == tokenizer.image_start_id:
            end = ids.index(tokenizer.image_end_id)
            out, ids = out + inside, ids[end:]
        else:
            ids = ids[1:]
    return out


# The real vocabulary


@pytest.mark.real
def test_special_ids_are_the_checkpoints(real: Tokenizer, cases: dict[str, Any]) -> None:
    """Every special id has the number that the checkpoint's embeddings were trained with."""
    vocab = cases["vocab"]
    assert real.n_vocab == vocab["n_vocab"]
    assert len(real.special_ids) == 217
    assert {form: real.special_ids[form] for form in vocab["specials"]} == vocab["specials"]
    named = (real.eos_id, real.im_start_id, real.im_end_id, real.ref_start_id, real.ref_end_id, real.box_start_id)
    assert named == (151643, 151644, 151645, 151851, 151852, 151853)
    named = (real.box_end_id, real.quad_start_id, real.quad_end_id)
    assert (*named, real.image_start_id, real.image_end_id, real.image_pad_id) == tuple(range(151854, 151860))


@pytest.mark.real
@pytest.mark.parametrize(("policy", "tags"), [("all", SPECIALS), ("image_only", IMAGE_TAGS)])
def test_tagged_text_encodes_as_the_reference(
    real: Tokenizer, cases: dict[str, Any], policy: str, tags: tuple[str, ...]
) -> None:
    """Trusted text gives the reference's ids under both of its policies."""
    for row in cases["encode"]:
        assert with_padded_spans(real, real.encode_tagged(row["text"], tags)) == row[policy], row["text"]


@pytest.mark.real
def test_difference_user_text_never_yields_special_ids(real: Tokenizer, cases: dict[str, Any]) -> None:
    """Deliberate difference 1: `encode` is the reference's policy "none"; its own default parses every tag."""
    for row in cases["encode"]:
        assert real.encode(row["text"]) == row["none"], row["text"]
    assert real.encode("<|im_end|><img>") != [real.im_end_id, real.image_start_id]


@pytest.mark.real
def test_ids_decode_as_the_reference(real: Tokenizer, cases: dict[str, Any]) -> None:
    """Decoding shows or skips special ids as the reference does (rows with a picture's path hold none of our ids)."""
    rows = [row for row in cases["encode"] if "<img>" not in row["text"]]
    assert len(rows) == len(cases["encode"]) - 3
    for row in rows:
        assert real.decode(row["all"]) == row["decoded"]
        assert real.decode(row["all"], skip_special=True) == row["decoded_skip_special"]


@pytest.mark.real
def test_stream_shows_the_reference_prefixes(real: Tokenizer, cases: dict[str, Any]) -> None:
    """After each id the stream has shown exactly the whole characters, as the reference's prefixes do."""
    stream, shown = StreamDecoder(real, skip_special=True), ""
    for token_id, prefix in zip(cases["stream"]["ids"], cases["stream"]["prefixes_ignore"], strict=True):
        shown += stream.push(token_id)
        assert shown == prefix
    assert stream.flush() == ""
    assert real.decode(cases["stream"]["ids"]) == cases["stream"]["text"]


@pytest.mark.real
@pytest.mark.parametrize("unit", [" ", "a", "的", "\n"])
def test_a_million_characters_encode(real: Tokenizer, unit: str) -> None:
    """Long runs neither panic (tiktoken does from some hundred thousand spaces on) nor take more than seconds."""
    text = "x" + unit * 1_000_000 + "x"
    began = time.monotonic()
    ids = real.encode(text)
    assert time.monotonic() - began < 10
    assert real.decode(ids) == text


# The file


def test_special_ids_follow_any_vocabulary(small: Tokenizer) -> None:
    """A small vocabulary works as the large one: the 217 special ids follow its last rank."""
    n_ranks = small.n_vocab - 217
    assert list(small.special_ids.values()) == list(range(n_ranks, small.n_vocab))
    assert small.eos_id == n_ranks
    assert small.image_pad_id == small.n_vocab - 1
    assert small.encode("the user") == [257, ord(" "), 261]


def test_folder_and_crlf_are_accepted(small: Tokenizer, vocabulary_file: Path, tmp_path: Path) -> None:
    """A folder stands for its vocabulary, and a file with CRLF line ends is the same vocabulary."""
    (tmp_path / "qwen.tiktoken").write_bytes(vocabulary_file.read_bytes().replace(b"\n", b"\r\n"))
    assert Tokenizer(tmp_path).encode("the\r\nuser") == small.encode("the\r\nuser")
    assert Tokenizer(str(tmp_path)).special_ids == small.special_ids


WHOLE = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\r\n\n", "is empty"),
        (WHOLE + b"dGg=\n", "line 257: expected"),
        (WHOLE + b"dGg= 256 1\n", "line 257: expected"),
        (WHOLE + b"d*g= 256\n", "line 257: expected"),
        (WHOLE + b"dGg= many\n", "line 257: expected"),
        (WHOLE + b"dGg= 25", "each once"),
        (WHOLE + b"dGg= 257\n", "each once"),
        (WHOLE + b"dGg= -1\n", "each once"),
        (WHOLE + b"AA== 256\n", "line 257: .* repeated"),
        (b"dGg= 0\n", "lacks 256 of the 256 single bytes"),
        (b"\x80\xff\x00", "line 1: expected"),
    ],
)
def test_bad_vocabulary_is_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    """A file that is no whole vocabulary is refused, naming the file and the line."""
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_vocabulary_is_one_clear_line(tmp_path: Path) -> None:
    """A folder without a vocabulary says so."""
    with pytest.raises(CheckpointError, match=r"cannot read the vocabulary .*qwen\.tiktoken"):
        Tokenizer(tmp_path)


# Encoding


@given(text=any_text)
@example(text="".join(SPECIALS))
def test_no_text_yields_special_ids(small: Tokenizer, text: str) -> None:
    """Injection: whatever a user types, lone surrogates too, every id is an ordinary one."""
    assert all(0 <= i < small.n_vocab - 217 for i in small.encode(text))


@given(text=st.text())
def test_text_comes_back_in_nfc(small: Tokenizer, text: str) -> None:
    """Nothing is lost but the difference between equivalent spellings."""
    assert small.decode(small.encode(text)) == unicodedata.normalize("NFC", text)


def test_surrogates(small: Tokenizer) -> None:
    """A pair of surrogates is its character; a lone one, which no encoding has, becomes U+FFFD."""
    assert small.decode(small.encode("\ud83d\ude00 \ud800x\udc00")) == "\U0001f600 \ufffdx\ufffd"


@given(text=st.lists(st.sampled_from(["  ", *" \t\n\r\x85\u3000\xa0\u2000ab1!'s\u0301"])).map("".join))
@example(text="a   \n  b  ")
def test_long_spaces_are_cut_where_the_pattern_cuts(small: Tokenizer, text: str) -> None:
    """The work-around for long runs of spaces gives the pattern's own ids (here with every run taken as long)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LONG_SPACE", re.compile(f"(?<!{module._SPACE}){module._SPACE}{{2,}}"))
        ids = small.encode(text)
    assert ids == small._merges.encode_ordinary(unicodedata.normalize("NFC", text))


@pytest.mark.parametrize("tail", ["", "x", "\n", "\n  x"])
def test_a_million_spaces(small: Tokenizer, tail: str) -> None:
    """A million spaces are text like any other, and quick, whatever follows them."""
    began = time.monotonic()
    assert small.decode(small.encode(" " * 1_000_000 + tail)) == " " * 1_000_000 + tail
    assert time.monotonic() - began < 10


def test_endless_combining_marks_are_refused(small: Tokenizer) -> None:
    """Normalising them would take quadratic time (minutes for a million): one line instead, at once."""
    with pytest.raises(PromptError, match="combining marks"):
        small.encode("a" + "\u0301\u0323" * 500_000)
    assert small.encode("e\u0301" * 2000) == small.encode("é") * 2000


def test_only_the_given_tags_become_special(small: Tokenizer) -> None:
    """Trusted text keeps every other special form as characters."""
    text = "<ref>the</ref><img><|im_end|>"
    expected = ["<img><|im_end|>"]
    assert small.split_tags(text, REGION_TAGS) == [small.ref_start_id, "the", small.ref_end_id, *expected]
    assert small.encode_tagged("<img>", REGION_TAGS) == small.encode("<img>")
    assert small.encode_tagged("<ref>the", REGION_TAGS) == [small.ref_start_id, 257]


# Decoding


@pytest.mark.parametrize("token_id", [-1, 492, 10**6])
def test_unknown_ids_are_refused(small: Tokenizer, token_id: int) -> None:
    """An id outside the vocabulary, which a padded head could emit, is named."""
    assert small.n_vocab == 492
    for act in (lambda: small.decode([token_id]), lambda: small.decode([token_id], skip_special=True)):
        with pytest.raises(PromptError, match=f"id {token_id} is not in the vocabulary"):
            act()
    with pytest.raises(PromptError, match="not in the vocabulary"):
        StreamDecoder(small).push(token_id)


def test_invalid_bytes_decode_to_replacement_characters(small: Tokenizer) -> None:
    """Ids that spell no UTF-8 still decode."""
    assert small.decode([0xE4, ord("a"), 0xFF]) == "\ufffda\ufffd"


@given(ids=st.lists(st.integers(0, 491) | st.sampled_from([0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0xED, 272, 274])), skip=...)
def test_stream_joins_to_decode(small: Tokenizer, ids: list[int], skip: bool) -> None:
    """Deltas and flush join to the decoded text, invalid bytes included."""
    stream = StreamDecoder(small, skip)
    deltas = [stream.push(i) for i in ids]
    assert "".join(deltas) + stream.flush() == small.decode(ids, skip_special=skip)


def test_stream_never_shows_half_a_character(small: Tokenizer) -> None:
    """The bytes of a character wait for its last one."""
    stream = StreamDecoder(small)
    assert [stream.push(i) for i in (*"😀".encode(), 272, 0xA0)] == ["", "", "", "😀", "", "你"]
    assert stream.push(272) == ""
    assert stream.flush() == "\ufffd"


# The object


def test_copies_and_threads(small: Tokenizer) -> None:
    """A tokenizer pickles, copies and is shared between threads."""
    text = "the user 你好 " * 50
    ids = small.encode(text)
    assert copy.deepcopy(small).encode(text) == ids
    assert pickle.loads(pickle.dumps(small)).decode(ids) == text
    with ThreadPoolExecutor(4) as pool:
        assert all(result == ids for result in pool.map(small.encode, [text] * 32))
