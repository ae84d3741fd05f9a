"""From a name to a folder that holds a whole checkpoint.

    resolve    folder | "tiny" | "owner/name" (Hugging Face) | "modelscope:owner/name"  ->  folder
    embedded   the small checkpoint that comes with this library

Only what we read is fetched: weights (safetensors if the repository has them, else `.bin`), configuration, vocabulary,
font; never code. The hubs' own libraries do the work, in their own cache folders: a broken connection is taken up where
it stopped, a file that is complete is never fetched again, and a complete checkpoint needs no network.
"""

from __future__ import annotations

import errno
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError
from .folder import SIDE_FILES, WEIGHT_FILES, weight_files

MODELSCOPE = "modelscope:"
# Weights to look for, best first: one file, or an index and its shards.
PATTERNS = (
    ["model.safetensors.index.json", "model*.safetensors"],
    ["pytorch_model.bin.index.json", "pytorch_model*.bin"],
)
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
Fetch = Callable[[list[str]], str]  # the files of a repository that match the patterns, to a folder


def resolve(
    name: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None, quiet: bool = False
) -> Path:
    """The folder of a checkpoint, fetched if need be, with every shard that its index names.

    A folder of that name comes first ("tiny" excepted: write ./tiny). `revision` is a branch, tag or commit and
    `cache_dir` a folder, both for the hubs alone. Progress is shown on a terminal unless `quiet`. Raises
    CheckpointError for a name that is neither, a repository or revision that does not exist or is not open to this
    user, no network and no complete copy, no room, and a folder without weights or with shards missing.
    """
    text = str(name)
    if text == "tiny":
        return embedded(text)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise CheckpointError(f"{text} is a file; name the folder that it lies in")
        if text.startswith(MODELSCOPE) and _REPOSITORY.fullmatch(text.removeprefix(MODELSCOPE)):
            folder = _fetch_weights(_modelscope(text.removeprefix(MODELSCOPE), revision, cache_dir))
        elif _REPOSITORY.fullmatch(text):
            with _progress_bars(shown=not quiet and sys.stderr.isatty()):
                folder = _fetch_weights(_hugging_face(text, revision, cache_dir))
        else:
            raise CheckpointError(
                f'there is no folder {text}, and it is not a name on a hub either: those read "owner/name" or '
                f'"{MODELSCOPE}owner/name"'
            )
    weight_files(folder)
    return folder


def embedded(name: str) -> Path:
    """The folder of a checkpoint that comes with this library ("tiny"), in the installed package or in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / name, here.parents[2] / "weights" / name):
        if folder.is_dir():
            return folder
    raise CheckpointError(f'the embedded checkpoint "{name}" is missing from this installation; install qwenvl again')


def _fetch_weights(fetch: Fetch) -> Path:
    """Ask for safetensors; where a repository has none, ask for `.bin` files. The hub's answer tells which it has."""
    for patterns in PATTERNS:
        folder = Path(fetch([*SIDE_FILES, *patterns]))
        if any((folder / name).is_file() for name in WEIGHT_FILES):
            break
    return folder


def _hugging_face(repository: str, revision: str | None, cache_dir: str | Path | None) -> Fetch:
    # Imported here: it takes a while, and a local folder does not need it.
    import huggingface_hub
    from huggingface_hub import errors

    at = f" at revision {revision}" if revision else ""

    def fetch(patterns: list[str]) -> str:
        try:
            return huggingface_hub.snapshot_download(
                repository, revision=revision, cache_dir=cache_dir, allow_patterns=patterns
            )
        except errors.GatedRepoError:
            problem = f"{repository} asks for permission: accept its terms on its page, then run `hf auth login`"
        except errors.RepositoryNotFoundError:
            problem = (
                f"there is no folder {repository}, and on Hugging Face no such model that is open to you: check the "
                "name, or run `hf auth login` if it is private"
            )
        except errors.RevisionNotFoundError:
            problem = f"{repository} on Hugging Face has no revision {revision}"
        except errors.LocalEntryNotFoundError:
            problem = (
                f"{repository}{at} is not complete in the cache and Hugging Face cannot be reached (no network, or "
                "HF_HUB_OFFLINE is set): connect and run this again, or name a local folder"
            )
        except Exception as error:  # whatever the library's HTTP client, which changes with its version, may raise
            problem = _interrupted(f"{repository}{at}", error)
        raise CheckpointError(problem)

    return fetch


def _modelscope(repository: str, revision: str | None, cache_dir: str | Path | None) -> Fetch:
    try:
        modelscope = importlib.import_module("modelscope")
    except ImportError:
        raise CheckpointError(
            f"{MODELSCOPE}{repository} needs the ModelScope library: pip install qwenvl[modelscope]"
        ) from None
    options: dict[str, str] = {}
    if revision:
        options["revision"] = revision
    if cache_dir:
        options["cache_dir"] = str(cache_dir)

    def fetch(patterns: list[str]) -> str:
        try:
            return str(modelscope.snapshot_download(repository, allow_patterns=patterns, **options))
        except Exception as error:  # the library has no common parent for its errors
            raise CheckpointError(_interrupted(f"{MODELSCOPE}{repository}", error)) from None

    return fetch


def _interrupted(what: str, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full, {what} is not complete: free some room or set cache_dir, and run this again"
    reason = next(iter(str(error).splitlines()), "") or "no reason given"
    return f"fetching {what} failed ({type(error).__name__}: {reason}); run this again, it keeps what is complete"


@contextmanager
def _progress_bars(*, shown: bool) -> Iterator[None]:
    """Switch huggingface_hub's bars off for a while; they would fill a log with half-drawn lines."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    switch = not shown and not are_progress_bars_disabled()
    if switch:
        disable_progress_bars()
    try:
        yield
    finally:
        if switch:
            enable_progress_bars()
