"""The command line: `qwenvl chat | generate | ground | info | convert | quantize | train | eval | serve | ...`.

Heavy modules are imported inside the command that needs them, so that `qwenvl --help` answers at once. A user's
mistake is one line on stderr and exit status 2; a bug is a traceback.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .bench import command as bench
from .errors import ImageError, PromptError, QwenVLError, printable, told
from .evaluation import command as evaluation
from .processes import as_rank, parallel_of
from .quantization import command as quantization
from .serving import command as serving
from .training import command as training

if TYPE_CHECKING:
    from PIL.Image import Image

    from .pipeline import Pipeline
    from .text.boxes import Box, Region

DECODING = (
    *("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "frequency_penalty", "presence_penalty"),
    *("no_repeat_ngram_size", "min_new_tokens", "max_new_tokens", "stop", "seed"),
)

EXAMPLES = {
    "chat": """examples:
  qwenvl chat                                              # talk to the embedded model in the terminal
  qwenvl chat --model Qwen/Qwen-VL-Chat --image dog.jpg    # talk about a picture
  qwenvl chat --image dog.jpg "What is this?"              # one question, one answer
  qwenvl chat --image a.jpg --image b.jpg "Compare the two." --json --save boxes.png
  qwenvl chat --model Qwen/Qwen-VL-Chat --parallel layers  # some layers on each GPU
  torchrun --nproc-per-node 2 -m qwenvl.cli chat --model Qwen/Qwen-VL-Chat --parallel tensor  # a part of each layer""",
    "generate": """examples:
  qwenvl generate --model Qwen/Qwen-VL --image dog.jpg "Generate the caption in English with grounding:" --bare
  qwenvl generate --model Qwen/Qwen-VL --image dog.jpg "What animal is it? Answer:" --bare --json""",
    "ground": """examples:
  qwenvl ground --image dog.jpg "the dog"
  qwenvl ground --image dog.jpg "the dog" --json --save boxes.png""",
    "info": """examples:
  qwenvl info tiny
  qwenvl info Qwen/Qwen-VL-Chat --json""",
    "convert": """examples:
  qwenvl convert Qwen/Qwen-VL-Chat qwen-vl-chat
  qwenvl convert qwen-vl-chat back-again --to reference
  qwenvl convert Qwen/Qwen-VL-Chat mine --adapter run/adapter      # what `qwenvl train` learned, folded in

The destination is written as DESTINATION.partial and renamed when it is whole. If the run is stopped, run it again.""",
    "quantize": quantization.EPILOG,
    "train": training.EPILOG,
    "eval": evaluation.EPILOG,
    "serve": serving.EPILOG,
    "bench": bench.EPILOG,
    "demo": """example:
  qwenvl demo --out demo-out""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    for stream in (sys.stdin, sys.stdout):  # one odd character is no reason to lose a conversation
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            given = _parser().parse_args(arguments)
            given.run(given)
        finally:
            sys.stdout.flush()
    except QwenVLError as error:
        print(told(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


class _Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qwenvl",
        description="Qwen-VL: ask about pictures, find things in them, convert and inspect checkpoints.",
        epilog='example:\n  qwenvl chat --image dog.jpg "What is this?"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qwenvl {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    def command(name: str, run: Any, what: str, *groups: Any) -> argparse.ArgumentParser:  # noqa: ANN401
        sub = commands.add_parser(
            name,
            help=what,
            description=what,
            epilog=EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        for group in groups:
            group(sub)
        return sub

    chat = command(
        "chat",
        as_rank(_chat),
        "Talk about pictures, or ask one question.",
        _model,
        _parallel,
        _images,
        _decoding,
        _output,
    )
    chat.add_argument("question", nargs="?", help="ask this and exit; without it, talk in the terminal")
    chat.add_argument("--system", help="the system message")
    chat.add_argument("--out", default="qwenvl-out", help="folder for annotated pictures (default: %(default)s)")

    generate = command(
        "generate",
        as_rank(_generate),
        "Let a base checkpoint go on after pictures and a text.",
        _model,
        _parallel,
        _images,
        _decoding,
        _output,
    )
    generate.add_argument("prompt", help="the text after the pictures")
    generate.add_argument("--bare", action="store_true", help="write no `Picture k:` before the pictures")

    ground = command("ground", as_rank(_ground), "Find a phrase in a picture.", _model, _parallel, _output)
    ground.add_argument("--image", nargs=1, required=True, help="path or URL")
    ground.add_argument("phrase", help='what to find, such as "the dog"')

    info = command("info", _info, "Show a checkpoint's configuration, parameters and bytes.", _source)
    info.add_argument("checkpoint", nargs="?", default="tiny", help="folder, hub id or tiny (default: %(default)s)")
    info.add_argument("--json", action="store_true", help="print one JSON object")

    convert = command(
        "convert", _convert, "Convert a checkpoint from the reference's layout to ours, or back.", _source
    )
    convert.add_argument("source", help='a folder (either layout), "owner/name" or "modelscope:owner/name"')
    convert.add_argument("destination", help="the folder to write; must not hold anything else")
    convert.add_argument("--to", choices=("qwenvl", "reference"), help="layout to write (default: the other one)")
    convert.add_argument("--max-shard-bytes", type=int, help="size of a shard (default: 2 GB)")
    convert.add_argument(
        "--adapter", metavar="FOLDER", help="fold this LoRA adapter in; --to is then our layout unless it is given"
    )

    quantize = command("quantize", quantization.run, "Pack a checkpoint's decoder to 4 or 8 bits.", _source)
    quantization.add_arguments(quantize)

    train = command("train", training.run, "Fine-tune on conversations about pictures: all weights, LoRA or QLoRA.")
    training.add_arguments(train)

    benchmarks = command("eval", None, "Run the paper's benchmarks, check their data, compare the results.")
    evaluation.add_arguments(benchmarks, _model, _load)

    server = command(
        "serve",
        partial(serving.run, load=_load),
        "Answer over the network: an OpenAI-compatible API, and a page.",
        _model,
    )
    serving.add_arguments(server)

    timing = command("bench", bench.run, "Measure speed and memory, beside what the device could do.")
    bench.add_arguments(timing)

    demo = command("demo", _demo, "Run the whole path on a picture that is drawn here.", _model)
    demo.add_argument("--out", default="demo-out", help="folder for the pictures (default: %(default)s)")
    demo.add_argument("--seed", type=int, help="of the picture that is drawn (default: a fresh one)")
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", help="hub id, folder or tiny (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, float16, bfloat16 (default: %(default)s)")
    parser.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter of the model, as `qwenvl train` writes it")
    _source(parser)


def _parallel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parallel",
        choices=("tensor", "layers"),
        help="several devices: a part of each layer on each, under torchrun; or some layers on each (docs/parallel.md)",
    )


def _source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of a checkpoint on a hub")
    parser.add_argument("--cache-dir", help="where checkpoints from a hub are kept")
    parser.add_argument("--quiet", action="store_true", help="no progress bars and remarks")


def _images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", action="append", default=[], help="path or URL; may be given several times")


def _output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--save", metavar="PICTURE", help="write the (last) picture with the boxes drawn on it")


def _decoding(parser: argparse.ArgumentParser) -> None:
    """Options of decoding; what is not given is as the checkpoint's generation_config.json says."""
    group = parser.add_argument_group("decoding", "what is not given is as the checkpoint says")
    group.add_argument("--sample", dest="do_sample", action="store_true", default=None, help="sample")
    group.add_argument("--greedy", dest="do_sample", action="store_false", help="take the most likely token")
    group.add_argument("--temperature", type=float)
    group.add_argument("--top-k", type=int)
    group.add_argument("--top-p", type=float)
    group.add_argument("--repetition-penalty", type=float)
    group.add_argument("--frequency-penalty", type=float)
    group.add_argument("--presence-penalty", type=float)
    group.add_argument("--no-repeat-ngram-size", type=int)
    group.add_argument("--min-new-tokens", type=int)
    group.add_argument("--max-new-tokens", type=int)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be given several times"
    )
    group.add_argument("--seed", type=int, help="of sampling")


def _load(given: argparse.Namespace) -> Pipeline:
    from .loading import load

    pipeline = load(
        given.model,
        given.device,
        given.dtype,
        revision=given.revision,
        cache_dir=given.cache_dir,
        adapter=given.adapter,
        parallel=parallel_of(given),
        quiet=given.quiet,
    )
    if pipeline.config.note and not given.quiet:
        print(printable(f"{given.model}: {pipeline.config.note}"), file=sys.stderr)
    return pipeline


def _options(given: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in DECODING if (value := getattr(given, name)) is not None}


def _pictures(given: argparse.Namespace, sources: Sequence[str]) -> list[Image]:
    """Open the pictures, and look at where to save one, before anything takes long: a mistake shows at once."""
    from PIL import Image

    from .image import FORMATS, open_image

    pictures = [open_image(source) for source in sources]
    if given.save is not None:
        path = Path(given.save)
        if not pictures:
            raise PromptError("--save needs a picture: give one with --image")
        if Image.registered_extensions().get(path.suffix.lower()) not in FORMATS:
            raise ImageError(f"cannot save a picture as {path.name!r}: end the name in .png, .jpg or .webp")
        if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise ImageError(f"cannot save {given.save!r}: {path.parent} is not a folder that you may write into")
    return pictures


def _chat(given: argparse.Namespace) -> None:
    system = {} if given.system is None else {"system": given.system}
    if given.question is None and (given.json or given.save):
        raise PromptError("--json and --save need a question on the command line")

    from .terminal import converse
    from .text.boxes import parse_spans

    pictures = _pictures(given, given.image)
    pipeline = _load(given)
    if given.question is None:
        converse(pipeline, given.image, given.out if given.first else None, **system, **_options(given))
        return
    query = [*({"image": picture} for picture in pictures), {"text": given.question}]
    stream = pipeline.chat_stream(query, **system, **_options(given))
    for delta in stream:
        if not given.json:
            print(printable(delta), end="", flush=True)
    if not given.json:
        print()
    facts = {"question": given.question, "reply": stream.reply}
    _report(given, pipeline, pictures, facts, parse_spans(stream.reply))


def _generate(given: argparse.Namespace) -> None:
    from .text.boxes import parse_spans

    pictures = _pictures(given, given.image)
    pipeline = _load(given)
    query = [*({"image": picture} for picture in pictures), {"text": given.prompt}]
    text = pipeline.generate(query, numbered=not given.bare, **_options(given))
    if not given.json:
        print(printable(text))
    _report(given, pipeline, pictures, {"prompt": given.prompt, "text": text}, parse_spans(text))


def _ground(given: argparse.Namespace) -> None:
    from .terminal import show_boxes

    pictures = _pictures(given, given.image)
    pipeline = _load(given)
    boxes = pipeline.ground(pictures[-1], given.phrase)
    if not given.json:
        show_boxes(boxes)
    _report(given, pipeline, pictures, {"phrase": given.phrase}, boxes)


def _report(
    given: argparse.Namespace,
    pipeline: Pipeline,
    pictures: Sequence[Image],
    facts: dict[str, Any],
    found: Sequence[Region | Box],
) -> None:
    """Save the annotated picture and print the JSON object, as far as they were asked for."""
    from dataclasses import asdict

    from .draw import draw_regions, save_image
    from .text.boxes import Box

    boxes = [one if isinstance(one, Box) else one.box(*picture.size) for picture in pictures[-1:] for one in found]
    saved = None
    try:
        if given.save is not None:
            save_image(draw_regions(pictures[-1], found, pipeline.font, pipeline.policy), given.save)
            saved = given.save
            if not given.json:
                print(f"saved {saved}" + ("" if boxes else " (there was no box to draw)"), file=sys.stderr)
    finally:  # a full disk does not take the answer with it
        if given.json:
            result = {"model": given.model, "images": given.image, **facts}
            print(json.dumps({**result, "boxes": [asdict(box) for box in boxes], "saved": saved}))


def _info(given: argparse.Namespace) -> None:
    from .info import describe, summarize
    from .weights.hub import resolve

    folder = resolve(given.checkpoint, revision=given.revision, cache_dir=given.cache_dir, quiet=given.quiet)
    facts = summarize(folder)
    print(json.dumps(facts) if given.json else printable(describe(facts)))


def _convert(given: argparse.Namespace) -> None:
    from .weights.convert import convert
    from .weights.hub import resolve

    source = resolve(given.source, revision=given.revision, cache_dir=given.cache_dir, quiet=given.quiet)
    size = {} if given.max_shard_bytes is None else {"max_shard_bytes": given.max_shard_bytes}
    if given.adapter is None:
        written = convert(source, given.destination, to=given.to, **size, quiet=given.quiet)
    else:
        from .training.results import merge_adapter

        layout = {} if given.to is None else {"to": given.to}
        written = merge_adapter(source, given.adapter, given.destination, **layout, **size, quiet=given.quiet)
    print(f"wrote {given.destination}" if written else f"{given.destination} already is this conversion, whole")


def _demo(given: argparse.Namespace) -> None:
    from .demo import demonstrate

    demonstrate(_load(given), given.out, given.seed)


if __name__ == "__main__":
    sys.exit(main())
