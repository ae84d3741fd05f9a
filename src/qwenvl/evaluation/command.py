"""`qwenvl eval`: benchmarks listed, their data checked and made ready, run, scored anew, judged and shown.

add_arguments   the flags of its parts
EPILOG          examples
run             the command
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, printable
from ..processes import as_rank

if TYPE_CHECKING:
    from ..adapt.ranks import Ranks
    from ..pipeline import Pipeline
    from .benchmark import Benchmark

OUT = "eval-out"
OPENAI = "https://api.openai.com/v1"
TEXT = 512  # tokens of a question and its answer, at most; longer ones are told
EXAMPLES = """\
  qwenvl eval run tiny tiny_grounding --limit 220            # the embedded model, on pictures that are drawn here
  qwenvl eval list
  qwenvl eval prepare refcoco_val data                       # what the folder has, what is missing, who publishes it
  qwenvl eval frames data                                    # of SEED-Bench's videos
  qwenvl eval run table6 --data data --model Qwen/Qwen-VL    # a table of the paper
  qwenvl eval run okvqa_val --data data --model Qwen/Qwen-VL --few-shot 4
  torchrun --nproc-per-node 8 -m qwenvl.cli eval run table4 table5 --data data --model Qwen/Qwen-VL
  qwenvl eval judge eval-out/Qwen-VL-Chat/touchstone_en --model gpt-4
  qwenvl eval score eval-out                                 # all runs in it, anew
  qwenvl eval report eval-out""".splitlines()
RESUMED = "A run that was stopped goes on when the same command is given again. Nothing is downloaded but the model."
EPILOG = "\n".join(["examples:", *EXAMPLES, "", RESUMED])
PLACES = """videos are looked for in DIR/seed_bench and in DIR, there and in these folders:
  Something-Something v2  SSV2/videos, 20bn-something-something-v2, videos
                          as 94328.webm
  EPIC-KITCHENS           EPIC-KITCHENS/3h91syskeag572hl6tvuovwv4d/videos/test, EPIC-KITCHENS, videos
                          as P03/P03_24.MP4, P03/videos/P03_24.MP4 or P03_24.MP4
  Breakfast               BreakfastII_15fps_qvga_sync, videos
                          as P06/cam01/P06_cereals.avi
Frames go to video_imgs_4 beside SEED-Bench.json. Those that are there are kept: a run that was stopped goes on.
Videos are decoded with PyAV: pip install 'qwenvl[video]'"""
Adder = Callable[[argparse.ArgumentParser], None]


def add_arguments(
    parser: argparse.ArgumentParser, model: Adder, load: Callable[[argparse.Namespace], Pipeline]
) -> None:
    """The parts and their flags; `model` adds those that say which model, `load` loads it."""
    parts = parser.add_subparsers(metavar="part", required=True)

    def part(name: str, run: Callable[[argparse.Namespace], None], what: str) -> argparse.ArgumentParser:
        sub = parts.add_parser(
            name,
            help=what,
            description=what,
            epilog="\n".join(["examples:", *(line for line in EXAMPLES if f"eval {name}" in line)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        return sub

    part("list", _list, "The benchmarks, with the paper's figures.")

    prepare = part("prepare", _prepare, "Check the data of a benchmark, and say what is missing and who publishes it.")
    prepare.add_argument("benchmark", help="as `qwenvl eval list` names it, or table4 to table7")
    prepare.add_argument("data", metavar="DIR", help="the folder of all data, such as the reference's `data`")
    prepare.add_argument("--quiet", action="store_true", help="no progress bar")

    frames = part(
        "frames", _frames, "Cut the frames that SEED-Bench's questions about videos are asked with out of the videos."
    )
    frames.add_argument("data", metavar="DIR", help="the folder of all data, with seed_bench/SEED-Bench.json in it")
    frames.add_argument("--quiet", action="store_true", help="no progress bar")
    frames.epilog = f"{frames.epilog}\n\n{PLACES}"

    run = part("run", as_rank(lambda given: _run(given, load)), "Answer benchmarks, score the answers, write reports.")
    model(run)
    run.set_defaults(each_whole=True)  # torchrun: each process has a model, and answers a share of the items
    run.add_argument("benchmark", nargs="+", help="as `qwenvl eval list` names it, or table4 to table7")
    run.add_argument("--data", metavar="DIR", help="the folder of all data")
    run.add_argument("--out", metavar="DIR", help=f"where answers and reports go (default: {OUT}/MODEL)")
    run.add_argument("--few-shot", type=int, default=0, metavar="K", help="examples before each question")
    run.add_argument("--seed", type=int, default=0, help="of examples and of sampling (default: %(default)s)")
    run.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    run.add_argument("--rows", type=int, help="items that are computed at once (default: as many as fit, up to 32)")
    run.add_argument(
        "--on-error",
        choices=("fatal", "skip"),
        default="fatal",
        help="stop at items that cannot be asked, or list them and go on (default: %(default)s)",
    )

    score = part("score", _score, "Score the answers of a run anew, without a model.")
    score.add_argument("run_folder", metavar="DIR", help="the folder of a run, or one above it")
    score.add_argument("--data", metavar="DIR", type=Path, help="the folder of all data, if it has moved")

    judge = part("judge", _judge, "Let another model judge the answers of a TouchStone run, in both orders.")
    judge.add_argument("run_folder", metavar="DIR", help="the folder of the run")
    judge.add_argument("--data", metavar="DIR", type=Path, help="the folder of all data, if it has moved")
    judge.add_argument("--model", required=True, help="the judge's name at its endpoint, such as gpt-4")
    judge.add_argument("--url", default=OPENAI, help="an OpenAI-compatible endpoint (default: %(default)s)")
    judge.add_argument(
        "--key",
        default="OPENAI_API_KEY",
        metavar="VARIABLE",
        help="environment variable with its key (default: %(default)s)",
    )
    judge.add_argument("--template", metavar="FILE", help="how it is asked, in place of this library's words")
    judge.add_argument("--threads", type=int, default=8, help="questions to it at once (default: %(default)s)")
    judge.add_argument("--timeout", type=float, default=120.0, help="seconds for each (default: %(default)s)")
    judge.add_argument("--quiet", action="store_true", help="no progress bar")

    report = part("report", _report, "Reports as a Markdown table, beside the paper's figures, and a radar plot.")
    report.add_argument("folder", metavar="DIR", help="with runs in it, of one model or several")
    report.add_argument("--plot", metavar="PNG", help="where the plot goes (default: DIR/radar.png)")


def _list(given: argparse.Namespace) -> None:
    from .catalogue import BENCHMARKS
    from .summary import listed

    found = listed(BENCHMARKS.values())
    print(json.dumps(found) if given.json else _lines(found))


def _lines(found: list[dict[str, Any]]) -> str:
    lines = [f"{'benchmark':26}{'':26}{'items':>8}  {'table':7}of the paper, Qwen-VL / Qwen-VL-Chat"]
    for one in found:
        figures = "; ".join(
            f"{name} {' / '.join(map(str, known.values()))}" for name, known in one["published"].items()
        )
        size = "" if one["size"] is None else f"{one['size']:,}"
        lines.append(f"{one['name']:26}{one['title']:26}{size:>8}  {one['table'] or '':<7}{figures}".rstrip())
    return "\n".join(lines)


def _prepare(given: argparse.Namespace) -> None:
    from .catalogue import find
    from .prepare import described, prepare

    found = [prepare(benchmark, given.data, quiet=given.quiet) for benchmark in find([given.benchmark])]
    told = [one.as_json() for one in found]
    print(json.dumps(told) if given.json else printable("\n\n".join(map(described, found))))
    if not all(one.ready for one in found):
        raise SystemExit(1)


def _frames(given: argparse.Namespace) -> None:
    from .frames import cut, described

    found = cut(given.data, quiet=given.quiet)
    print(json.dumps(found.as_json()) if given.json else printable(described(found)))
    if found.problems:
        raise SystemExit(1)


def _run(given: argparse.Namespace, load: Callable[[argparse.Namespace], Pipeline]) -> None:
    from ..adapt.ranks import shared_errors
    from .catalogue import find
    from .run import Plan, check_format, dataset_of, evaluate
    from .summary import table

    _check(given)
    out = Path(given.out or Path(OUT) / Path(given.model).name)
    data = None if given.data is None else Path(given.data)
    plan = Plan(data, out, given.few_shot, given.seed, given.limit, given.on_error == "skip", given.quiet)
    found = []  # with its data, whose mistakes are told before a model loads
    for benchmark in find(given.benchmark):
        with _left_out(given, benchmark):
            found.append((benchmark, dataset_of(benchmark, plan)))
    if not found:
        raise ConfigError("none of these benchmarks has its files here")
    ranks = _ranks(given)
    with shared_errors(ranks is not None):
        pipeline = load(given)
        asked = []
        for benchmark, dataset in found:
            with _left_out(given, benchmark):
                check_format(benchmark, pipeline)
                asked.append((benchmark, dataset))
        if not asked:
            raise ConfigError("none of these benchmarks can be asked of this checkpoint")
        longest = _longest([benchmark for benchmark, _ in asked], pipeline, given.few_shot)
        pipeline.start_engine(given.rows, max_length=longest)
    reports = [evaluate(*one, pipeline, plan, ranks) for one in asked]
    if given.first:
        print(json.dumps(reports) if given.json else printable(table(reports)))
        if not given.json and not given.quiet:
            print(f"answers and reports are in {out}", file=sys.stderr)


@contextmanager
def _left_out(given: argparse.Namespace, benchmark: Benchmark) -> Iterator[None]:
    """Go on without a benchmark of a table that cannot be run here, and say so; one that was named itself is an error.

    So a table is one command also for a base checkpoint, and though TouchStone's Chinese questions are not published.
    """
    from .items import Unavailable

    try:
        yield
    except Unavailable as error:
        if benchmark.name in given.benchmark:
            raise
        if given.first:
            print(printable(f"left out: {error}"), file=sys.stderr)


def _check(given: argparse.Namespace) -> None:
    for name, least in (("few_shot", 0), ("seed", 0), ("limit", 1), ("rows", 1)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be {least} or more, not {value}")


def _ranks(given: argparse.Namespace) -> Ranks | None:
    """This process among those that torchrun started, on a device of its own; None without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from ..adapt.ranks import Ranks, join

    ranks = Ranks.of_torchrun()
    device = ranks.device(given.device)
    join(device)
    given.device = str(device)
    return ranks


def _longest(benchmarks: list[Benchmark], pipeline: Pipeline, few_shot: int) -> int:
    """Tokens that a row of the engine should have: the model's trained length, or more where examples need it."""
    config = pipeline.config
    pictures = max(4 if benchmark.name == "seed_video" else 1 for benchmark in benchmarks)
    example = pictures * (config.visual.n_queries + 2) + TEXT
    return min(max(config.seq_length, (few_shot + 1) * example + TEXT), config.max_position_embeddings)


def _score(given: argparse.Namespace) -> None:
    from .journal import SETTINGS
    from .run import rescore
    from .summary import runs_in, table

    reports = [rescore(folder, given.data) for folder in runs_in(Path(given.run_folder), SETTINGS)]
    print(json.dumps(reports) if given.json else printable(table(reports)))


def _judge(given: argparse.Namespace) -> None:
    from .endpoint import OpenAIJudge
    from .judge import template_file
    from .run import judge_run
    from .summary import table
    from .touchstone import NOT_ASKED, UNREAD

    if not given.timeout > 0:
        raise ConfigError(f"--timeout must be more than 0 seconds, not {given.timeout:g}")
    template = None if given.template is None else template_file(given.template)
    by = OpenAIJudge(given.url, given.model, given.key, given.timeout)
    how = {"data": given.data, "template": template, "threads": given.threads, "quiet": given.quiet}
    report = judge_run(Path(given.run_folder), by, **how)
    print(json.dumps(report) if given.json else printable(table([report])))
    if any(what.startswith(UNREAD) and NOT_ASKED not in what for what in report["odd"]):
        raise SystemExit(1)


def _report(given: argparse.Namespace) -> None:
    from .radar import radar
    from .report import REPORT, WHOLE, load
    from .summary import runs_in, summary

    reports = [load(folder / REPORT, WHOLE) for folder in runs_in(Path(given.folder))]
    plot = Path(given.plot or Path(given.folder) / "radar.png")
    drawn = radar(reports, plot)
    if given.json:
        print(json.dumps({"reports": reports, "plot": str(plot) if drawn else None}))
        return
    print(printable(summary(reports)))
    print(f"drew {plot}" if drawn else "a radar plot takes figures of three benchmarks or more", file=sys.stderr)
