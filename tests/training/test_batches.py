"""Batches: what collation keeps, and an order that depends on nothing but seed and step."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import one_line_error, random_model, small_config
from torch import Tensor
from training_runs import SPAN

from qwenvl.errors import ConfigError
from qwenvl.training.batches import BatchOrder, Sample, collate
from qwenvl.training.objective import next_token_loss


def sample(ids: list[int], pictures: int = 0) -> Sample:
    """Every id a label; pictures of one number each."""
    return Sample(ids, list(ids), torch.randn(pictures, 3, 28, 28) if pictures else None, f"{ids}")


def test_collate() -> None:
    """Padded on the right, without labels there; pictures in the order of the rows; sources kept."""
    samples = [sample([1, 2, 3]), sample([*SPAN, *SPAN], 2), sample([*SPAN, 4], 1)]
    batch = collate(samples, pad_id=9)
    assert batch.input_ids[0].tolist() == [1, 2, 3, *[9] * 9]
    assert batch.labels[0].tolist() == [1, 2, 3, *[-100] * 9]
    assert batch.attention_mask is not None
    assert batch.attention_mask.sum(dim=1).tolist() == [3, 12, 7]
    assert batch.pixels is not None
    assert torch.equal(batch.pixels, torch.cat([s.pixels for s in samples if s.pixels is not None]))
    assert (batch.sources, batch.tokens) == ([s.source for s in samples], 22)


def test_nothing_is_padded() -> None:
    """Rows of one length need no mask, and texts no pixels."""
    batch = collate([sample([1, 2]), sample([3, 4])])
    assert (batch.attention_mask, batch.pixels) == (None, None)


orders = st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.booleans())


def order_of(count: int, batch_size: int, seed: int, grouped: bool) -> BatchOrder:
    """Lengths fall with the number, so that shuffling shows."""
    return BatchOrder(count, batch_size, seed, list(range(count, 0, -1)) if grouped else None)


@given(orders, st.integers(1, 4))
def test_every_sample_equally_often(drawn: tuple[int, int, int, bool], passes: int) -> None:
    """Any number of whole passes holds every sample as often, whatever the batch size."""
    order = order_of(*drawn)
    count, batch_size = order.count, order.batch_size
    steps = -(-passes * count // batch_size)
    seen = [index for step in range(steps) for index in order.batch(step)]
    assert Counter(seen[: passes * count]) == dict.fromkeys(range(count), passes)


@given(orders, st.integers(0, 30))
def test_a_batch_depends_on_its_step_alone(drawn: tuple[int, int, int, bool], step: int) -> None:
    """A resumed run, which asks for a later step first, gets what the first run got."""
    order = order_of(*drawn)
    earlier = [order.batch(number) for number in range(step + 1)]
    assert order_of(*drawn).batch(step) == earlier[step]


@given(orders, st.integers(0, 9), st.integers(1, 3), st.integers(1, 3))
def test_ranks_share_the_batch(drawn: tuple[int, int, int, bool], step: int, ranks: int, accumulation: int) -> None:
    """The pieces of all ranks are the batch that one rank would see, in pieces of one size."""
    count, size, seed, grouped = drawn
    order = order_of(count, size * ranks * accumulation, seed, grouped)
    shares = [order.pieces(step, rank=rank, ranks=ranks, accumulation=accumulation) for rank in range(ranks)]
    assert [[len(piece) for piece in share] for share in shares] == [[size] * accumulation] * ranks
    together = [index for pieces in zip(*shares, strict=True) for piece in pieces for index in piece]
    assert together == order.batch(step)


def test_passes_and_seeds_differ() -> None:
    """Each pass is shuffled anew, and each seed otherwise."""
    first, again, other = (BatchOrder(50, 50, seed) for seed in (0, 0, 1))
    assert first.batch(0) == again.batch(0)
    assert sorted(first.batch(0)) == sorted(first.batch(1)) == list(range(50))
    assert len({tuple(batch) for batch in (first.batch(0), first.batch(1), other.batch(0), range(50))}) == 4


def test_like_lengths_share_a_batch() -> None:
    """With lengths, a batch pads a fifth of what it would, and batches still come in random order."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 1000, (1001,), generator=generator).tolist()

    def padding(order: BatchOrder) -> float:
        batches = [[lengths[index] for index in order.batch(step)] for step in range(300)]
        return sum(max(batch) - length for batch in batches for length in batch)

    grouped = BatchOrder(1001, 8, 0, lengths)
    assert padding(grouped) < padding(BatchOrder(1001, 8, 0)) / 5
    longest = [max(lengths[index] for index in grouped.batch(step)) for step in range(40)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_nothing_to_train_on() -> None:
    """An empty dataset has no batches."""
    with one_line_error(ConfigError, "no sample"):
        BatchOrder(0, 4, 0)


# The objective


def loss_of(samples: list[Sample]) -> tuple[float, int]:
    """Loss and count of a batch under a model in which everything is trained."""
    loss, count = next_token_loss(random_model(small_config()), collate(samples))
    return loss.item(), int(count)


def test_the_sum_over_rows() -> None:
    """A batch's loss is the sum of what its rows have alone: padding carries none, and the label is the next id."""
    samples = [sample([1, 2, 3]), sample([*SPAN, 4, 5], 1), sample([7, 8, 9, 10, 11])]
    alone = [loss_of([one]) for one in samples]
    loss, count = loss_of(samples)
    assert loss == pytest.approx(sum(loss for loss, _ in alone), rel=1e-5)
    assert count == sum(count for _, count in alone) == 2 + 7 + 4
    model = random_model(small_config())
    chances = model(torch.tensor([[1, 2, 3]]))[0].log_softmax(-1)
    assert alone[0][0] == pytest.approx(-(chances[0, 2] + chances[1, 3]).item(), rel=1e-5)


def gradients(frozen: bool) -> dict[str, Tensor | None]:
    """Gradients of a batch of texts, with towers that are trained or frozen."""
    model = random_model(small_config())
    for tower in (model.visual, model.resampler):
        tower.requires_grad_(not frozen)
    loss, _ = next_token_loss(model, collate([sample([1, 2]), sample([3, 4, 5])]))
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_texts_reach_every_parameter() -> None:
    """A batch without pictures gives trained towers a gradient, of zero, and leaves that of the decoder as it is."""
    trained, frozen = gradients(frozen=False), gradients(frozen=True)
    for name, gradient in trained.items():
        assert gradient is not None, name
        if name.startswith("decoder."):
            torch.testing.assert_close(gradient, frozen[name], rtol=1e-4, atol=1e-6)
        else:
            assert gradient.abs().max() == 0, name


def test_a_curriculum_keeps_its_order() -> None:
    """Data with an order of its own comes in that order, pass after pass; the ranks' pieces still make up the batch."""
    order = BatchOrder(10, 4, seed=3, in_order=True)
    assert [order.batch(step) for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    assert [order.pieces(1, rank=rank, ranks=2) for rank in range(2)] == [[[4, 5]], [[6, 7]]]
