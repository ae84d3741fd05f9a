"""Runs a file of tests of Triton kernels: in Triton's interpreter, or on a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Where a file of kernels' tests is run; the interpreter takes its time.
WHERE = [pytest.param("interpreter", marks=pytest.mark.slow), "GPU"]


def run(file: str, where: str) -> None:
    """In a process of its own, since Triton decides when it is imported whether it interprets."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: it comes with torch for CUDA")
    if where == "GPU" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/adapt/{file}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1" if where == "interpreter" else "0"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
