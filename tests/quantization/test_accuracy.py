"""What fewer bits cost: the embedded model's held-out answers before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

import qwenvl
from qwenvl.config import QuantizationConfig
from qwenvl.quantization.checkpoint import quantize
from qwenvl.training.recipes.tiny_evaluate import ROWS, Question, evaluate, questions
from qwenvl.training.recipes.tiny_scenes import Split
from qwenvl.weights.hub import embedded


def right(folder: str | Path, asked: Sequence[Question]) -> float:
    """The share of held-out questions that a checkpoint answers right."""
    scores = evaluate(qwenvl.load(folder, "cpu", quiet=True), asked, quiet=True).values()
    return sum(score.right for score in scores) / sum(score.asked for score in scores)


def test_int4_answers_as_well(int4: Path) -> None:
    """A few questions of every kind: in 4 bits the embedded model loses next to none of its answers."""
    asked = questions(Split.TEST, 3)
    assert len(asked) == 6 * len(ROWS)
    assert right(int4, asked) >= right("tiny", asked) - 2 / len(asked)


@pytest.mark.slow
def test_less_than_a_point_is_lost(int4: Path, tmp_path: Path) -> None:
    """Over all rows of the table, int4 by GPTQ and int8 lose less than a point; docs/quantization.md has more."""
    quantize(embedded("tiny"), tmp_path / "int8", QuantizationConfig(bits=8, group_size=-1), quiet=True)
    asked = questions(Split.TEST, 50)
    plain = right("tiny", asked)
    assert right(tmp_path / "int8", asked) > plain - 0.01
    assert right(int4, asked) > plain - 0.01
