"""Where tests find numbers: `tests/goldens` is ours; the real vocabulary and photographs live outside, if at all."""

import os
from pathlib import Path

import pytest

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The committed reference numbers. They never skip."""
    return GOLDENS


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """The folder with `hf/` and `images/` that are not ours to publish; skips where QWENVL_REFERENCE_DIR is unset."""
    folder = os.environ.get("QWENVL_REFERENCE_DIR")
    if not folder:
        pytest.skip("QWENVL_REFERENCE_DIR is not set: the real vocabulary and photographs are not in this repository")
    return Path(folder)
