"""The documents keep their promises: their code runs, their commands exist, their links and names lead somewhere."""

from __future__ import annotations

import builtins
import contextlib
import io
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ENVIRONMENT

import qwenvl
from qwenvl.cli import _parser, main
from qwenvl.config import QwenVLConfig
from qwenvl.model.qwenvl import QwenVL
from qwenvl.weights.hub import embedded

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    "README.zh.md",
    "docs/model.md",
    "docs/tutorial.md",
    "docs/training.md",
    "docs/quantization.md",
    "docs/engine.md",
    "docs/parallel.md",
    "docs/web.md",
    "docs/evaluation.md",
    "docs/benchmark.md",
    "docs/small-model.md",
    "docs/serving.md",  # whose examples tests/serving/test_documents.py runs
    "docs/deployment.md",
    "weights/tiny/README.md",
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?!https?:)([^)\s#]*)#?([^)\s]*)\)")
HUB_ID = re.compile(r"\b[Qq]wen/Qwen-VL")
LARGEST_PICTURE = 200_000  # bytes

documents = pytest.mark.parametrize("document", DOCUMENTS)
# Whose examples take many seconds, and do what tests/quantization and tests/adapt do in small.
PACKING = pytest.param("docs/quantization.md", marks=pytest.mark.slow)
SPREADING = pytest.param("docs/parallel.md", marks=pytest.mark.slow)


def read(document: str) -> str:
    """A document's text."""
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    """Its code blocks in one language."""
    return [body for name, body in BLOCK.findall(read(document)) if name == language]


def prose(document: str) -> str:
    """What is not in a code block."""
    return BLOCK.sub("", read(document))


def headings(document: str) -> list[tuple[int, str]]:
    """Level, and the anchor that a link names, of each heading."""
    found = re.findall(r"^(#+) (.*)$", prose(document), re.MULTILINE)
    return [(len(marks), re.sub(r"[^\w\- ]", "", text).lower().replace(" ", "-")) for marks, text in found]


@pytest.mark.parametrize(
    "document",
    [
        *("README.md", "docs/model.md", "docs/tutorial.md", "docs/training.md", PACKING),
        *("docs/engine.md", "docs/parallel.md", "docs/evaluation.md"),
    ],
)
def test_python_runs(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader can paste the blocks one after the other; each line `# -> text` is what the block above it prints."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    assert blocks(document, "python")
    for number, block in enumerate(blocks(document, "python"), 1):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(block, f"{document}, python block {number}", "exec"), names)
        promised = re.findall(r"^ *# -> (.*)$", block, re.MULTILINE)
        assert promised == [line for line in output.getvalue().splitlines() if line in promised]


@pytest.mark.parametrize(
    "document",
    [
        *("README.md", "docs/tutorial.md", "docs/training.md", PACKING, SPREADING),
        *("docs/evaluation.md", "weights/tiny/README.md"),
    ],
)
def test_commands_work(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command does what it did when it was written: ours run here, those that build or download are looked up,
    and so are those that would wait for somebody.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "input", _leave)
    lines = [line for block in blocks(document, "bash") for line in block.splitlines() if line.strip()]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        if program == "qwenvl" and (
            HUB_ID.search(line) or arguments[0] == "serve" or arguments[:2] == ["eval", "judge"]
        ):
            _parser().parse_args(arguments)
        elif program == "qwenvl":
            assert main(arguments) == 0, line
        elif program == "torchrun" and HUB_ID.search(line):
            _parser().parse_args(arguments[arguments.index("qwenvl.cli") + 1 :])
        elif program == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", *arguments]
            assert subprocess.run(command, env=ENVIRONMENT, timeout=300, check=False).returncode == 0, line
        else:
            assert _exists(program, arguments), f"{document}: {line}"


def _leave(*_: object) -> str:
    raise EOFError


def _exists(program: str, arguments: list[str]) -> bool:
    """Whether a make target, a script with its options, or what pip is to install is there."""
    first, *rest = arguments
    if program == "make":
        return all(re.search(rf"^{target}:", read("Makefile"), re.MULTILINE) for target in arguments)
    if program == "python":
        return all(option in read(first) for option in rest if option.startswith("-"))
    if program == "pip" and first == "install":
        *options, what = rest
        extras = re.findall(r"\w+", what)
        files = [name for name in options if not name.startswith("-")]
        declared = [re.search(rf"^{extra} = \[", read("pyproject.toml"), re.MULTILINE) for extra in extras]
        return what.startswith(".") and all(declared) and all((ROOT / name).is_file() for name in files)
    return False


@documents
def test_links_lead_somewhere(document: str) -> None:
    """No link of ours is broken, headings included, and no picture is large."""
    for target, anchor in LINK.findall(prose(document)):
        path = (ROOT / document).parent / target if target else ROOT / document
        assert path.exists(), f"{document} links to {target}"
        if anchor:
            there = path.resolve().relative_to(ROOT).as_posix()
            assert anchor in [name for _, name in headings(there)], f"{document} links to {target}#{anchor}"
        assert path.suffix != ".png" or path.stat().st_size < LARGEST_PICTURE


@documents
def test_names_exist(document: str) -> None:
    """A call that is renamed or removed is noticed here, also where it stands in a table or a sentence."""
    vl = qwenvl.load("tiny", quiet=True)
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    for code in re.findall(r"`([^`\n]+)`", prose(document)):
        for name in re.findall(r"\bvl\.(\w+)", code):
            assert hasattr(vl, name), f"{document}: {code}"
        for name in re.findall(r"\bqwenvl((?:\.(?!py\b)[A-Za-z_]\w*)+)", code):
            pkgutil.resolve_name(f"qwenvl{name}")
        if called := re.fullmatch(r"(?:\w+\.)*(\w+)\(\)", code):
            assert re.search(rf"(def|class) {called[1]}\b", source), f"{document}: {code}"


def test_chinese_readme_says_the_same() -> None:
    """The two READMEs have the same code, sections and numbers: whoever changes one is reminded of the other."""
    english, chinese = "README.md", "README.zh.md"

    def code(document: str) -> list[tuple[str, str]]:
        """Blocks without their comments, which are translated."""
        return [(name, re.sub(r"(^|\s+)# .*$", "", body, flags=re.MULTILINE)) for name, body in BLOCK.findall(document)]

    def numbers(document: str) -> list[list[str]]:
        """Those in each row of each table."""
        return [re.findall(r"\d[\d.,]*", row) for row in re.findall(r"^\|.*$", prose(document), re.MULTILINE)]

    assert code(read(english)) == code(read(chinese))
    assert [level for level, _ in headings(english)] == [level for level, _ in headings(chinese)]
    assert numbers(english) == numbers(chinese)


def test_the_small_models_sizes() -> None:
    """The last column of the letters in model.md, and the parameters that are spoken of, are the embedded model's."""
    config = QwenVLConfig.load(embedded("tiny"))
    vision = config.visual
    cells = (line.split("|")[1:-1] for line in read("docs/model.md").splitlines() if re.match(r"\| [A-Z, ]+ \|", line))
    column = {letter.strip(): small.strip() for letter, *_, small in cells}
    assert column == {
        "B, T": "",
        "S": f"up to {config.max_position_embeddings} ({vision.image_size})",
        "N": "",
        "P": str((vision.image_size // vision.patch_size) ** 2),
        "W": str(vision.width),
        "Q": str(vision.n_queries),
        "C": str(config.hidden_size),
        "H, D": f"{config.num_attention_heads}, {config.kv_channels}",
        "L": str(config.num_hidden_layers),
        "F": str(config.mlp_width),
        "V": str(config.vocab_size),
    }
    with torch.device("meta"):
        millions = sum(parameter.numel() for parameter in QwenVL(config).parameters()) / 1e6
    assert f"{millions:.1f} million parameters" in read("README.md")
    assert f"{millions:.1f} million parameters" in read("weights/tiny/README.md")
    assert f"| {millions:.2f} million |" in read("docs/small-model.md")


@documents
def test_nothing_is_left_to_fill_in(document: str) -> None:
    """No placeholder for a number stays in a document."""
    assert not re.search(r"FILL|@[A-Z0-9]+@", read(document))
