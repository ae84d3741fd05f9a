"""Files that are whole or not there, and folders that one process has to itself.

whole_file     write a file that gets its name last
flush_folder   put the names in a folder on the disk
held           whether a lock file is ours alone
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

TEMPORARY = ".tmp"  # what the name ends in while the file grows


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write to; it becomes `path`, in one step, when the block ends and all bytes are on the disk.

    If the block fails, what was at `path` before is still there, and the room that was taken is given back. Raises
    OSError.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError, ValueError):
            temporary.unlink()
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Put the names in `folder` on the disk too, where the system can (Windows cannot open folders)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Whether the lock file `path` is this process's while the block runs; false where another process has it.

    A lock ends with its process, however that ends; the file stays. Where the system has no locks (Windows, some
    network folders) everybody has it. Raises OSError if the file cannot be made.
    """
    with open(path, "ab") as file:
        ours = True
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            ours = False
        except (ImportError, OSError):
            pass
        yield ours
