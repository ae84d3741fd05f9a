"""`qwenvl train`: settings to data, a model, an adapter, the loop, and a result that the other commands open.

    add_arguments   a flag for every setting
    EPILOG          examples, with the real model's memory need
    run             the command

`finetune.py` does the work; it is imported when training begins, for the sake of `--help`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from ..errors import QwenVLError, printable
from .errors import DataError
from .memory import QWEN_VL, Workload, estimate
from .settings import SETTINGS_FILE, TrainSettings, hints, read_toml, settings_by_group, to_toml, without_none

if TYPE_CHECKING:
    from .finetune import Outcome


def _real_workload() -> Workload:
    """What the example in the help does: LoRA over the published weights in bfloat16, one conversation at a time."""
    defaults = TrainSettings()
    return Workload(
        "lora",
        rows=1,
        tokens=defaults.max_length,
        images=1,
        weight_bytes=2,
        compute_bytes=2,
        rank=defaults.lora_r,
        targets=defaults.lora_targets,
        checkpointing=True,
        accumulates=True,
    )


EPILOG = f"""examples:
  qwenvl train --example example                # writes a picture, conversations about it, and example/train.toml
  qwenvl train example/train.toml
  qwenvl train example/train.toml --steps 20 --output longer --merge          # flags override the file
  qwenvl train --model Qwen/Qwen-VL-Chat --data conversations.json --output run --batch-size 16 --accumulation 16 \
--activation-checkpointing

The last one trains a LoRA adapter over the published weights, one conversation of up to {TrainSettings().max_length}
tokens at a time. Computed, not measured (1 GB = 10^9 bytes), it needs on the device about
  {estimate(QWEN_VL, _real_workload())}

Several devices: torchrun --nproc-per-node 8 -m qwenvl.cli train ...
A run that was stopped goes on when the same command is given again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting, and what else the command can do."""
    parser.add_argument("config", nargs="?", metavar="CONFIG.toml", help="settings; flags override them")
    parser.add_argument("--print-config", action="store_true", help="print all settings as TOML, and stop")
    parser.add_argument("--dry-run", action="store_true", help="check data and memory, and stop")
    parser.add_argument("--example", metavar="FOLDER", help="write data and settings to try this with, and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--quiet", action="store_true", help="no progress bars and remarks")
    section, latest = parser.add_argument_group(), ""
    for group, setting in settings_by_group():
        if group != latest:
            section, latest = parser.add_argument_group(group), group
        shown = " ".join(map(str, setting.default)) if isinstance(setting.default, tuple) else setting.default
        help = setting.metadata["help"].replace("%", "%%")
        help += "" if setting.default is None else f" (default: {shown})"
        section.add_argument(
            f"--{setting.name.replace('_', '-')}", default=None, help=help, **_kind(hints()[setting.name])
        )


def _kind(hint: Any) -> dict[str, Any]:  # noqa: ANN401 - a type
    """What argparse needs to know of a type."""
    hint = without_none(hint)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        return {"nargs": "+" if kinds[-1] is Ellipsis else len(kinds), "type": kinds[0]}
    return {"type": hint}


def run(given: argparse.Namespace) -> None:
    """The command. Raises QwenVLError."""
    from_file = {} if given.config is None else read_toml(given.config)
    flags = {s.name: value for s in fields(TrainSettings) if (value := getattr(given, s.name)) is not None}
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in flags and other not in flags:  # two ways to say the same: the flag's counts
            from_file.pop(other, None)
    settings = TrainSettings(**from_file | flags)
    _ = settings.training, settings.lora  # what is wrong with these should not wait for the data
    if given.print_config:
        print(to_toml(settings), end="")
        return
    if given.example is not None:
        from .example import write_example

        write_example(given.example)
        print(f"wrote {given.example}: qwenvl train {Path(given.example) / SETTINGS_FILE}")
        return
    from .finetune import train

    first = os.environ.get("WORLD_SIZE", "1") == "1" or os.environ["RANK"] == "0"
    try:
        outcome = train(settings, quiet=given.quiet, dry_run=given.dry_run)
    except QwenVLError as error:
        if first:
            raise
        if isinstance(error, DataError):  # of a sample that this rank alone has seen
            print(f"rank {os.environ['RANK']}: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    if first:
        facts = {**asdict(outcome), "finished": outcome.finished}
        print(json.dumps(facts) if given.json else _told(outcome, settings))
    if outcome.stopped == "signal":
        raise KeyboardInterrupt


def _told(outcome: Outcome, settings: TrainSettings) -> str:
    if outcome.stopped == "dry run":
        return "the data can be trained on; nothing was trained"
    if not outcome.finished:
        return f"stopped after update {outcome.steps}; the same command goes on"
    lines = [f"{outcome.output} is finished already"] if outcome.stopped == "finished earlier" else []
    for kind, folder in outcome.written.items():
        how = f"--model {settings.model} --adapter {folder}" if kind == "adapter" else f"--model {folder}"
        lines.append(f"{kind} in {folder}: qwenvl chat {how}")
    return "\n".join(lines)
