"""The benchmark of the small model: what counts as right, how sure a share is, and who is asked what."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qwenvl
from qwenvl.pipeline import Pipeline
from qwenvl.text.parts import parse_tagged
from qwenvl.training.recipes import tiny, tiny_evaluate
from qwenvl.training.recipes.tiny_evaluate import (
    ROWS,
    Question,
    Score,
    answers,
    evaluate,
    judge,
    overlap,
    questions,
    report,
    table,
)
from qwenvl.training.recipes.tiny_questions import Exchange, raw_form
from qwenvl.training.recipes.tiny_scenes import Split, draw, scene
from qwenvl.training.recipes.tiny_words import CHINESE, ENGLISH, LANGUAGES

BOX = (100, 100, 300, 300)


@pytest.fixture(scope="module")
def embedded() -> Pipeline:
    """Any checkpoint will do."""
    return qwenvl.load("tiny", "cpu", "float32", quiet=True)


def perfect(question: Question) -> str:
    """What a model that sees everything would say."""
    exchange = question.exchange
    return raw_form(exchange)[1] if question.row.endswith("(raw)") else exchange.answer


# Boxes


@given(st.lists(st.integers(0, 12), min_size=8, max_size=8))
def test_overlap_by_counting_cells(numbers: list[int]) -> None:
    """Intersection over union, against the cells of a grid that lie in both and in either."""
    boxes = []
    for x1, y1, x2, y2 in (numbers[:4], numbers[4:]):
        boxes.append((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    cells = [{(x, y) for x in range(b[0], b[2]) for y in range(b[1], b[3])} for b in boxes]
    expected = len(cells[0] & cells[1]) / max(len(cells[0] | cells[1]), 1)
    assert overlap(*boxes) == pytest.approx(expected)
    assert overlap(*boxes[::-1]) == pytest.approx(expected)


# Judging


def box_question(*targets: tuple[int, ...], row: str = "box") -> Question:
    """Where the circles are."""
    places = "".join("<box>({},{}),({},{})</box>".format(*target) for target in targets)
    exchange = Exchange("box", "Box it.", f"<ref>red circle</ref>{places}", ENGLISH, "red circle", targets)  # type: ignore[arg-type]
    return Question(row, exchange, (scene(0),))


def wide(share: float) -> str:
    """A box whose IoU with BOX is `share`."""
    return f"<ref>red circle</ref><box>(100,100),(300,{100 + round(200 * share)})</box>"


def test_half_an_overlap_is_enough() -> None:
    """IoU 0.5 is right, 0.49 is not, whatever the label says; the mean overlap is told in any case."""
    for share, right in ((0.49, False), (0.5, True), (0.51, True), (1.0, True)):
        verdict, found = judge(box_question(BOX), wide(share))
        assert (verdict, found) == (right, pytest.approx(share))
    assert judge(box_question(BOX), wide(1).replace("red circle", "thing")) == (True, 1)


def test_as_many_boxes_as_things() -> None:
    """One too few or too many is wrong, and so is another order; what is missing overlaps by nothing."""
    two = box_question(BOX, (500, 500, 700, 700))
    right = two.exchange.answer
    assert judge(two, right) == (True, 1)
    assert judge(two, wide(1)) == (False, 0.5)
    assert judge(box_question(BOX), right) == (False, 1)
    first, second = right.removeprefix("<ref>red circle</ref>").split("</box>")[:2]
    assert judge(two, f"{second}</box>{first}</box>") == (False, 0)


def test_the_base_form_goes_on_from_an_open_box() -> None:
    """Its reply has no tag before the first corner; several boxes follow each other."""
    assert judge(box_question(BOX, row="box (raw)"), "(100,100),(300,300)</box>") == (True, 1)
    assert judge(box_question(BOX, row="box (raw)"), "(100,100),(300,190)</box>")[0] is False
    two = box_question(BOX, (500, 500, 700, 700), row="box (raw)")
    assert judge(two, "(100,100),(300,300)</box><box>(500,500),(700,700)</box>") == (True, 1)


def test_texts_are_right_to_the_letter() -> None:
    """White space around them does not matter; everything else does."""
    question = Question("count", Exchange("count", "How many?", "3", ENGLISH), (scene(0),))
    verdicts = {reply: judge(question, reply) for reply in ("3", " 3\n", "33", "three", "3.", "")}
    assert verdicts == {reply: (reply.strip() == "3", None) for reply in verdicts}


def test_captions_need_boxes_and_names() -> None:
    """A caption whose boxes fit is wrong if a thing is called by another's name."""
    (question,) = questions(Split.TEST, 1, rows=("caption",))[:1]
    assert question.exchange.language is ENGLISH
    assert judge(question, question.exchange.answer) == (True, 1)
    wrong = question.exchange.answer.replace("<ref>", "<ref>dark ")
    assert judge(question, wrong) == (False, 1)
    assert judge(question, "")[0] is False


@pytest.mark.parametrize(
    "reply",
    [
        *("", "<box>", "</box>(1,", "\0\ufffd", "(1,2),(3,4)</box>", "<box>(5,5),(5,5)</box>"),
        "<ref></ref><box>(900,1),(2,3),(4,5),(6,7)</box>" * 9,
        *("<quad>(1,2),(3,4),(5,6),(7,8)</quad>", "(99999999999999999,-3.5),(nan,1)"),
    ],
)
def test_garbage_is_wrong_and_never_raises(reply: str) -> None:
    """Whatever a model says."""
    for question in questions(Split.TEST, 2):
        right, overlapping = judge(question, reply)
        assert not right
        assert overlapping is None or 0 <= overlapping < 0.5


# Scores


def test_wilson_interval() -> None:
    """Against published values, and the ends of the scale."""
    for right, asked, low, high in ((0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)):
        assert Score(right, asked).interval() == pytest.approx((low, high), abs=1e-4)
    assert Score(90, 100).interval() == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert Score(0, 0).interval()[0] == 0


def test_table() -> None:
    """Markdown with a row of each skill and a column of each language."""
    scores = {("box", "English"): Score(9, 10, 0.8), ("box", "Chinese"): Score(5, 10, 0.41)}
    scores |= {("count", language.name): Score(10, 10) for language in LANGUAGES}
    assert table(scores).splitlines() == [
        "| | English | Chinese |",
        "|---|---|---|",
        "| box | 90.0% (59.6 to 98.2), IoU 0.80 | 50.0% (23.7 to 76.3), IoU 0.41 |",
        "| count | 100.0% (72.2 to 100.0) | 100.0% (72.2 to 100.0) |",
    ]


# Who is asked what


@pytest.mark.parametrize("split", [Split.TEST, Split.VALIDATION])
def test_questions_are_of_their_split(split: Split) -> None:
    """As many for each row and language, each about a picture of its own, none of which training could have seen."""
    asked = questions(split, 5)
    counts = Counter((question.row, question.exchange.language.name) for question in asked)
    assert counts == {(row, language.name): 5 for row in ROWS for language in LANGUAGES}
    for question in asked:
        assert all(shown.seed in split.value for shown in question.scenes)
        assert not any(shown.seed in Split.TRAIN.value for shown in question.scenes)
        assert len(question.scenes) == 1 + (question.row == "compare")
        assert question.exchange.skill == question.row.split(" ")[0]
    for row in ROWS:
        own = [question.scenes[0].seed for question in asked if question.row == row]
        assert len(set(own[:5])) == len(set(own[5:])) == 5
    assert [q.exchange for q in questions(split, 3, rows=("box",))] == [q.exchange for q in asked[:3] + asked[5:8]]


def test_yes_and_no_are_asked_alike() -> None:
    """A model that always says yes gets half of it."""
    for row, high in (("exists", 0.6), ("relation", 0.4), ("count", 0.5)):
        for_all = Counter(question.exchange.answer for question in questions(Split.TEST, 150, rows=(row,)))
        assert max(for_all.values()) / 300 < high, row


def test_the_same_question_every_time() -> None:
    """The benchmark is a pure function of split and number; `first` begins elsewhere."""
    one, other = (questions(Split.TEST, 4, rows=("count", "text")) for _ in range(2))
    assert one == other
    assert all(question.scenes[0].text is not None for question in one if question.row == "text")
    later = questions(Split.TEST, 4, rows=("count", "text"), first=1000)
    assert not {q.scenes for q in later} & {q.scenes for q in one}


# Answers


def test_an_oracle_gets_everything_right(monkeypatch: pytest.MonkeyPatch, embedded: Pipeline) -> None:
    """Every question of every row can be answered, and the true answer is judged right."""
    monkeypatch.setattr(tiny_evaluate, "answers", lambda vl, batch: [perfect(question) for question in batch])
    found = report(embedded, 20, quiet=True)
    assert list(found["scores"]) == sorted(ROWS)
    for row, languages in found["scores"].items():
        for language, score in languages.items():
            assert (score["right"], score["asked"], score["share"]) == (20, 20, 1.0), (row, language)
            assert score.get("iou", 1.0) == 1.0
            assert ("iou" in score) == (row in ("box", "box (raw)", "boxes", "caption"))
    assert found["table"].count("100.0% (83.9 to 100.0)") == 2 * len(ROWS)
    assert (found["split"], found["each"]) == ("test", 20)
    json.dumps(found)


def test_scores_go_to_their_rows(monkeypatch: pytest.MonkeyPatch, embedded: Pipeline) -> None:
    """Who answers Chinese questions alone has all of those and no other, in whatever order they are asked."""
    monkeypatch.setattr(
        tiny_evaluate,
        "answers",
        lambda vl, batch: [perfect(q) if q.exchange.language is CHINESE and q.row != "text" else "?" for q in batch],
    )
    asked = questions(Split.VALIDATION, 7)
    random.Random(0).shuffle(asked)
    scores = evaluate(embedded, asked, quiet=True)
    assert {key: score.right for key, score in scores.items()} == {
        (row, language.name): 7 * (language is CHINESE and row != "text") for row in ROWS for language in LANGUAGES
    }


def test_answers_are_those_of_the_pipeline(monkeypatch: pytest.MonkeyPatch, embedded: Pipeline) -> None:
    """A batch of questions gets, one by one, what `chat` and `generate` reply to each alone."""
    monkeypatch.setattr(tiny_evaluate, "LONGEST", 8)
    batch = questions(Split.TEST, 1)
    for question, reply in zip(batch, answers(embedded, batch), strict=True):
        pictures = [{"image": draw(shown)} for shown in question.scenes]
        if question.row.endswith("(raw)"):
            query = [*pictures, {"ref": question.exchange.phrase, "box": None}]
            alone = embedded.generate(query, numbered=False, max_new_tokens=8, do_sample=False)
            assert reply == alone
        else:
            query = [*pictures, *parse_tagged(question.exchange.question)]
            alone, _ = embedded.chat(query, max_new_tokens=8, do_sample=False)
            assert reply.strip() == alone
    assert len(set(answers(embedded, batch))) > 1


def test_no_answer_is_too_long_to_be_given() -> None:
    """The longest caption there can be, letter by letter, ends before the limit on new tokens."""
    phrase = 1 + 2 + 1  # <ref>, two words, </ref>
    place = 2 + 4 * 3 + 5  # <box>, </box>, four numbers of three digits, at most (, ,, ),( and )
    assert 6 * (phrase + place + 2) + len("the text HOTEL") <= tiny_evaluate.LONGEST
    assert tiny.LONGEST == tiny_evaluate.LONGEST


def test_score_without_overlap() -> None:
    """Shares of nothing are nothing; an overlap of some rows does not leak into others."""
    assert Score(0, 0).share == 0
    assert replace(Score(1, 2), overlap=0.5).overlap == 0.5
