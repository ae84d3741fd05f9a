"""What is measured on an engine: a stream of requests, all at once and arriving, and what it keeps for them.

engine_parts   the parts, for one model

Each part has an engine of its own, with rows for 32 requests on a GPU and 8 elsewhere. Its first round is the warm-up:
requests of the same lengths, of which every CUDA graph is captured. No round has ids or pictures of another.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from ..adapt.capture import GRAPHS
from ..generation.engine import Engine
from .driving import Answer, Driver, TimeUp, decoding_rate, gaps, percentiles, rate
from .figures import Event, Figure
from .plan import Plan
from .roofline import kv_bytes, stepping
from .subject import Part, Subject
from .workload import Ask, Workload, arrivals

ROWS = {"cuda": 32}  # requests at once
CPU_ROWS = ALONE = 8  # elsewhere; and of the requests that are answered one at a time, too
BEFORE = 32  # steps that are looked at before a long prompt arrives
SHARE = 0.7  # of what was answered all at once that arrives in the same time
CACHE_SHARE = 0.6  # of the free memory that a cache may take where rows are as long as fits
GUESSES = 4  # of a lookup
FEW_IDS, ANY_OF_THEM = 64, 100.0  # ids, and a temperature, with which guesses are made and are wrong
T = TypeVar("T")


def engine_parts(subject: Subject, plan: Plan) -> Iterator[Part]:
    """What the plan has of OF_AN_ENGINE, the longest last."""
    for part, weight, measurement in (
        ("second-round", 1, _second_round),
        ("steady", 2, _steady),
        ("long-prompt", 2, _long_prompt),
        ("lookup", 4, _lookup),
        ("throughput", 6, _throughput),
        ("arrivals", 4, _arrivals),
    ):
        if part in plan.parts:
            yield part, part.replace("-", " "), weight, partial(measurement, _Bench(subject, plan, part))


@dataclass(frozen=True)
class _Bench:
    """What the parts have in common."""

    subject: Subject
    plan: Plan
    part: str

    @property
    def rows(self) -> int:
        """Of an engine."""
        return ROWS.get(self.subject.device.torch.type, CPU_ROWS)

    def workload(self, number: int) -> Workload:
        """Of one round."""
        return Workload(self.subject.config, number)

    def mixed(self, number: int, count: int = 0) -> list[Ask]:
        """The requests of one round."""
        return self.workload(number).mixed(count or self.rows, self.plan.context, self.plan.answer)

    @property
    def slots(self) -> int:
        """For any of these in a row: half as long again as the mean, and with two pictures where the mean has fewer."""
        return int(1.5 * (self.plan.context + self.plan.answer / 2)) + 2 * self.subject.span

    def texts(self, number: int, tokens: int, new: int) -> list[Ask]:
        """As many texts of one length as there are rows."""
        workload = self.workload(number)
        return [workload.ask(tokens, new) for _ in range(self.rows)]

    def driver(self, end: float, slots: int, rows: int = 0, *, n_vocab: int = 0, lookup: int = 0) -> Driver:
        """Of an engine with rows of so many slots, as far as the model has positions."""
        ordinary = self.subject.config.visual.image_start_id  # no tag of a picture: answers become parts of prompts
        model, rows = self.subject.model, rows or self.rows
        engine = Engine(model, rows=rows, max_length=slots, n_vocab=n_vocab or ordinary, lookup=lookup)
        return Driver(engine, self.subject.device.clock, end)

    def rounds(self, once: Callable[[int], T], end: float) -> list[T]:
        """What the rounds after the first return: as many as the plan has and there is time for, one at least.

        Raises TimeUp without one.
        """
        clock, found = self.subject.device.clock, list[T]()
        for number in range(self.plan.rounds + 1):
            begin = clock()
            try:
                found.append(once(number))
            except TimeUp:
                if number < 2:
                    raise
                break
            if number and 2 * clock() - begin > end:
                break
        return found[1:]

    def figure(self, name: str, values: Sequence[float], unit: str, note: str = "", **details: float) -> Figure:
        """The median of the rounds, and how far they are apart."""
        if len(values) > 1:
            details |= {"rounds": len(values), "least": min(values), "most": max(values)}
        on_gpu = self.subject.device.torch.type == "cuda"
        eager = "steps were not captured as CUDA graphs" if on_gpu and GRAPHS.failed else ""
        return Figure(
            self.part,
            self.subject.name,
            name,
            round(statistics.median(values), 3),
            unit,
            note="; ".join(filter(None, (note, eager))),
            details={key: round(value, 3) for key, value in details.items()},
        )


def _throughput(bench: _Bench, seconds: float) -> Iterator[Event]:
    """All requests at once, and the first of them one at a time: through engines that differ in their rows alone."""
    end, rows, asks = bench.subject.device.clock() + seconds, bench.rows, bench.mixed(0)
    many, one = bench.driver(end, bench.slots), bench.driver(end, bench.slots, rows=1)

    def once(number: int) -> tuple[list[Answer], list[Answer]]:
        asks = bench.mixed(number)
        if number % 2:
            return many.together(asks), one.in_turn(asks[:ALONE])
        alone = one.in_turn(asks[:ALONE])
        return many.together(asks), alone

    found = bench.rounds(once, end)
    context, new = statistics.mean(ask.context for ask in asks), sum(ask.new for ask in asks)
    pictures = sum(len(ask.pictures) for ask in asks)
    middle, high = (1e3 * x for x in percentiles([answer.first for answers, _ in found for answer in answers]))
    note = f"a mean context of {context:.0f}, {new} new ids, {pictures} pictures; first tokens after {middle:.0f} ms"
    about = {"context": context, "new_ids": new, "pictures": pictures}
    about |= {"first_token_p50_ms": middle, "first_token_p95_ms": high}
    yield bench.figure(f"{rows} at once", [rate(answers) for answers, _ in found], "tok/s", note, **about)
    note = f"{ALONE} of them" if rows > ALONE else ""
    yield bench.figure("one at a time", [rate(alone) for _, alone in found], "tok/s", note)
    gains = [rate(answers) / rate(alone) for answers, alone in found]
    yield bench.figure(f"{rows} at once to one at a time", gains, "x", _between(gains))
    decoding = [decoding_rate(answers) * statistics.mean(gaps(alone)) for answers, alone in found]
    if all(decoding):
        yield bench.figure("the same, behind the prompts", decoding, "x", _between(decoding))


def _steady(bench: _Bench, seconds: float) -> Iterator[Event]:
    """All rows decode, none of them begins or ends, beside the least time in which weights and caches are read; one."""
    subject, plan, rows = bench.subject, bench.plan, bench.rows
    end = subject.device.clock() + seconds
    many, one = bench.driver(end, 3 * plan.context), bench.driver(end, 3 * plan.context, rows=1)

    def once(number: int) -> tuple[tuple[float, float], tuple[float, float]]:
        asks = bench.texts(number, plan.context - plan.answer // 2, 2 * plan.context)
        if number % 2:
            return _steps(many, asks, plan.answer), _steps(one, asks[:1], plan.answer)
        alone = _steps(one, asks[:1], plan.answer)
        return _steps(many, asks, plan.answer), alone

    found = bench.rounds(once, end)
    context = statistics.mean(context for (_, context), _ in found)
    note = f"a mean context of {context:.0f}"
    for count, rates in ((rows, [all_ for (all_, _), _ in found]), (1, [alone for _, (alone, _) in found])):
        work = stepping(subject.config, subject.width, count, context)
        name = f"{count} rows decoding" if count > 1 else "1 row decoding"
        figure = bench.figure(name, rates, "tok/s", note, context=context, bytes_per_step=work.bytes)
        yield subject.limits.hold(figure, work, rows=count)
    gains = [all_ / alone for (all_, _), (alone, _) in found]
    yield bench.figure(f"{rows} rows decoding to one", gains, "x", _between(gains))


def _steps(driver: Driver, asks: Sequence[Ask], steps: int) -> tuple[float, float]:
    """Ids in a second over so many steps of requests that all decode, and the tokens that each row holds on average."""
    answers = [driver.ask(ask) for ask in asks]
    driver.settle(answers)
    before, begin = len(driver.loads), driver.clock()
    ids = sum(len(answer.times) for answer in answers)
    for _ in range(steps):
        driver.step()
    taken, loads = driver.clock() - begin, driver.loads[before:]
    ids = sum(len(answer.times) for answer in answers) - ids
    driver.cancel()
    return ids / taken, statistics.mean(load.tokens for load in loads) / len(asks)


def _arrivals(bench: _Bench, seconds: float) -> Iterator[Event]:
    """Requests that arrive at random, SHARE as many in a second as were answered when all had come at once."""
    plan, clock = bench.plan, bench.subject.device.clock
    end = clock() + seconds
    driver = bench.driver(end, bench.slots)
    for number in range(2):  # the first is a warm-up
        begin = clock()
        driver.together(bench.mixed(number))
    often = SHARE * bench.rows / (clock() - begin)
    count = max(min(plan.arrivals, int(SHARE * (end - clock()) / 2 * often)), bench.rows)
    times = list(arrivals(often, count, seed=0))
    for number in (2, 3):
        driver.loads.clear()
        answers = driver.arriving(bench.mixed(number, count), times)
    note = f"{count} requests, {often:.3g} in a second"
    yield bench.figure("arriving", [rate(answers)], "tok/s", note, requests_per_second=often, requests=count)
    for name, values in (("first token", [answer.first for answer in answers]), ("time per token", gaps(answers))):
        middle, high = percentiles(values)
        yield bench.figure(f"arriving, {name}, p50", [1e3 * middle], "ms")
        yield bench.figure(f"arriving, {name}, p95", [1e3 * high], "ms")
    used = [100 * load.tokens / load.slots for load in driver.loads]
    waiting = [load.waiting for load in driver.loads]
    active = statistics.mean(load.active for load in driver.loads)
    note = f"at most {max(used):.0f}%; {active:.1f} requests had a row, up to {max(waiting)} waited"
    yield bench.figure(
        "arriving, cache in use",
        [statistics.mean(used)],
        "%",
        note,
        peak=max(used),
        active=active,
        waiting=max(waiting),
    )


def _long_prompt(bench: _Bench, seconds: float) -> Iterator[Event]:
    """One prompt, as long as fits, with two pictures, arrives while all other rows decode."""
    subject, plan, rows = bench.subject, bench.plan, bench.rows
    end, config = subject.device.clock() + seconds, subject.config
    fitting = int(CACHE_SHARE * subject.device.free()) // (rows * kv_bytes(config, subject.width))
    slots = min(plan.long_prompt, config.max_position_embeddings, fitting or plan.long_prompt)
    driver = bench.driver(end, slots)

    def once(number: int) -> tuple[float, float, float]:
        workload = bench.workload(number)
        answers = [driver.ask(workload.ask(plan.context // 4, slots)) for _ in range(rows - 1)]
        driver.settle(answers)
        begin = driver.clock()
        for _ in range(BEFORE):
            driver.step()
        text = slots - 1 - 2 * subject.span
        arrived = driver.ask(workload.ask(text, 1, [workload.picture(), workload.picture()]))
        before = gaps(answers, begin)
        driver.settle([arrived])
        during = gaps(answers, arrived.due)
        driver.cancel()
        return statistics.median(before), max(before), max(during)

    found = bench.rounds(once, end)
    note = f"{slots - 1} tokens, 2 of its pictures among them; {rows - 1} others decode"
    yield bench.figure("longest gap before a long prompt", [1e3 * longest for _, longest, _ in found], "ms")
    yield bench.figure("longest gap while it is computed", [1e3 * longest for *_, longest in found], "ms", note)
    added = [1e3 * (longest - usual) for usual, _, longest in found]
    yield bench.figure("delay by a long prompt", added, "ms", "beyond the usual gap")


def _second_round(bench: _Bench, seconds: float) -> Iterator[Event]:
    """A chat with a picture goes on; beside it, a prompt of the same length with nothing that was seen before."""
    plan, clock = bench.plan, bench.subject.device.clock
    end = clock() + seconds
    question, answer = plan.context // 16, plan.answer // 2
    driver = bench.driver(end, bench.subject.span + 2 * (question + answer) + 1)

    def first(ask: Ask) -> float:
        answers = [driver.ask(ask)]
        driver.until(answers)
        driver.cancel()
        return answers[0].first

    def once(number: int) -> tuple[float, float]:
        workload = bench.workload(number)
        begun = workload.ask(question, answer, [workload.picture()])
        (said,) = driver.together([begun])
        goes_on = Ask([*begun.ids, *said.request.ids, *workload.text(question)], begun.pictures, answer)
        unseen = workload.ask(len(goes_on.ids) - bench.subject.span, answer, [workload.picture()])
        if number % 2:
            return first(goes_on), first(unseen)
        anew = first(unseen)
        return first(goes_on), anew

    found = bench.rounds(once, end)
    tokens = bench.subject.span + 2 * question + answer
    yield bench.figure("second round, first token", [1e3 * reused for reused, _ in found], "ms", f"of {tokens} tokens")
    yield bench.figure("the same, nothing reused", [1e3 * anew for _, anew in found], "ms")
    gains = [anew / reused for reused, anew in found]
    yield bench.figure("second round, how much sooner", gains, "x", _between(gains))


def _lookup(bench: _Bench, seconds: float) -> Iterator[Event]:
    """Answers that repeat what the model said, and answers without a pattern, with guesses and without."""
    plan, begin = bench.plan, bench.subject.device.clock()
    slots = plan.context // 2 + 2 * plan.answer

    def on_and_off(end: float, n_vocab: int = 0) -> tuple[Driver, Driver]:
        make = partial(bench.driver, end, slots, n_vocab=n_vocab)
        return make(lookup=GUESSES), make()

    def repeating(guessing: Driver, plain: Driver, number: int) -> _Lookup:
        asks = bench.texts(number, plan.context // 2, plan.answer)
        said = plain.together(asks)  # greedy answers of some length go round in circles, and so does what follows
        longer = [Ask([*ask.ids, *answer.request.ids], (), ask.new) for ask, answer in zip(asks, said, strict=True)]
        return _Lookup.of(guessing, plain, longer)

    def patternless(guessing: Driver, plain: Driver, number: int) -> _Lookup:
        asks = [
            Ask([id_ % FEW_IDS for id_ in ask.ids], (), ask.new)
            for ask in bench.texts(number, plan.context // 2, plan.answer)
        ]
        return _Lookup.of(guessing, plain, asks, do_sample=True, temperature=ANY_OF_THEM, top_p=1.0, top_k=0)

    for name, once, n_vocab, share in (
        ("answers that repeat", repeating, 0, 0.5),
        ("random answers", patternless, FEW_IDS, 1.0),
    ):
        end = begin + share * seconds
        found = bench.rounds(partial(once, *on_and_off(end, n_vocab)), end)
        gains, steps = [one.gain for one in found], statistics.median(one.ids_per_step for one in found)
        note = f"{steps:.2f} ids a step; {_between(gains)}"
        if once is repeating:
            differing = sum(one.differing for one in found)
            note += f"; of {bench.rows * len(found)} answers {differing or 'none'} differ"
        yield bench.figure(f"lookup of {GUESSES}, {name}", gains, "x", note, ids_per_step=steps)


@dataclass(frozen=True)
class _Lookup:
    """How much faster ids come with guesses, how many of them in a step, and how many answers are not the same."""

    gain: float
    ids_per_step: float
    differing: int

    @classmethod
    def of(cls, guessing: Driver, plain: Driver, asks: Sequence[Ask], **options: float) -> _Lookup:
        """One after the other."""
        new, old = guessing.together(asks, seed=0, **options), plain.together(asks, seed=0, **options)
        ids, steps = (sum(len(kind(answer.times)) for answer in new) for kind in (list, set))
        differing = sum(a.request.ids != b.request.ids for a, b in zip(new, old, strict=True))
        return cls(decoding_rate(new) / decoding_rate(old), ids / steps, differing)


def _between(gains: Sequence[float]) -> str:
    return f"{min(gains):.2f} to {max(gains):.2f} in {len(gains)} rounds" if len(gains) > 1 else ""
