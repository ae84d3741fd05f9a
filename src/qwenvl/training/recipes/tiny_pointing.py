"""Where to look while answering, what to see there, and how many: what a phrase means, for attention to learn.

From answers alone, a decoder needs tens of thousands of pictures before it begins to tie a phrase to a place, and more
to count. The generator knows which things are meant, so it says so. While a thing is named and its box or its letters
are spelt, and where a question has named it, half of the heads of two middle layers are taught to attend to the visual
tokens on it, and behind them the hidden states to tell of it what the visual tokens tell. Two more heads are taught to
divide their attention so that it tells how many things a question's phrase means, one in the first picture and one in
the last. Like the dense targets this is for
training only; the model and its prompts are those without it.

    points              for every token of a sequence, what to look at
    aims                the same for a batch, as cells of the grid
    groups, tallies     likewise, all that a question's phrase means
    queries_and_keys    what the layers that point look with
    attention_at        where the tokens look that are taught
    standing            where a picture's visual tokens are
    pointing_loss       the attention that the cells do not receive
    telling_loss        what hidden states do not tell of them
    tallying_loss       how far attention is from telling how many there are
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...model.decoder import Attention, AttentionContext, Decoder
from ...text.prompt import IGNORED_LABEL
from ...text.tokenizer import Tokenizer
from .tiny_dense import LETTERING, LETTERS, NUMBER, DenseHeads, dense_loss
from .tiny_questions import group, place
from .tiny_scenes import COLOURS, SHAPES, Scene
from .tiny_words import LANGUAGES

Split: TypeAlias = Callable[[Tensor, AttentionContext], tuple[Tensor, Tensor, Tensor]]

LAYERS = (1, 2)  # of 4: what is asked is gathered before them, and what is seen is spelt after
POINTING_HEADS = slice(0, 3)  # of 6
TALLYING_HEADS = slice(3, 4), slice(4, 5)  # for the first picture and for the last
MOST = 6  # things in a picture, the word among them
# What a phrase means; in this order, the longest is found first.
PHRASES = {
    language.phrase(colour, shape, number).encode(): (colour, shape)
    for language in LANGUAGES
    for colour in (*COLOURS, None)
    for shape in (*SHAPES, None)
    for number in (2, 1)
}
MENTION = re.compile(rb"(?<!What )(?:" + b"|".join(PHRASES) + rb")")  # the `shape` of "What shape" means none
NEAR = 100  # thousandths that the corners of a box may be off altogether: questions name them inexactly
LETTER = 16  # from here on, the letters' classes; below, the things' numbers


def points(tokenizer: Tokenizer, ids: Sequence[int], labels: Sequence[int], scene: Scene) -> list[int]:
    """For each of `ids` what to look at while the next is found: a thing's number (from 1, in `scene.things`), LETTER
    and a letter's class, or 0 for nothing.

    In an answer: a thing from its `<ref>` to the end of its box, and all along another box; every letter of a printed
    word. In a question: where a box or the phrase of one thing alone ends, since nobody can know before that.
    """
    found = [0] * len(ids)
    for at, meant in _mentions(tokenizer, ids, scene):
        if labels[at] == IGNORED_LABEL and len(meant) == 1:
            found[at] = meant[0]
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


def groups(tokenizer: Tokenizer, ids: Sequence[int], labels: Sequence[int], scene: Scene) -> list[int]:
    """For each of `ids`, where a phrase ends in a question: 1, and 2 ** n for every thing n that it means; else 0."""
    found = [0] * len(ids)
    for at, meant in _mentions(tokenizer, ids, scene):
        if labels[at] == IGNORED_LABEL:
            found[at] = 1 + sum(2**number for number in meant)
    return found


def _mentions(tokenizer: Tokenizer, ids: Sequence[int], scene: Scene) -> Iterator[tuple[int, list[int]]]:
    """Where a phrase ends, and the numbers of the things that it means."""
    special = set(tokenizer.special_ids.values())  # there is a star in `<|im_start|>`
    pieces = [b"\n" if id_ in special else tokenizer.token_bytes(id_) for id_ in ids]
    ends = list(accumulate(map(len, pieces)))  # they need not be those of words, nor of characters
    for phrase in MENTION.finditer(b"".join(pieces)):
        meant = group(scene, *PHRASES[phrase[0]]).things
        yield bisect_left(ends, phrase.end()), [1 + scene.things.index(thing) for thing in meant]


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
def queries_and_keys(decoder: Decoder) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A list that gets queries and keys [B,H,T,D] of each of LAYERS as they are computed, while this lasts.

    Whole attention maps would double the work of attention, for rows of which most are not looked at.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def noting(compute: Split) -> Split:
        def noted(qkv: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
            query, key, value = compute(qkv, context)
            seen.append((query, key))
            return query, key, value

        return noted

    attentions = [cast(Attention, decoder.blocks[layer].attn) for layer in LAYERS]
    for attention in attentions:
        attention.queries_keys_values = noting(attention.queries_keys_values)  # type: ignore[assignment, method-assign]
    try:
        yield seen
    finally:
        for attention in attentions:
            del attention.queries_keys_values


def attention_at(rows: Tensor, columns: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Causal attention [K,H,T] of K tokens, at least one, from queries and keys [B,H,T,D] of right-padded rows.

    rows [K], ascending, and columns [K] say where the tokens stand. Each row's tokens are brought side by side for one
    product a row: `key[rows]` would copy a row's keys for each of its tokens.
    """
    seats = torch.arange(len(rows), device=query.device) - torch.searchsorted(rows, rows)  # within each row
    seated = query.new_zeros(len(query), int(seats.max()) + 1, query.shape[1], query.shape[3])
    seated[rows, seats] = query[rows, :, columns]
    scores: Tensor = seated.transpose(1, 2) @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    later = torch.arange(key.shape[2], device=key.device) > columns[:, None, None]
    return scores[rows, :, seats].float().masked_fill(later, -torch.inf).softmax(dim=-1)


def standing(visual: Tensor, n_queries: int, *, last: bool) -> Tensor:
    """Columns [B,Q] of each row's first or last picture, given visual [B,T], true at visual tokens."""
    order = visual.int().argsort(dim=1, descending=True, stable=True)
    begin = visual.sum(dim=1, keepdim=True) - n_queries if last else 0
    return order.gather(1, begin + torch.arange(n_queries, device=visual.device).expand(len(visual), -1))


def _received(attention: Tensor, columns: Tensor) -> Tensor:
    """Of attention [K,H,T], what columns [K,Q] receive: [K,H,Q]."""
    return attention.gather(2, columns[:, None].expand(-1, attention.shape[1], -1))


def pointing_loss(attention: Tensor, columns: Tensor, aims: Aims) -> Tensor:
    """The mean, over aims (at least one), layers and heads, of -log of the attention that an aim's cells receive.

    attention: [K,H,T], of all heads of all layers that point; columns [B,Q]: where each row's first picture stands.
    """
    received = _received(attention, columns[aims.rows]) * aims.cells[:, None]
    return -received.sum(dim=-1).clamp(min=1e-6).log().mean()


@dataclass(frozen=True)
class Tallies:
    """The K tokens of a batch where a question's phrase ends: rows [K], columns [K], and cells [K,6,Q], true where the
    n-th thing is if the phrase means it.
    """

    rows: Tensor
    columns: Tensor
    cells: Tensor


def tallies(groups: Tensor, dense: Tensor) -> Tallies:
    """Those of groups [B,T], given the dense targets [B,Q,8] of one picture of each row."""
    rows, columns = groups.nonzero(as_tuple=True)
    numbers = torch.arange(1, 1 + MOST, device=groups.device)[:, None]
    meant = groups[rows, columns, None, None] >> numbers & 1
    return Tallies(rows, columns, (dense[rows, None, :, NUMBER] == numbers) & meant.bool())


def tallying_loss(attention: Tensor, columns: Tensor, tallies: Tallies) -> Tensor:
    """How far attention is from a tally: the mean Kullback-Leibler divergence over phrases (at least one) and heads.

    In a tally each thing that is meant receives a seventh, whatever its size, and all else gets the rest: so the mix of
    what is attended to tells how many there are, or that there is none. Only things on a cell count.

    attention: [K,H,T], of all heads and layers that tally this picture, which stands in columns [B,Q].
    """
    received = _received(attention, columns[tallies.rows])
    # A sum, not a product of matrices: autocast would run that in 16 bits.
    things = (received[:, :, None] * tallies.cells[:, None]).sum(dim=-1)  # [K,H,6]
    shares = torch.cat((things, 1 - things.sum(dim=-1, keepdim=True)), dim=-1).clamp(min=1e-6)
    wanted = tallies.cells.any(dim=2).type_as(shares) / (1 + MOST)
    wanted = torch.cat((wanted, 1 - wanted.sum(dim=-1, keepdim=True)), dim=-1)[:, None]
    return F.kl_div(shares.log(), wanted.expand_as(shares), reduction="sum") / shares[..., 0].numel()


def telling_loss(heads: DenseHeads, hidden: Tensor, aims: Aims) -> Tensor:
    """The dense loss of what the hidden states [B,T,C] behind the pointing layers tell about their aims.

    heads: those that read the visual tokens: what is told there must have come over as it was.
    """
    return dense_loss(heads(hidden[aims.rows, aims.columns][None]), aims.targets[None])
