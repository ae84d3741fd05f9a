"""How a benchmark's time is shared, and which sizes it has."""

from __future__ import annotations

import pytest

from qwenvl.bench.plan import COMPARISONS, FULL, GRACE, PARTS, QUICK, TINY, Budget


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_that_is_not_used_is_for_the_next() -> None:
    """Shares go by weight; what one leaves the others get, and one that takes too long takes it from them."""
    clock = Clock()
    budget = Budget(60, [1, 2, 3], clock)
    assert budget.share() == pytest.approx(10)
    clock.now += 4
    assert budget.share() == pytest.approx(56 * 2 / 5)
    clock.now += 50
    assert budget.left == budget.share() == pytest.approx(6)
    clock.now += 30
    assert budget.left == 0


def test_the_promised_times_and_sizes() -> None:
    """Full within 8 minutes and quick within 2, also where the last process has to be stopped; the README's lengths."""
    assert FULL.seconds + GRACE < 8 * 60
    assert QUICK.seconds + GRACE <= 2 * 60
    assert FULL.decode == QUICK.decode == (1792, 7934)
    assert FULL.rows == TINY.rows == (1, 8, 32)
    assert FULL.parts == PARTS
    assert not set(QUICK.parts) & {"start-up", *COMPARISONS}
    assert set(PARTS) - set(TINY.parts) == {"compile"}
