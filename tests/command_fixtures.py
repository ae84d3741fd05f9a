"""Run commands here, for tests of the command line: a pytest plugin that their modules name."""

from pathlib import Path
from typing import Any

import pytest
from commands import Run
from PIL import Image

import qwenvl
from qwenvl import cli, loading


@pytest.fixture
def dog(tmp_path: Path) -> str:
    """A grey picture of 200 x 100 pixels."""
    Image.new("RGB", (200, 100), (90, 90, 90)).save(tmp_path / "dog.png")
    return str(tmp_path / "dog.png")


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch, shared: qwenvl.Pipeline) -> None:
    """Load the embedded model once for all of these tests; whatever else a command names is really loaded."""
    load = loading.load

    def load_or_share(name: Any, device: Any, dtype: Any, **options: Any) -> qwenvl.Pipeline:
        plain = (name, device, dtype) == ("tiny", "auto", "auto") and options.get("adapter") is None
        return shared if plain else load(name, device, dtype, **options)

    monkeypatch.setattr(loading, "load", load_or_share)


@pytest.fixture(scope="session")
def shared() -> qwenvl.Pipeline:
    """The embedded model."""
    return qwenvl.load("tiny", "cpu", quiet=True)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], loaded_once: None) -> Run:  # noqa: ARG001 - asked for its effect
    """Run a command here; returns its status, what it printed, and its remarks."""

    def run_here(*arguments: str) -> tuple[int, str, str]:
        try:
            status = cli.main(arguments)
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return run_here
