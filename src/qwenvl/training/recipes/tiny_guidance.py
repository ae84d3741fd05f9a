"""Losses of attention: where to look while answering, what to see there, and how many.

While a thing is named and its box or its letters are spelt, and where a question has named it, half of the heads of two
middle layers are taught to attend to the visual tokens on it, and behind them the hidden states to tell of it what the
visual tokens tell. Two more heads of each are taught to divide their attention so that it tells how many things a
question's phrase means, one in the first picture and one in the last. Like the dense targets this is for training only;
the model and its prompts are those without it.

    guidance_loss       all of it, of one batch
    queries_and_keys    what the layers that point look with
    Aims, aims_of       the points of a batch, as cells of the grid
    Tallies, tallies_of the groups of a batch, likewise
    attention_at        where the tokens look that are taught
    picture_columns     where a picture's visual tokens are
    pointing_loss       the attention that the cells do not receive
    telling_loss        what hidden states do not tell of them
    tallying_loss       how far attention is from telling how many there are
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import VisionConfig
from ...model.decoder import Attention, AttentionContext, Decoder
from .tiny_data import SceneBatch
from .tiny_dense import LETTERING, NUMBER, DenseHeads, dense_loss
from .tiny_pointing import LETTER

QueriesKeysValues: TypeAlias = Callable[[Tensor, AttentionContext], tuple[Tensor, Tensor, Tensor]]

LAYERS = (1, 2)  # of 4: what is asked is gathered before them, and what is seen is spelt after
POINTING_HEADS = slice(0, 3)  # of 6
TALLYING_HEADS = slice(3, 4), slice(4, 5)  # for the first picture and for the last
# Weights of the losses on where to look, on what is seen there, and on how many there are.
POINTING, TELLING, TALLYING = 0.3, 0.1, 3.0
MOST = 6  # things in a picture, the word among them


def guidance_loss(
    heads: DenseHeads,
    config: VisionConfig,
    batch: SceneBatch,
    hidden: Sequence[Tensor],
    seen: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """The loss of looking elsewhere than at what an answer is about, of not telling what is there, or how many.

    heads: those that read the visual tokens. hidden: the states [B,T,C] before each layer. seen: `queries_and_keys`.
    """
    visual = batch.input_ids == config.image_pad_id
    ends = (visual.sum(dim=1) // config.n_queries).cumsum(dim=0)  # of each row's pictures
    pictures = [picture_columns(visual, config.n_queries, last=last) for last in (False, True)]
    dense = batch.dense[F.pad(ends[:-1], (1, 0))], batch.dense[ends - 1]  # of the first and of the last
    query, key = (torch.stack(both, dim=1) for both in zip(*seen, strict=True))  # [B,2,H,T,D]

    def looks(tokens: Aims | Tallies, heads: slice) -> Tensor:
        own = (given[:, :, heads].flatten(1, 2) for given in (query, key))
        return attention_at(tokens.rows, tokens.columns, *own)

    loss = hidden[0].new_zeros(())
    aims = aims_of(batch.points, dense[0])
    if len(aims.rows):
        loss = loss + POINTING * pointing_loss(looks(aims, POINTING_HEADS), pictures[0], aims)
        loss = loss + TELLING * telling_loss(heads, hidden[1 + max(LAYERS)], aims)
    for which, own in enumerate(TALLYING_HEADS):
        tallies = tallies_of(batch.groups[:, which], dense[which])
        if len(tallies.rows):
            share = TALLYING / len(TALLYING_HEADS)
            loss = loss + share * tallying_loss(looks(tallies, own), pictures[which], tallies)
    return loss


@dataclass(frozen=True)
class Aims:
    """The K tokens of a batch that look at something: rows [K] and columns [K] of where they stand, the cells [K,Q] to
    look at, true where, and the dense targets [K,8] of what is there.
    """

    rows: Tensor
    columns: Tensor
    cells: Tensor
    targets: Tensor


def aims_of(points: Tensor, dense: Tensor) -> Aims:
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

    def noting(compute: QueriesKeysValues) -> QueriesKeysValues:
        def noted(x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
            query, key, value = compute(x, context)
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


def picture_columns(visual: Tensor, n_queries: int, *, last: bool) -> Tensor:
    """Columns [B,Q] of each row's first or last picture, given visual [B,T], true at visual tokens."""
    order = visual.int().argsort(dim=1, descending=True, stable=True)
    begin = visual.sum(dim=1, keepdim=True) - n_queries if last else 0
    return order.gather(1, begin + torch.arange(n_queries, device=visual.device).expand(len(visual), -1))


def _received(attention: Tensor, picture: Tensor) -> Tensor:
    """Of attention [K,H,T], what a picture's columns [K,Q] receive: [K,H,Q]."""
    return attention.gather(2, picture[:, None].expand(-1, attention.shape[1], -1))


def pointing_loss(attention: Tensor, picture: Tensor, aims: Aims) -> Tensor:
    """The mean, over aims (at least one), layers and heads, of -log of the attention that an aim's cells receive.

    attention: [K,H,T], of all heads of all layers that point; picture [B,Q]: the columns of each row's first.
    """
    received = _received(attention, picture[aims.rows]) * aims.cells[:, None]
    return -received.sum(dim=-1).clamp(min=1e-6).log().mean()


@dataclass(frozen=True)
class Tallies:
    """The K tokens of a batch where a question's phrase ends: rows [K], columns [K], and cells [K,6,Q], true where the
    n-th thing is if the phrase means it.
    """

    rows: Tensor
    columns: Tensor
    cells: Tensor


def tallies_of(groups: Tensor, dense: Tensor) -> Tallies:
    """Those of groups [B,T], given the dense targets [B,Q,8] of one picture of each row."""
    rows, columns = groups.nonzero(as_tuple=True)
    numbers = torch.arange(1, 1 + MOST, device=groups.device)[:, None]
    meant = groups[rows, columns, None, None] >> numbers & 1
    return Tallies(rows, columns, (dense[rows, None, :, NUMBER] == numbers) & meant.bool())


def tallying_loss(attention: Tensor, picture: Tensor, tallies: Tallies) -> Tensor:
    """How far attention is from a tally: the mean Kullback-Leibler divergence over phrases (at least one) and heads.

    In a tally each thing that is meant receives a seventh, whatever its size, and all else gets the rest: so the mix of
    what is attended to tells how many there are, or that there is none. Only things on a cell count.

    attention: [K,H,T], of all heads and layers that tally this picture; picture [B,Q]: its columns.
    """
    received = _received(attention, picture[tallies.rows])
    # A sum, not a product of matrices: autocast would run that in 16 bits.
    things = (received[:, :, None] * tallies.cells[:, None]).sum(dim=-1)  # [K,H,6]
    shares = torch.cat((things, 1 - things.sum(dim=-1, keepdim=True)), dim=-1).clamp(min=1e-6)
    wanted = tallies.cells.any(dim=2).type_as(shares) / (1 + MOST)
    wanted = torch.cat((wanted, 1 - wanted.sum(dim=-1, keepdim=True)), dim=-1)[:, None]
    return F.kl_div(shares.log(), wanted.expand_as(shares), reduction="none").sum(dim=-1).mean()


def telling_loss(heads: DenseHeads, hidden: Tensor, aims: Aims) -> Tensor:
    """The dense loss of what the hidden states [B,T,C] behind the pointing layers tell about their aims.

    heads: those that read the visual tokens: what is told there must have come over as it was.
    """
    return dense_loss(heads(hidden[aims.rows, aims.columns][None]), aims.targets[None])
