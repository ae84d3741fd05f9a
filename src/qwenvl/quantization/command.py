"""`qwenvl quantize`: flags to a packed checkpoint and a table of what it cost.

    add_arguments   the flags
    EPILOG          examples
    run             the command

`checkpoint.py` does the work; it is imported when that begins, for the sake of `--help`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..config import QuantizationConfig
from ..errors import printable
from . import SAMPLES

if TYPE_CHECKING:
    from .checkpoint import Report

WIDELY_READ = (-1, 32, 64, 128)  # sizes of groups that other tools have kernels for
EPILOG = """examples:
  qwenvl quantize tiny tiny-int4 --group-size 64           # the embedded model, on examples of its own
  qwenvl quantize Qwen/Qwen-VL-Chat qwen-vl-chat-int4 --data conversations.json --image-root pictures
  qwenvl quantize Qwen/Qwen-VL-Chat qwen-vl-chat-int8 --bits 8 --group-size -1 --method rtn

The data are conversations about pictures, as `qwenvl train` takes them. If the run is stopped, run it again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; defaults are those of the published Int4 checkpoint."""
    default = QuantizationConfig()
    parser.add_argument("source", help='a folder (either layout), "owner/name", "modelscope:owner/name" or tiny')
    parser.add_argument("destination", help="the folder to write; must not hold anything")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=default.bits, help="default: %(default)s")
    parser.add_argument(
        "--group-size",
        type=int,
        default=default.group_size,
        help="inputs that share a scale, -1: all of an output's (default: %(default)s)",
    )
    parser.add_argument(
        "--method",
        choices=("gptq", "rtn"),
        default="gptq",
        help="GPTQ, or round to nearest, which needs no data (default: %(default)s)",
    )
    parser.add_argument("--data", metavar="FILE", help="conversations to calibrate with, JSON or JSON lines")
    parser.add_argument(
        "--image-root", metavar="FOLDER", help="where relative paths begin (default: the file's folder)"
    )
    parser.add_argument("--samples", type=int, default=SAMPLES, help="conversations to take (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which conversations (default: %(default)s)")
    parser.add_argument("--desc-act", action="store_true", help="the inputs that matter most first (act-order)")
    parser.add_argument("--asymmetric", action="store_true", help="a zero point for each group")
    parser.add_argument("--lm-head", action="store_true", help="pack the head, too; not every other tool loads that")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument(
        "--to", choices=("reference", "qwenvl"), default="reference", help="layout to write (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(given: argparse.Namespace) -> None:
    """The command. Raises QwenVLError."""
    quantization = QuantizationConfig(
        bits=given.bits,
        group_size=given.group_size,
        sym=not given.asymmetric,
        desc_act=given.desc_act,
        lm_head=given.lm_head,
    )
    from ..weights.hub import resolve
    from .checkpoint import quantize

    if given.group_size not in WIDELY_READ and not given.quiet:
        told = f"groups of {given.group_size} are read here and by few other tools; 128 is what all of them read"
        print(told, file=sys.stderr)
    source = resolve(given.source, revision=given.revision, cache_dir=given.cache_dir, quiet=given.quiet)
    report = quantize(
        source,
        given.destination,
        quantization,
        method=given.method,
        data=given.data,
        image_root=given.image_root,
        samples=given.samples,
        seed=given.seed,
        device=given.device,
        to=given.to,
        quiet=given.quiet,
    )
    print(json.dumps(asdict(report)) if given.json else printable(table(report)))


def table(report: Report) -> str:
    """What it cost, kind by kind, as lines for a terminal."""
    what = "outputs" if report.examples else "weights"
    lines = [f"{'linear':18}{what + ' off by':>16}{'at worst':>10}{'bytes before':>18}{'bytes after':>18}"]
    for name, kind in report.linears.items():
        error, worst = f"{kind.error:.2%}", f"{kind.worst:.2%}"
        lines.append(f"{name:18}{error:>16}{worst:>10}{kind.bytes_before:>18,}{kind.bytes_after:>18,}")
    lines.append(f"{'whole checkpoint':44}{report.bytes_before:>18,}{report.bytes_after:>18,}")
    on = f" on {report.examples} examples of {report.tokens:,} tokens in all" if report.examples else ""
    lines += ["", f"{report.method}{on}, {report.seconds:.0f} s; wrote {report.destination}"]
    return "\n".join(lines)
