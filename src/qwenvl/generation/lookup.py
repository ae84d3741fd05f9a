"""Prompt lookup: guess the ids that follow from what followed the same words earlier in the text.

draft   the guess

Answers repeat their prompts: names, phrases, coordinates of a box that was found before. A guess costs a search; the
model then looks at all of it in one step, and keeps what it would have said itself (speculative decoding, arXiv
2211.17192, with the text for a draft model).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LONGEST = 3  # ids that must have occurred before; if they have not, fewer are tried


def draft(text: Sequence[int], n_ids: int) -> list[int]:
    """The `n_ids` ids that followed the newest earlier occurrence of the text's last ids; none if there was none."""
    ids = np.asarray(text, dtype=np.int64)
    for size in range(min(LONGEST, len(ids) - 1), 0, -1) if n_ids > 0 else ():
        earlier = np.lib.stride_tricks.sliding_window_view(ids[:-1], size)
        found = np.flatnonzero((earlier == ids[-size:]).all(axis=1))
        if len(found):
            start = int(found[-1]) + size  # and from the text's end on, what has been guessed so far
            guess: list[int] = np.resize(ids[start:], n_ids).tolist()
            return guess
    return []
