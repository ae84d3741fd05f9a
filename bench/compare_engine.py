"""An engine on a CPU, on the mid-size random model of compare_eager.py: many rows at once, and a chat that goes on.

    python bench/compare_engine.py            # ten minutes on two CPU cores
    python bench/compare_engine.py --quick    # one round after the warm-up
    python bench/compare_engine.py --only second-round
    python bench/compare_engine.py --save     # also append the JSON line to bench/results/compare_engine.jsonl

Parts of `qwenvl bench --engine`, which has the embedded model there: its steps are mostly Python, this one's mostly
arithmetic. The second round of a chat with a picture, reused and anew; 8 rows that decode, and one; 8 requests at a
mean context of 256 and with 64 new ids, at once and one at a time. Both ways in one process and in turn. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from compare_eager import MID_SIZE

from qwenvl.bench.device import Device, measure_limits
from qwenvl.bench.figures import Facts
from qwenvl.bench.measure import measure_model
from qwenvl.bench.plan import FULL
from qwenvl.bench.random_weights import random_model
from qwenvl.bench.report import Report, append
from qwenvl.bench.roofline import Limits
from qwenvl.bench.subject import Subject

PARTS = ("second-round", "steady", "throughput")
RESULTS = Path(__file__).parent / "results" / "compare_engine.jsonl"


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round after the warm-up")
    parser.add_argument("--save", action="store_true", help="append the line to bench/results/compare_engine.jsonl")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="of the three parts")
    given = parser.parse_args()
    rounds, seconds = (1, 300) if given.quick else (5, 900)
    plan = replace(FULL, seconds=seconds, parts=tuple(given.only), context=256, answer=64, rounds=rounds)
    begin, device = time.perf_counter(), Device(torch.device("cpu"))
    report = Report(
        "quick" if given.quick else "full", "mid-size, random", MID_SIZE, seconds=plan.seconds, table=True, quiet=False
    )
    with report:
        report.add(Facts({**device.describe(), "dtype": "float32"}))
        rates = {"GB/s": 0.0, "TFLOP/s": 0.0}
        for limit in measure_limits(device, plan, torch.float32):
            rates[limit.unit] = max(rates[limit.unit], limit.value)
            report.add(limit)
        limits = Limits(1e9 * rates["GB/s"], 1e12 * rates["TFLOP/s"])
        subject = Subject(random_model(MID_SIZE, torch.float32, device), device, limits, "float32")
        for event in measure_model(subject, plan, plan.seconds):
            report.add(event)
    result = {**report.result(time.perf_counter() - begin), "bench": "compare_engine"}
    if given.save:
        append(result, RESULTS)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
