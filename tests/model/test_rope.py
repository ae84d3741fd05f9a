"""Rotation, dynamic NTK and log-n against their definitions, written down a second time and in float64."""

import cmath
import math

import pytest
import torch

from qwenvl.model.rope import inverse_frequencies, logn_factors, ntk_alpha, rotary_tables, rotate


@pytest.mark.parametrize(
    ("length", "alpha"),
    [(1, 1), (0, 1), (511, 1), (512, 1), (513, 3), (1024, 3), (1025, 7), (2048, 7), (2049, 15), (4096, 15), (4097, 31)],
)
def test_alpha_steps_as_the_length_doubles(length: int, alpha: int) -> None:
    """max(2^ceil(log2(T / seq_length) + 1) - 1, 1): the boundary itself still belongs to the shorter side."""
    assert ntk_alpha(length, 512) == alpha
    by_formula = max(2 ** math.ceil(math.log2(length / 512) + 1) - 1, 1) if length else 1
    assert by_formula == alpha


def test_frequencies_stretch_the_base() -> None:
    """The base becomes base x alpha^(d/(d-2)); the pair i turns by base^(-2i/d) a position."""
    for head_size, alpha in ((32, 1.0), (32, 3.0), (128, 7.0)):
        base = 10000 * alpha ** (head_size / (head_size - 2))
        expected = [base ** (-2 * i / head_size) for i in range(head_size // 2)]
        found = inverse_frequencies(head_size, 10000.0, alpha)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)


def test_rotation_turns_complex_pairs() -> None:
    """Channels i and i + D/2 are one complex number, which position p turns by p x frequency: not neighbours."""
    torch.manual_seed(0)
    positions = torch.tensor([[0, 1, 700], [5, 6, 7]])
    frequencies = torch.stack([inverse_frequencies(8, 10000.0), inverse_frequencies(8, 10000.0, 3.0)])
    x = torch.randn(2, 2, 3, 4, 8)  # [B,2,T,H,D]
    turned = rotate(x, *rotary_tables(positions, frequencies))
    for row, two, at, head in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:4])).tolist():
        vector, result = x[row, two, at, head].tolist(), turned[row, two, at, head].tolist()
        for i in range(4):
            angle = positions[row, at].item() * frequencies[row, i].item()
            expected = complex(vector[i], vector[i + 4]) * cmath.exp(1j * angle)
            assert abs(complex(result[i], result[i + 4]) - expected) < (2e-4 if angle > 100 else 1e-5)


def test_scores_depend_on_the_distance_alone() -> None:
    """A query and a key moved on together have the same product: why left padding does no harm."""
    torch.manual_seed(0)
    query_key = torch.randn(1, 2, 1, 1, 16)
    frequencies = inverse_frequencies(16, 10000.0)[None]

    def score(first: int, second: int) -> float:
        turned = [rotate(query_key, *rotary_tables(torch.tensor([[p]]), frequencies)) for p in (first, second)]
        return float((turned[0][:, 0] * turned[1][:, 1]).sum())

    assert score(9, 2) == pytest.approx(score(107, 100), abs=1e-4)
    assert score(9, 2) != pytest.approx(score(9, 3), abs=1e-2)


def test_rotation_is_computed_in_float32() -> None:
    """In bfloat16 the angle of a far position would be wrong by radians; only the result is rounded."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 1, 1, 32).bfloat16()
    tables = rotary_tables(torch.tensor([[4001]]), inverse_frequencies(32, 10000.0)[None])
    assert tables[0].dtype == tables[1].dtype == torch.float32
    turned = rotate(x, *tables)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), *tables).bfloat16())


def test_logn_begins_behind_seq_length() -> None:
    """The query at 1-based position i is scaled by log(i)/log(seq_length) if i > seq_length, else by 1."""
    factors = logn_factors(torch.tensor([[0, 510, 511, 512, 1023, 32766]]), 512)[0].tolist()
    expected = [1, 1, 1, math.log(513) / math.log(512), math.log(1024) / math.log(512), math.log(32767) / math.log(512)]
    assert factors == pytest.approx(expected, abs=1e-6)
    assert factors[3] > 1
