"""Figures of benchmarks: the official scorers' overall values, intervals, and what is odd about answers."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from qwenvl.evaluation.items import Item
from qwenvl.evaluation.scoring import Answered, Scores, figure, score


def golden(goldens: Path, name: str) -> Any:
    """A golden file of the metrics."""
    return json.loads((goldens / "metrics" / f"{name}.json").read_text(encoding="utf-8"))


def answered(truths: list[Any], answers: list[str], **more: Any) -> list[Answered]:
    """Items with these truths, and what was said to them."""
    return [
        Answered(Item(str(k), (b"",), truth=truth, **more), answer)
        for k, (truth, answer) in enumerate(zip(truths, answers, strict=True))
    ]


def choice(losses: list[list[float]], truths: list[int]) -> list[Answered]:
    """Questions with options, and the loss of each."""
    return [
        Answered(Item(str(k), (b"",), truth=truth, options=("a", "b")), "", tuple(row))
        for k, (row, truth) in enumerate(zip(losses, truths, strict=True))
    ]


def test_an_interval_holds_what_the_bootstrap_says() -> None:
    """The interval is that of drawing units with replacement, here against numpy's plain way of doing so."""
    values = np.random.default_rng(7).random(400).round(1)
    found = figure("accuracy", [list(values)])
    draw = np.random.default_rng(1)
    means = 100 * draw.choice(values, (20_000, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    assert found.value == pytest.approx(100 * fmean(values))
    assert found.low == pytest.approx(low, abs=0.35)
    assert found.high == pytest.approx(high, abs=0.35)
    assert found.high - found.low == pytest.approx(high - low, rel=0.1), "one of 90% is 16% narrower"
    assert found == figure("accuracy", [list(values)]), "the same scores, the same interval"
    assert found.count == 400


def test_strata_are_drawn_apart() -> None:
    """A sum over subtasks adds their means, however many units each has; a certain one adds no width."""
    certain, even = [1.0] * 50, [0.0, 1.0] * 200
    both = figure("sum", [certain, even])
    assert both.value == pytest.approx(150)
    assert both.high - both.low == pytest.approx(figure("even", [even]).high - figure("even", [even]).low, abs=0.6)


@pytest.mark.parametrize(
    ("metric", "truths", "answers", "value", "name"),
    [
        ("vqa", [[{"answer": "red", "answer_id": k} for k in range(10)]] * 2, ["red", "blue"], 50, "VQA accuracy"),
        ("anls", [["a cat"], ["a dog"]], ["A  cat", "whale"], 50, "ANLS"),
        ("relaxed", [["10", "20"], ["x"]], ["20.5", "y"], 50, "relaxed accuracy"),
        ("exact", [["Yes", "Yep"], ["No"]], [" yep ", "yes"], 50, "accuracy"),
        ("gqa", [["dog"], ["cat"]], ["it is a dog.", "cats"], 50, "accuracy"),
    ],
)
def test_means_of_answers(metric: str, truths: list[Any], answers: list[str], value: float, name: str) -> None:
    """Each metric of texts is in percent, under the paper's name for it, and every one of several truths counts."""
    found = score(metric, answered(truths, answers))
    assert found.figures[0].name == name
    assert found.figures[0].value == pytest.approx(value)
    assert list(found.items.values()) == [1.0, 0.0]


def test_an_empty_answer_is_listed() -> None:
    """Answers without a word are scored as the official scorer does, and listed by id."""
    assert score("exact", answered([["a"], ["b"]], [" ", "b"])).odd == {"empty answers": ["0"]}
    assert score("exact", answered([["a"]], ["a"])).odd == {}


def test_captions_are_the_official_corpus(goldens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIDEr x 100 of the golden corpus, beside BLEU-4 and ROUGE-L, and each picture's CIDEr as its item's score."""
    monkeypatch.setattr("qwenvl.evaluation.meteor.PACKAGE", "none")  # METEOR has tests of its own
    cases = golden(goldens, "captions")
    items = [
        Answered(Item(str(one["image_id"]), (b"",), truth=one["references"]), one["candidate"])
        for one in cases["items"]
    ]
    found = score("captions", items)
    for one, key in zip(found.figures, ("CIDEr", "Bleu_4", "ROUGE_L"), strict=True):
        assert one.value == pytest.approx(100 * cases["corpus"][key], abs=1e-7)
        assert one.low < one.value < one.high
    assert fmean(found.items.values()) == pytest.approx(cases["corpus"]["CIDEr"])


def test_grounding_both_scales_and_answers_without_a_box(goldens: Path) -> None:
    """Accuracy is the golden one, over boxes of / 1000 beside it; answers without a box are wrong, and listed."""
    cases = golden(goldens, "grounding")
    items = [
        Answered(
            Item(str(k), (b"",), truth=one["gt_bbox"], more=dict(zip(("height", "width"), one["hw"], strict=True))),
            one["answer"],
        )
        for k, one in enumerate(cases["items"])
    ]
    found = score("grounding", items)
    assert [one.name for one in found.figures] == ["accuracy", "accuracy, boxes / 1000", "mean IoU"]
    assert found.figures[0].value == pytest.approx(100 * cases["precision_at_1"])
    assert list(found.items.values()) == [one["correct"] for one in cases["items"]]
    lost = found.odd["answers without a box"]
    assert lost == [str(k) for k, one in enumerate(cases["items"]) if not any(one["predict_bbox_pixels"])]
    size = {"width": 1000, "height": 1000}
    edge = score("grounding", answered([[0, 0, 1000, 500]], ["(0,0),(999,250)"], more=size))
    assert [one.value for one in edge.figures[:2]] == [100, 0]
    empty = score("grounding", answered([[0, 0, 0, 0], [0, 0, 9, 9]], ["no box", "(0,0),(9,9)"], more=size))
    assert 0 < empty.figures[2].value < 100, "an overlap that is no number counts as none"


def test_letters() -> None:
    """The first capital that is an option's letter is the choice; other answers are wrong and listed."""
    items = [
        Answered(Item(str(k), (b"",), truth=1, options=("x", "y", "z")), answer)
        for k, answer in enumerate(["B. y", "I say it is (B)", "b", "D", "A or B"])
    ]
    found = score("letter", items)
    assert list(found.items.values()) == [1, 1, 0, 0, 0]
    assert found.odd == {"answers without a letter": ["2", "3"]}


def test_options_by_loss_and_subtask() -> None:
    """The least loss is the choice, the first of equal ones; subtasks are scored by themselves, too."""
    items = choice([[2.0, 1.0], [1.0, 1.0], [3.0, 0.5]], [1, 1, 1])
    items = [
        Answered(Item(**{**vars(one.item), "group": "odd" if k else "even"}), "", one.losses)
        for k, one in enumerate(items)
    ]
    found = score("choice", items)
    assert list(found.items.values()) == [1, 0, 1]
    assert found.groups["odd"].value == pytest.approx(50)
    assert found.groups["even"].value == pytest.approx(100)


def test_mmbench_counts_questions(goldens: Path) -> None:
    """Circular and majority accuracy are the golden ones, over questions, not rotations."""
    cases = golden(goldens, "mmbench_circular")
    said = {one["index"]: one["prediction"] for one in cases["predictions"]}
    rows = []
    for row in cases["rows"]:
        options = tuple(option for option in row["options"] if option)
        item = Item(str(row["index"]), (b"",), truth="ABCD".index(row["answer"]), options=options)
        if row["index"] in said:
            rows.append(Answered(item, "", tuple(float(k != said[row["index"]]) for k in range(len(options)))))
    found = score("circular", rows)
    assert [one.name for one in found.figures] == ["circular accuracy", "majority accuracy"]
    strict, usual = found.figures
    assert strict.value == pytest.approx(100 * cases["circular_correct"] / cases["circular_total"])
    assert usual.value == pytest.approx(cases["consistency_majority_percent"])
    assert strict.count == usual.count == cases["circular_total"]


def test_mmbench_groups_are_circular() -> None:
    """A question of which most rotations are right counts for its kind only if all are."""
    rows = [
        Answered(Item(str(rotation * 1_000_000 + 7), (b"",), truth=0, options=("x", "y"), group="kind"), "", losses)
        for rotation, losses in enumerate([(0.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
    ]
    found = score("circular", rows)
    assert [one.value for one in found.figures] == [0, 100]
    assert (found.groups["kind"].value, found.groups["kind"].count) == (0, 1)


def test_mme_adds_accuracy_and_both_right(goldens: Path) -> None:
    """The two sums are the golden ones; answers that are neither yes nor no are wrong and listed."""
    cases = golden(goldens, "mme")
    items = [
        Answered(Item(f"{task} {k}", (b"",), truth=row[2], group=task, more={"picture": row[0]}), row[3])
        for task, of_task in cases["tasks"].items()
        for k, row in enumerate(of_task["rows"])
    ]
    found = score("mme", items)
    assert {one.name: one.value for one in found.figures[:2]} == pytest.approx(cases["totals"], abs=1e-9)
    assert [one.name for one in found.figures[2:]] == ["accuracy", "accuracy+"]
    for task, of_task in cases["tasks"].items():
        assert found.groups[f"{task}, score"].value == pytest.approx(of_task["score"], abs=1e-9)
        truths = [row[2].lower() for row in of_task["rows"]]
        accuracy = 100 * fmean(one == other for one, other in zip(truths, of_task["labels"], strict=True))
        assert found.groups[f"{task}, accuracy"].value == pytest.approx(accuracy, abs=1e-9)
        assert found.groups[f"{task}, accuracy+"].value == pytest.approx(of_task["score"] - accuracy, abs=1e-9)
    labels = [label for of_task in cases["tasks"].values() for label in of_task["labels"]]
    alone = score("mme", items[:-1])
    assert alone.odd["answers about pictures with one answer"] == [items[-2].item.id]
    task = f"{items[-1].item.group}, score"
    assert alone.groups[task].count == found.groups[task].count - 1
    assert len(found.odd["answers neither yes nor no"]) == labels.count("other")


def test_items_without_a_truth_are_not_scored() -> None:
    """Where the annotations are not public there is no figure, rather than one of nothing."""
    assert score("vqa", answered([None, None], ["a", "b"])) == Scores((), {})
