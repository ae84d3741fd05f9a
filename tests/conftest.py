"""Where tests find numbers: `tests/goldens` is ours; the real vocabulary and photographs live outside, if at all."""

import json
import os
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import Golden, chat_config, random_model, write_checkpoint, write_vocabulary

import qwenvl
from qwenvl.text.tokenizer import Tokenizer

GOLDENS = Path(__file__).parent / "goldens"
DIFFERENCES = pytest.StashKey[dict[str, dict[str, float]]]()

torch.set_num_threads(1)  # small tensors: threads cost more than they do
# A shell that starts tests in the background has them ignore Ctrl-C, and so would every process that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


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


def _golden(name: str) -> Golden:
    folder = GOLDENS / name
    vl = qwenvl.load(folder, dtype="float32", device="cpu", quiet=True)
    facts = json.loads((folder / "cases.json").read_text())
    size = vl.config.visual.image_size
    pixels = {image: qwenvl.preprocess(folder / "images" / image, size) for image in facts["images"]}
    return Golden(name, folder, vl, facts, load_file(folder / "cases.safetensors"), pixels)


@pytest.fixture(scope="session")
def tiny_112() -> Golden:
    """The golden model whose patch grid is smaller than the stored positions, with its numbers; float32."""
    return _golden("tiny-112")


@pytest.fixture(scope="session")
def tiny_448() -> Golden:
    """The golden model with heads of 128 and the real image size, with its numbers; float32."""
    return _golden("tiny-448")


@pytest.fixture(scope="session", params=["tiny-112", "tiny-448"])
def golden(request: pytest.FixtureRequest) -> Golden:
    """Both golden models, one after the other."""
    fixture: Golden = request.getfixturevalue(request.param.replace("-", "_"))
    return fixture


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole chat checkpoint of random weights: its own small vocabulary, greedy, ChatML, 40 new tokens."""
    vocabulary = write_vocabulary(tmp_path_factory.mktemp("vocabulary"))
    tokenizer = Tokenizer(vocabulary)
    generation = {"chat_format": "chatml", "eos_token_id": tokenizer.eos_id, "max_new_tokens": 40}
    folder = tmp_path_factory.mktemp("checkpoints") / "chat"
    return write_checkpoint(folder, random_model(chat_config(tokenizer)), vocabulary, generation)


@pytest.fixture(scope="session")
def differences(request: pytest.FixtureRequest) -> dict[str, dict[str, float]]:
    """Where golden tests note the largest difference of each case, for the summary: model -> case -> difference."""
    return request.config.stash.setdefault(DIFFERENCES, defaultdict(dict))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need files which are not ours to publish."""
    for item in items:
        if "reference_dir" in getattr(item, "fixturenames", ()):
            item.add_marker("real")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """What a process of `pytest -n` has noted goes to the one that prints the summary."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["differences"] = {name: dict(cases) for name, cases in session.config.stash.get(DIFFERENCES, {}).items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take it from there."""
    noted = node.config.stash.setdefault(DIFFERENCES, defaultdict(dict))
    for name, cases in getattr(node, "workeroutput", {}).get("differences", {}).items():
        noted[name] |= cases


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print how many tests with the real files ran, and how far from the reference's numbers ours are."""
    counts = [
        sum("real" in report.keywords for report in terminalreporter.getreports(outcome))
        for outcome in ("passed", "failed", "skipped")
    ]
    terminalreporter.write_line("tests with the real files: {} passed, {} failed, {} skipped".format(*counts))
    for name, cases in config.stash.get(DIFFERENCES, {}).items():
        shown = ", ".join(f"{case} {difference:.1e}" for case, difference in cases.items())
        terminalreporter.write_line(f"{name}: largest difference from the reference: {shown}")
