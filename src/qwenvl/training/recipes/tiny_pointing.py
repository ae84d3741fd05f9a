"""Where to look while answering, and what to see there: the thing that the words are about.

From answers alone, a decoder needs tens of thousands of pictures before it begins to tie a phrase to a place. The
generator knows which thing it is, so it says so: while a thing is named and its box or its letters are spelt, half of
the heads of two middle layers are taught to attend to the visual tokens on that thing, and behind them the hidden
states to tell of it what the visual tokens tell. Like the dense targets this is for training only; the model and its
prompts are those without it.

    points           for every token of a sequence, what to look at
    aims             the same for a batch, as cells of the grid
    watched          what the layers that point look with
    pointing_loss    the attention that the cells do not receive
    telling_loss     what hidden states do not tell of them
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...model.decoder import Attention, AttentionContext, Decoder
from ...text.prompt import IGNORED_LABEL
from ...text.tokenizer import Tokenizer
from .tiny_dense import LETTERING, LETTERS, NUMBER, DenseHeads, dense_loss
from .tiny_questions import group, place
from .tiny_scenes import COLOURS, SHAPES, Scene
from .tiny_words import LANGUAGES

LAYERS = (1, 2)  # of 4: what is asked is gathered before them, and what is seen is spelt after
HEADS = [0, 1, 2]  # of 6
# What a phrase means; in this order, the longest is found first.
PHRASES = {
    language.phrase(colour, shape, number).encode(): (colour, shape)
    for language in LANGUAGES
    for colour in (*COLOURS, None)
    for shape in (*SHAPES, None)
    for number in (2, 1)
    if colour or shape
}
NEAR = 100  # thousandths that the corners of a box may be off altogether: questions name them inexactly
LETTER = 16  # from here on, the letters' classes; below, the things' numbers


def points(tokenizer: Tokenizer, ids: Sequence[int], labels: Sequence[int], scene: Scene) -> list[int]:
    """For each of `ids` what to look at while the next is found: a thing's number (from 1, in `scene.things`), LETTER
    and a letter's class, or 0 for nothing.

    In an answer: a thing from its `<ref>` to the end of its box, and all along another box; every letter of a printed
    word. In a question: where a box or the phrase of one thing alone ends, since nobody can know before that.
    """
    found = [0] * len(ids)
    for at, number in _mentions(tokenizer, ids, scene):
        if labels[at] == IGNORED_LABEL:
            found[at] = number
    phrase = box = 0
    for at, id_ in enumerate(ids):
        learned = labels[at] != IGNORED_LABEL
        if id_ == tokenizer.ref_start_id and learned:
            phrase = at
        elif id_ == tokenizer.box_start_id:
            box = at
        elif id_ == tokenizer.box_end_id:
            first, last = (phrase or box, at) if learned else (at, at + 1)
            found[first:last] = [_nearest(scene, tokenizer.decode(ids[box:at]))] * (last - first)
            phrase = 0
    for start, word in _readings(tokenizer, ids, labels, scene):
        for at, id_ in enumerate(word, start):
            letter = tokenizer.decode([id_]).strip()  # the first may be one token with the space before it
            if len(letter) == 1:  # no space alone
                found[at - 1] = LETTER + 1 + LETTERS.index(letter)
    return found


def _mentions(tokenizer: Tokenizer, ids: Sequence[int], scene: Scene) -> Iterator[tuple[int, int]]:
    """Where a phrase ends that means one thing alone, and the thing's number."""
    pieces = [tokenizer.token_bytes(id_) for id_ in ids]  # their bounds need not be those of words, nor of characters
    ends = list(accumulate(map(len, pieces)))
    for phrase in re.finditer(b"|".join(PHRASES), b"".join(pieces)):
        colour, shape = PHRASES[phrase[0]]
        meant = group(scene, colour, shape).things
        if len(meant) == 1:
            yield bisect_left(ends, phrase.end()), 1 + scene.things.index(meant[0])


def _nearest(scene: Scene, corners: str) -> int:
    """The number of the thing whose box is spelt, 0 if it is nobody's."""
    spelt = [int(number) for number in re.findall("[0-9]+", corners)]
    distances = [sum(abs(a - b) for a, b in zip(place(scene, t), spelt, strict=True)) for t in scene.things]
    nearest = min(distances)
    return 1 + distances.index(nearest) if nearest <= NEAR else 0


def _readings(
    tokenizer: Tokenizer, ids: Sequence[int], labels: Sequence[int], scene: Scene
) -> Iterator[tuple[int, list[int]]]:
    """Where the printed word stands as an answer or as a phrase, and its tokens there."""
    if scene.text is None:
        return
    closing = tokenizer.im_end_id, tokenizer.eos_id, tokenizer.ref_end_id
    ends = [at for at, id_ in enumerate(ids) if id_ in closing and labels[at] != IGNORED_LABEL]
    for word in (tokenizer.encode(space + (scene.text.word or "")) for space in ("", " ")):
        for start in (end - len(word) for end in ends):
            if list(ids[start : start + len(word)]) == word:
                yield start, word


@dataclass(frozen=True)
class Aims:
    """The K tokens of a batch that look at something: rows [K] and columns [K] of where they stand, the cells [K,Q] to
    look at, true where, and the dense targets [K,8] of what is there.
    """

    rows: Tensor
    columns: Tensor
    cells: Tensor
    targets: Tensor


def aims(points: Tensor, dense: Tensor) -> Aims:
    """Those of points [B,T], given the dense targets [B,Q,8] of each row's first picture.

    What covers no cell enough to be its content is nothing to look at.
    """
    rows, columns = points.nonzero(as_tuple=True)
    wanted = points[rows, columns, None]
    cells = (dense[rows, :, NUMBER] == wanted) | (dense[rows, :, LETTERING] == wanted - LETTER)
    seen = cells.any(dim=1)
    rows, columns, cells = rows[seen], columns[seen], cells[seen]
    targets = dense[rows, cells.int().argmax(dim=1)]  # of the first cell, whose letter is not the thing's
    targets[:, LETTERING] *= points[rows, columns] >= LETTER
    return Aims(rows, columns, cells, targets)


@contextmanager
def watched(decoder: Decoder) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """While it lasts, the queries and keys [B,3,T,D] of HEADS are appended for each of LAYERS that computes.

    Whole attention maps would double the work of attention, for rows of which most are not looked at.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    contexts: list[AttentionContext] = []

    def begin(_attention: nn.Module, arguments: tuple[Any, ...]) -> None:
        contexts.append(arguments[1])

    def note(attention: Attention, qkv: Tensor) -> None:
        query, key, _ = attention.split(qkv, contexts.pop())
        seen.append((query[:, HEADS], key[:, HEADS]))

    hooks: list[RemovableHandle] = []
    for layer in LAYERS:
        attention = decoder.blocks[layer].attn
        assert isinstance(attention, Attention)
        hooks.append(attention.register_forward_pre_hook(begin))
        hooks.append(attention.c_attn.register_forward_hook(lambda _m, _i, qkv, own=attention: note(own, qkv)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def attention_at(aims: Aims, query: Tensor, key: Tensor) -> Tensor:
    """Causal attention [K,H,T] from the aims' tokens, of queries and keys [B,H,T,D] of right-padded rows."""
    seats = torch.arange(len(aims.rows), device=query.device) - torch.searchsorted(aims.rows, aims.rows)  # in each row
    seated = query.new_zeros(len(query), int(seats.max()) + 1, query.shape[1], query.shape[3])
    seated[aims.rows, seats] = query[aims.rows, :, aims.columns]
    scores: Tensor = seated.transpose(1, 2) @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    later = torch.arange(key.shape[2], device=key.device) > aims.columns[:, None, None]
    return scores[aims.rows, :, seats].float().masked_fill(later, -torch.inf).softmax(dim=-1)


def pointing_loss(attention: Sequence[Tensor], visual: Tensor, aims: Aims) -> Tensor:
    """The mean, over aims, layers and heads, of -log of the attention that an aim's cells receive.

    attention: [K,H,T] of every layer; visual [B,T]: true at visual tokens, of which a row's first Q count.
    """
    standing = visual.int().argsort(dim=1, descending=True, stable=True)[aims.rows, : aims.cells.shape[1]]  # [K,Q]
    given = torch.stack(list(attention), dim=1).flatten(1, 2)  # [K,.,T]
    received = given.gather(2, standing[:, None].expand(-1, given.shape[1], -1)) * aims.cells[:, None]  # [K,.,Q]
    return -received.sum(dim=-1).clamp(min=1e-6).log().mean()


def telling_loss(heads: DenseHeads, hidden: Tensor, aims: Aims) -> Tensor:
    """The dense loss of what the hidden states [B,T,C] behind the pointing layers tell about their aims.

    heads: those that read the visual tokens: what is told there must have come over as it was.
    """
    return dense_loss(heads(hidden[aims.rows, aims.columns][None]), aims.targets[None])
