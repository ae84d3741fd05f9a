"""Function calling in the ReAct form: the tools as text in a question, the calls as text in a reply.

    Tool, tools_of      what a reply may call
    question_head       the tools, and how to use them, before a question
    reply_prefix        how a reply begins that must call a tool
    call_text, answer_text      what a reply was, in the form
    STOP, THOUGHT, ANSWER_BEGUN     where the model is stopped, and what it goes on from after a result
    parse_reply, ReactStream    what the model wrote, as content and calls

The form is a data format, the one that the chat checkpoints were trained with: wording and white space are those of
`openai_api.py` in the QwenLM/Qwen repository. A reply in it is

    Thought: why
    Action: name
    Action Input: arguments
    Observation: result

as often as needed, then `Thought: ...` and `Final Answer: ...`. The model writes up to `Observation:`, where it is
stopped; results come from the client, in the next request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from ..errors import PromptError
from ..text.parts import shown

STOP = "Observation:"
THOUGHT = "Thought:"
_ACTION = "Action:"
_INPUT = "Action Input:"
_ANSWER = "Final Answer:"
ANSWER_BEGUN = f"{THOUGHT} I now know the final answer.\n{_ANSWER}"

_TOOL = (
    "{name}: Call this tool to interact with the {name} API. What is the {name} API useful for? {description}"
    " Parameters: {parameters}"
)
_INSTRUCTION = """\
Answer the following questions as best you can. You have access to the following APIs:

{tools}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!"""

ToolChoice: TypeAlias = "str | Mapping[str, Any] | None"


# Tools


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


def tools_of(tools: Sequence[Tool | Mapping[str, Any]], tool_choice: ToolChoice = None) -> list[Tool]:
    """The tools that a reply may call, checked: all that are given, or none where `tool_choice` is "none".

    A tool is a Tool or the object of the OpenAI API; `tool_choice` is "auto" (as None), "none", "required" or the
    API's object that names a function. Raises PromptError, naming the tool by its place, for names that the form
    cannot write or tell apart, and for a choice that the tools do not allow.
    """
    given: dict[str, Tool] = {}
    for number, tool in enumerate(tools):
        if not isinstance(tool, Tool):
            function = tool["function"]
            tool = Tool(function["name"], function.get("description") or "", function.get("parameters") or {})
        name = tool.name
        if not name or name != name.strip() or len(name.splitlines()) > 1:
            raise PromptError(f"tools[{number}]: a name is one line without spaces around it, not {shown(name)}")
        if name in given:
            raise PromptError(f"tools[{number}]: another tool has the name {shown(name)} already")
        given[name] = tool
    chosen = _chosen(tool_choice)
    if tool_choice not in (None, "auto", "none") and not given:
        raise PromptError("tool_choice asks for a call, but no tools are given")
    if chosen is not None and chosen not in given:
        raise PromptError(f"tool_choice names {shown(chosen)}, which is none of the tools")
    return [] if tool_choice == "none" else list(given.values())


def _chosen(tool_choice: ToolChoice) -> str | None:
    """The function that a choice names, if any."""
    if isinstance(tool_choice, Mapping):
        return str(tool_choice["function"]["name"])
    if tool_choice not in (None, "auto", "none", "required"):
        raise PromptError(f"tool_choice is auto, none, required or a function, not {shown(tool_choice)}")
    return None


# The form, written


def question_head(tools: Sequence[Tool]) -> str:
    """What stands before a question so that its reply may call the tools."""
    described = (
        _TOOL.format(
            name=tool.name,
            description=tool.description,
            parameters=json.dumps(tool.parameters, ensure_ascii=False),
        )
        for tool in tools
    )
    names = ", ".join(tool.name for tool in tools)
    return _INSTRUCTION.format(tools="\n\n".join(described), names=names) + "\n\nQuestion: "


def reply_prefix(tool_choice: ToolChoice) -> str:
    """The beginning of the reply, written for the model, where it must call a tool; else nothing.

    Put behind the prompt, and before what the model writes when that is parsed. No trailing space: the model's tokens
    begin with theirs.
    """
    name = _chosen(tool_choice)
    if name is None and tool_choice != "required":
        return ""
    begun = f"{THOUGHT} I need to use a tool.\n{_ACTION}"
    return begun if name is None else f"{begun} {name}\n{_INPUT}"


def trimmed(text: str) -> str:
    """The text as the form takes it: the reference strips this of everything, as its training data was."""
    return text.lstrip("\n").rstrip()


def call_text(thought: str, name: str, arguments: str, result: str) -> str:
    """A call and its result. An empty thought leaves `Thought: ` and a line end, as in the reference."""
    thought = trimmed(thought)
    if not thought.startswith(THOUGHT):
        thought = f"{THOUGHT} {thought}"
    call = f"{thought}\n{_ACTION} {name}\n{_INPUT} {arguments}".rstrip()
    return f"{call}\n{STOP} {trimmed(result)}"


def answer_text(content: str) -> str:
    """A reply without a call."""
    return f"{ANSWER_BEGUN} {trimmed(content)}"


# The form, read


class Call(NamedTuple):
    """A call. The arguments are as the model wrote them: JSON is what it was asked for, not what it must have said."""

    name: str
    arguments: str


class Reply(NamedTuple):
    """What a reply says to the user, and what it calls: one tool at most, since the form waits for its result."""

    content: str
    calls: list[Call]


class ReactStream:
    """Reads a reply as it comes. What `push` returns, and the rest from `finish`, join to the content.

    Held back until the final answer begins, since all before it may turn out to be the thought of a call. Marks count
    at the beginning of a line, and the first one decides: what follows `Final Answer:` is answer, what follows
    `Action Input:` is arguments, up to `Observation:`. A reply that was begun for the model needs its prefix pushed
    first. Never raises.
    """

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._names = frozenset(tool.name for tool in tools)
        self._lines: list[str] = []  # whole lines before a mark that decides
        self._line = ""  # the line that has not ended
        self._action: int | None = None  # the line with an `Action:` whose input has not come
        self._name: str | None = None  # of the tool that is called
        self._arguments: list[str] = []
        self._answering = False
        self._answer_begun = False
        self._space = ""  # white space that may be the answer's last

    def push(self, text: str) -> str:
        """The content that this text makes certain, maybe none."""
        if self._answering:
            return self._answer(text)
        if self._name is not None:
            self._arguments.append(text)
            return ""
        if not self._lines and not self._line:
            text = text.lstrip()
        lines = (self._line + text).split("\n")
        for number, line in enumerate(lines):
            if line.startswith(_ANSWER):
                self._answering = True
                return self._answer("\n".join([line[len(_ANSWER) :], *lines[number + 1 :]]))
            if self._calls(line):
                self._arguments.append("\n".join([line[len(_INPUT) :], *lines[number + 1 :]]))
                return ""
            if number < len(lines) - 1:
                self._lines.append(line)
        self._line = lines[-1]
        return ""

    def finish(self) -> Reply:
        """The rest of the content, and the calls, when no more text comes."""
        if self._answering:
            return Reply("", [])
        if self._name is None:
            return Reply("\n".join([*self._lines, self._line]).strip(), [])
        thought = "\n".join(self._lines[: self._action]).strip().removeprefix(THOUGHT).strip()
        return Reply(thought, [Call(self._name, _without_observation("".join(self._arguments)))])

    def _calls(self, line: str) -> bool:
        """Whether arguments begin on this line, which may have more to come."""
        if line.startswith(_ACTION):
            self._action = len(self._lines)
        elif line.startswith(_INPUT) and self._action is not None:
            name = "\n".join(self._lines[self._action :])[len(_ACTION) :].strip()
            if name in self._names:
                self._name = name
                return True
            # A tool that nobody offered cannot be called: a client would fail on it. So it is no mark but text, and
            # the user sees what the model tried.
            self._action = None
        return False

    def _answer(self, text: str) -> str:
        """What of the answer can be shown: stripped, as far as it is known where it ends."""
        if not self._answer_begun:
            text = text.lstrip()
            self._answer_begun = bool(text)
        text = self._space + text
        shown_now = text.rstrip()
        self._space = text[len(shown_now) :]
        return shown_now


def _without_observation(text: str) -> str:
    """Arguments up to the observation, or to what is left of the word where the reply was cut inside it."""
    arguments = text.partition(f"\n{STOP}")[0].strip()
    before, newline, last = arguments.rpartition("\n")
    if newline and last.startswith("Observ") and STOP.startswith(last):  # `Observ` is its first token
        return before.rstrip()
    return arguments


def parse_reply(text: str, tools: Sequence[Tool]) -> Reply:
    """What the model wrote, after the prefix with which it was begun: the thought and the call, or the answer.

    Without a call, the content is what follows `Final Answer:`, or the whole text where there is none. Never raises;
    takes time linear in the text.
    """
    stream = ReactStream(tools)
    content = stream.push(text)
    rest, calls = stream.finish()
    return Reply(content + rest, calls)
