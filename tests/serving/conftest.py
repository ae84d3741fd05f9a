"""One server for all tests that only ask it something."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Running, running

import qwenvl
from qwenvl.pipeline import Pipeline
from qwenvl.serving.settings import Settings


@pytest.fixture
def pipeline(chat_folder: Path) -> Pipeline:
    """A chat model of random weights."""
    return qwenvl.load(chat_folder, device="cpu", dtype="float32", quiet=True)


@pytest.fixture(scope="module")
def server(chat_folder: Path) -> Iterator[Running]:
    """A server that is left as it was found."""
    vl = qwenvl.load(chat_folder, device="cpu", dtype="float32", quiet=True)
    with running(vl, Settings(rows=4, queue=8, max_length=1024, max_images=4)) as found:
        yield found
