"""METEOR, where it can be had: it is a Java program with its data, METEOR 1.5, which pycocoevalcap brings.

meteor    of captions beside people's, if there is what it takes
missing   what is not there of that

`pip install 'qwenvl[meteor]'` brings the program, of 100 MB; Java itself must be there. None of pycocoevalcap's Python
is run: that could wait for ever, and one odd caption could shift those after it.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from .captions import Score, Sentence

PACKAGE, PROGRAM = "pycocoevalcap", "meteor/meteor-1.5.jar"
JAVA = "java"
FLAGS = ("-", "-", "-stdio", "-l", "en", "-norm")
START, EACH = 300.0, 0.1  # seconds that it may take to start, and for each sentence: ten times what is usual
BETWEEN = " ||| "  # its mark between the parts of a line


def missing() -> str | None:
    """What METEOR lacks here, for people; None if nothing."""
    if _program() is None:
        return f"{PACKAGE} is not installed: pip install 'qwenvl[meteor]'"
    return None if shutil.which(JAVA) else f"Java is not installed: there is no command {JAVA}"


def meteor(candidates: Sequence[Sentence], references: Sequence[Sequence[Sentence]]) -> Score | None:
    """METEOR 1.5, from 0 to 1, of sentences as `rouge_l` takes them; that of all pictures together is not their mean.

    None where `missing` says why, and, after a warning, where Java fails or takes too long.
    """
    program, java = _program(), shutil.which(JAVA)
    if program is None or java is None:
        return None
    questions = [
        BETWEEN.join(["SCORE", *map(_line, group), _line(words)])
        for words, group in zip(candidates, references, strict=True)
    ]
    seconds = START + EACH * (len(candidates) + sum(map(len, references)))
    try:
        return _asked([java, "-jar", "-Xmx2G", str(program), *FLAGS], program.parent, questions, seconds)
    except _Failed as error:
        warnings.warn(f"METEOR is left out: {error}", stacklevel=2)
        return None


class _Failed(Exception):
    """How the program failed."""


def _program() -> Path | None:
    """The package's file, found without an import of the package."""
    spec = find_spec(PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or ()
    return next((path for path in (Path(folder) / PROGRAM for folder in folders) if path.is_file()), None)


def _line(words: Sentence) -> str:
    """A sentence that stays one: on one line, and without the mark that stands between sentences."""
    return " ".join(" ".join(words).splitlines()).replace("|||", "")


def _asked(command: Sequence[str], folder: Path, questions: Sequence[str], seconds: float) -> Score:
    """What the program says: counts of each question; and of all the counts, a score for each, and one for all.

    It has ended when this returns or raises _Failed, after `seconds` at the latest.
    """
    with tempfile.TemporaryFile() as errors:  # a pipe that nobody reads would stop it once that is full
        try:
            with subprocess.Popen(
                command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            ) as process:
                late = threading.Timer(seconds, process.kill)
                late.start()
                try:
                    counts = [_replies(process, question, 1)[0] for question in questions]
                    *images, corpus = map(float, _replies(process, BETWEEN.join(["EVAL", *counts]), len(counts) + 1))
                finally:
                    process.kill()
                    late.cancel()
        except (OSError, ValueError) as error:
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise _Failed(f"Java failed, or had no answer within {seconds:.0f} s: {last or error}") from None
    return Score(corpus, images)


def _replies(process: subprocess.Popen[bytes], question: str, lines: int) -> list[str]:
    """The lines that it replies to one. Raises OSError where it has ended, and ValueError where it replies less."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{question}\n".encode(errors="replace"))
    process.stdin.flush()
    replies = [process.stdout.readline().decode().strip() for _ in range(lines)]
    if not all(replies):
        raise ValueError("it ended")
    return replies
