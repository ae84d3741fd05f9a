"""The ReAct form: written as the checkpoints were trained, read whatever the model wrote, streamed as it is read."""

import re
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import one_line_error

from qwenvl.errors import PromptError
from qwenvl.serving.react import (
    STOP,
    ReactStream,
    Reply,
    Tool,
    answer_text,
    call_text,
    parse_reply,
    question_head,
    reply_prefix,
    tools_of,
)

TOOLS = [Tool("search", "Finds pages."), Tool("画图", "画一张图", {"type": "object", "必填": ["提示"]})]


def function(name: str, **more: Any) -> dict[str, Any]:
    """A tool as a request gives it."""
    return {"type": "function", "function": {"name": name, **more}}


# Tools


def test_tools_are_written_as_the_checkpoint_was_trained() -> None:
    """Wording and white space of the instruction, to the character; Chinese stays Chinese, no parameters are `{}`."""
    assert question_head(TOOLS) == (
        "Answer the following questions as best you can. You have access to the following APIs:\n"
        "\n"
        "search: Call this tool to interact with the search API. What is the search API useful for? Finds pages."
        " Parameters: {}\n"
        "\n"
        "画图: Call this tool to interact with the 画图 API. What is the 画图 API useful for? 画一张图"
        ' Parameters: {"type": "object", "必填": ["提示"]}\n'
        "\n"
        "Use the following format:\n"
        "\n"
        "Question: the input question you must answer\n"
        "Thought: you should always think about what to do\n"
        "Action: the action to take, should be one of [search, 画图]\n"
        "Action Input: the input to the action\n"
        "Observation: the result of the action\n"
        "... (this Thought/Action/Action Input/Observation can be repeated zero or more times)\n"
        "Thought: I now know the final answer\n"
        "Final Answer: the final answer to the original input question\n"
        "\n"
        "Begin!\n"
        "\n"
        "Question: "
    )


def test_braces_in_a_description_are_text() -> None:
    """What a client writes about its tool is not a template."""
    assert "useful for? {name} {0} {{ Parameters: {}" in question_head([Tool("a", "{name} {0} {{")])


def test_tools_of_a_request() -> None:
    """Objects of the API and Tools are the same; what may be missing or null in the API is empty."""
    given = [
        function("search", description="Finds pages."),
        function("画图", description="画一张图", parameters=TOOLS[1].parameters),
    ]
    assert tools_of(given) == tools_of(TOOLS) == TOOLS
    assert tools_of([function("a", description=None, parameters=None)]) == [Tool("a", "", {})]


@pytest.mark.parametrize("choice", [None, "auto", "required", function("search")])
def test_choices_that_leave_the_tools(choice: Any) -> None:
    """Every choice but "none" shows all tools, so that the prompt's beginning does not change with it."""
    assert tools_of(TOOLS, choice) == TOOLS


def test_none_takes_the_tools_away() -> None:
    """With tool_choice "none" the model hears of no tool; without tools that is what there is anyway."""
    assert tools_of(TOOLS, "none") == tools_of([], "none") == tools_of([], "auto") == []


@pytest.mark.parametrize("name", ["", " a", "a\nAction Input: x", "a\u2028b", "\n"])
def test_names_that_the_form_cannot_write(name: str) -> None:
    """A name with a line end would write lines of the form."""
    with one_line_error(PromptError, "tools[1]", "name"):
        tools_of([function("a"), function(name)])


def test_names_that_cannot_be_told_apart() -> None:
    """Two tools of one name."""
    with one_line_error(PromptError, "tools[2]", "'a'"):
        tools_of([function("a"), function("b"), function("a")])


@pytest.mark.parametrize(
    ("tools", "choice", "says"),
    [
        ([], "required", "no tools"),
        ([], function("search"), "no tools"),
        (TOOLS, function("other"), "'other'"),
        (TOOLS, "sometimes", "'sometimes'"),
        ([], "sometimes", "'sometimes'"),
    ],
)
def test_choices_that_the_tools_do_not_allow(tools: list[Tool], choice: Any, says: str) -> None:
    """A call that cannot be made is refused before the model is asked."""
    with one_line_error(PromptError, "tool_choice", says):
        tools_of(tools, choice)


@pytest.mark.parametrize(
    ("choice", "prefix", "written", "call"),
    [
        (None, "", "Thought: t\nAction: search\nAction Input: {}", ("search", "{}")),
        ("auto", "", "Thought: t\nAction: search\nAction Input: {}", ("search", "{}")),
        ("none", "", "hello", None),
        ("required", "Thought: I need to use a tool.\nAction:", " 画图\nAction Input: {}\n", ("画图", "{}")),
        (
            function("search"),
            "Thought: I need to use a tool.\nAction: search\nAction Input:",
            ' {"q"',
            ("search", '{"q"'),
        ),
    ],
)
def test_a_reply_is_begun_for_the_model(choice: Any, prefix: str, written: str, call: tuple[str, str] | None) -> None:
    """Where a call is asked for, the model can only go on with it; prefix and reply are read as one."""
    assert reply_prefix(choice) == prefix
    reply = parse_reply(prefix + written, TOOLS)
    assert reply.calls == ([call] if call else [])
    assert reply.content == ("I need to use a tool." if prefix else "t" if call else "hello")


# Writing


def test_calls_and_answers_in_the_form() -> None:
    """White space as the reference has it: line ends before and white space after a text are no part of it."""
    assert call_text("\nlook ", "search", '{"q": 1}\n', "\n found \n") == (
        'Thought: look\nAction: search\nAction Input: {"q": 1}\nObservation:  found'
    )
    assert call_text("", "search", "{}", "") == "Thought: \nAction: search\nAction Input: {}\nObservation: "
    assert call_text("Thought: t", "a", "", "r") == "Thought: t\nAction: a\nAction Input:\nObservation: r"
    assert answer_text("\n你好\n") == "Thought: I now know the final answer.\nFinal Answer: 你好"


# Reading

CALL = 'Action: search\nAction Input: {"q": "x"}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        pytest.param(f"Thought: t\n{CALL}", "t", [("search", '{"q": "x"}')], id="a call"),
        pytest.param(f" t\n{CALL}\nObservation:", "t", [("search", '{"q": "x"}')], id="after a prompt's Thought:"),
        pytest.param(CALL, "", [("search", '{"q": "x"}')], id="no thought, no line end before"),
        pytest.param(f" \n {CALL}", "", [("search", '{"q": "x"}')], id="white space before"),
        pytest.param("Thought: \nAction: search  \nAction Input: x  \n", "", [("search", "x")], id="trailing spaces"),
        pytest.param("Action:\nsearch\n\nAction Input:\nx\ny", "", [("search", "x\ny")], id="lines of their own"),
        pytest.param(
            "Action: search\r\nAction Input: x\r\nObservation: y", "", [("search", "x")], id="carriage return"
        ),
        pytest.param("Action: search\nAction Input: x\nObserv", "", [("search", "x")], id="cut in Observation"),
        pytest.param("Action: search\nAction Input: x\nO", "", [("search", "x\nO")], id="a letter is no Observation"),
        pytest.param("Action: search\nAction Input: Observ", "", [("search", "Observ")], id="Observation as input"),
        pytest.param("Action: search\nAction Input:", "", [("search", "")], id="no arguments"),
        pytest.param("Action: search\nAction Input: not {json", "", [("search", "not {json")], id="no JSON"),
        pytest.param(
            "我要画图\nAction: 画图\nAction Input: {'提示': '猫'}",
            "我要画图",
            [("画图", "{'提示': '猫'}")],
            id="Chinese",
        ),
        pytest.param(
            "t\nAction: search\nAction Input: x\nFinal Answer: y",
            "t",
            [("search", "x\nFinal Answer: y")],
            id="an answer in the arguments",
        ),
        pytest.param(
            "t\nAction: search\nObservation: x\nAction: search\nAction Input: y",
            "t\nAction: search\nObservation: x",
            [("search", "y")],
            id="an action without input, then one with",
        ),
        pytest.param("Thought: t\nFinal Answer: 你好 \n", "你好", [], id="an answer"),
        pytest.param("Final Answer:a\nFinal Answer: b", "a\nFinal Answer: b", [], id="the first answer counts"),
        pytest.param(f"Final Answer: a\n{CALL}", f"a\n{CALL}", [], id="a call in the answer"),
        pytest.param("t\nFinal Answer:", "", [], id="an empty answer"),
        pytest.param("The Final Answer: 3", "The Final Answer: 3", [], id="a mark inside a line"),
        pytest.param(" hello \n", "hello", [], id="no form at all"),
        pytest.param("Thought: hmm", "Thought: hmm", [], id="a thought alone"),
        pytest.param("t\nAction: search", "t\nAction: search", [], id="cut before the input"),
        pytest.param("t\nAction Input: x", "t\nAction Input: x", [], id="an input without action"),
        pytest.param(
            "Action: search\nFinal Answer: x\nAction Input: y", "x\nAction Input: y", [], id="changed its mind"
        ),
        pytest.param("", "", [], id="nothing"),
    ],
)
def test_what_a_model_wrote(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    """Thought and call, answer, or, where the form is missing, the text."""
    assert parse_reply(text, TOOLS) == (content, calls)


def test_an_unknown_tool_is_text() -> None:
    """No client can run it: all of the text is content, and what follows is read as if it were not there."""
    unknown = "Thought: t\nAction: delete\nAction Input: {}"
    assert parse_reply(unknown, TOOLS) == (unknown, [])
    assert parse_reply(unknown, []) == (unknown, [])
    assert parse_reply(f"{unknown}\nFinal Answer: a", TOOLS) == ("a", [])
    assert parse_reply(f"{unknown}\n{CALL}", TOOLS).calls == [("search", '{"q": "x"}')]


words = st.text(st.sampled_from("ab你 \n{}:"), max_size=12)


@given(thought=words, arguments=words, result=words)
def test_what_is_written_can_be_read(thought: str, arguments: str, result: str) -> None:
    """A call comes out of the history as it was when the model made it, but for white space around its texts."""
    written = call_text(thought, "search", arguments, result)
    assert parse_reply(written, TOOLS) == (thought.strip(), [("search", arguments.strip())])
    assert parse_reply(written.partition(STOP)[0], TOOLS) == parse_reply(written, TOOLS)
    assert parse_reply(answer_text(result), TOOLS) == (result.strip(), [])


def test_reading_takes_linear_time() -> None:
    """Texts that would take hours if lines were read again and again: all marks that never decide, and long lines."""
    begun = time.process_time()
    for piece in ("Action:\n", "Action: x\nAction Input:\n", "Action:", "\n", " ", "Action Input:\n", "Observation:\n"):
        for head in ("", "x\n", "Action: other\n", "Action: search\nAction Input: ", "Final Answer: x"):
            parse_reply(head + piece * 50_000, TOOLS)
    assert time.process_time() - begun < 20


# Streaming

marks = ["Thought:", "Action:", "Action Input:", "Final Answer:", "Observation:", "Observ", "search", "画图", "other"]
forms = st.lists(
    st.sampled_from(
        [*marks, "\nAction: search\nAction Input:", "\nFinal Answer:", " ", "\n", "\n", "\r", "\u3000", "{}", "x"]
    ),
    max_size=16,
).map("".join)


def in_pieces(text: str, cuts: Sequence[int]) -> list[str]:
    """The text cut at these places, as far as it has them."""
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[begin:end] for begin, end in pairwise(places)]


def streamed(pieces: Sequence[str]) -> tuple[list[str], Reply]:
    """The deltas, and what comes at the end."""
    stream = ReactStream(TOOLS)
    return [stream.push(piece) for piece in pieces], stream.finish()


@given(text=forms | st.text(), cuts=st.lists(st.integers(0, 1000), max_size=30))
def test_stream_is_the_blocking_form(text: str, cuts: list[int]) -> None:
    """However a reply arrives, its deltas and their rest join to the content that the whole text has, and its calls."""
    deltas, (rest, calls) = streamed(in_pieces(text, cuts))
    assert ("".join(deltas) + rest, calls) == parse_reply(text, TOOLS)


@given(text=forms)
def test_reading_is_what_the_form_says(text: str) -> None:
    """Against the rules written once more, as expressions over the whole text."""
    text = text.lstrip()
    header = r"^Action:((?:(?!\nAction:|\nAction Input:).)*)\nAction Input:"
    answer = re.search(r"^Final Answer:(.*)", text, re.M | re.S)
    headers = re.finditer(header, text, re.M | re.S)
    called = next((header for header in headers if header[1].strip() in ("search", "画图")), None)
    if answer and not (called and called.start() < answer.start()):
        assert parse_reply(text, TOOLS) == (answer[1].strip(), [])
    elif called:
        arguments = re.split(r"\nObservation:", text[called.end() :])[0].strip()
        arguments = re.sub(r"\nObserv(a|at|ati|atio|ation|ation:)?$", "", arguments).rstrip()
        thought = re.sub(r"^Thought:", "", text[: called.start()].strip()).strip()
        assert parse_reply(text, TOOLS) == (thought, [(called[1].strip(), arguments)])
    else:
        assert parse_reply(text, TOOLS) == (text.strip(), [])


@given(text=forms)
def test_nothing_is_shown_before_the_answer_begins(text: str) -> None:
    """A thought that may be a call's is never half shown."""
    stream = ReactStream(TOOLS)
    seen = ""
    for character in text:
        delta = stream.push(character)
        assert not delta or "Final Answer:" in seen
        seen += character


def test_an_answer_streams() -> None:
    """From the mark on, each piece is shown at once, but for white space that may be the last."""
    pieces = ["Thought: t", "\nFinal", " Answer", ":", " ", "a", " ", " b\n", "c", "\n"]
    assert streamed(pieces) == (["", "", "", "", "", "a", "", "  b", "\nc", ""], ("", []))
    assert streamed(["x\nFinal Answer: a "])[0] == ["a"]
