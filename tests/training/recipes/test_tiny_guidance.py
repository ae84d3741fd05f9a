"""The small model's lessons in looking: rows of a few tokens, of which four show a picture of 2 x 2 cells."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qwenvl.training.recipes.tiny_dense import LETTERING, LETTERS, NUMBER, DenseHeads, dense_loss, dense_targets
from qwenvl.training.recipes.tiny_guidance import (
    aims_of,
    attention_at,
    picture_columns,
    pointing_loss,
    tallies_of,
    tallying_loss,
    telling_loss,
)
from qwenvl.training.recipes.tiny_pointing import LETTER
from qwenvl.training.recipes.tiny_scenes import Split, scene


def cells(numbers: Sequence[int], classes: Sequence[int] = (0, 0, 0, 0)) -> Tensor:
    """Dense targets [1,4,8] of a picture: the thing on each cell, and the letter's class."""
    made = torch.zeros(1, 4, 8, dtype=torch.long)
    made[..., NUMBER], made[..., LETTERING] = torch.tensor(numbers), torch.tensor(classes)
    return made


HEADS = 6  # three of each of two layers


def attending(tokens: int, *rows: dict[int, list[float]], firsts: Sequence[int] = (1, 1)) -> Tensor:
    """Attention [B,6,T,T] at random, but where tokens are given.

    A token has eight numbers: what it gives to four columns from the row's first, in the one layer and in the other.
    """
    maps = torch.rand(len(rows), HEADS, tokens, tokens)
    for row, (given, first) in enumerate(zip(rows, firsts, strict=False)):
        for token, shares in given.items():
            maps[row, :3, token, first : first + 4] = torch.tensor(shares[:4])
            maps[row, 3:, token, first : first + 4] = torch.tensor(shares[4:])
    return maps


def loss_of(maps: Tensor, wanted: Tensor, where: Tensor, dense: Tensor) -> Tensor:
    """The pointing loss of what points [B,T] aim at."""
    found = aims_of(wanted, dense)
    return pointing_loss(maps[found.rows, :, found.columns], picture_columns(where, dense.shape[1], last=False), found)


def visual(tokens: int, *firsts: int, count: int = 4) -> Tensor:
    """[B,T]: true at `count` columns from each row's first."""
    columns = torch.arange(tokens)
    return torch.stack([(columns >= first) & (columns < first + count) for first in firsts])


def pointing(tokens: int, *rows: dict[int, int]) -> Tensor:
    """[B,T] from each row's tokens that point."""
    made = torch.zeros(len(rows), tokens, dtype=torch.long)
    for row, wanted in enumerate(rows):
        for token, point in wanted.items():
            made[row, token] = point
    return made


ONE = {5: [0.1, 0.2, 0.3, 0.05, 0.25, 0.25, 0.1, 0.2]}


def test_the_loss_by_hand() -> None:
    """-log of what two layers give to the thing's cells, all together: 0.1 + 0.2, and 0.25 + 0.25."""
    maps, where = attending(7, ONE), visual(7, 1)
    for number, given in ((1, (0.3, 0.5)), (2, (0.05, 0.2))):
        loss = loss_of(maps, pointing(7, {5: number}), where, cells([1, 1, 0, 2]))
        assert loss.item() == pytest.approx(-(math.log(given[0]) + math.log(given[1])) / 2, rel=1e-5)


def test_tokens_weigh_alike() -> None:
    """The mean is over all tokens that point, not over rows: three of one row count three times one of another."""
    even = [0.5, 0, 0, 0, 0.5, 0, 0, 0]
    all_ = [1.0, 0, 0, 0, 1.0, 0, 0, 0]
    maps = attending(9, {6: even}, {6: all_, 7: all_, 8: all_})
    wanted = pointing(9, {6: 1}, dict.fromkeys((6, 7, 8), 1))
    loss = loss_of(maps, wanted, visual(9, 1, 1), cells([1, 0, 0, 2])[[0, 0]])
    assert loss.item() == pytest.approx(math.log(2) / 4, rel=1e-5)


def test_every_head_is_to_look() -> None:
    """At the thing's cells: what goes to other columns does not matter."""
    where, wanted, dense = visual(7, 1), pointing(7, {5: 1}), cells([1, 1, 0, 2])
    maps = attending(7, ONE)
    before = loss_of(maps, wanted, where, dense)
    others = torch.rand(maps.shape)
    others[:, :, 5, 1:3] = maps[:, :, 5, 1:3]
    assert torch.equal(loss_of(others, wanted, where, dense), before)
    for head in range(HEADS):
        better = maps.clone()
        better[:, head, 5, 1] += 0.1
        assert loss_of(better, wanted, where, dense) < before


def test_heads_weigh_alike() -> None:
    """Each has to look by itself: the mean is over the -log of each."""
    maps, where = attending(7, ONE), visual(7, 1)
    maps[0, 2, 5, 1:5] = torch.tensor([0.05, 0.05, 0, 0])  # where the others of its layer give 0.3
    loss = loss_of(maps, pointing(7, {5: 1}), where, cells([1, 1, 0, 2]))
    given = [0.1, 0.3, 0.3, 0.5, 0.5, 0.5]
    assert loss.item() == pytest.approx(-sum(map(math.log, given)) / len(given), rel=1e-5)


def test_pictures_at_different_columns() -> None:
    """A row's cells are its own visual tokens, and its thing is the one of its own picture."""
    maps = attending(9, ONE, {8: ONE[5]}, firsts=(1, 3))
    dense = torch.cat((cells([1, 1, 0, 2]), cells([0, 0, 1, 0])))
    loss = loss_of(maps, pointing(9, {5: 1}, {8: 1}), visual(9, 1, 3), dense)
    given = [0.3, 0.5, 0.3, 0.1]
    assert loss.item() == pytest.approx(-sum(map(math.log, given)) / 4, rel=1e-5)


def test_the_first_of_two_pictures() -> None:
    """Beside rows with one picture too: the visual tokens of the second do not count."""
    where = torch.cat((visual(12, 1) | visual(12, 6), visual(12, 6)))
    maps = attending(12, {11: ONE[5]}, {11: ONE[5]}, firsts=(1, 6))
    loss = loss_of(maps, pointing(12, {11: 1}, {11: 1}), where, cells([1, 1, 0, 2])[[0, 0]])
    assert loss.item() == pytest.approx(-(math.log(0.3) + math.log(0.5)) / 2, rel=1e-5)


def test_things_on_no_cell() -> None:
    """A thing too thin for any cell, and a letter too small, are left out and do not weigh in the mean."""
    maps, where, dense = attending(8, ONE), visual(8, 1), cells([1, 1, 0, 2], [0, 0, 4, 0])
    alone = loss_of(maps, pointing(8, {5: 1}), where, dense)
    assert torch.equal(loss_of(maps, pointing(8, {5: 1, 6: 3, 7: LETTER + 5}), where, dense), alone)


def test_letters() -> None:
    """A letter's class is looked for among letters only, a thing's number among things only; all its cells count."""
    maps, where = attending(7, ONE), visual(7, 1)
    dense = cells([3, 3, 1, 2], [1, 3, 0, 1])
    for point, given in ((LETTER + 1, (0.15, 0.45)), (LETTER + 3, (0.2, 0.25)), (3, (0.3, 0.5)), (1, (0.3, 0.1))):
        loss = loss_of(maps, pointing(7, {5: point}), where, dense)
        assert loss.item() == pytest.approx(-(math.log(given[0]) + math.log(given[1])) / 2, rel=1e-5), point


def test_looking_away_altogether_is_finite() -> None:
    """Attention that has rounded to 0 has a large loss and a gradient, not infinite ones."""
    given = torch.zeros(1, HEADS, 7, 7, requires_grad=True)
    loss = loss_of(given, pointing(7, {5: 1}), visual(7, 1), cells([1, 1, 0, 2]))
    assert 10 < loss < 20
    loss.backward()
    assert given.grad is not None
    assert given.grad.isfinite().all()


def test_it_can_be_learned() -> None:
    """Free attention, moved down the gradient, comes to lie on each thing and each letter, and nowhere else."""
    shown = scene(Split.TRAIN.seed(1), least=3, words=1.0)
    assert shown.text is not None
    dense = dense_targets(shown, 8)[None]
    letters = [LETTER + 1 + LETTERS.index(letter) for letter in shown.text.word or ""]
    found = torch.tensor([[0] * 65 + [*range(1, 1 + len(shown.things)), *letters]])
    scores = torch.zeros(1, HEADS, *[found.shape[1]] * 2, requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.5)
    for _ in range(25):
        optimizer.zero_grad()
        loss = loss_of(scores.softmax(dim=-1), found, visual(found.shape[1], 1, count=64), dense)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02
    for number in range(1, 1 + len(shown.things)):
        looked = scores[0, :, 64 + number, 1:65].argmax(dim=-1)
        assert (dense[0, looked, NUMBER] == number).all()


# What is told


def test_aims() -> None:
    """Each token that points at something, its cells, and what is there: of a thing without the letters on it."""
    dense = torch.cat((cells([0, 2, 2, 1], [0, 7, 4, 0]), cells([1, 1, 0, 2])))
    dense[0, :, 0] = torch.tensor([0, 7, 7, 3])
    kept = dense.clone()
    found = aims_of(pointing(6, {4: 2, 5: LETTER + 4, 3: 4}, {2: 1}), dense)
    assert (found.rows.tolist(), found.columns.tolist()) == ([0, 0, 1], [4, 5, 2])
    assert found.cells.int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 0], [1, 1, 0, 0]]
    assert found.targets[:, [0, LETTERING, NUMBER]].tolist() == [[7, 0, 2], [7, 4, 2], [0, 0, 1]]
    assert torch.equal(dense, kept)


def test_telling_is_the_dense_loss_of_the_aims() -> None:
    """What the hidden state at a token that points tells, by the visual tokens' heads; other tokens tell nothing."""
    torch.manual_seed(0)
    heads, hidden, dense = DenseHeads(8), torch.randn(2, 6, 8), cells([1, 0, 2, 2], [0, 0, 5, 0])[[0, 0]]
    dense[..., :2], dense[..., 3:NUMBER] = 1, 500
    wanted = pointing(6, {5: 1}, {3: LETTER + 5, 4: 2})
    loss = telling_loss(heads, hidden, aims_of(wanted, dense))
    targets = torch.stack((dense[0, 0], dense[1, 2], dense[1, 2]))
    targets[2, LETTERING] = 0
    expected = dense_loss(heads(torch.stack((hidden[0, 5], hidden[1, 3], hidden[1, 4]))[None]), targets[None])
    assert torch.allclose(loss, expected)
    changed = torch.randn(2, 6, 8)
    changed[wanted > 0] = hidden[wanted > 0]
    assert torch.equal(telling_loss(heads, changed, aims_of(wanted, dense)), loss)


def test_nothing_to_tell() -> None:
    """Without aims the loss is 0, and so are its gradients."""
    heads, hidden = DenseHeads(8), torch.randn(1, 6, 8, requires_grad=True)
    loss = telling_loss(heads, hidden, aims_of(pointing(6, {}), cells([1, 0, 2, 2])))
    assert loss == 0
    loss.backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


# How many there are


def test_tallies() -> None:
    """Each phrase's token, and the cells of each thing that it means in its row's picture, letters apart."""
    dense = torch.cat((cells([0, 2, 2, 1], [0, 7, 4, 0]), cells([1, 1, 0, 2])))
    found = tallies_of(pointing(6, {4: 1 + 2 + 4, 5: 1}, {2: 1 + 8, 3: 1 + 4}), dense)
    assert (found.rows.tolist(), found.columns.tolist()) == ([0, 0, 1, 1], [4, 5, 2, 3])
    assert found.cells.shape == (4, 6, 4)
    wanted = {(0, 0): [0, 0, 0, 1], (0, 1): [0, 1, 1, 0], (3, 1): [0, 0, 0, 1]}  # a third thing is on no cell
    for phrase, thing in itertools.product(range(4), range(6)):
        assert found.cells[phrase, thing].int().tolist() == wanted.get((phrase, thing), [0, 0, 0, 0])


def looking(*shares: list[float]) -> tuple[Tensor, Tensor]:
    """Attention [K,1,7] of tokens that give these shares to four columns from the first, and these columns."""
    given = torch.zeros(len(shares), 1, 7)
    given[:, 0, 1:5] = torch.tensor(shares)
    given[:, 0, 0] = 1 - given.sum(dim=2)[:, 0]
    return given, picture_columns(visual(7, 1), 4, last=False)


def test_standing() -> None:
    """The columns of a row's first picture and of its last, in order, whatever stands between and around."""
    where = torch.cat((visual(12, 1) | visual(12, 7), visual(12, 6)))
    assert picture_columns(where, 4, last=False).tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert picture_columns(where, 4, last=True).tolist() == [[7, 8, 9, 10], [6, 7, 8, 9]]


def test_tally_by_hand() -> None:
    """A seventh for each thing, over all its cells, is no loss; else the divergence, alike over phrases and heads."""
    dense = cells([1, 1, 2, 0])
    seventh = 1 / 7
    both, one, none = 1 + 2 + 4, 1 + 2, 1
    exact = {both: [0.1, seventh - 0.1, seventh, 0.3], one: [0, seventh, 0.4, 0], none: [0, 0, 0, 0]}
    for phrase, shares in exact.items():
        given, where = looking(shares)
        assert abs(tallying_loss(given, where, tallies_of(pointing(7, {5: phrase}), dense)).item()) < 1e-5
    given, where = looking([0.25, 0.25, 0.1, 0], [0, seventh, 0, 0])
    loss = tallying_loss(torch.cat((given, given), dim=1), where, tallies_of(pointing(7, {5: both, 6: one}), dense))
    expected = seventh * (math.log(seventh / 0.5) + math.log(seventh / 0.1)) + 5 / 7 * math.log(5 / 7 / 0.4)
    assert loss.item() == pytest.approx(expected / 2, rel=1e-4)


def test_attention_at() -> None:
    """That of the tokens asked for, as the decoder's causal attention has it, whatever stands behind them."""
    torch.manual_seed(0)
    query, key = torch.randn(3, 2, 6, 4), torch.randn(3, 2, 6, 4)
    rows, columns = torch.tensor([0, 0, 2]), torch.tensor([1, 5, 3])
    hidden = torch.ones(6, 6).triu(1).bool()
    whole = (query @ key.transpose(2, 3) / 2).masked_fill(hidden, -torch.inf).softmax(dim=-1)
    assert torch.allclose(attention_at(rows, columns, query, key), whole[rows, :, columns], atol=1e-6)
