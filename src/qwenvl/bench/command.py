"""`qwenvl bench`: flags to a request, and what came of it to the screen and to a file.

    add_arguments   its flags
    EPILOG          examples
    run             the command

Torch is imported by what measures, not here: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

from ..config import QuantizationConfig, QwenVLConfig
from ..errors import ConfigError
from ..training.memory import QWEN_VL
from .conductor import WIDTHS, Request, Subject, conduct
from .plan import FULL, PARTS, QUICK, TINY
from .report import RESULTS, Report, append

EPILOG = """examples:
  qwenvl bench                                 # random weights of Qwen-VL's shape, bfloat16 and int4, on the GPU
  qwenvl bench --quick --only decode           # the device's limits and decoding, in two minutes
  qwenvl bench --model Qwen/Qwen-VL-Chat-Int4
  qwenvl bench --tiny                          # every part once, small, on the CPU

The last line is one JSON object. In a checkout it is also added to bench/results/bench.jsonl (--tiny is not).
The status is 1 if a part failed, with one line that says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, on what."""
    parser.add_argument("--model", help="folder, hub id or tiny (default: random weights of Qwen-VL's shape)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--dtype", choices=WIDTHS, help="16 or 32 bits alone, in this dtype (default: both, and int4)")
    kind.add_argument("--int4", action="store_true", help="random weights in 4 bits alone")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="2 minutes in place of 8: shorter runs, fewer parts")
    size.add_argument("--tiny", action="store_true", help="everything small, on the CPU: to see that it works")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    parser.add_argument("--no-save", action="store_true", help="add nothing to bench/results/")
    parser.add_argument("--quiet", action="store_true", help="no remarks on what is being measured")


def run(given: argparse.Namespace) -> None:
    """The command. Raises QwenVLError; exits with status 1 if a part failed."""
    begin = time.perf_counter()
    mode, plan = ("tiny", TINY) if given.tiny else ("quick", QUICK) if given.quick else ("full", FULL)
    if given.only:
        plan = replace(plan, parts=tuple(part for part in PARTS if part in given.only))
    subjects = _subjects(given)
    request = Request(
        plan=plan,
        subjects=subjects,
        device="cpu" if given.tiny and given.device == "auto" else given.device,
        dtype=given.dtype or "auto",
        apart=not given.tiny,
        quiet=given.quiet,
    )
    weights = given.model or ("tiny and random" if given.tiny else "random")
    report = Report(mode, weights, subjects[0].config, table=not given.json)
    conduct(request, report)
    result = report.finish(time.perf_counter() - begin)
    if not (given.tiny or given.no_save):
        append(result, RESULTS)
    print(json.dumps(result), flush=True)
    if report.failed:
        raise SystemExit(1)


def _subjects(given: argparse.Namespace) -> tuple[Subject, ...]:
    """The kinds of weights: a checkpoint's own, or random ones, in 16 or 32 bits and packed."""
    if given.model and given.int4:
        raise ConfigError("--int4 is for random weights: a checkpoint has the bits that it has (see qwenvl quantize)")
    if given.model or (given.tiny and not given.int4):
        from ..weights.hub import resolve

        folder = resolve(given.model or "tiny", quiet=given.quiet)
        subject = Subject(QwenVLConfig.load(folder), str(folder))
        if given.model or given.dtype:
            return (subject,)
        return subject, Subject(_packed(subject.config))
    if given.tiny:
        from ..weights.hub import embedded

        return (Subject(_packed(QwenVLConfig.load(embedded("tiny")))),)
    plain, packed = Subject(QWEN_VL), Subject(_packed(QWEN_VL))
    return (packed,) if given.int4 else (plain,) if given.dtype else (plain, packed)


def _packed(config: QwenVLConfig) -> QwenVLConfig:
    return replace(config, quantization_config=QuantizationConfig())
