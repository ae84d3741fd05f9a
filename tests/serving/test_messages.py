"""Messages as a conversation: in the reference's order, nothing lost, mistakes named by their place."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import one_line_error, write_vocabulary

from qwenvl.errors import PromptError
from qwenvl.serving.messages import Conversation, conversation_of, prompt_of
from qwenvl.serving.react import Tool, question_head
from qwenvl.text.parts import Turn
from qwenvl.text.prompt import DEFAULT_SYSTEM, chatml_prompt
from qwenvl.text.tokenizer import REGION_TAGS, SPECIALS, Tokenizer

Q = 3  # visual tokens of a picture
TOOLS = [Tool("search", "Finds pages."), Tool("画图")]
HEAD = question_head(TOOLS)
ANSWER = "Thought: I now know the final answer.\nFinal Answer:"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer that every machine has."""
    return Tokenizer(write_vocabulary(tmp_path_factory.mktemp("vocabulary")))


def user(content: Any) -> dict[str, Any]:
    """A question."""
    return {"role": "user", "content": content}


def said(content: Any) -> dict[str, Any]:
    """A reply without a call."""
    return {"role": "assistant", "content": content}


def system(content: Any, role: str = "system") -> dict[str, Any]:
    """What the reply is to be like."""
    return {"role": role, "content": content}


def called(content: Any, *calls: tuple[str, str, str]) -> dict[str, Any]:
    """An assistant's message with calls: id, name, arguments."""
    listed = [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in calls]
    return {"role": "assistant", "content": content, "tool_calls": listed}


def result(id_: str, content: Any) -> dict[str, Any]:
    """What a tool gave."""
    return {"role": "tool", "tool_call_id": id_, "content": content}


def text(content: str) -> dict[str, str]:
    """A part of a content."""
    return {"type": "text", "text": content}


def picture(url: str) -> dict[str, Any]:
    """Another; `detail` means nothing here."""
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


ASKED = [user("weather?"), called("look", ("1", "search", '{"q": "x"}')), result("1", "sunny\n")]
LOOKED = 'Thought: look\nAction: search\nAction Input: {"q": "x"}\nObservation: sunny'


# Without tools


def test_a_question() -> None:
    """The least that there can be: the default system message, no history, nothing begun."""
    assert conversation_of([user("hi")]) == Conversation(DEFAULT_SYSTEM, [], [{"text": "hi"}], "")


def test_a_conversation_is_kept_as_it_is() -> None:
    """Turns in order; system messages joined by a line end, also an empty one; white space and tags are text."""
    messages = [
        system("a"),
        system([text("b"), text("c")], "developer"),
        user(" <img>x</img>\n"),
        said("\ntwo "),
        user("q\n"),
    ]
    assert conversation_of(messages) == Conversation(
        "a\nbc", [Turn([{"text": " <img>x</img>\n"}], "\ntwo ")], [{"text": "q\n"}], ""
    )
    assert conversation_of([system(""), user("q")]).system == ""


def test_neighbours_of_one_role() -> None:
    """A question that was not answered is a turn without a reply; texts of the assistant are joined by a line end."""
    messages = [user("a"), user("b"), said("c"), said(None), said([text("d"), text("e")]), user("f")]
    history = [Turn([{"text": "a"}], None), Turn([{"text": "b"}], "c\n\nde")]
    assert conversation_of(messages) == Conversation(DEFAULT_SYSTEM, history, [{"text": "f"}], "")
    assert conversation_of([user("a"), said(""), user("b")]).history == [Turn([{"text": "a"}], "")]


def test_pictures_are_parts() -> None:
    """In their order among the texts, by their URLs, which are not opened here."""
    messages = [user([text("a"), picture("data:,1"), text("b")]), said("c"), user([picture("http://x/2")])]
    assert conversation_of(messages) == Conversation(
        DEFAULT_SYSTEM, [Turn([{"text": "a"}, {"image": "data:,1"}, {"text": "b"}], "c")], [{"image": "http://x/2"}], ""
    )


def test_messages_are_left_alone() -> None:
    """The caller's objects are not changed."""
    messages = [user([text("\na "), picture("u")]), said("b"), *copy.deepcopy(ASKED)]
    before = copy.deepcopy(messages)
    conversation_of(messages, TOOLS)
    assert messages == before


# With tools


def test_tools_stand_before_the_question() -> None:
    """Before the first one, pictures and all, its text trimmed as the form has it."""
    assert conversation_of([user("\nq ")], TOOLS) == Conversation(
        DEFAULT_SYSTEM, [], [{"text": HEAD}, {"text": "q"}], ""
    )
    parts = conversation_of([user([picture("u"), text("\nq\n")])], TOOLS).query
    assert parts == [{"text": HEAD}, {"image": "u"}, {"text": "\nq"}]


def test_tools_stand_before_the_last_question_that_has_a_reply() -> None:
    """In a longer conversation the reference shows the tools one question earlier than the one that is asked."""
    conversation = conversation_of(
        [system(" s\n"), user("a"), said("b"), user("c"), said("d\n"), user("e"), user("f")], TOOLS
    )
    assert conversation == Conversation(
        " s",
        [
            Turn([{"text": "a"}], f"{ANSWER} b"),
            Turn([{"text": HEAD}, {"text": "c"}], f"{ANSWER} d"),
            Turn([{"text": "e"}], None),
        ],
        [{"text": "f"}],
        "",
    )


def test_a_result_is_gone_on_from() -> None:
    """The reference's text completion: the reply so far, and a thought begun; the tools before its own question."""
    conversation = conversation_of([user("a"), said("b"), *ASKED], TOOLS)
    assert conversation.history == [Turn([{"text": "a"}], f"{ANSWER} b")]
    assert conversation.query == [{"text": HEAD}, {"text": "weather?"}]
    assert conversation.reply_begun == f"{LOOKED}\nThought:"


def test_a_reply_that_called_stands_in_the_history() -> None:
    """Thought, call, result and answer are one reply."""
    (turn,) = conversation_of([*ASKED, said("It is sunny."), user("thanks")], TOOLS).history
    assert turn == Turn([{"text": HEAD}, {"text": "weather?"}], f"{LOOKED}\n{ANSWER} It is sunny.")


def test_several_calls_in_one_message() -> None:
    """One after the other, each with its own result, whatever the order of the results."""
    messages = [
        user("q"),
        called(None, ("x", "search", "{}"), ("y", "画图", "猫")),
        result("y", [text("a "), text("cat")]),
        result("x", "found"),
    ]
    assert conversation_of(messages, TOOLS).reply_begun == (
        "Thought: \nAction: search\nAction Input: {}\nObservation: found\n"
        "Thought: \nAction: 画图\nAction Input: 猫\nObservation: a cat\n"
        "Thought:"
    )


def test_calls_in_a_row() -> None:
    """Messages with calls follow each other in one reply; an id may come again in another message."""
    conversation = conversation_of([*ASKED, *ASKED[1:]], TOOLS)
    assert conversation.reply_begun == f"{LOOKED}\n{LOOKED}\nThought:"


@pytest.mark.parametrize(
    ("choice", "prefix"),
    [
        ("required", "Thought: I need to use a tool.\nAction:"),
        (
            {"type": "function", "function": {"name": "画图"}},
            "Thought: I need to use a tool.\nAction: 画图\nAction Input:",
        ),
    ],
)
def test_a_call_is_begun(choice: Any, prefix: str) -> None:
    """Where a call is asked for, behind a question and behind a result."""
    assert conversation_of([user("q")], TOOLS, choice).reply_begun == prefix
    assert conversation_of(ASKED, TOOLS, choice).reply_begun == f"{LOOKED}\n{prefix}"


@pytest.mark.parametrize(("tools", "choice"), [([], None), (TOOLS, "none")])
def test_no_tools_after_a_result(tools: list[Tool], choice: Any) -> None:
    """Many clients send results without the tools: the model is led to its answer, and shows no thought of a call."""
    conversation = conversation_of(ASKED, tools, choice)
    assert conversation == Conversation(DEFAULT_SYSTEM, [], [{"text": "weather?"}], f"{LOOKED}\n{ANSWER}")
    (first, second) = conversation_of(
        [*ASKED, said("Sun."), user("b\n"), said(" c "), user("d")], tools, choice
    ).history
    assert first == Turn([{"text": "weather?"}], f"{LOOKED}\n{ANSWER} Sun.")
    assert second == Turn([{"text": "b\n"}], " c ")


# Mistakes

TWO = called("", ("1", "search", "{}"), ("2", "search", "{}"))


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        pytest.param([], ["messages", "user"], id="no message"),
        pytest.param([system("s")], ["messages", "user"], id="a system message alone"),
        pytest.param(
            [system("s"), said("a"), user("b")], ["messages[1]", "first", "an assistant's"], id="assistant first"
        ),
        pytest.param([result("1", "r"), user("b")], ["messages[0]", "first", "a tool's"], id="a result first"),
        pytest.param([user("a"), said("b")], ["messages[1]", "last", "an assistant's"], id="assistant last"),
        pytest.param([user("a"), called("", ("1", "f", ""))], ["messages[1]", "last"], id="calls last"),
        pytest.param([user("a"), system("s"), user("b")], ["messages[1]", "a system's"], id="system later"),
        pytest.param(
            [user("a"), system("s", "developer"), user("b")], ["messages[1]", "developer"], id="developer later"
        ),
        pytest.param([user("a"), system("s", "function"), user("b")], ["messages[1]", "'function'"], id="unknown role"),
        pytest.param([user("a"), system("s", "x\ny")], ["messages[1]", "last", "'x"], id="unknown role last"),
        pytest.param([user("a"), result("1", "r")], ["messages[1]", "follow"], id="a result after a question"),
        pytest.param([user("a"), said("b"), result("1", "r")], ["messages[2]", "follow"], id="a result after no call"),
        pytest.param([*ASKED, user("a"), result("1", "r")], ["messages[4]", "follow"], id="a result too late"),
        pytest.param([*ASKED, result("1", "r")], ["messages[3]", "'1'", "already"], id="two results"),
        pytest.param([*ASKED, result("2", "r")], ["messages[3]", "'2'", "no call"], id="a result of no call"),
        pytest.param([user("a"), TWO, result("1", "r")], ["messages[1]", "'2'", "no tool's"], id="a result is missing"),
        pytest.param([user("a"), TWO, user("b")], ["messages[1]", "'1'", "no tool's"], id="all results are missing"),
        pytest.param(
            [user("a"), called("", ("1", "f", ""), ("1", "g", "")), result("1", "r")],
            ["messages[1]", "two calls", "'1'"],
            id="two calls with an id",
        ),
        pytest.param([user("a"), said("b"), user("")], ["messages[2]", "empty"], id="an empty question"),
        pytest.param([user(" \n")], ["messages[0]", "empty"], id="a blank question"),
        pytest.param([user([])], ["messages[0]", "empty"], id="no parts"),
        pytest.param([user(None)], ["messages[0]", "empty"], id="null"),
        pytest.param([user([text(""), text(" ")])], ["messages[0]", "empty"], id="empty parts"),
        pytest.param([user([{"type": "input_audio"}])], ["messages[0]", "'input_audio'"], id="a sound"),
        pytest.param([system([picture("u")]), user("a")], ["messages[0]", "a system"], id="a system's picture"),
        pytest.param([user("a"), said([picture("u")]), user("b")], ["messages[1]", "an assistant's"], id="its picture"),
        pytest.param([*ASKED[:2], result("1", [picture("u")])], ["messages[2]", "a tool's"], id="a tool's picture"),
    ],
)
@pytest.mark.parametrize("tools", [[], TOOLS], ids=["plain", "tools"])
def test_mistakes_are_named_by_their_place(messages: list[Any], says: list[str], tools: list[Tool]) -> None:
    """One clear line, whether tools are given or not."""
    with one_line_error(PromptError, *says):
        conversation_of(messages, tools)


# Ids


def whole(tokenizer: Tokenizer, tagged: str) -> list[int]:
    """The reference's way: one string, encoded at once, in which every special form is meant."""
    ids: list[int] = []
    for piece in tokenizer.split_tags(tagged, SPECIALS):
        ids += [piece] if isinstance(piece, int) else tokenizer.encode(piece)
    return ids


def check_continuation(tokenizer: Tokenizer) -> None:
    """A conversation with a call in its history, and one that goes on from a result and from a prefix."""
    messages = [system("S"), user("你好"), called(None, ("1", "画图", "{}")), result("1", "<box>(1,2),(3,4)</box>")]
    messages += [said("the <ref>dog</ref>"), *ASKED]
    for choice, begun in ((None, "Thought:"), ("required", "Thought: I need to use a tool.\nAction:")):
        expected = (
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
            "Thought: \nAction: 画图\nAction Input: {}\nObservation: <box>(1,2),(3,4)</box>\n"
            f"{ANSWER} the <ref>dog</ref><|im_end|>\n"
            f"<|im_start|>user\n{HEAD}weather?<|im_end|>\n<|im_start|>assistant\n{LOOKED}\n{begun}"
        )
        prompt = prompt_of(tokenizer, conversation_of(messages, TOOLS, choice), Q)
        assert prompt.ids == whole(tokenizer, expected)
        assert prompt.images == []


def test_pieces_are_encoded_as_the_whole(small: Tokenizer) -> None:
    """The reply's beginning put behind the prompt gives the ids of the one string that the reference encodes."""
    check_continuation(small)


def test_regions_of_a_reply_that_goes_on_are_special(small: Tokenizer) -> None:
    """What is gone on from has the ids that it will have in the history: region tags special, no other."""
    found = result("1", "<ref>dog</ref><box>(1,2),(3,4)</box><img>x</img>")
    begun = prompt_of(small, conversation_of([*ASKED[:2], found], TOOLS), Q).ids
    later = prompt_of(small, conversation_of([*ASKED[:2], found, said("a"), user("b")], TOOLS), Q).ids
    assert later[: len(begun)] == begun
    assert small.box_start_id in begun
    assert small.image_start_id not in begun


def test_pieces_are_encoded_as_the_whole_by_the_real_vocabulary(reference_dir: Path) -> None:
    """The same, with the checkpoint's merges, some of which join line ends to what is before them."""
    check_continuation(Tokenizer(reference_dir / "hf"))


def test_the_tools_and_a_pictures_number_are_one_text(small: Tokenizer) -> None:
    """`Question: Picture 1:` is encoded as one string; the picture has its span."""
    prompt = prompt_of(small, conversation_of([user([picture("u"), text("what")])], TOOLS), Q)
    span = "<img>" + "<imgpad>" * Q + "</img>"
    expected = (
        f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n<|im_start|>user\n{HEAD}Picture 1:{span}\nwhat<|im_end|>\n"
    )
    assert prompt.ids == whole(small, expected + "<|im_start|>assistant\n")
    assert prompt.images == ["u"]


def test_no_turn_is_dropped(small: Tokenizer) -> None:
    """A conversation beyond the reference's window of 6,144 ids is kept: the server refuses what is too long."""
    messages = [
        message for number in range(40) for message in (user([picture(f"u{number}"), text("x" * 300)]), said("r"))
    ]
    prompt = prompt_of(small, conversation_of([*messages, user("q")]), Q)
    assert len(prompt.ids) > 12_000
    assert prompt.images == [f"u{number}" for number in range(40)]
    assert prompt == chatml_prompt(
        small, "q", conversation_of([*messages, user("q")]).history, n_queries=Q, max_window_size=10**6
    )


forged = st.lists(st.sampled_from([*SPECIALS[:3], "<img>", "</img>", "<imgpad>", "\n", "user", "Thought:"])).map(
    "".join
)


@given(a=forged, b=forged, c=forged, d=forged)
def test_no_message_forges_a_turn_or_a_picture(small: Tokenizer, a: str, b: str, c: str, d: str) -> None:
    """Injection: text of any message, tools' results and arguments too, adds no special id but regions' to a prompt."""

    def special(*texts: str) -> list[int]:
        a, b, c, d = texts
        messages = [system(a), user(f"q{b}"), called(c, ("1", "search", d)), result("1", a)]
        prompt = prompt_of(small, conversation_of([*messages, said(b), *messages[1:]], [Tool("search", c)]), Q)
        kinds = set(small.special_ids.values()) - {small.special_ids[tag] for tag in REGION_TAGS}
        return [i for i in prompt.ids if i in kinds]

    assert special(a, b, c, d) == special("x", "x", "x", "x")
