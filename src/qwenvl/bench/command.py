"""`qwenvl bench`: flags to a request, and what came of it to the screen and to a file.

    add_arguments   its flags
    EPILOG          examples
    run             the command

Torch is imported by what measures, not here: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from ..config import QuantizationConfig, QwenVLConfig
from ..errors import ConfigError
from ..training.memory import QWEN_VL
from .plan import FULL, OF_AN_ENGINE, PARTS, QUICK, TINY

if TYPE_CHECKING:
    from .jobs import Weights

DTYPES = ("float32", "float16", "bfloat16")
GROUPS = (128, 64, 32)  # of random weights in 4 bits: the published one, or what divides a small model's widths
EPILOG = """examples:
  qwenvl bench                                 # random weights of Qwen-VL's shape, bfloat16 and int4, on the GPU
  qwenvl bench --quick --only decode           # the device's limits and decoding, in two minutes
  qwenvl bench --model Qwen/Qwen-VL-Chat-Int4
  qwenvl bench --engine                        # many requests at once: throughput, waiting, what is reused
  qwenvl bench --tiny                          # every part once, small, on the CPU
  qwenvl bench --tiny --only compile           # torch.compile takes half a minute there, so --tiny leaves it out

Without a GPU, `qwenvl bench` is `qwenvl bench --tiny`, unless --device cpu or --model asks for more.
The last line is one JSON object. In a checkout it is also added to bench/results/bench.jsonl (--tiny is not).
The status is 1 if a part failed, with one line that says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, on what."""
    parser.add_argument("--model", help="folder, hub id or tiny (default: random weights of Qwen-VL's shape)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--dtype", choices=DTYPES, help="weights that are not packed alone, in this dtype")
    kind.add_argument("--int4", action="store_true", help="random weights in 4 bits alone")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="2 minutes in place of 8: shorter runs, fewer parts")
    size.add_argument("--tiny", action="store_true", help="everything small, on the CPU: to see that it works")
    parser.add_argument("--engine", action="store_true", help="an engine's parts in place of the others")
    every = (*PARTS, *OF_AN_ENGINE)
    told = f"of {', '.join(PARTS)}; of an engine: {', '.join(OF_AN_ENGINE)}"
    parser.add_argument("--only", nargs="+", choices=every, metavar="PART", help=told)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    parser.add_argument("--no-save", action="store_true", help="add nothing to bench/results/")
    parser.add_argument("--quiet", action="store_true", help="no progress and no remarks")


def run(given: argparse.Namespace) -> None:
    """The command. Raises QwenVLError; exits with status 1 if a part failed."""
    if given.model and given.int4:
        raise ConfigError("--int4 is for random weights: a checkpoint has the bits that it has (see qwenvl quantize)")
    from ..loading import choose_device
    from .report import RESULTS, Report, append
    from .runner import Request, measure

    begin, tiny = time.perf_counter(), given.tiny
    if given.device == "auto" and not (tiny or given.model) and choose_device("auto").type != "cuda":
        tiny = True
        if not given.quiet:
            told = "there is no GPU to use here: measuring what --tiny does. --device cpu measures Qwen-VL's shape"
            print(f"{told} (38.6 GB of float32, or half in bfloat16), --model a checkpoint", file=sys.stderr)
    mode, plan = ("tiny", TINY) if tiny else ("quick", QUICK) if given.quick else ("full", FULL)
    if given.only or given.engine:
        plan = replace(plan, parts=tuple(given.only or OF_AN_ENGINE))
    weights = _weights(given, tiny)
    device = "cpu" if tiny and given.device == "auto" else given.device
    name = given.model or ("tiny, and random ones of its shape" if tiny else "random")
    report = Report(mode, name, weights[0].config, seconds=plan.seconds, table=not given.json, quiet=given.quiet)
    with report:
        measure(Request(plan, weights, device, given.dtype or "auto", apart=not tiny), report)
    result = report.result(time.perf_counter() - begin)
    if not (tiny or given.no_save):
        append(result, RESULTS)
    print(json.dumps(result), flush=True)
    if report.failed:
        raise SystemExit(1)


def _weights(given: argparse.Namespace, tiny: bool) -> tuple[Weights, ...]:
    """A checkpoint's own weights, or random ones, in 16 or 32 bits and packed."""
    from ..weights.hub import resolve
    from .jobs import Weights

    plain = Weights(QWEN_VL)
    if given.model or tiny:
        folder = resolve(given.model or "tiny", quiet=given.quiet)
        plain = Weights(QwenVLConfig.load(folder), str(folder))
    config = plain.config
    group = next((size for size in GROUPS if config.hidden_size % size == config.mlp_width % size == 0), GROUPS[0])
    packed = Weights(replace(config, quantization_config=QuantizationConfig(group_size=group)))
    if given.int4:
        return (packed,)
    return (plain,) if given.model or given.dtype else (plain, packed)
