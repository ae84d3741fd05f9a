"""Metrics give what the official scorers gave for the same answers, item for item and over all."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from qwenvl.errors import PromptError
from qwenvl.evaluation.choices import MME_GROUPS, Rotated, circular, likeliest, majority, mme_label, mme_score
from qwenvl.evaluation.grounding import MODEL_SCALE, box_of, correct, iou
from qwenvl.evaluation.texts import anls, exact_match, gqa_normalised, levenshtein, relaxed_accuracy
from qwenvl.evaluation.vqa import normalised, vqa_accuracy, without_marks

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "metrics"


def golden(name: str) -> Any:
    """What an official scorer gave."""
    return json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))


def mean(values: list[float]) -> float:
    """Over all items."""
    return sum(values) / len(values)


def test_vqa_accuracy() -> None:
    """Each answer as it is compared, its accuracy, and the means over all, by kinds of questions and of answers."""
    found, kinds, answers = [], defaultdict(list), defaultdict(list)
    expected = golden("vqa_accuracy")
    for item in expected["items"]:
        assert normalised(item["answer"]) == item["processed"], item
        accuracy = 100 * vqa_accuracy(item["answer"], item["answers"])
        assert abs(accuracy - item["accuracy_12dp"]) < 1e-9, item
        found.append(accuracy)
        kinds[item["question_type"]].append(accuracy)
        answers[item["answer_type"]].append(accuracy)
    whole = expected["overall_12dp"]
    assert abs(mean(found) - whole["overall"]) < 1e-9
    for ours, theirs in ((kinds, whole["perQuestionType"]), (answers, whole["perAnswerType"])):
        assert {name: pytest.approx(mean(values), abs=1e-9) for name, values in ours.items()} == theirs


def test_vqa_quirks() -> None:
    """Answers of people keep their case and number words; periods beyond the 32nd stay; marks depend on spaces."""
    assert vqa_accuracy("one", [{"answer": "one"}] * 10) == 0
    assert without_marks("." * 40) == "." * 8
    assert without_marks("a-b") == "a b"
    assert without_marks("a- b") == "a b"
    assert normalised("somebody'd Im cant") == "somebodyd im can't"
    assert vqa_accuracy("yes", []) == 0


def test_anls() -> None:
    """With the threshold and without; and the distance by itself."""
    expected = golden("anls")
    for a, b, distance in expected["levenshtein"]:
        assert levenshtein(a, b) == distance
    for name, threshold in (("score", expected["threshold"]), ("score_no_threshold", 0.0)):
        found = [anls(item["answer"], item["answers"], threshold) for item in expected["items"]]
        for item, score in zip(expected["items"], found, strict=True):
            assert abs(score - item[name]) < 1e-12, item
        overall = expected["overall" if name == "score" else "overall_no_threshold"]
        assert abs(mean(found) - overall) < 1e-12


def test_relaxed_accuracy() -> None:
    """In the order of arguments that the reference has, beside each annotation, of which the best counts."""
    expected, found = golden("relaxed_accuracy"), []
    for item in expected["items"]:
        known = item["annotation"] if isinstance(item["annotation"], list) else [item["annotation"]]
        each = [relaxed_accuracy(item["answer"], annotation) for annotation in known]
        assert each == item["per_annotation"], item
        found.append(float(max(each)))
        assert found[-1] == item["score"], item
    assert abs(mean(found) - expected["overall"]) < 1e-12


def test_exact_match() -> None:
    """Case and white space around are nothing; all else is."""
    expected = golden("exact_match")
    found = [float(exact_match(item["answer"], item["annotation"])) for item in expected["items"]]
    assert found == [item["score"] for item in expected["items"]]
    assert abs(mean(found) - expected["overall"]) < 1e-12


def test_gqa() -> None:
    """The clean-up cuts texts as the reference's does, and annotations stay as they are."""
    expected, found = golden("gqa"), []
    for item in expected["items"]:
        assert gqa_normalised(item["answer"]) == item["normalised"], item
        found.append(float(exact_match(gqa_normalised(item["answer"]), item["annotation"])))
        assert found[-1] == item["score"], item
    assert abs(mean(found) - expected["overall"]) < 1e-12


def test_grounding() -> None:
    """Boxes read out of answers, their overlap, and how many are right."""
    expected, right = golden("grounding"), 0
    for item in expected["items"]:
        height, width = item["hw"]
        box = box_of(item["answer"], width, height)
        assert box == pytest.approx([float(side) for side in item["predict_bbox_pixels"]], rel=1e-6, nan_ok=True), item
        overlap = iou(box, item["gt_bbox"])
        assert math.isnan(overlap) if item["iou"] == "nan" else abs(overlap - item["iou"]) < 1e-6, item
        assert correct(box, item["gt_bbox"]) == bool(item["correct"]), item
        right += correct(box, item["gt_bbox"])
    assert (right, len(expected["items"])) == (expected["correct"], expected["total"])


def test_the_models_own_scale() -> None:
    """The model was trained with thousandths, while the reference's scorer divides by 999."""
    assert box_of("<box>(500,250),(1000,1000)</box>", 200, 100, MODEL_SCALE) == (100, 25, 200, 100)


def test_mme() -> None:
    """Labels, tasks, and the sums of both groups."""
    expected, totals = golden("mme"), dict.fromkeys(MME_GROUPS, 0.0)
    for answer, label in expected["parse"]:
        assert mme_label(answer) == label, answer
    assert {group: list(tasks) for group, tasks in MME_GROUPS.items()} == expected["groups"]
    for task, facts in expected["tasks"].items():
        score = mme_score([(truth, answer) for _, _, truth, answer in facts["rows"]])
        assert abs(score - facts["score"]) < 1e-9, task
        totals[next(group for group, tasks in MME_GROUPS.items() if task in tasks)] += score
    assert totals == pytest.approx(expected["totals"], abs=1e-9)
    with pytest.raises(PromptError, match="two questions"):
        mme_score([("Yes", "yes")])


@pytest.mark.parametrize("benchmark", ["scienceqa", "seed_bench"])
def test_the_least_loss(benchmark: str) -> None:
    """The first option of the least loss, also where several share it."""
    count = 0
    for batch in golden("multiple_choice")[benchmark]["batches"]:
        for losses, prediction in zip(batch["option_losses"], batch["predictions"], strict=True):
            assert likeliest(losses) == (prediction if isinstance(prediction, int) else "ABCD".index(prediction))
            count += 1
    assert count > 20
    for losses in ([], [1.0, math.nan]):
        with pytest.raises(PromptError):
            likeliest(losses)


def test_mmbench() -> None:
    """Circular: every rotation right; majority: the text chosen most often. They differ, as the goldens do."""
    expected = golden("mmbench_circular")
    rows = [Rotated(row["index"], tuple(row["options"]), "ABCD".index(row["answer"])) for row in expected["rows"]]
    predictions = {row["index"]: row["prediction"] for row in expected["predictions"]}
    strict, lenient = circular(rows, predictions), majority(rows, predictions)
    assert (sum(strict.values()), len(strict)) == (expected["circular_correct"], expected["circular_total"])
    failing = {index % 1_000_000 for index in expected["first_failing_rotation_index"]}
    assert {question for question, right in strict.items() if not right} == failing
    found = (sum(lenient.values()), len(lenient))
    assert found == (expected["consistency_majority_correct"], expected["consistency_majority_total"])
