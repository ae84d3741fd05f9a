"""The house stands: imports run upward only, files stay small, and the core asks for few packages."""

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "qwenvl"
MODULES = sorted(path.relative_to(SOURCE).with_suffix("").as_posix() for path in SOURCE.rglob("*.py"))

# Floors from bottom to top. A module may import from its own floor's folder and from the floors below it.
FLOORS = [
    ["errors"],
    ["files"],
    ["checks"],
    ["config"],
    ["model"],
    ["text"],
    ["fetch"],
    ["image"],
    ["draw"],
    ["weights"],
    ["adapt"],
    ["generation"],
    ["pictures"],
    ["pipeline"],
    ["loading"],
    [
        "training",
        "quantization",
        "evaluation",
        "serving",
        "bench",
        "info",
        "demo",
        "terminal",
        "processes",
        "cli",
        "__main__",
    ],
]
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}
INSTALLED = {"torch", "tiktoken", "safetensors", "huggingface_hub", "PIL", "numpy", "tqdm"}
TRITON = {"adapt/packed_triton": {"triton"}, "adapt/attend_triton": {"triton"}}  # by module
OPTIONAL = {"weights/hub": {"modelscope"}, **TRITON}
# What each folder may ask for beyond the floors: packages outside the standard library.
PACKAGES = {"errors": set(), "checks": set(), "config": set(), "model": {"torch"}, "text": {"tiktoken"}}
MODEL_IMPORTS = {"model", "config", "errors"}
TEXT_IMPORTS = {"text", "errors"}


def floor_of(module: str) -> str:
    """The part of the house in which a module, written with slashes, lies."""
    return module.split("/")[0]


def imports_of(module: str) -> tuple[set[str], set[str]]:
    """What a module imports anywhere in its code: our own parts, and packages from outside the standard library."""
    ours: set[str] = set()
    others: set[str] = set()
    package = module.split("/")[:-1]
    for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            path = [*base, *(node.module or "").split(".")] if node.module else base
            ours |= {path[0]} if path else {alias.name for alias in node.names}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                first, *rest = name.split(".")
                if first == "qwenvl":
                    ours |= {rest[0]} if rest else {alias.name for alias in node.names}
                elif first not in sys.stdlib_module_names and first != "_typeshed":  # which type checkers bring
                    others.add(first)
    return ours, others


def houses() -> list[str]:
    """Every module but the `__init__` files, which are exempt."""
    return [module for module in MODULES if not module.endswith("__init__")]


@pytest.mark.parametrize("module", houses())
def test_imports_run_upward(module: str) -> None:
    """Nothing imports what stands on it, inside functions neither; a new part must be given its floor here."""
    own = floor_of(module)
    assert own in HEIGHT, f"{own} has no floor: put it into FLOORS"
    ours, _ = imports_of(module)
    wrong = [name for name in ours if name != own and name in HEIGHT and HEIGHT[name] >= HEIGHT[own]]
    if HEIGHT[own] == len(FLOORS) - 1:  # the commands stand side by side
        wrong = []
    assert not wrong, f"{module} imports {wrong}"


def test_the_walk_sees_imports() -> None:
    """Guards the tests of this file: known imports of every form are found."""
    assert imports_of("pipeline")[0] >= {"model", "generation", "text", "config", "image"}
    assert imports_of("model/decoder") == ({"model", "config", "errors"}, {"torch"})
    assert "torch" in imports_of("weights/gptq")[1]
    assert any(imports_of(module)[0] for module in MODULES if floor_of(module) == "cli")


@pytest.mark.parametrize("module", [module for module in houses() if floor_of(module) in PACKAGES])
def test_the_lower_floors_ask_for_little(module: str) -> None:
    """model/ imports torch, config and errors alone; text/ never imports torch."""
    own = floor_of(module)
    ours, others = imports_of(module)
    assert others <= PACKAGES[own]
    assert own != "model" or ours <= MODEL_IMPORTS
    assert own != "text" or ours <= TEXT_IMPORTS


@pytest.mark.parametrize("module", houses())
def test_no_package_beyond_the_declared_ones(module: str) -> None:
    """No transformers, einops, torchvision or accelerate; extras only where they belong."""
    _, others = imports_of(module)
    if floor_of(module) not in ("serving", "evaluation", "training"):
        assert others <= INSTALLED | OPTIONAL.get(module, set())
    assert not others & {"transformers", "einops", "torchvision", "accelerate"}


def test_files_stay_readable() -> None:
    """No file passes 400 lines, and image to logits stays under 1,000."""
    lengths = {module: len((SOURCE / f"{module}.py").read_text(encoding="utf-8").splitlines()) for module in MODULES}
    assert {module: length for module, length in lengths.items() if length > 400} == {}
    assert sum(length for module, length in lengths.items() if module.startswith("model/")) < 1000


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_qwenvl_is_light() -> None:
    """`import qwenvl` loads none of the heavy packages; using a name does."""
    heavy = "sorted(sys.modules.keys() & {'torch', 'numpy', 'PIL', 'tiktoken', 'safetensors', 'huggingface_hub'})"
    assert run(f"import sys, qwenvl; qwenvl.QwenVLConfig, qwenvl.QwenVLError; print({heavy})") == "[]"
    assert "torch" in run(f"import sys, qwenvl; qwenvl.KVCache; print({heavy})")


def test_text_works_without_torch() -> None:
    """The tokenizer and prompts run where torch is not installed."""
    blocked = "import sys; sys.modules['torch'] = None; import "
    modules = [module.replace("/", ".") for module in houses() if floor_of(module) in ("text", "config", "errors")]
    run(blocked + ", ".join(f"qwenvl.{module}" for module in modules))


def test_every_public_name_is_there() -> None:
    """`__all__`, the table of homes and the type checker's imports list the same names, and each can be had."""
    import qwenvl

    assert set(qwenvl.__all__) == set(qwenvl._HOMES)
    for name in qwenvl.__all__:
        assert getattr(qwenvl, name) is not None
    block = (SOURCE / "__init__.py").read_text(encoding="utf-8").split("if TYPE_CHECKING:")[1].split("__version__")[0]
    assert set(re.findall(r"\b(\w+)\b", " ".join(re.findall(r"import (.+)", block)))) == set(qwenvl.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        qwenvl.nothing  # noqa: B018


def imported_first(module: str) -> set[str]:
    """The modules of ours that must have run before this one has: imports outside functions and type checking."""
    before: set[str] = set()
    package = module.split("/")[:-1]
    waiting: list[ast.AST] = list(ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            path = "/".join([*base, *(node.module or "").split(".")] if node.module else base)
            named = [f"{path}/{alias.name}".lstrip("/") for alias in node.names]
            before |= {name for name in (path, *named) if name in MODULES}
        elif isinstance(node, (ast.Try, ast.ClassDef, ast.With)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test)
        ):
            waiting += ast.iter_child_nodes(node)
    return before


def test_imports_go_in_no_circle() -> None:
    """So whichever module is imported first, those that it needs have run: none relies on another's having come."""
    left = {module: imported_first(module) for module in MODULES}
    assert left["evaluation/run"] >= {"evaluation/journal", "adapt/ranks", "files"}, "the walk sees imports"
    while ready := [module for module, before in left.items() if not before & left.keys()]:
        for module in ready:
            del left[module]
    assert not left, f"a circle among {sorted(left)}"


@pytest.mark.slow
def test_every_module_imports_by_itself() -> None:
    """In a fresh interpreter, whichever comes first: no import relies on another module's having run.

    Triton comes with torch for CUDA; the modules that need it are imported only where they are used.
    """
    there = [module for module in MODULES if module not in TRITON or find_spec("triton")]
    names = [f"qwenvl.{module.replace('/', '.').removesuffix('.__init__')}" for module in there]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    code = (
        "import importlib, sys\n"
        "import torch, numpy, PIL, tiktoken, safetensors, huggingface_hub, tqdm\n"
        f"for name in {names!r}:\n"
        "    for loaded in [m for m in sys.modules if m.split('.')[0] == 'qwenvl']:\n"
        "        del sys.modules[loaded]\n"
        "    importlib.import_module(name)\n"
        "print('done')"
    )
    assert run(code) == "done"
