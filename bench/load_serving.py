"""A server under load, of the embedded model on this machine: is anything lost, and what does a crowd get beside one?

    python bench/load_serving.py                 # two minutes and a half: 64 clients for 60 s, one for 30 s twice
    python bench/load_serving.py --seconds 10    # a short one
    python bench/load_serving.py --save          # also append the JSON line to bench/results/load_serving.jsonl

`qwenvl serve` in a process of its own. One client, 64, and one again: questions of mixed lengths with up to two
pictures of mixed sizes, streamed and whole; some hang up, some send what is no request (see load_clients.py).
Throughput is the tokens in a second of the answers that came whole within the time. The last line is JSON; the status
is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from load_clients import Mix, Tally, crowd
from tqdm import tqdm

from qwenvl import __version__
from qwenvl.bench.device import processor
from qwenvl.bench.report import append

RESULTS = Path(__file__).parent / "results" / "load_serving.jsonl"
WARM_UP = 8.0  # seconds of a crowd before anything is measured
TIMES, GROWTH = 3.0, 1.05  # bars: throughput beside one client's; memory at the end beside what it was in the middle


@dataclass(frozen=True)
class Run:
    """What came of some clients' requests within so many seconds, and the server's memory in MB, once a second."""

    clients: int
    tally: Tally
    seconds: float
    memory: list[float]

    @property
    def rate(self) -> float:
        """Tokens in a second, of the answers that came whole within the time."""
        return self.tally.tokens / self.seconds

    @property
    def growth(self) -> float:
        """Memory in the last quarter beside that in the second."""
        quarter = len(self.memory) // 4
        return statistics.median(self.memory[-quarter:]) / statistics.median(self.memory[quarter : 2 * quarter])


def main() -> int:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64, help="at once (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the crowd, from 8 (default: %(default)s)")
    parser.add_argument("--save", action="store_true", help="append the line to bench/results/load_serving.jsonl")
    given = parser.parse_args()
    if given.clients < 1 or given.seconds < 8:
        parser.error("there must be at least one client, for at least 8 seconds")
    with serving() as (url, pid):
        model = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"]
        asyncio.run(crowd(url, Mix(model), given.clients, WARM_UP))
        plan = ((1, given.seconds / 2), (given.clients, given.seconds), (1, given.seconds / 2))
        runs = [watched(url, pid, Mix(model, seed), *what) for seed, what in enumerate(plan, 1)]
        left = still_busy(url)
    result = judged(runs, left)
    if given.save:
        append(result, RESULTS)
    print(json.dumps(result))
    return 0 if all(result["passed"].values()) else 1


@contextmanager
def serving() -> Iterator[tuple[str, int]]:
    """A server on a free port, until the end of the block: its address and its process."""
    command = [sys.executable, "-m", "qwenvl.cli", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            found = re.search(r"http://[\d.:]+\d", process.stdout.readline())
            if found is None:
                raise SystemExit("the server did not start")
            yield found[0], process.pid
        finally:
            process.terminate()


def watched(url: str, pid: int, mix: Mix, clients: int, seconds: float) -> Run:
    """A crowd, and what the server takes meanwhile."""
    memory: list[float] = []
    stop = threading.Event()

    def look() -> None:
        with tqdm(total=round(seconds), unit="s", desc=f"{clients} at once", disable=None, leave=False) as bar:
            while not stop.wait(1):
                memory.append(memory_of(pid))
                bar.update()

    looking = threading.Thread(target=look)
    looking.start()
    try:
        tally = asyncio.run(crowd(url, mix, clients, seconds))
    finally:
        stop.set()
        looking.join()
    return Run(clients, tally, seconds, memory)


def memory_of(pid: int) -> float:
    """What a process has in memory, in MB, as Linux says."""
    (told,) = re.findall(r"VmRSS:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    return int(told) / 1000


def still_busy(url: str) -> int:
    """Answers, rows and requests that the server has when nobody asks any more."""
    time.sleep(1)
    told = httpx.get(f"{url}/metrics", trust_env=False).text
    return sum(int(float(value)) for value in re.findall(r"^qwenvl_(?:busy|active|waiting) (\S+)", told, re.MULTILINE))


def judged(runs: list[Run], left: int) -> dict[str, Any]:
    """Print what the runs have shown; the JSON line."""
    alone, many = statistics.mean((runs[0].rate, runs[2].rate)), runs[1]
    result: dict[str, Any] = {
        "bench": "load_serving",
        "date": datetime.date.today().isoformat(),
        "version": __version__,
        "device": processor(),
        "torch": torch.__version__,
        "runs": [facts(run) for run in runs],
        "times": round(many.rate / alone, 2),
        "growth": round(many.growth, 4),
        "left": left,
    }
    lost = sum(sum(run.tally.lost.values()) for run in runs)
    result["passed"] = {
        f"throughput at least {TIMES:g} times one client's": result["times"] >= TIMES,
        "nothing lost": lost == 0,
        "no slot leaked": left == 0,
        f"memory grows by less than {GROWTH - 1:.0%}": result["growth"] < GROWTH,
    }
    print(f"{result['device']}, torch {result['torch']}, {result['date']}")
    for name in result["runs"][0]:
        print(f"  {name:<18}" + "".join(f"{run[name]:>10g}" for run in result["runs"]))
    print(f"  {result['times']} times the throughput of one; memory x {result['growth']}; {left} slots still in use")
    for name, times in sum((run.tally.lost for run in runs), Counter()).items():
        print(f"  LOST, {times} times: {name}")
    for name, passed in result["passed"].items():
        print(f"  {'passed' if passed else 'MISSED'}: {name}")
    return result


def facts(run: Run) -> dict[str, float]:
    """The figures of one run."""
    tally = run.tally
    return {
        "clients": run.clients,
        "seconds": round(run.seconds, 1),
        "answers": tally.answers,
        "tokens/s": round(run.rate, 1),
        **{f"first ms p{share}": percentile(tally.first, share) for share in (50, 95)},
        **{f"answer ms p{share}": percentile(tally.whole, share) for share in (50, 95)},
        "hung up": tally.hung_up,
        "refused": sum(tally.refusals.values()) - tally.refusals[429],
        "refused: full": tally.refusals[429],
        "lost": sum(tally.lost.values()),
        "memory MB": round(max(run.memory), 1),
    }


def percentile(seconds: list[float], share: int) -> float:
    """In milliseconds; 0 of nothing."""
    return round(1000 * sorted(seconds)[min(len(seconds) * share // 100, len(seconds) - 1)], 1) if seconds else 0.0


if __name__ == "__main__":
    sys.exit(main())
