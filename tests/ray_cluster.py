"""Ray on this machine alone, with replicas of the server, in a process of its own that takes all of it along.

`cluster` starts this file as that process: what Ray leaves behind in a process (threads, signals' handlers) would stay
with the tests that follow.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STARTING = 120  # seconds: machines that run other tests, too, take their time
STOPPING = 30


@dataclass
class Cluster:
    """Answers at `url`; all its processes descend from `pid`."""

    url: str
    pid: int

    def replicas(self) -> list[int]:
        """The processes that hold a model each."""
        return [pid for pid, title in descendants(self.pid).items() if title.startswith("ray::ServeReplica")]


@contextmanager
def cluster(**arguments: Any) -> Iterator[Cluster]:
    """A cluster that serves what `build` makes of the arguments, until the end of the block; nothing of it remains."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # the names of Ray's sockets have no room for more
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), str(ROOT / "tests")]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # so it stays on 127.0.0.1, on Linux too
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else it is made in the home directory
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, str(folder), json.dumps(arguments)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
    try:
        url, end = folder / "url", time.monotonic() + STARTING
        while not url.exists():
            if process.poll() is not None or time.monotonic() > end:
                said = (folder / "log").read_text(encoding="utf-8", errors="replace")
                raise AssertionError(f"Ray has not come up: {said[-3000:]}")
            time.sleep(0.05)
        yield Cluster(url.read_text(encoding="utf-8"), process.pid)
    finally:
        there = descendants(process.pid)
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(STOPPING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        left = _left(there)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
    assert not left, f"Ray has left processes behind: {left}"


def descendants(pid: int) -> dict[int, str]:
    """The processes that a process has started, and those that these have, with their titles."""
    listed = subprocess.run(["ps", "-axo", "pid=,ppid=,args="], capture_output=True, text=True, check=True, timeout=30)
    rows = [(int(row[0]), int(row[1]), row[2]) for row in (line.split(None, 2) for line in listed.stdout.splitlines())]
    found, todo = {}, [pid]
    while todo:
        parent = todo.pop()
        for child, above, title in rows:
            if above == parent:
                found[child] = title
                todo.append(child)
    return found


def _left(there: dict[int, str]) -> dict[int, str]:
    """Those that do not end within a while. Orphans are told by number and title, for they have another parent."""
    end = time.monotonic() + STOPPING
    while True:
        now = descendants(1)
        left = {pid: title for pid, title in there.items() if now.get(pid) == title}
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.1)


def stay_here() -> None:
    """In each of Ray's processes: a replica has a server that would listen to the whole network, whatever is set."""
    from ray._common import tls_utils

    listen = getattr(tls_utils, "add_port_to_grpc_server", None)
    if listen is not None:
        tls_utils.add_port_to_grpc_server = lambda server, where: listen(server, where.replace("[::]", "127.0.0.1"))


def main(folder: Path, arguments: dict[str, Any]) -> None:
    """Serve until the one who has started this closes our input, or ends."""
    import ray
    from ray import serve

    from deploy.ray_serve import build

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        object_store_memory=80 << 20,  # nearly the least that it takes
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=str(folder),
        runtime_env={"worker_process_setup_hook": "ray_cluster.stay_here"},
    )
    try:
        serve.start(http_options=serve.HTTPOptions(host="127.0.0.1", port=port))
        serve.run(build(arguments))
        (folder / "url.new").write_text(f"http://127.0.0.1:{port}", encoding="utf-8")
        (folder / "url.new").rename(folder / "url")
        sys.stdin.read()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
