"""Reports beside one another: labels, tables, differences, and the radar plot."""

import builtins
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import one_line_error

from qwenvl.errors import QwenVLError
from qwenvl.evaluation.items import DataError
from qwenvl.evaluation.pooled import with_pooled
from qwenvl.evaluation.radar import radar
from qwenvl.evaluation.runs import Runs, compared, numbered
from qwenvl.evaluation.summary import markdown, summary, table


def report(benchmark: str = "refcoco_val", value: float = 50.0, **settings: Any) -> dict[str, Any]:
    """A report with one figure, of four answers of which two are right."""
    given = {
        "model": "Qwen/Qwen-VL",
        "dtype": "bfloat16",
        "bits": None,
        "few_shot": 0,
        "weights": "abc",
        "questions": "q",
    }
    figure = {"name": "accuracy", "value": value, "low": value - 1, "high": value + 1, "count": 4, "difference": {}}
    return {
        "benchmark": benchmark,
        "title": benchmark.upper(),
        "model": settings.get("model", "Qwen/Qwen-VL"),
        "settings": {**given, **settings},
        "items": 4,
        "items_of_the_benchmark": 4,
        "whole": True,
        "figures": [{**figure, "published": {"Qwen/Qwen-VL": 2 * value}}],
        "groups": {},
        "odd": {},
        "hidden": 0,
        "problems": [],
        "answers": [{"id": str(k), "answer": str(k % 2), "score": float(k % 2)} for k in range(4)],
    }


def test_labels_say_what_differs() -> None:
    """A run is called by its model, and by what tells it from others of that name; more bits come first."""
    assert Runs(numbered([report(), report("mme")])).labels == ["Qwen-VL"]
    runs = Runs(
        numbered([report(bits=4), report(), report(dtype="float32"), report(few_shot=4), report(weights="def")])
    )
    assert runs.labels[-1] == "Qwen-VL, bfloat16, 4 bits, 0-shot"
    assert len(set(runs.labels)) == 5
    assert "Qwen-VL, float32, not packed, 0-shot" in runs.labels
    assert "Qwen-VL, bfloat16, not packed, 0-shot, def" in runs.labels
    assert Runs(numbered([report(), report(model="Qwen/Qwen-VL-Chat")])).labels == ["Qwen-VL", "Qwen-VL-Chat"]


def test_differences_are_taken_pair_by_pair() -> None:
    """Runs of which each lost another answer differ by nothing, yet not for certain; other questions are left out."""
    one, other, strange = report(), report(bits=4), report(bits=8, questions="others")
    for row in other["answers"][:2]:
        row |= {"score": 1 - row["score"], "answer": "x"}
    rows = compared(Runs(numbered([one, other, strange])))
    assert [row[1] for row in rows] == ["Qwen-VL, 4 bits"]
    assert rows[0][2].startswith("+0.00 (-")
    assert rows[0][3] == "50.0%"


def test_options_are_compared_by_choice() -> None:
    """Losses that differ in the last digit are the same answer, if they choose the same option."""
    one, other = report(), report(bits=4)
    for found, small in ((one, 0.0), (other, 1e-6)):
        found["answers"] = [{"id": "1", "losses": [1.0, 0.5 + small], "score": 1.0}]
    assert compared(Runs(numbered([one, other])))[0][3] == "100.0%"


def test_what_the_paper_gives_together() -> None:
    """ChartQA's halves are counted together where a run has both, item by item, beside the paper's one figure."""
    halves = [report("chartqa_test_human"), report("chartqa_test_augmented")]
    halves[1]["answers"] = [{"id": "9", "answer": "", "score": 1.0}]
    *_, whole = with_pooled(halves)
    assert whole["figures"][0]["value"] == pytest.approx(100 * 3 / 5)
    assert whole["figures"][0]["published"] == {"Qwen/Qwen-VL": 65.7, "Qwen/Qwen-VL-Chat": 66.3}
    assert with_pooled(halves[:1]) == numbered(halves[:1])
    assert len(with_pooled([halves[0], {**halves[1], "settings": report(bits=4)["settings"]}])) == 2


def test_runs_alike_stand_side_by_side() -> None:
    """Two runs that differ in their limit or seed alone, which had one label, hid one another: the last was shown."""
    both = numbered([report(value=40.0), report(value=60.0), report("mme", value=70.0)])
    runs = Runs(both)
    assert runs.labels == ["Qwen-VL", "Qwen-VL, run 2"]
    shown = [runs.report(label, "refcoco_val") for label in runs.labels]
    assert [one["figures"][0]["value"] for one in shown if one] == [40, 60]
    halves = ("chartqa_test_human", "chartqa_test_augmented")
    twice = with_pooled([report(name, value=value) for value in (40.0, 60.0) for name in halves])
    assert Runs(twice).labels == runs.labels
    assert all(Runs(twice).report(label, "chartqa") for label in runs.labels)


def test_figures_stand_in_their_own_rows() -> None:
    """A run of MME's first items has no Cognition: the figures behind it stood a row too high, as another's value."""
    whole, part = report("mme"), report("mme", bits=4)
    known = whole["figures"][0]
    names = ("Perception", "Cognition", "accuracy")
    whole["figures"] = [{**known, "name": name} for name in names]
    part["figures"] = [{**known, "name": name, "value": 70.0} for name in ("Perception", "accuracy")]
    told = table([part, whole])
    assert "|  | Cognition | 50.00 (49.00 to 51.00) |  | 100.0 |" in told
    assert "|  | accuracy | 50.00 (49.00 to 51.00) | 70.00 (49.00 to 51.00) | 100.0 |" in told
    part["figures"] = [{**known, "name": "Cognition"}]
    whole["figures"] = [{**known, "name": "Perception"}]
    assert list(Runs(numbered([whole, part])).figures("mme")) == ["Perception", "Cognition"]


def test_tables() -> None:
    """Runs are columns, the paper's figure stands behind them; what is not whole has a mark, and is told below."""
    part = {
        **report("okvqa_val", model="Qwen/Qwen-VL-Chat"),
        "whole": False,
        "items": 3,
        "odd": {"empty answers": ["1"]},
    }
    told = table([report(), part])
    assert "| benchmark | figure | Qwen-VL | Qwen-VL-Chat | paper: Qwen-VL |" in told
    assert "| REFCOCO_VAL | accuracy | 50.00 (49.00 to 51.00) |  | 100.0 |" in told
    assert "| OKVQA_VAL | accuracy |  | 50.00 (49.00 to 51.00) * | 100.0 |" in told
    assert "- okvqa_val, Qwen/Qwen-VL-Chat: 3 items of 4 (*); 1 empty answers." in told
    assert told.index("Table 4") < told.index("Table 6")
    assert markdown(["a|b"], [["c|d"]])[-1] == "| c\\|d |"


@pytest.mark.parametrize(
    ("benchmark", "remark"), [("touchstone_en", "not judged yet"), ("mme", "no figure can be had from these")]
)
def test_reports_without_a_figure(benchmark: str, remark: str) -> None:
    """Protects who ran MME with --limit 1, half a picture's pair, from being sent to a judge."""
    assert f"- {benchmark}, Qwen/Qwen-VL: {remark}" in table([{**report(benchmark), "figures": []}])


def test_subtasks() -> None:
    """Subtasks are rows; those of "row, column" make a table with both."""
    found = report()
    known = found["figures"][0]
    found["groups"] = {"scene": known, "text in it": known}
    assert "| text in it | 50.00 (49.00 to 51.00) |" in summary([found])
    found["groups"] = {f"{row}, {column}": known for row in "ab" for column in ("one", "two")}
    assert "|  | one, Qwen-VL | two, Qwen-VL |" in summary([found])
    found["groups"] = {"a, one": known, "b, one": known}
    assert "| b, one | 50.00 (49.00 to 51.00) |" in summary([found]), "a column alone left its cells empty"


def test_radar_of_the_paper(tmp_path: Path) -> None:
    """With three benchmarks of the paper there is a plot, a line for each run; with two there is none."""
    names = ("refcoco_val", "mme", "nocaps")
    reports = [report(name, bits=bits) for name in names for bits in (None, 4)]
    assert radar(reports, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or []}
    assert {(0x2A, 0x6F, 0xDB), (0xD1, 0x49, 0x5B)} <= colours
    assert not radar(reports[:4], tmp_path / "none.png")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


def test_radar_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is not there and a missing matplotlib are one line."""
    reports = [report(name) for name in ("refcoco_val", "mme", "nocaps")]
    with one_line_error(DataError, "cannot write"):
        radar(reports, tmp_path / "no" / "plot.png")
    real = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with one_line_error(QwenVLError, "pip install 'qwenvl[eval]'"):
        radar(reports, tmp_path / "plot.png")
