"""What people get who install the package: the wheel's contents, its requirements, and the targets of `make`."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import qwenvl
from qwenvl.weights.hub import embedded

ROOT = Path(__file__).parents[1]
REQUIREMENTS = {"torch", "tiktoken", "safetensors", "huggingface_hub", "pillow", "numpy", "tqdm"}


def text(name: str) -> str:
    """A file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def output(command: Sequence[str | Path], **options: object) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout without the network."""
    pytest.importorskip("hatchling", reason="builds the wheel; it comes with the dev extra")
    pytest.importorskip("pip", reason="builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for name in ("src", "weights", "tests/text"):  # some tests, to see that they stay out
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    output([*build, "--wheel-dir", folder, source])
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_is_whole(wheel: Path) -> None:
    """The wheel has every module, the embedded checkpoint, the marker of types and both license files; no tests."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for file in embedded("tiny").iterdir():
            assert archive.read(f"qwenvl/weights/tiny/{file.name}") == file.read_bytes()
    modules = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    assert modules <= set(names)
    assert "qwenvl/py.typed" in names
    metadata = f"qwenvl-{qwenvl.__version__}.dist-info"
    assert {f"{metadata}/licenses/LICENSE", f"{metadata}/licenses/NOTICE"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"qwenvl", metadata}
    assert not [name for name in names if "test" in name]
    assert wheel.stat().st_size < 15 * 2**20  # nearly all of it the small model


def test_wheel_requires_what_we_import(wheel: Path) -> None:
    """A plain install brings the core packages and no others; the wheel's version is the package's."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        metadata = archive.read(name).decode()
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", metadata, re.MULTILINE)
    assert sorted(name.replace("-", "_") for name in required) == sorted(REQUIREMENTS)
    assert f"\nVersion: {qwenvl.__version__}\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


def test_installed_wheel_answers(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, from another folder, the installed command finds its embedded checkpoint."""
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(environment, with_pip=False)
    bin_ = environment / ("Scripts" if os.name == "nt" else "bin")
    (packages,) = environment.rglob("site-packages")
    # What the wheel requires is borrowed from here: folders in a .pth file are searched, their own .pth files, by
    # which an editable install points to this checkout, are not read.
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    assert str(Path(torch.__file__).parents[1]) in borrowed
    (packages / "borrowed.pth").write_text("\n".join(borrowed))
    pip = [sys.executable, "-m", "pip", "--python", bin_ / "python", "install", "--quiet", "--no-deps", "--no-index"]
    output([*pip, "--ignore-installed", wheel])
    plain = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    home = output([bin_ / "python", "-c", "import qwenvl; print(qwenvl.__file__)"], env=plain, cwd=elsewhere)
    assert Path(home.strip()).parent == packages / "qwenvl"
    chat = [bin_ / "qwenvl", "chat", "--model", "tiny", "--quiet"]
    screen = output(chat, env=plain, cwd=elsewhere, input="What is in the picture?\n/save talk.json\n")
    assert "qwenvl chat with tiny" in screen
    (turn,) = json.loads((elsewhere / "talk.json").read_text(encoding="utf-8"))
    assert turn["reply"] == qwenvl.load("tiny", quiet=True).chat("What is in the picture?")[0]


def test_import_is_light() -> None:
    """`import qwenvl` pays for nothing heavy until something is used."""
    script = "import sys, qwenvl; print({'torch', 'numpy', 'PIL', 'tiktoken', 'huggingface_hub'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    assert output([sys.executable, "-c", script], env=environment) == "set()\n"


def test_public_names() -> None:
    """Every public name can be imported and is what `dir` and a type checker are told."""
    assert set(qwenvl.__all__) == set(qwenvl._HOMES)
    for name in qwenvl.__all__:
        assert getattr(qwenvl, name).__name__ == name


def test_versions_agree() -> None:
    """There is one version: pyproject.toml reads the package's."""
    assert 'dynamic = ["version"]' in text("pyproject.toml")
    assert re.fullmatch(r"\d+\.\d+\.\d+", qwenvl.__version__)


def test_constraints_pin_what_is_asked_for() -> None:
    """Every package that the project or its dev extra names has an exact version, so that a fresh machine gets it."""
    pinned = {
        re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r"^([\w.-]+)==", text("constraints.txt"), re.M)
    }
    named = set(re.findall(r'^    "([\w-]+)>=', text("pyproject.toml"), re.MULTILINE))
    (dev,) = re.findall(r"^dev = \[(.*?)^\]", text("pyproject.toml"), re.MULTILINE | re.DOTALL)
    named |= set(re.findall(r"""["']([a-z][\w-]+)>=""", dev) + re.findall(r'"([a-z][\w-]+)"', dev))
    assert named > REQUIREMENTS
    assert {re.sub(r"[-_.]+", "-", name) for name in named} <= pinned


# ---- make


def targets() -> set[str]:
    """What the Makefile declares."""
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text("Makefile"), re.MULTILINE)
    return set(phony.split())


def test_make_help() -> None:
    """`make`, and `make help`, list every target with one line of what it does."""
    if shutil.which("make") is None:
        pytest.skip("there is no make here")
    lines = output(["make", "-s", "help"], cwd=ROOT).splitlines()
    assert output(["make", "-s"], cwd=ROOT).splitlines() == lines
    listed = {line.split()[1]: line.split(maxsplit=2)[2] for line in lines}
    assert all(line.startswith("  make ") for line in lines)
    assert set(listed) == targets()
    assert {"setup", "demo", "chat", "test", "check", "bench"} <= set(listed)
    assert all(len(what) > 10 for what in listed.values())


def test_make_targets_can_run() -> None:
    """Every target's recipe can be made out, and the files that the recipes run exist."""
    if shutil.which("make") is None:
        pytest.skip("there is no make here")
    for target in sorted(targets()):
        output(["make", "--dry-run", target], cwd=ROOT)
    for script in re.findall(r"\$\(RUN\) ((?:tools|bench)/\S+\.py)", text("Makefile")):
        assert (ROOT / script).is_file(), script


def test_continuous_integration_runs_what_people_run() -> None:
    """`.ci/run` is executable and runs the same targets."""
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert {"make check", "make test", "make demo"} <= set(text(".ci/run").splitlines())
