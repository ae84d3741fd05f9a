"""A judge's verdicts, asked of a stand-in endpoint on the loopback, and TouchStone's scores of them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qwenvl.errors import ConfigError
from qwenvl.evaluation.endpoint import NoVerdict, OpenAIJudge
from qwenvl.evaluation.items import DataError, Item
from qwenvl.evaluation.judge import TEMPLATES, Verdict, judge, prompt, read_scores, template_file, transcript
from qwenvl.evaluation.touchstone import Means, touchstone_scores

KEY, VARIABLE = "sk-very-secret-key", "A_JUDGES_KEY"
SHORT = "{annotation}|{question}|{answer_1}|{answer_2}"  # a template whose prompts tests can take apart


def item(name: str, group: str = "") -> Item:
    """One question, with its annotation and reference answer."""
    return Item(
        name, (), f"question {name}", {"annotation": "a red dog", "reference": f"reference {name}"}, group=group
    )


ITEMS = [item("1", "colour"), item("2", "colour, count"), item("3", "count")]
ASKED = [(one, f"ours {one.id}") for one in ITEMS]


class Plain:
    """A judge without an endpoint: says what `say` makes of each prompt, and remembers them."""

    def __init__(self, say: Callable[[str], str], model: str = "plain") -> None:
        self.say, self.model = say, model
        self.prompts: list[str] = []

    def __call__(self, messages: Sequence[dict[str, str]]) -> str:
        """The reply."""
        (message,) = messages
        self.prompts.append(message["content"])
        return self.say(message["content"])


def fair(asked: str) -> str:
    """Ours is worth 8, the reference 6, wherever they stand."""
    first = asked.split("|")[2]
    return "8 6\nbecause" if first.startswith("ours") else "6 8"


class Endpoint(ThreadingHTTPServer):
    """Answers POSTs with what `say` gives: a status and a text, which status 200 wraps as a completion."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.say: Callable[[], tuple[int, str]] = lambda: (200, "8 9")
        self.requests: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Endpoint

    def log_message(self, *_: object) -> None:
        """Nothing: tests are quiet."""

    def do_POST(self) -> None:
        """A completion, or an error."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((body, {name.lower(): value for name, value in self.headers.items()}))
        status, text = self.server.say()
        if status == 200:
            message = {"role": "assistant", "content": text}
            completion = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
            text = json.dumps({**completion, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
        with contextlib.suppress(OSError):  # of a client that has left
            self.send_response(abs(status))
            self.send_header("Content-Type", "application/json")
            self.send_header("retry-after-ms", "1")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A server in a thread, and the key for it."""
    monkeypatch.setenv(VARIABLE, KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join(10)


def asking(url: str, **more: Any) -> OpenAIJudge:
    """The judge behind an endpoint, impatient."""
    return OpenAIJudge(url, "judge-1", VARIABLE, **{"timeout": 5.0, "retries": 0, **more})


def verdicts(path: Path, judging: Any, asked: Any = ASKED, **more: Any) -> list[Verdict]:
    """Ask, with one thread and the short template."""
    return judge(asked, judging, path, **{"template": SHORT, "threads": 1, "quiet": True, **more})


def lines(path: Path) -> list[dict[str, Any]]:
    """What a transcript holds, without the time that it took."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(({**one, "seconds": 0} for one in found), key=lambda one: (one["id"], one["order"]))


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("8 9", (8, 9)),
        ("8 9\nbecause", (8, 9)),
        ("\n 8.5  9 \r\nbecause 1 2", (8.5, 9)),
        ("7, 10", (7, 10)),
        ("8 9\n第一个回答更好。", (8, 9)),
        ("８\u3000９\n因为", (8, 9)),
        ("8，9", (8, 9)),
    ],
)
def test_two_numbers_are_read(reply: str, scores: tuple[float, float]) -> None:
    """Protects what judges write, in both languages, reasons or not."""
    assert read_scores(reply) == scores


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ("", "empty reply"),
        (" \n ", "empty reply"),
        ("8/9", "no two numbers"),
        ("Answer 1 is better.\n8 9", "no two numbers"),
        ("8", "no two numbers"),
        ("8 9 7", "no two numbers"),
        ("nan 5", "no two numbers"),
        ("1e1 inf", "no two numbers"),
        ("0 5", "out of range"),
        ("5 10.5", "out of range"),
        ("-8 9", "out of range"),
    ],
)
def test_nonsense_is_no_score(reply: str, kind: str) -> None:
    """Protects the mean from what is not two numbers from 1 to 10: it is told as such, and never guessed at."""
    with pytest.raises(NoVerdict) as raised:
        read_scores(reply)
    assert raised.value.kind == kind


def test_texts_are_inserted_as_they_are() -> None:
    """Protects braces, placeholders' names and format signs in questions and answers from being read as a template."""
    one = Item("1", (), "{answer_1} {0!r}", {"annotation": "{question}%s", "reference": "{"})
    assert prompt(one, "{x}\\1", template=SHORT) == "{question}%s|{answer_1} {0!r}|{x}\\1|{"
    assert prompt(one, "{x}\\1", swapped=True, template=SHORT) == "{question}%s|{answer_1} {0!r}|{|{x}\\1"


@pytest.mark.parametrize("language", TEMPLATES)
def test_our_own_templates_hold_everything(language: str) -> None:
    """Protects the default wordings: each text once, the first answer before the second, nothing left of the braces."""
    text = prompt(ITEMS[0], "ours 1", template=TEMPLATES[language])
    for part in ("a red dog", "question 1", "ours 1", "reference 1"):
        assert text.count(part) == 1
    assert text.index("ours 1") < text.index("reference 1")
    assert "{" not in text


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (SHORT.replace("{annotation}", ""), "has no {annotation}"),
        (SHORT.replace("answer_2", "answer2"), "has no {answer_2}"),
        (SHORT + "{extra}", "{extra}"),
        (SHORT + "{}", "between braces"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(tmp_path: Path, template: str, said: str) -> None:
    """Protects a user's template from being asked a thousand times with a text missing; the error is one line."""
    path = tmp_path / "template.txt"
    path.write_text(template, encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        template_file(path)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_templates_come_from_files(tmp_path: Path) -> None:
    """Protects the reading of a template, byte-order mark or not, and one line for a file that is none."""
    path = tmp_path / "template.txt"
    path.write_bytes(b"\xef\xbb\xbf" + SHORT.encode())
    assert template_file(path) == SHORT
    path.write_bytes(b"\xff")
    for wrong in (path, tmp_path / "none.txt"):
        with pytest.raises(ConfigError, match=wrong.name):
            template_file(wrong)


def test_an_item_without_reference_is_refused() -> None:
    """Protects from asking about nothing."""
    with pytest.raises(DataError, match="item 9 has no reference"):
        prompt(Item("9", (), "q", {"annotation": "a"}), "ours")


def test_an_endpoint_is_asked_in_both_orders(endpoint: Endpoint, tmp_path: Path) -> None:
    """Protects what is sent: one message, temperature 0, the key in its header, each order once; and the verdict."""
    found = verdicts(tmp_path / "t.jsonl", asking(endpoint.url), ASKED[:1])
    bodies = [body for body, _ in endpoint.requests]
    assert sorted(body["messages"][0]["content"] for body in bodies) == [
        "a red dog|question 1|ours 1|reference 1",
        "a red dog|question 1|reference 1|ours 1",
    ]
    assert {(body["model"], body["temperature"], len(body["messages"])) for body in bodies} == {("judge-1", 0, 1)}
    assert {headers["authorization"] for _, headers in endpoint.requests} == {f"Bearer {KEY}"}
    assert {(one.order, one.reply, one.scores) for one in found} == {
        ("answer first", "8 9", (8, 9)),
        ("reference first", "8 9", (9, 8)),
    }


def test_a_judge_that_prefers_the_first_place_is_even(tmp_path: Path) -> None:
    """Protects the un-swapping: favour for the first place gives both answers the same score; fairness does not."""
    scores = touchstone_scores(ITEMS, verdicts(tmp_path / "1", Plain(lambda _: "9 5")))
    assert scores.overall == Means(700, 700, 6)
    scores = touchstone_scores(ITEMS, verdicts(tmp_path / "2", Plain(fair)))
    assert scores.overall == Means(800, 600, 6)
    assert scores.groups == {"colour": Means(800, 600, 4), "count": Means(800, 600, 4)}
    assert not scores.unread
    assert not scores.half


def test_busy_then_ready(endpoint: Endpoint, tmp_path: Path) -> None:
    """Protects a run from an endpoint that asks to wait: the same request is made again."""
    answers = iter([(429, "{}"), (200, "8 9"), (503, "{}"), (200, "8 9")])
    endpoint.say = lambda: next(answers)
    found = verdicts(tmp_path / "t", asking(endpoint.url, retries=1), ASKED[:1])
    assert [one.scores for one in found] == [(8, 9), (9, 8)]


@pytest.mark.parametrize(
    ("say", "kind", "what"),
    [
        (lambda: (500, f'{{"error": {{"message": "{KEY}"}}}}'), "HTTP error", "500 Internal Server Error"),
        (lambda: (401, "{}"), "HTTP error", "401 Unauthorized"),
        (lambda: (-200, "{}"), "no completion", ""),
        (lambda: (-200, "not JSON"), "no completion", ""),
        (lambda: (-200, '{"choices": [{"message": {"content": "no", "refusal": "I may not"}}]}'), "refusal", "I may"),
        (lambda: (200, ""), "empty reply", ""),
        (lambda: (200, "nonsense"), "no two numbers", "nonsense"),
        (lambda: (200, "11 9"), "out of range", "11 9"),
    ],
    ids=["500", "401", "no-choices", "no-json", "refusal", "empty", "nonsense", "range"],
)
def test_failures_are_told_and_asked_again(
    endpoint: Endpoint, tmp_path: Path, say: Callable[[], tuple[int, str]], kind: str, what: str
) -> None:
    """Protects the mean from failures, which have their kind in the transcript, and heal on the next run."""
    path = tmp_path / "t.jsonl"
    endpoint.say = say
    found = verdicts(path, asking(endpoint.url, retries=1), ASKED[:1])
    assert {(one.scores, one.wrong) for one in found} == {(None, kind)}
    assert all(what in one.what for one in found)
    scores = touchstone_scores(ITEMS[:1], found)
    assert scores.overall == Means(None, None, 0)
    assert scores.unread == {kind: ("1", "1")}
    endpoint.say = lambda: (200, "8 9")
    found = verdicts(path, asking(endpoint.url), ASKED[:1])
    assert touchstone_scores(ITEMS[:1], found).overall == Means(850, 850, 2)
    assert len(lines(path)) == 4
    assert KEY not in path.read_text(encoding="utf-8")


def test_an_endpoint_that_says_nothing(endpoint: Endpoint, tmp_path: Path) -> None:
    """Protects a run from hanging."""

    def wait() -> tuple[int, str]:
        endpoint.over.wait(5)
        return 200, "8 9"

    endpoint.say = wait
    found = verdicts(tmp_path / "t", asking(endpoint.url, timeout=0.2), ASKED[:1], threads=2)
    assert {one.wrong for one in found} == {"time-out"}


def test_an_endpoint_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Protects from a traceback where no one listens."""
    monkeypatch.setenv(VARIABLE, KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        found = verdicts(tmp_path / "t", asking(f"http://127.0.0.1:{bound.getsockname()[1]}/v1"), ASKED[:1])
    assert {one.wrong for one in found} == {"no connection"}


def test_no_secret_is_written(endpoint: Endpoint, tmp_path: Path) -> None:
    """Protects the key and a URL's password from an endpoint that says them back, and from what judges look like."""
    password = "pass-word-of-mine"
    endpoint.say = lambda: (200, f"8 9\n{KEY} {password}")
    asked = asking(endpoint.url.replace("//", f"//somebody:{password}@"))
    assert verdicts(tmp_path / "t", asked)[0].reply == "8 9\n*** ***"
    text = (tmp_path / "t").read_text(encoding="utf-8") + repr(asked) + str(asked)
    for secret in (KEY, password, "somebody", "127.0.0.1", "Bearer"):
        assert secret not in text


@pytest.mark.parametrize(
    ("url", "key", "value", "said"),
    [
        ("http://h/v1", "A_VARIABLE_THAT_IS_NOT_SET", None, "A_VARIABLE_THAT_IS_NOT_SET should hold"),
        ("http://h/v1", VARIABLE, " \n", "should hold"),
        ("http://h/v1", KEY, KEY, "name of an environment variable"),
        ("ftp://me:hidden-word@h/v1", VARIABLE, KEY, "https://host/v1"),
        ("http://me:hidden-word@h:x/v1", VARIABLE, KEY, "https://host/v1"),
        ("h/v1", VARIABLE, KEY, "https://host/v1"),
    ],
)
def test_what_makes_no_judge_is_one_line(
    monkeypatch: pytest.MonkeyPatch, url: str, key: str, value: str | None, said: str
) -> None:
    """Protects a user who forgot the key or mistook the URL, or gave the key for its name, which is not printed."""
    if value is not None:
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError) as raised:
        OpenAIJudge(url, "m", key)
    assert said in str(raised.value)
    for secret in (KEY, "hidden-word", "\n"):
        assert secret not in str(raised.value)


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects who has no openai package: one line says what to install."""
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"pip install 'qwenvl\[eval\]'"):
        OpenAIJudge("http://h/v1", "m")


def test_what_is_settled_is_not_asked_again(tmp_path: Path) -> None:
    """Protects money; and a score from verdicts on another answer, template or judge."""
    path = tmp_path / "t"
    verdicts(path, Plain(fair))
    again = Plain(fair)
    verdicts(path, again)
    assert again.prompts == []
    verdicts(path, again, [(ITEMS[0], "ours, another"), *ASKED[1:]])
    assert len(again.prompts) == 2
    other = Plain(fair, "another judge")
    verdicts(path, other)
    assert len(other.prompts) == 6
    assert {one.model for one in transcript(path)} == {"another judge"}


KILLED = """
import os, sys
sys.path[:0] = {paths!r}
import test_judge as t
left = [3]
def say(asked):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), 9)
    return t.fair(asked)
t.verdicts(t.Path({path!r}), t.Plain(say))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """Protects verdicts from a kill: a resumed run's transcript and scores are those of one that was let be."""
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    expected = touchstone_scores(ITEMS, verdicts(whole, Plain(fair)))
    code = KILLED.format(paths=[str(Path(__file__).parent), *sys.path], path=str(killed))
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == -9
    kept = len(killed.read_bytes().splitlines())
    assert 1 <= kept <= 3
    with open(killed, "ab") as file:
        file.write(whole.read_bytes().splitlines()[-1][:-20])  # half a line, as a kill may leave
    assert len(transcript(killed)) == kept
    going_on = Plain(fair)
    assert touchstone_scores(ITEMS, verdicts(killed, going_on, threads=4)) == expected
    assert len(going_on.prompts) == 6 - kept
    assert lines(killed) == lines(whole)


def test_a_judge_that_breaks_ends_the_run(tmp_path: Path) -> None:
    """Protects from errors that nobody sees: a bug in a judge is raised, and what came before it is kept."""
    replies = iter(["8 9"])
    with pytest.raises(StopIteration):
        verdicts(tmp_path / "t", Plain(lambda _: next(replies)))
    assert len(transcript(tmp_path / "t")) == 1


@pytest.mark.parametrize(("error", "kind"), [(TimeoutError(), "time-out"), (ConnectionResetError(), "no connection")])
def test_a_judge_of_ones_own_may_be_out_of_reach(tmp_path: Path, error: OSError, kind: str) -> None:
    """Protects simple judges, which raise what Python does."""

    def say(_: str) -> str:
        raise error

    assert {one.wrong for one in verdicts(tmp_path / "t", Plain(say))} == {kind}


def test_any_reply_survives_the_transcript(tmp_path: Path) -> None:
    """Protects replies to the letter: line ends of every kind, Chinese, and half of a surrogate pair."""
    reply = "8 9\r\n因为\u2028\x85 \ud83d 🐶 \\ud83d"
    for one in verdicts(tmp_path / "t", Plain(lambda _: reply)):
        assert one.reply == reply
    assert "因为" in (tmp_path / "t").read_text(encoding="utf-8")


def test_the_last_of_several_verdicts_counts(tmp_path: Path) -> None:
    """Protects the score from verdicts that a later run replaced, be it with a failure."""
    path = tmp_path / "t"
    first = verdicts(path, Plain(fair), ASKED[:1])
    path.write_bytes(path.read_bytes() * 2)
    assert transcript(path) == first
    later = [Verdict("1", "answer first", "m", "p", "hm", None, "no two numbers", "hm", 0.1)]
    scores = touchstone_scores(ITEMS[:1], [*first, *later])
    assert scores.overall == Means(800, 600, 1)
    assert scores.unread == {"no two numbers": ("1",)}
    assert scores.half == ("1",)


def test_unread_rounds_are_left_out_and_listed(tmp_path: Path) -> None:
    """Protects the reference's mean, over rounds that could be read: an item with one of them counts once."""
    says = {"a red dog|question 1|ours 1|reference 1": "10 1", "a red dog|question 2|reference 2|ours 2": "?"}
    found = verdicts(tmp_path / "t", Plain(lambda asked: says.get(asked, "4 4")), ASKED[:2])
    scores = touchstone_scores(ITEMS, found)
    assert scores.overall == Means(600, 300, 3)
    assert scores.groups == {"colour": Means(600, 300, 3), "count": Means(400, 400, 1)}
    assert scores.unread == {"no two numbers": ("2",), "not asked": ("3", "3")}
    assert scores.half == ("2",)


@pytest.mark.parametrize(
    "line",
    [
        "not JSON",
        "[]",
        '{"id": "1"}',
        '{"id":"1","order":"?","model":"","prompt":"","reply":"","scores":[1,2],"wrong":null,"what":"","seconds":0}',
        '{"id":"1","order":"answer first","model":"","prompt":"","reply":"","scores":[1,NaN],"wrong":null,"what":"",'
        '"seconds":0}',
        '{"id":"1","order":"answer first","model":"","prompt":"","reply":"","scores":null,"wrong":null,"what":"",'
        '"seconds":0}',
    ],
)
def test_a_file_that_is_no_transcript_is_refused(tmp_path: Path, line: str) -> None:
    """Protects another file from being written to, and the score from lines that are no verdicts."""
    path = tmp_path / "t.jsonl"
    path.write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"t.jsonl:1 is no judge's verdict"):
        verdicts(path, Plain(fair))
    assert path.read_text(encoding="utf-8") == f"{line}\n"


def test_threads_and_places_are_checked(tmp_path: Path) -> None:
    """Protects a user's mistakes from tracebacks: no threads, and a transcript that cannot be written."""
    with pytest.raises(ConfigError, match="threads"):
        verdicts(tmp_path / "t", Plain(fair), threads=0)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        verdicts(tmp_path / "file" / "t", Plain(fair))
