"""What a run tells: a line of JSON for each report, TensorBoard where it is installed, a progress bar.

TrainingLog    all three
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tqdm import tqdm

from ..files import whole_file

LOG_FILE = "log.jsonl"
BOARD_FOLDER = "tensorboard"


class TrainingLog:
    """The log of a run in `folder` that goes on after update `step` of `steps`.

    Lines that a killed run wrote after its last checkpoint are cut off: their updates will be made again. `active` is
    false on all ranks but one, which then write and show nothing.
    """

    def __init__(self, folder: Path, step: int, steps: int, *, active: bool, quiet: bool) -> None:
        self._begun = self._since = time.monotonic()
        self._updates = self._tokens = 0
        self._file: IO[str] | None = None
        self._board: Any = None
        self._bar = tqdm(
            total=steps, initial=step, desc="training", unit="step", disable=True if quiet or not active else None
        )
        if active:
            path = folder / LOG_FILE
            _cut(path, step)
            self._file = path.open("a", encoding="utf-8")
            self._board = _board(folder, step)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        for sink in (self._file, self._board):
            if sink is not None:
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
        """A line, on the disk when this returns."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **facts}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in facts.items():
                for key, number in value.items() if isinstance(value, Mapping) else [("", value)]:
                    self._board.add_scalar(f"{name}/{key}" if key else name, number, step)


def _cut(path: Path, step: int) -> None:
    """Keep the lines up to update `step`; a last line that a kill cut short goes too."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if kept != lines:
        with whole_file(path) as file:
            file.write("".join(kept).encode())


def _board(folder: Path, step: int) -> Any:  # noqa: ANN401 - tensorboard may not be installed
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / BOARD_FOLDER), purge_step=step + 1)
