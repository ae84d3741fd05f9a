"""Convert a checkpoint from the reference's layout to ours, or back (`qwenvl convert`). See `--help`."""

import sys

from qwenvl.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
