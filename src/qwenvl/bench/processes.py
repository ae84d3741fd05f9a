"""Jobs in processes of their own, which end when their time is up.

run_apart    a job in a fresh process
run_here     the same in this one, for small models
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from .figures import Event, Figure, Missing, from_line
from .jobs import Job, perform

Run = Callable[[Job, float], Iterator[Event]]


def run_here(job: Job, _: float) -> Iterator[Event]:
    """Do a job in this process, which no limit of time stops. A bug's traceback goes to stderr, as it does apart."""
    try:
        yield from perform(job)
    except Exception:
        traceback.print_exc(file=sys.stderr)
        yield Missing(job.part, job.subject, "it failed, see above", failed=True)


def run_apart(job: Job, limit: float) -> Iterator[Event]:
    """Do a job in a fresh process: its figures, as they come, and why there are no more if it did not end well.

    It is stopped after `limit` seconds. A figure of starting up is counted from here on. Whatever else the process
    prints goes to stderr. Where the reader stops, the process does too.
    """
    begin = time.perf_counter()
    command = [sys.executable, "-m", "qwenvl.bench.jobs", job.to_line()]
    source = str(Path(__file__).parents[2])  # this package, also where it is not installed
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,  # so that whatever it has started can be stopped with it
    ) as process:
        late = threading.Event()

        def stop() -> None:
            late.set()
            _kill(process)

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                event = from_line(line)
                if event is None:
                    print(line, end="", file=sys.stderr, flush=True)
                elif isinstance(event, Figure) and event.part == "start-up":
                    yield replace(event, value=round(time.perf_counter() - begin, 3))
                else:
                    yield event
            process.wait()
        except BaseException:  # Ctrl-C, which this process alone has heard
            _kill(process)
            raise
        finally:
            timer.cancel()
    if late.is_set():
        yield Missing(job.part, job.subject, f"it was stopped after {limit:.0f} s, its time was up", failed=True)
    elif process.returncode:
        how = f"ended by signal {-process.returncode}" if process.returncode < 0 else "failed, see above"
        yield Missing(job.part, job.subject, f"its process {how}", failed=True)


def _kill(process: subprocess.Popen[str]) -> None:
    try:
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except ProcessLookupError:
        pass
