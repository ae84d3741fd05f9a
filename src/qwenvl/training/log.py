"""What a run tells: a line of JSON for each report, TensorBoard where it is installed, a progress bar.

TrainingLog    all three
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tqdm import tqdm

from ..files import whole_file
from .errors import TrainingError

LOG_FILE = "log.jsonl"
BOARD_FOLDER = "tensorboard"


class TrainingLog:
    """The log of a run in `folder` that goes on after update `step` of `steps`.

    Lines that a killed run wrote after its last checkpoint are cut off: their updates will be made again. `active` is
    false on all ranks but one, which then write and show nothing. Raises TrainingError where it cannot be written.
    """

    def __init__(self, folder: Path, step: int, steps: int, *, active: bool, quiet: bool) -> None:
        self._begun = self._since = time.monotonic()
        self._updates = self._tokens = 0
        self._file: IO[str] | None = None
        self._board: Any = None
        if active:
            path = folder / LOG_FILE
            with _explained():
                _cut(path, step)
                self._file = path.open("a", encoding="utf-8")
                self._board = _board(folder, step)
        self._bar = tqdm(
            total=steps, initial=step, desc="training", unit="step", disable=True if quiet or not active else None
        )

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        for sink in (self._file, self._board):
            if sink is not None:
                # What could not be written fails again here, and must not hide what ended the run.
                with _explained() if kind is None else suppress(OSError):
                    sink.close()

    def step(self, loss: float, tokens: int) -> None:
        """One update is done."""
        self._updates += 1
        self._tokens += tokens
        self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self._bar.update()

    def progress(self, step: int, **facts: float) -> None:
        """A line about the run after update `step`, with its speed since the last such line of this process."""
        now = time.monotonic()
        speeds = {"tokens_per_second": self._tokens, "updates_per_second": self._updates}
        passed = max(now - self._since, 1e-9)
        rates = {name: round(count / passed, 3) for name, count in speeds.items() if count}
        self._since, self._updates, self._tokens = now, 0, 0
        self.write(step, **facts, **rates, seconds=round(now - self._begun, 3))

    def write(self, step: int, **facts: Any) -> None:  # noqa: ANN401 - numbers, or names with numbers
        """A line, on the disk when this returns; a number that is not finite, which JSON lacks, is null."""
        if self._file is not None:
            with _explained():
                self._file.write(json.dumps(_finite({"step": step, **facts}), allow_nan=False) + "\n")
                self._file.flush()
        if self._board is not None:
            for name, value in facts.items():
                for key, number in value.items() if isinstance(value, Mapping) else [("", value)]:
                    self._board.add_scalar(f"{name}/{key}" if key else name, number, step)


def _cut(path: Path, step: int) -> None:
    """Keep the lines up to update `step`; what is no line of a log, as a kill or a crash leaves it, goes too."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step(line) <= step]
    if kept != lines:
        with whole_file(path) as file:
            file.write(b"".join(kept))


def _step(line: bytes) -> float:
    """The update that a line is about; infinity if it is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return math.inf


def _finite(value: Any) -> Any:  # noqa: ANN401 - numbers, or names with numbers
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(f"the log cannot be written: {error}") from None


def _board(folder: Path, step: int) -> Any:  # noqa: ANN401 - tensorboard may not be installed
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / BOARD_FOLDER), purge_step=step + 1)
