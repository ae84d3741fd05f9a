"""A command in each of the processes that torchrun started, of which one speaks.

as_rank       a command as each of them runs it
parallel_of   how a command was asked to use several devices
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable

from .errors import ConfigError, QwenVLError, told

Command = Callable[[argparse.Namespace], None]

# Seconds until another rank than the first says what is wrong. Mostly the first one says it, too, and torchrun ends all
# others once one has ended.
SILENCE = 5.0


def as_rank(run: Command) -> Command:
    """The command, of which the first process prints and writes files; the others compute, and do neither.

    It is told by `given.first` which it is.
    """

    def run_as_rank(given: argparse.Namespace) -> None:
        given.first = os.environ.get("RANK", "0") == "0"
        try:
            if given.first:
                return run(given)
            given.quiet, given.save = True, None
            with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
                return run(given)
        except QwenVLError as error:
            if getattr(given, "parallel", None) == "tensor":
                from .adapt.ranks import end_without_others

                end_without_others()
            if given.first:
                raise
            time.sleep(SILENCE)
            print(f"rank {os.environ['RANK']}: {told(error)}", file=sys.stderr)
            raise SystemExit(2) from None

    return run_as_rank


def parallel_of(given: argparse.Namespace) -> str | None:
    """`--parallel`. Raises ConfigError where each of many processes would load a whole model; not if `each_whole`."""
    parallel: str | None = getattr(given, "parallel", None)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and parallel != "tensor" and not getattr(given, "each_whole", False):
        raise ConfigError(
            f"torchrun started {processes} processes, each of which would load the whole model: add --parallel tensor "
            "to chat, generate or ground, or start one process"
        )
    return parallel
