"""Two vocabularies: a small one that every machine has, and the real one."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from qwenvl.text.tokenizer import VOCABULARY_FILE, Tokenizer

# Every single byte, as a vocabulary must have, and a few merges, among them halves of characters.
MERGES = ["th", "the", " the", "er", "us", "user", " \n", "  \n", "),", "),(", "  ", "    ", "\n\n", "<|", "im", "<|im"]
TOKENS = [bytes([i]) for i in range(256)] + [m.encode() for m in MERGES] + [b"\xe4\xbd", b"\xe4\xbd\xa0", b"\xf0\x9f"]


@pytest.fixture(scope="session")
def vocabulary_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole vocabulary of 275 merges."""
    path = tmp_path_factory.mktemp("small") / VOCABULARY_FILE
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(TOKENS)))
    return path


@pytest.fixture(scope="session")
def small(vocabulary_file: Path) -> Tokenizer:
    """A tokenizer that every machine has."""
    return Tokenizer(vocabulary_file)


@pytest.fixture(scope="session")
def real(reference_dir: Path) -> Tokenizer:
    """The checkpoint's own tokenizer; skips where it is missing."""
    return Tokenizer(reference_dir / "hf")


@pytest.fixture(scope="session")
def cases(goldens: Path) -> dict[str, Any]:
    """What the reference's tokenizer and prompt code gave."""
    return json.loads((goldens / "tokenizer" / "cases.json").read_text(encoding="utf-8"))
