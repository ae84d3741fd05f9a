"""Text to ids and back: byte-pair encoding over `qwen.tiktoken`, with special ids that no text can produce.

    Tokenizer        encode, decode, and every special id by name
    StreamDecoder    ids one by one to text, never half a character

`Tokenizer.encode` takes text as data: `<|im_end|>` or `<img>` typed by a user become ordinary characters. Special ids
enter a prompt by structure only (see `prompt`).
"""

from __future__ import annotations

import base64
import codecs
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import tiktoken

from ..errors import CheckpointError, PromptError

VOCABULARY_FILE = "qwen.tiktoken"

REGION_TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
IMAGE_TAGS = (*REGION_TAGS, "<img>", "</img>", "<imgpad>")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)), *IMAGE_TAGS)

# How text is cut into pieces before bytes are merged; part of the checkpoint, as the merges are.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The pattern's lookahead overflows the regex engine's stack on some hundred thousand spaces, so `_encode_ordinary` cuts
# runs of this many characters out itself, at their start: no piece of the pattern begins before such a run and reaches
# into it. The class is Unicode's White_Space without line ends, which is narrower than Python's \s.
_LONG_RUN = 10_000
_SPACE = "[ \t\v\f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_LONG_SPACE = re.compile(f"(?<!{_SPACE}){_SPACE}{{{_LONG_RUN},}}")

# Sorting combining marks, a part of normalisation, takes quadratic time; no script stacks more than a few.
_MOST_MARKS = 1000


def _read_ranks(path: Path) -> dict[bytes, int]:
    """The merges in a vocabulary file: token bytes to rank. Raises CheckpointError naming file and line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"cannot read the vocabulary {path}: {error.strerror}") from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            repeated = token in ranks
            ranks[token] = int(rank)
        except ValueError:
            raise CheckpointError(f"{path}, line {number}: expected a base64 token and its rank") from None
        if repeated or not token:
            raise CheckpointError(f"{path}, line {number}: the token {token!r} is {'repeated' if token else 'empty'}")
    if not ranks:
        raise CheckpointError(f"the vocabulary {path} is empty")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{path}: the ranks of {len(ranks)} tokens must be 0 to {len(ranks) - 1}, each once")
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing:  # some text could then not be encoded at all
        raise CheckpointError(f"{path} lacks {missing} of the 256 single bytes: it is truncated or no vocabulary")
    return ranks


def _normalised(text: str) -> str:
    """NFC, as the checkpoint was trained. Surrogate pairs become their character, lone surrogates U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if len(text) > _MOST_MARKS:
        marks = 0
        for character in text:
            marks = marks + 1 if unicodedata.category(character)[0] == "M" else 0
            if marks > _MOST_MARKS:
                raise PromptError(f"the text has more than {_MOST_MARKS} combining marks on one character; remove them")
    return unicodedata.normalize("NFC", text)


@lru_cache
def _splitter(tags: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"({'|'.join(map(re.escape, tags))})")


class Tokenizer:
    """The checkpoint's vocabulary: N merges, ids 0..N-1, then 217 special ids (Qwen-VL: N = 151,643).

    `path` is a `qwen.tiktoken` file, or a folder that has one. Immutable, so that threads may share it. Raises
    CheckpointError if the file is missing or not a whole vocabulary.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if path.is_dir():
            path = path / VOCABULARY_FILE
        self._ranks = _read_ranks(path)
        # Without special tokens: what this object encodes cannot contain one.
        self._merges = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=self._ranks, special_tokens={})
        self.special_ids = {form: len(self._ranks) + i for i, form in enumerate(SPECIALS)}
        self._bytes = [*sorted(self._ranks, key=self._ranks.__getitem__), *(form.encode() for form in SPECIALS)]

        self.eos_id = self.special_ids["<|endoftext|>"]  # separator and padding too
        self.im_start_id = self.special_ids["<|im_start|>"]
        self.im_end_id = self.special_ids["<|im_end|>"]
        self.ref_start_id = self.special_ids["<ref>"]
        self.ref_end_id = self.special_ids["</ref>"]
        self.box_start_id = self.special_ids["<box>"]
        self.box_end_id = self.special_ids["</box>"]
        self.quad_start_id = self.special_ids["<quad>"]
        self.quad_end_id = self.special_ids["</quad>"]
        self.image_start_id = self.special_ids["<img>"]
        self.image_end_id = self.special_ids["</img>"]
        self.image_pad_id = self.special_ids["<imgpad>"]

    @property
    def n_vocab(self) -> int:
        """Ids that exist, special ones included: 151,860 for Qwen-VL. A model's output may be wider."""
        return len(self._bytes)

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token: so many characters, once normalised, are at least one id."""
        return max(map(len, self._bytes))

    @cached_property
    def _one_piece(self) -> tiktoken.Encoding:
        """The same merges for a run of white space taken as one piece; built when first needed."""
        return tiktoken.Encoding("qwen-spaces", pat_str=r"\s+", mergeable_ranks=self._ranks, special_tokens={})

    def encode(self, text: str) -> list[int]:
        """Ids of NFC-normalised text; never a special id, whatever the text.

        A lone surrogate is encoded as U+FFFD. Raises PromptError on more than 1,000 combining marks in a row.
        """
        text = _normalised(text)
        ids: list[int] = []
        done = 0
        for run in _LONG_SPACE.finditer(text):
            end = run.end()
            if end < len(text):
                if text[end] in "\r\n":
                    continue  # then all of it belongs to the piece that ends in the line end
                end -= 1  # the pattern leaves the last space to the word that follows
            ids += self._merges.encode_ordinary(text[done : run.start()])
            ids += self._one_piece.encode_ordinary(text[run.start() : end])
            done = end
        return ids + self._merges.encode_ordinary(text[done:])

    def split_tags(self, text: str, tags: Sequence[str]) -> list[str | int]:
        """Trusted text cut at the surface forms in `tags`, which become their special ids; the rest stays text.

        `tags` are keys of `special_ids`, such as REGION_TAGS for what a model said.
        """
        pieces = _splitter(tuple(tags)).split(text)
        return [self.special_ids[p] if i % 2 else p for i, p in enumerate(pieces) if p]

    def encode_tagged(self, text: str, tags: Sequence[str]) -> list[int]:
        """Ids of trusted text, with the surface forms in `tags`, and no others, as special ids."""
        ids: list[int] = []
        for piece in self.split_tags(text, tags):
            ids += [piece] if isinstance(piece, int) else self.encode(piece)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """What one id stands for: often a part of a character. Raises PromptError if there is no such id."""
        if not 0 <= token_id < len(self._bytes):
            raise PromptError(f"id {token_id} is not in the vocabulary, whose ids are 0 to {len(self._bytes) - 1}")
        return self._bytes[token_id]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids; special ids show their surface form or are skipped; bytes that are no UTF-8 become U+FFFD.

        Raises PromptError if an id is not in the vocabulary.
        """
        first_special = len(self._ranks)
        kept = (self.token_bytes(i) for i in ids if not (skip_special and first_special <= i < self.n_vocab))
        return b"".join(kept).decode("utf-8", "replace")


class StreamDecoder:
    """Text of ids that come one by one: the deltas and the final `flush` join to `tokenizer.decode(ids)`.

    A token may end inside a character; its first bytes are held back until the rest arrives.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = frozenset(tokenizer.special_ids.values()) if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes, maybe none. Raises PromptError if there is no such id."""
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left when no more ids come: U+FFFD for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)
