"""A guess of what follows, from what followed before."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvl.generation.lookup import LONGEST, draft


@pytest.mark.parametrize(
    ("text", "n_ids", "guess"),
    [
        ([1, 2, 3, 9, 1, 2, 3], 4, [9, 1, 2, 3]),
        ([1, 2, 3, 9, 1, 2, 3], 6, [9, 1, 2, 3, 9, 1]),  # a text that repeats itself goes on doing so
        ([1, 2, 3, 9, 8, 1, 2, 3], 2, [9, 8]),
        ([5, 2, 3, 9, 7, 1, 2, 3], 1, [9]),  # two ids, as three have not occurred
        ([4, 3, 9, 7, 3, 8, 1, 2, 3], 2, [8, 1]),  # one id; the newest place
        ([1, 2, 3, 4], 3, []),
        ([7, 7], 3, [7, 7, 7]),
        ([7], 3, []),
        ([], 3, []),
        ([1, 2, 3, 9, 1, 2, 3], 0, []),
    ],
)
def test_draft(text: list[int], n_ids: int, guess: list[int]) -> None:
    """The longest ending that has occurred before decides, and of its places the newest."""
    assert draft(text, n_ids) == guess


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(0, 6))
def test_every_guess_is_a_quotation(text: list[int], n_ids: int) -> None:
    """What is guessed stands in the text, with the guess behind it, after the text's last ids; all or nothing."""
    guess = draft(text, n_ids)
    whole = text + guess
    if guess:
        assert len(guess) == n_ids
        quoted = [
            (at, size)
            for size in range(1, LONGEST + 1)
            for at in range(len(text) - size)
            if text[at : at + size] == text[-size:] and whole[at + size : at + size + len(guess)] == guess
        ]
        assert quoted
    elif n_ids and text:
        assert text[-1] not in text[:-1]  # or there would have been one
