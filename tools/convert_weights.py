"""Convert a checkpoint from the reference's layout to ours, or back. See `--help`."""

from __future__ import annotations

import argparse
import sys

from qwenvl.errors import QwenVLError

EXAMPLE = """\
examples:
  python tools/convert_weights.py Qwen/Qwen-VL-Chat qwen-vl-chat
  python tools/convert_weights.py qwen-vl-chat back-again --to reference

The destination is written as DESTINATION.partial and renamed when it is whole. If the run is stopped, run it again."""


def main() -> int:
    """Parse the command line and convert; 2 for a mistake of the user's, told in one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", help='a folder (either layout), "owner/name" on Hugging Face, "modelscope:owner/name"'
    )
    parser.add_argument("destination", help="the folder to write; must not hold anything else")
    parser.add_argument("--to", choices=("qwenvl", "reference"), help="layout to write (default: the other one)")
    parser.add_argument("--max-shard-bytes", type=int, default=2_000_000_000, help="default: %(default)s")
    parser.add_argument("--revision", help="branch, tag or commit, for a source on a hub")
    parser.add_argument("--cache-dir", help="where a source on a hub is kept (default: the hub's own cache)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    given = parser.parse_args()

    from qwenvl.weights.convert import convert
    from qwenvl.weights.hub import resolve

    try:
        source = resolve(given.source, revision=given.revision, cache_dir=given.cache_dir, quiet=given.quiet)
        written = convert(
            source, given.destination, to=given.to, max_shard_bytes=given.max_shard_bytes, quiet=given.quiet
        )
    except QwenVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {given.destination}" if written else f"{given.destination} already is this conversion, whole")
    return 0


if __name__ == "__main__":
    sys.exit(main())
