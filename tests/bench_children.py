"""What processes of a benchmark do in tests, in place of a job; found by name from a fresh process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from qwenvl.bench.figures import Event, Figure
from qwenvl.bench.jobs import Job

BEFORE = Figure("weights", "float32", "before", 1.0, "s")


def speak(_: Job) -> Iterator[Event]:
    """Say what a library might, to stdout, and end well."""
    print("a library's remark")
    yield BEFORE
    yield "something to come"


def crash(_: Job) -> Iterator[Event]:
    """Be killed, as where memory runs out."""
    yield BEFORE
    os.kill(os.getpid(), signal.SIGKILL)


def hang(_: Job) -> Iterator[Event]:
    """Start a process, tell its id, and never come back."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield Figure("weights", "float32", "child", child.pid, "s")
    time.sleep(600)
