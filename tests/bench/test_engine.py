"""An engine's parts on a small model: what each measures, and that it is what it says."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from commands import outside
from support import random_model, small_config

from qwenvl.bench import engine
from qwenvl.bench.device import Device
from qwenvl.bench.driving import Answer, Driver, TimeUp
from qwenvl.bench.engine import engine_parts
from qwenvl.bench.figures import Figure, Missing
from qwenvl.bench.measure import measure_model
from qwenvl.bench.plan import OF_AN_ENGINE, TINY, Plan
from qwenvl.bench.roofline import Limits, stepping
from qwenvl.bench.subject import Subject
from qwenvl.bench.workload import Ask

CONFIG = small_config()
PLAN = replace(TINY, context=40, answer=8, rounds=1, arrivals=10, long_prompt=160)


@pytest.fixture(scope="module")
def subject() -> Subject:
    """On a CPU that moves 1 GB and does 1 TFLOP in a second."""
    return Subject(random_model(CONFIG), Device(torch.device("cpu")), Limits(1e9, 1e12), "float32")


def measured(subject: Subject, part: str, plan: Plan = PLAN) -> dict[str, Figure]:
    """The figures of one part, by name; anything that is missing is raised."""
    ((_, _, _, measurement),) = engine_parts(subject, replace(plan, parts=(part,)))
    events = list(measurement(60))
    assert all(isinstance(event, Figure) and event.part == part for event in events)
    return {event.name: event for event in events if isinstance(event, Figure)}


@pytest.fixture
def driven(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Driver, Ask, Answer]]]:
    """What the drivers were asked for, as it came."""
    noted: list[tuple[Driver, Ask, Answer]] = []
    real = Driver.ask

    def ask(self: Driver, wanted: Ask, *rest: float, **options: float) -> Answer:
        noted.append((self, wanted, real(self, wanted, *rest, **options)))
        return noted[-1][2]

    monkeypatch.setattr(Driver, "ask", ask)
    return iter([noted])


@pytest.mark.parametrize(
    "words",
    [["--only", "second-round"], pytest.param(["--engine"], marks=pytest.mark.slow)],
    ids=["second-round", "engine"],
)
def test_tiny_from_the_command_line(words: list[str]) -> None:
    """Parts of an engine and no other, with a bar that is judged on a CPU, whatever the model."""
    done = outside("bench", "--tiny", "--dtype", "float32", *words)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    parts = set(OF_AN_ENGINE) if words == ["--engine"] else {"second-round"}
    assert {figure["part"] for figure in result["figures"]} == {"device", "weights", *parts}
    bars = {figure["name"]: figure["bar"] for figure in result["figures"] if "passed" in figure}
    assert bars.pop("second round, how much sooner") == 4
    assert bars == ({"8 at once to one at a time": 3} if "throughput" in parts else {})
    assert done.stdout.count(">= 4, cpu") == 1
    assert (result["failed"], result["mode"]) == ([], "tiny")


def test_only_what_is_planned(subject: Subject) -> None:
    """Each part by itself, in the order of the plan; a model's other parts come without an engine."""
    names = [part for part, *_ in engine_parts(subject, replace(PLAN, parts=("lookup", "steady", "decode")))]
    assert names == ["steady", "lookup"]
    assert not list(engine_parts(subject, TINY))


def test_at_once_and_one_at_a_time_are_the_same_requests(subject: Subject, driven: Iterator[list[tuple]]) -> None:
    """Eight rows and one, each with the round's requests; the ratio is of the two rates of that round."""
    found = measured(subject, "throughput")
    noted = next(driven)
    rows = [driver.engine.load.rows for driver, *_ in noted]
    assert sorted(set(rows)) == [1, 8]
    assert rows.count(1) == rows.count(8) == 2 * 8  # the warm-up, and one round
    many, one = ([ask.ids for driver, ask, _ in noted if driver.engine.load.rows == count] for count in (8, 1))
    assert sorted(many) == sorted(one)
    assert all(len(answer.times) == ask.new for _, ask, answer in noted)
    gain = found["8 at once"].value / found["one at a time"].value
    assert found["8 at once to one at a time"].value == pytest.approx(gain, rel=1e-3)
    assert found["8 at once"].details["new_ids"] == 8 * 8


def test_steady_rows_are_held_against_the_limit(subject: Subject) -> None:
    """Nothing but steps of all rows, at the context that they really had; the limit is that of such steps."""
    figure = measured(subject, "steady")["8 rows decoding"]
    context = float(figure.details["context"])
    assert context == pytest.approx(PLAN.context, abs=6)  # what settles before is a few tokens
    work = stepping(CONFIG, 4, 8, context)
    assert figure.details["bytes_per_step"] == pytest.approx(work.bytes)
    assert figure.limit == pytest.approx(8 * 1e9 / work.bytes, rel=1e-4)
    assert figure.limited_by == "memory"


def test_arrivals_come_at_a_share_of_what_was_measured(subject: Subject, driven: Iterator[list[tuple]]) -> None:
    """As many as planned, in the order of their times; waiting, time per token and the cache have their figures."""
    found = measured(subject, "arrivals")
    noted = next(driven)
    assert len(noted) == 2 * 8 + 2 * 10  # all at once, to know the rate; arriving: a warm-up and what is told
    due = [answer.due for _, _, answer in noted[-10:]]
    assert due == sorted(due)
    assert len(set(due)) == 10
    at_once = [answer for *_, answer in noted[8:16]]
    capacity = 8 / (max(answer.times[-1] for answer in at_once) - at_once[0].due)
    assert found["arriving"].details["requests_per_second"] == pytest.approx(engine.SHARE * capacity, rel=0.2)
    for name in ("first token", "time per token"):
        assert 0 < found[f"arriving, {name}, p50"].value <= found[f"arriving, {name}, p95"].value
    used = found["arriving, cache in use"]
    assert 0 < used.value <= used.details["peak"] <= 100


def test_a_long_prompt_arrives_while_all_others_decode(subject: Subject, driven: Iterator[list[tuple]]) -> None:
    """It fills its row, with two pictures; the others have begun before, and none has ended when it has its id."""
    found = measured(subject, "long-prompt")
    noted = next(driven)
    *others, (_, long, arrived) = noted[8:]
    assert (len(others), len(long.ids), len(long.pictures)) == (7, 159, 2)
    for _, _, other in others:
        assert other.times[0] < arrived.due < arrived.times[0] < other.times[-1]
    before, during, added = found.values()
    assert before.value > 0
    assert during.value >= added.value > 0


def test_the_second_round_reuses_the_first(subject: Subject, driven: Iterator[list[tuple]]) -> None:
    """What it is compared with is as long, and has nothing in common with what was seen."""
    found = measured(subject, "second-round")
    noted = next(driven)
    for begun in (noted[0:3], noted[3:6]):
        first, *both = begun
        (_, goes_on, reused), (_, unseen, anew) = sorted(both, key=lambda one: -one[2].request.reused)
        assert goes_on.ids[: len(first[1].ids)] == first[1].ids
        assert reused.request.reused == len(first[1].ids) + first[1].new - 1  # all but the id that was not fed yet
        assert anew.request.reused == 0
        assert len(unseen.ids) == len(goes_on.ids)
    reused, anew, gain = (figure.value for figure in found.values())
    assert gain == pytest.approx(anew / reused, rel=0.01)


def test_lookup_beside_none(subject: Subject, driven: Iterator[list[tuple]]) -> None:
    """The greedy ids are the same; several come in a step where answers repeat, and one at a time where none does."""
    found = measured(subject, "lookup", replace(PLAN, answer=48))
    repeated, random = found.values()
    assert "of 8 answers none differ" in repeated.note
    assert repeated.details["ids_per_step"] > 1.3 > random.details["ids_per_step"] >= 1
    assert len({id(driver) for driver, *_ in next(driven)}) == 4


def test_the_arithmetic_of_lookup() -> None:
    """Ids a step, how much faster, and how many answers guesses have changed: that is told, not hidden in a ratio."""

    class Drivers:
        """Whose answers are known."""

        def __init__(self, *answers: tuple[list[int], list[float]]) -> None:
            self.answers = [Answer(argparse.Namespace(ids=ids), 0.0, times) for ids, times in answers]

        def together(self, _: object, **options: float) -> list[Answer]:
            """Them."""
            assert options == {"seed": 0}
            return self.answers

    guessing = Drivers(([1, 2, 3, 4], [1, 2, 2, 3]), ([5, 6, 7, 8], [1, 2, 3, 3]))
    plain = Drivers(([1, 2, 3, 4], [1, 2, 3, 4]), ([5, 6, 7, 9], [1, 3, 5, 7]))
    found = engine._Lookup.of(guessing, plain, [])  # type: ignore[arg-type]
    assert found == engine._Lookup(gain=(6 / 2) / (6 / 6), ids_per_step=8 / 6, differing=1)


def test_rounds_end_in_time(subject: Subject) -> None:
    """The first is the warm-up; those that there is no time for are left out, but one is told or it is an error."""
    now = [0.0]
    bench = engine._Bench(
        replace(subject, device=Device(torch.device("cpu"), lambda: now[0])), replace(PLAN, rounds=5), ""
    )

    def once(number: int) -> int:
        now[0] += 10
        if now[0] > 1000:
            raise TimeUp("there was not enough time for it")
        return number

    assert bench.rounds(once, 1000) == [1, 2, 3, 4, 5]
    assert bench.rounds(once, now[0] + 35) == [1, 2]
    now[0] = 960
    assert bench.rounds(once, 10_000) == [1, 2, 3]
    with pytest.raises(TimeUp):
        bench.rounds(once, 10_000)


def test_a_part_without_time_is_missing(subject: Subject) -> None:
    """One line, and no figure of half a stream."""
    events = list(measure_model(subject, replace(PLAN, parts=("steady",)), 1e-6))
    (missing,) = (event for event in events if not isinstance(event, str))
    assert missing == Missing("steady", "float32", "there was not enough time for it", failed=True)
