"""Parts and turns (see `parts`) as ids and pictures: prompts, replies, training examples.

    Prompt              ids, and the pictures of their image spans
    chatml_prompt       a conversation with a chat checkpoint
    raw_prompt          a query to a base checkpoint
    stop_ids, stop_strings      where a reply ends
    training_example    a conversation as ids and labels

Special ids are put in by structure alone: a role, a picture, a region, or the tags of a text that is declared trusted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import PromptError
from .boxes import points_text
from .parts import CORNERS, Part, Query, Turn, parse_tagged, parts_of, shown
from .tokenizer import IMAGE_TAGS, REGION_TAGS, Tokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."
IGNORED_LABEL = -100  # what cross entropy leaves out by default

_STRAY_TAGS = tuple(tag for tag in IMAGE_TAGS if tag != "<img>")  # only a picture may start an image span

_Piece: TypeAlias = "str | int | _Picture"


@dataclass(frozen=True)
class _Picture:
    source: Any


@dataclass(frozen=True)
class Prompt:
    """Ids for the model, and the pictures that fill their image spans, in reading order, one for each span."""

    ids: list[int]
    images: list[Any]


def _pieces(tokenizer: Tokenizer, parts: Sequence[Part]) -> Iterator[_Piece]:
    """What parts become: text to encode, special ids, pictures."""
    ids = tokenizer.special_ids
    pictures = 0
    for part in parts:
        if "image" in part:
            pictures += 1
            if part.get("numbered", True):
                yield from (f"Picture {pictures}:", _Picture(part["image"]), "\n")
            else:
                yield _Picture(part["image"])
        elif "text" in part:
            yield from tokenizer.split_tags(part["text"], _STRAY_TAGS) if part.get("tagged") else [part["text"]]
        if "ref" in part:
            yield from (ids["<ref>"], part["ref"], ids["</ref>"])
        for kind in CORNERS.keys() & part.keys():
            if part[kind] is None:
                yield ids["<box>"]
            for place in part[kind] or ():
                yield from (ids[f"<{kind}>"], points_text(place), ids[f"</{kind}>"])


def _render(tokenizer: Tokenizer, parts: Sequence[Part], n_queries: int) -> Prompt:
    """Ids of parts. Neighbouring texts are encoded as one, as in the reference, where they are one string."""
    ids: list[int] = []
    images: list[Any] = []
    texts: list[str] = []
    for piece in (*_pieces(tokenizer, parts), None):
        if isinstance(piece, str):
            texts.append(piece)
            continue
        ids += tokenizer.encode("".join(texts))
        texts.clear()
        if isinstance(piece, int):
            ids.append(piece)
        elif piece is not None:
            ids += [tokenizer.image_start_id, *[tokenizer.image_pad_id] * n_queries, tokenizer.image_end_id]
            images.append(piece.source)
    return Prompt(ids, images)


def _message(tokenizer: Tokenizer, role: str, content: Sequence[int]) -> list[int]:
    """One ChatML message. Role, newline and content are encoded apart: no merge crosses from one to the next."""
    head = [tokenizer.im_start_id, *tokenizer.encode(role), *tokenizer.encode("\n")]
    return [*head, *content, tokenizer.im_end_id]


def _history(tokenizer: Tokenizer, turns: Sequence[Turn], room: int, n_queries: int) -> Prompt:
    """The newest turns that take less than `room` ids together, in order; the first that does not fit ends them."""
    newline = tokenizer.encode("\n")
    kept: list[Prompt] = []
    for turn in reversed(turns):
        query = _render(tokenizer, turn.parts, n_queries)
        ids = [*newline, *_message(tokenizer, "user", query.ids), *newline]
        if turn.reply is not None:
            # What the model said about regions is special again; anything else in a reply is only text.
            ids += _message(tokenizer, "assistant", tokenizer.encode_tagged(turn.reply, REGION_TAGS))
        room -= len(ids)
        if room <= 0:
            break
        kept.append(Prompt(ids, query.images))
    kept.reverse()
    return Prompt([i for turn in kept for i in turn.ids], [image for turn in kept for image in turn.images])


def chatml_prompt(
    tokenizer: Tokenizer,
    query: Query,
    history: Sequence[Turn] = (),
    *,
    system: str = DEFAULT_SYSTEM,
    max_window_size: int = 6144,
    n_queries: int = 256,
    numbered: bool = True,
) -> Prompt:
    """The prompt for a reply to `query` after `history`, up to and with `<|im_start|>assistant` and a newline.

    The newest turns are kept while they and the system message take less than `max_window_size` ids; the query is not
    counted, as in the reference. `n_queries` is the width of an image span without its two ends, `numbered=False`
    writes the query's pictures without `Picture k:`. Raises PromptError on malformed parts and an empty query.
    """
    if not isinstance(system, str):
        raise PromptError(f"system must be a text, not a {type(system).__name__}")
    if not isinstance(history, Sequence):
        raise PromptError(f"history must be a list of Turns, not a {type(history).__name__}")
    for number, turn in enumerate(history, 1):
        if not isinstance(turn, Turn):
            raise PromptError(f"history item {number} is a {type(turn).__name__}, not a Turn (see Turn.from_dict)")
    asked = _render(tokenizer, parts_of(query, numbered), n_queries)
    newline = tokenizer.encode("\n")
    head = _message(tokenizer, "system", tokenizer.encode(system))
    past = _history(tokenizer, history, max_window_size - len(head), n_queries)
    tail = [*newline, *_message(tokenizer, "user", asked.ids), *newline]
    tail += [tokenizer.im_start_id, *tokenizer.encode("assistant"), *newline]
    return Prompt([*head, *past.ids, *tail], [*past.images, *asked.images])


def raw_prompt(tokenizer: Tokenizer, query: Query, *, n_queries: int = 256, numbered: bool = True) -> Prompt:
    """The query alone, as a base checkpoint continues it. Arguments and errors as in `chatml_prompt`."""
    return _render(tokenizer, parts_of(query, numbered), n_queries)


# Replies


def stop_ids(tokenizer: Tokenizer, chat_format: str) -> tuple[int, ...]:
    """Ids that end a reply in the format `chatml` or `raw`."""
    messages = (tokenizer.im_end_id, tokenizer.im_start_id) if chat_format == "chatml" else ()
    return (*messages, tokenizer.eos_id)


def stop_strings(chat_format: str) -> tuple[str, ...]:
    """Texts that end a reply in the format `chatml` (none) or `raw`, where a base model may go on with a dialogue."""
    return () if chat_format == "chatml" else ("Human:",)


# Training


@dataclass(frozen=True)
class TrainingExample:
    """Ids and labels of one conversation (equally long; label -100 carries no loss) and its pictures.

    `images` are the pictures of whole image spans. `cut_image` says that the maximum length fell inside another span:
    the model refuses such ids, so skip the example or allow more ids.
    """

    ids: list[int]
    labels: list[int]
    images: list[Any]
    cut_image: bool


def _exchanges(conversations: Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
    """The messages, checked, without a leading one from the assistant."""
    for number, message in enumerate(conversations, 1):
        if not (isinstance(message, Mapping) and message.get("from") in ("user", "assistant")):
            raise PromptError(f"message {number} must have 'from': 'user' or 'assistant', not {shown(message)}")
        if not isinstance(message.get("value"), str):
            raise PromptError(f"message {number} must have a text as its value, not {shown(message.get('value'))}")
    if conversations and conversations[0]["from"] == "assistant":
        conversations = conversations[1:]
    if not conversations:
        raise PromptError("the conversation has no message from a user")
    return conversations


def training_example(
    tokenizer: Tokenizer,
    conversations: Sequence[Mapping[str, str]],
    max_length: int,
    *,
    n_queries: int = 256,
    pad: bool = False,
    system: str = DEFAULT_SYSTEM,
) -> TrainingExample:
    """One fine-tuning conversation, cut to `max_length` ids and, with `pad`, filled up with `<|endoftext|>`.

    `conversations` are {"from": "user" or "assistant", "value": trusted tagged text}; a leading assistant turn is
    dropped, as in the reference. `<|im_start|>`, `<|im_end|>` and the newline after it carry loss in every message,
    content in the assistant's alone (but never inside an image span). Raises PromptError naming the message.
    """
    messages = [
        ("system", [{"text": system}]),
        *((m["from"], parse_tagged(m["value"])) for m in _exchanges(conversations)),
    ]
    newline = tokenizer.encode("\n")
    ids: list[int] = []
    labels: list[int] = []
    images: list[Any] = []
    for role, parts in messages:
        content = _render(tokenizer, parts, n_queries)
        message_ids = _message(tokenizer, role, content.ids)
        learned = content.ids if role == "assistant" else [IGNORED_LABEL] * len(content.ids)
        learned = [IGNORED_LABEL if i == tokenizer.image_pad_id else i for i in learned]
        role_length = len(message_ids) - len(content.ids) - 2
        ids += [*message_ids, *newline]
        labels += [tokenizer.im_start_id, *[IGNORED_LABEL] * role_length, *learned, tokenizer.im_end_id, *newline]
        images += content.images

    ids, labels = ids[:max_length], labels[:max_length]
    starts = [at for at, i in enumerate(ids) if i == tokenizer.image_start_id]
    cut_image = bool(starts) and starts[-1] + n_queries + 2 > len(ids)
    images = images[: len(starts) - cut_image]
    if pad:
        padding = max_length - len(ids)
        ids += [tokenizer.eos_id] * padding
        labels += [IGNORED_LABEL] * padding
    return TrainingExample(ids, labels, images, cut_image)
