"""A judge, which is another model, compares answers with reference answers.

TEMPLATES       how it is asked, by language; `template_file` reads another, `checked_template` checks one
prompt          what it is asked about an item
read_scores     what it says, as two numbers
Verdict         what came of one round; `transcript` reads those of a file
judge           ask about many items, in both orders, and write down each verdict

A judge favours what it reads first, so each item has two rounds: our answer stands first in one, second in the other.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from threading import Lock
from typing import Literal, get_args

from tqdm import tqdm

from ..errors import ConfigError
from ..text.parts import shown
from .endpoint import Judge, NoVerdict
from .items import DataError, Item

Order = Literal["answer first", "reference first"]
ORDERS: tuple[Order, ...] = get_args(Order)
LOWEST, HIGHEST = 1, 10

NAMES = ("annotation", "question", "answer_1", "answer_2")
PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
TEMPLATES = {
    "en": """\
Two assistants were asked the same question about a picture. You cannot see it, but a person wrote down what it shows.

The picture, in that person's words:
{annotation}

The question:
{question}

Answer 1:
{answer_1}

Answer 2:
{answer_2}

How good is each answer, from 1 (worthless) to 10 (nothing could be better)? A good answer does what was asked, \
agrees with the picture, misses nothing that matters and is easy to follow; whatever it makes up counts against it. \
Neither its length nor its place before or after the other should matter to you.

On the first line write two numbers and nothing else: the one for answer 1, a space, the one for answer 2. \
Say why on the lines below.""",
    "zh": """\
两位助手就同一张图片回答了同一个问题。你看不到图片，但有人写下了图中的内容。

此人对图片的说明：
{annotation}

问题：
{question}

回答一：
{answer_1}

回答二：
{answer_2}

每个回答有多好？1 分表示毫无价值，10 分表示好得不能再好。\
好的回答做到了问题的要求，与图片相符，没有漏掉要紧的内容，而且容易看懂；\
凭空编造的内容要扣分。不要在意回答的长短，也不要在意哪一个排在前面。

第一行只写两个数字：先写回答一的分数，空一格，再写回答二的分数。从第二行起说明理由。""",
}


def checked_template(template: str, where: str = "the template") -> str:
    """The template, if it has each placeholder and no other. Raises ConfigError."""
    found = PLACEHOLDER.findall(template)
    wanted = ", ".join(f"{{{name}}}" for name in NAMES)
    for name in NAMES:
        if name not in found:
            raise ConfigError(f"{where} has no {{{name}}}: it should have {wanted}")
    for name in found:
        if name not in NAMES:
            raise ConfigError(f"{where} has {shown('{' + name + '}')}: between braces there may be only {wanted}")
    return template


def template_file(path: str | Path) -> str:
    """A template from a file in UTF-8. Raises ConfigError."""
    try:
        return checked_template(Path(path).read_text(encoding="utf-8-sig"), str(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text in UTF-8") from None


def prompt(item: Item, answer: str, swapped: bool = False, template: str = TEMPLATES["en"]) -> str:
    """What the judge is asked; `swapped`, the reference answer stands first. Raises DataError.

    The item's `truth` holds an "annotation" of its picture and a "reference" answer.
    """
    truth = item.truth if isinstance(item.truth, Mapping) else {}
    for key in ("annotation", "reference"):
        if not isinstance(truth.get(key), str):
            raise DataError(f"item {item.id} has no {key} to judge by")
    first, second = (truth["reference"], answer) if swapped else (answer, truth["reference"])
    texts = dict(zip(NAMES, (truth["annotation"], item.text, first, second), strict=True))
    return PLACEHOLDER.sub(lambda found: texts[found[1]], template)  # at one go: braces in texts are texts


def read_scores(reply: str) -> tuple[float, float]:
    """The two numbers from 1 to 10 of the first line, with a space or a comma between them. Raises NoVerdict.

    Nothing is guessed: "8/9" may be eight of nine points.
    """
    if not reply.strip():
        raise NoVerdict("empty reply")
    line = reply.strip().splitlines()[0]
    numbers = re.fullmatch(r"([-+]?\d+(?:\.\d+)?)(?:\s+|\s*[,，]\s*)([-+]?\d+(?:\.\d+)?)", line.strip())
    if not numbers:
        raise NoVerdict("no two numbers", shown(line))
    first, second = float(numbers[1]), float(numbers[2])
    if not (LOWEST <= first <= HIGHEST and LOWEST <= second <= HIGHEST):
        raise NoVerdict("out of range", shown(line))
    return first, second


@dataclass(frozen=True)
class Verdict:
    """What came of one round.

    Attributes:
        id: the item's.
        order: which answer the judge read first.
        model: the judge's name.
        prompt: what it was asked.
        reply: what it said, to the letter; None, if nothing came.
        scores: of our answer and of the reference answer, in this order whatever `order` is; None, if they are unread.
        wrong: the kind of failure, if they are.
        what: more about that.
        seconds: that the judge took, with retries.
    """

    id: str
    order: Order
    model: str
    prompt: str
    reply: str | None
    scores: tuple[float, float] | None
    wrong: str | None
    what: str
    seconds: float

    @property
    def round(self) -> tuple[str, str]:
        """Which round of which item."""
        return self.id, self.order


def transcript(path: str | Path) -> list[Verdict]:
    """The latest verdict of each round in a file; a last line that was cut off does not count. Raises DataError."""
    found: dict[tuple[str, str], Verdict] = {}
    path = Path(path)
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        verdict = _verdict(line)
        if verdict is None:
            raise DataError(f"{path}:{number} is no judge's verdict; remove that line, and the judge is asked again")
        found.pop(verdict.round, None)
        found[verdict.round] = verdict
    return list(found.values())


def judge(
    items_and_answers: Iterable[tuple[Item, str]],
    judge: Judge,
    path: str | Path,
    *,
    template: str = TEMPLATES["en"],
    threads: int = 8,
    quiet: bool = False,
) -> list[Verdict]:
    """Ask about each item in both orders, and give the verdicts that the transcript `path` has then.

    Each is written when it comes. What the transcript has already is not asked again if its scores could be read, and
    if the judge would be asked the same: another answer, template or model makes another question. Failures are
    written too, and asked again the next time. Raises DataError, ConfigError.
    """
    if threads < 1:
        raise ConfigError(f"threads should be at least 1, not {threads}")
    checked_template(template)
    path = Path(path)
    rounds: list[tuple[str, Order, str]] = [
        (item.id, order, prompt(item, answer, order == "reference first", template))
        for item, answer in items_and_answers
        for order in ORDERS
    ]
    known = transcript(path) if path.exists() else []
    settled = {(one.id, one.order, one.prompt) for one in known if one.scores and one.model == judge.model}
    waiting = [one for one in rounds if one not in settled]
    bar = tqdm(
        total=len(rounds), initial=len(rounds) - len(waiting), desc="judging", unit="round", disable=quiet or None
    )
    try:
        _mend(path)
        with open(path, "ab") as file, bar:
            lock = Lock()

            def settle(name: str, order: Order, asked: str) -> None:
                line = json.dumps(asdict(_ask(judge, name, order, asked)), ensure_ascii=False)
                with lock:
                    # Half a surrogate pair, which UTF-8 has no bytes for, becomes JSON's own "\ud83d".
                    file.write(line.encode("utf-8", "backslashreplace") + b"\n")
                    file.flush()

            pool = ThreadPoolExecutor(threads)
            try:
                for done in as_completed([pool.submit(settle, *one) for one in waiting]):
                    done.result()
                    bar.update()
            finally:
                pool.shutdown(cancel_futures=True)  # those that are under way are waited for, and written
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from None
    return transcript(path)


def _ask(judge: Judge, name: str, order: Order, asked: str) -> Verdict:
    """One round."""
    start = time.monotonic()
    reply = scores = wrong = None
    what = ""
    try:
        reply = judge([{"role": "user", "content": asked}])
        first, second = read_scores(reply)
        scores = (first, second) if order == "answer first" else (second, first)
    except NoVerdict as error:
        wrong, what = error.kind, error.what
    except TimeoutError:
        wrong = "time-out"
    except OSError:
        wrong = "no connection"
    seconds = round(time.monotonic() - start, 3)
    return Verdict(name, order, judge.model, asked, reply, scores, wrong, what, seconds)


def _verdict(line: bytes) -> Verdict | None:
    """A line of a transcript; None, if it is something else."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    names = {field.name for field in fields(Verdict)}
    if not isinstance(entry, dict) or not names <= entry.keys():
        return None
    scores = entry["scores"]
    if scores is not None:
        if not isinstance(scores, list) or len(scores) != 2 or not all(map(_is_score, scores)):
            return None
        scores = float(scores[0]), float(scores[1])
    texts = [entry[name] for name in ("id", "order", "model", "prompt", "what")]
    known = all(isinstance(text, str) for text in texts) and entry["order"] in ORDERS
    if not known or (scores is None) != isinstance(entry["wrong"], str):
        return None
    return Verdict(**{**{name: entry[name] for name in names}, "scores": scores})


def _is_score(number: object) -> bool:
    return (
        isinstance(number, (int, float))
        and not isinstance(number, bool)
        and math.isfinite(number)
        and LOWEST <= number <= HIGHEST
    )


def _mend(path: Path) -> None:
    """Cut off what a run that was killed left of a line, so that the next one begins a line. Raises OSError."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return
    with open(path, "r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
