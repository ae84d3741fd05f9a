"""How a benchmark's time is shared."""

from __future__ import annotations

import pytest

from qwenvl.bench.plan import Budget


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
