"""The command line: `qwenvl chat | generate | ground | info | convert | demo`.

Heavy modules are imported inside the command that needs them, so that `qwenvl --help` answers at once. A user's
mistake is one line on stderr and exit status 2; a bug is a traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import PromptError, QwenVLError

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .text.boxes import Box

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", "seed")

EXAMPLES = {
    "chat": """examples:
  qwenvl chat                                              # talk to the embedded model in the terminal
  qwenvl chat --model Qwen/Qwen-VL-Chat --image dog.jpg    # talk about a picture
  qwenvl chat --image dog.jpg "What is this?"              # one question, one answer
  qwenvl chat --image a.jpg --image b.jpg "Compare the two." --json --save boxes.png""",
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

The destination is written as DESTINATION.partial and renamed when it is whole. If the run is stopped, run it again.""",
    "demo": """example:
  qwenvl demo --out demo-out""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = _parser().parse_args(arguments)
    try:
        given.run(given)
        sys.stdout.flush()
    except QwenVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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

    chat = command("chat", _chat, "Talk about pictures, or ask one question.", _model, _images, _sampling, _output)
    chat.add_argument("question", nargs="?", help="ask this and exit; without it, talk in the terminal")
    chat.add_argument("--system", help="the system message")
    chat.add_argument("--out", default="qwenvl-out", help="folder for annotated pictures (default: %(default)s)")

    generate = command(
        "generate",
        _generate,
        "Let a base checkpoint go on after pictures and a text.",
        _model,
        _images,
        _sampling,
        _output,
    )
    generate.add_argument("prompt", help="the text after the pictures")
    generate.add_argument("--bare", action="store_true", help="write no `Picture k:` before the pictures")

    ground = command("ground", _ground, "Find a phrase in a picture.", _model, _output)
    ground.add_argument("--image", required=True, help="path or URL")
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
    convert.add_argument("--max-shard-bytes", type=int, default=2_000_000_000, help="default: %(default)s")

    demo = command("demo", _demo, "Run the whole path on a picture that is drawn here.", _model)
    demo.add_argument("--out", default="demo-out", help="folder for the pictures (default: %(default)s)")
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", help="hub id, folder or tiny (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, float16, bfloat16 (default: %(default)s)")
    _source(parser)


def _source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of a checkpoint on a hub")
    parser.add_argument("--cache-dir", help="where checkpoints from a hub are kept")
    parser.add_argument("--quiet", action="store_true", help="no progress bars and remarks")


def _images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", action="append", default=[], help="path or URL; may be given several times")


def _output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--save", metavar="PICTURE", help="write the (last) picture with the boxes drawn on it")


def _sampling(parser: argparse.ArgumentParser) -> None:
    """Options of decoding; what is not given is as the checkpoint's generation_config.json says."""
    group = parser.add_argument_group("decoding", "what is not given is as the checkpoint says")
    group.add_argument("--sample", dest="do_sample", action="store_true", default=None, help="sample")
    group.add_argument("--greedy", dest="do_sample", action="store_false", help="take the most likely token")
    group.add_argument("--temperature", type=float)
    group.add_argument("--top-k", type=int)
    group.add_argument("--top-p", type=float)
    group.add_argument("--repetition-penalty", type=float)
    group.add_argument("--max-new-tokens", type=int)
    group.add_argument("--seed", type=int, help="of sampling")


def _load(given: argparse.Namespace) -> Pipeline:
    from .loading import load

    pipeline = load(
        given.model, given.device, given.dtype, revision=given.revision, cache_dir=given.cache_dir, quiet=given.quiet
    )
    if pipeline.config.note and not given.quiet:
        print(f"{given.model}: {pipeline.config.note}", file=sys.stderr)
    return pipeline


def _options(given: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in SAMPLING if (value := getattr(given, name)) is not None}


def _chat(given: argparse.Namespace) -> None:
    from .terminal import converse, printable

    system = {} if given.system is None else {"system": given.system}
    if given.question is None:
        if given.json or given.save:
            raise PromptError("--json and --save need a question on the command line")
        converse(_load(given), given.image, given.out, **system, **_options(given))
        return
    pipeline = _load(given)
    query = [*({"image": image} for image in given.image), {"text": given.question}]
    if given.json:
        reply, _ = pipeline.chat(query, **system, **_options(given))
    else:
        stream = pipeline.chat_stream(query, **system, **_options(given))
        for delta in stream:
            print(printable(delta), end="", flush=True)
        print()
        reply = stream.reply
    _report(given, pipeline, given.image, {"question": given.question, "reply": reply}, reply)


def _generate(given: argparse.Namespace) -> None:
    from .terminal import printable

    pipeline = _load(given)
    query = [*({"image": image} for image in given.image), {"text": given.prompt}]
    text = pipeline.generate(query, numbered=not given.bare, **_options(given))
    if not given.json:
        print(printable(text))
    _report(given, pipeline, given.image, {"prompt": given.prompt, "text": text}, text)


def _ground(given: argparse.Namespace) -> None:
    pipeline = _load(given)
    boxes = pipeline.ground(given.image, given.phrase)
    if not given.json:
        for box in boxes:
            print(f"{box.label}: ({box.x1:.0f},{box.y1:.0f}),({box.x2:.0f},{box.y2:.0f})")
        if not boxes:
            print("no box found")
    _report(given, pipeline, [given.image], {"phrase": given.phrase}, boxes)


def _report(
    given: argparse.Namespace, pipeline: Pipeline, images: list[str], facts: dict[str, Any], found: str | list[Box]
) -> None:
    """Save the annotated picture and print the JSON object, as far as they were asked for."""
    from dataclasses import asdict

    from .draw import draw_regions, save_image
    from .image import open_image
    from .text.boxes import boxes_in

    picture = open_image(images[-1], pipeline.policy) if images else None
    boxes = found if isinstance(found, list) else boxes_in(found, *picture.size) if picture else []
    saved = None
    if given.save:
        if picture is None:
            raise PromptError("--save needs a picture: give one with --image")
        drawn = pipeline.draw(picture, found) if isinstance(found, str) else draw_regions(picture, found, pipeline.font)
        save_image(drawn or picture, given.save)
        saved = given.save
        if not given.json:
            print(f"saved {saved}" + ("" if boxes else " (there was no box to draw)"), file=sys.stderr)
    if given.json:
        result = {"model": given.model, "images": images, **facts, "boxes": [asdict(b) for b in boxes], "saved": saved}
        print(json.dumps(result, ensure_ascii=False))


def _info(given: argparse.Namespace) -> None:
    from .info import describe, summarise
    from .weights.hub import resolve

    folder = resolve(given.checkpoint, revision=given.revision, cache_dir=given.cache_dir, quiet=given.quiet)
    facts = summarise(folder)
    print(json.dumps(facts, ensure_ascii=False) if given.json else describe(facts))


def _convert(given: argparse.Namespace) -> None:
    from .weights.convert import convert
    from .weights.hub import resolve

    source = resolve(given.source, revision=given.revision, cache_dir=given.cache_dir, quiet=given.quiet)
    written = convert(source, given.destination, to=given.to, max_shard_bytes=given.max_shard_bytes, quiet=given.quiet)
    print(f"wrote {given.destination}" if written else f"{given.destination} already is this conversion, whole")


def _demo(given: argparse.Namespace) -> None:
    from .demo import demonstrate

    demonstrate(_load(given), given.out)


if __name__ == "__main__":
    sys.exit(main())
