"""What goes wrong in training and is a user's to fix."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import QwenVLError


class DataError(QwenVLError):
    """Training data that cannot be used; `bad` has a line for each record that is wrong."""

    def __init__(self, message: str, bad: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.bad = tuple(bad)


class TrainingError(QwenVLError):
    """A training run that cannot begin or go on; `updates` were made before, and the model has them."""

    def __init__(self, message: str, updates: int = 0) -> None:
        super().__init__(message)
        self.updates = updates
