"""Messages of the OpenAI API as a conversation, and as ids.

    Conversation        what `text.prompt.chatml_prompt` takes, and how the reply is begun
    conversation_of     messages, tools and the choice among them, as a Conversation
    prompt_of           its ids and pictures

Messages are plain dicts whose types have been checked; what is checked here is what they mean together. Their text is
data: nothing in it is read as a tag, but the region tags of what stands as the assistant's, as in any reply. That is
also so for tools' results, which the form puts into the assistant's text (see `react`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..errors import PromptError
from ..text.parts import Part, Turn, shown
from ..text.prompt import DEFAULT_SYSTEM, Prompt, chatml_prompt
from ..text.tokenizer import REGION_TAGS, Tokenizer
from .react import (
    ANSWER_BEGUN,
    THOUGHT,
    Tool,
    ToolChoice,
    answer_text,
    call_text,
    question_head,
    reply_prefix,
    tools_of,
    trimmed,
)

Message: TypeAlias = Mapping[str, Any]

_SYSTEM = ("system", "developer")
_WHOSE = {
    "system": "a system's",
    "developer": "a developer's",
    "user": "a user's",
    "assistant": "an assistant's",
    "tool": "a tool's",
}


@dataclass(frozen=True)
class Conversation:
    """What came before, what is asked, and the beginning of the reply, which the model goes on from.

    Pictures are the URLs that the messages give. `reply_begun` is what the assistant has done so far in this turn,
    tools' results included, and the prefix that makes it call a tool; most replies begin with nothing.
    """

    system: str
    history: list[Turn]
    query: list[Part]
    reply_begun: str


@dataclass
class _Exchange:
    """A user's message, and the assistant's texts up to the next one; `in_form` where these are in the ReAct form."""

    parts: list[Part]
    in_form: bool
    replies: list[str] = field(default_factory=list)

    def turn(self) -> Turn:
        """The exchange as it stands in a history."""
        reply = "\n".join(self.replies) if self.replies else None
        return Turn(self.parts, trimmed(reply) if reply is not None and self.in_form else reply)


def conversation_of(
    messages: Sequence[Message], tools: Sequence[Tool | Mapping[str, Any]] = (), tool_choice: ToolChoice = None
) -> Conversation:
    """The conversation that messages are, in the form of the reference's `openai_api.py` (see `react`) with tools.

    Without tools, texts are kept as they are. With them, the tools stand before the last question that has a reply, as
    in the reference: the one that is being answered if it has called tools already or is the first, else the one before
    it. Raises PromptError, naming the message by its place, for messages in an order that no conversation has.
    """
    offered = tools_of(tools, tool_choice)
    start = next((at for at, message in enumerate(messages) if message["role"] not in _SYSTEM), len(messages))
    if start == len(messages):
        raise PromptError("messages: there must be one from the user")
    if messages[start]["role"] != "user":
        raise PromptError(f"messages[{start}]: the first message must be the user's, not {_whose(messages[start])}")
    if messages[-1]["role"] not in ("user", "tool"):
        last = len(messages) - 1
        raise PromptError(
            f"messages[{last}]: the last message must be the user's or a tool's, not {_whose(messages[-1])}"
        )

    systems = [_text(message, f"messages[{at}]") for at, message in enumerate(messages[:start])]
    exchanges = _exchanges(messages, start, bool(offered))
    *past, asked = exchanges
    if offered:
        systems = [trimmed(text) for text in systems]
        shown_before = next((exchange for exchange in reversed(exchanges) if exchange.replies), asked)
        shown_before.parts = [{"text": question_head(offered)}, *shown_before.parts]
    return Conversation(
        system="\n".join(systems) if systems else DEFAULT_SYSTEM,
        history=[exchange.turn() for exchange in past],
        query=asked.parts,
        reply_begun=_reply_begun(asked.replies, bool(offered), tool_choice),
    )


def prompt_of(tokenizer: Tokenizer, conversation: Conversation, n_queries: int) -> Prompt:
    """The ids that the model goes on from, and their pictures. No turn is dropped, however long they are together.

    The reply's beginning is encoded as the whole reply will be when it stands in a history.
    """
    prompt = chatml_prompt(
        tokenizer,
        conversation.query,
        conversation.history,
        system=conversation.system,
        max_window_size=sys.maxsize,
        n_queries=n_queries,
    )
    return Prompt([*prompt.ids, *tokenizer.encode_tagged(conversation.reply_begun, REGION_TAGS)], prompt.images)


def _reply_begun(replies: Sequence[str], offered: bool, tool_choice: ToolChoice) -> str:
    """What the assistant has said in the turn that is being answered, and what is written for it before it goes on."""
    prefix = reply_prefix(tool_choice)
    if not replies:
        return prefix
    # After a result the model thinks on, and may call again. Where no tool is offered it is led straight to its answer,
    # since nobody looks for the form's marks in that reply.
    return "\n".join([*replies, prefix or (THOUGHT if offered else ANSWER_BEGUN)])


# Messages


def _exchanges(messages: Sequence[Message], start: int, offered: bool) -> list[_Exchange]:
    """The messages from `start` on, the first of which is a user's, one exchange for each that is."""
    exchanges: list[_Exchange] = []
    at = start
    while at < len(messages):
        message, where = messages[at], f"messages[{at}]"
        match message["role"]:
            case "user":
                exchanges.append(_Exchange(_user_parts(message, where, offered), offered))
            case "assistant" if message.get("tool_calls"):
                results = _results(messages, at)
                exchanges[-1].replies.append(_calls_text(message, where, results))
                exchanges[-1].in_form = True  # to its end, whether or not tools are given again
                at += len(results)  # they are read
            case "assistant":
                text = _text(message, where)
                exchanges[-1].replies.append(answer_text(text) if exchanges[-1].in_form else text)
            case "tool":
                raise PromptError(f"{where}: a tool's message must follow the assistant's that calls it")
            case "system" | "developer":
                raise PromptError(f"{where}: {_whose(message)} message must stand before all others")
            case role:
                raise PromptError(f"{where}: no message has the role {shown(role)}")
        at += 1
    return exchanges


def _results(messages: Sequence[Message], at: int) -> dict[str, str]:
    """What the tools' messages right after this one say, by the id of the call: each of its calls is answered once."""
    calls: set[str] = set()
    for call in messages[at]["tool_calls"]:
        if call["id"] in calls:
            raise PromptError(f"messages[{at}]: two calls have the id {shown(call['id'])}")
        calls.add(call["id"])
    results: dict[str, str] = {}
    for place in range(at + 1, len(messages)):
        message, where = messages[place], f"messages[{place}]"
        if message["role"] != "tool":
            break
        id_ = message["tool_call_id"]
        if id_ not in calls:
            raise PromptError(f"{where}: the assistant's message before has no call with the id {shown(id_)}")
        if id_ in results:
            raise PromptError(f"{where}: the call {shown(id_)} has been answered already")
        results[id_] = _text(message, where)
    for call in messages[at]["tool_calls"]:
        if call["id"] not in results:
            raise PromptError(f"messages[{at}]: no tool's message after it answers the call {shown(call['id'])}")
    return results


def _calls_text(message: Message, where: str, results: Mapping[str, str]) -> str:
    """An assistant's calls, each with its result, in the order of the calls.

    What it said besides is the thought of the first. The others have an empty one, as a message without content has in
    the reference, where each call is a message.
    """
    thoughts = [_text(message, where), *[""] * (len(results) - 1)]
    return "\n".join(
        call_text(thought, call["function"]["name"], call["function"]["arguments"], results[call["id"]])
        for thought, call in zip(thoughts, message["tool_calls"], strict=True)
    )


def _whose(message: Message) -> str:
    """Whose message it is, for an error."""
    return _WHOSE.get(message["role"], f"one of the role {shown(message['role'])}")


# Content


def _text(message: Message, where: str) -> str:
    """The text of a message that is not a user's; none is an empty one."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part["type"] != "text":
            raise PromptError(f"{where}: only a user's message has parts other than text, not {_whose(message)}")
    return "".join(part["text"] for part in content)


def _user_parts(message: Message, where: str, trim: bool) -> list[Part]:
    """A user's content as parts; `trim` cuts the white space at its two ends, as `trimmed` does."""
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts: list[Part] = []
    for part in content or ():
        match part["type"]:
            case "text":
                parts.append({"text": part["text"]})
            case "image_url":
                shown_at = part["image_url"]
                parts.append({"image": shown_at if isinstance(shown_at, str) else shown_at["url"]})
            case kind:
                raise PromptError(f"{where}: a part is of type text or image_url, not {shown(kind)}")
    if not any(part.get("text", "picture").strip() for part in parts):
        raise PromptError(f"{where}: the content is empty: give it a text or a picture")
    if trim:
        if "text" in parts[0]:
            parts[0] = {"text": parts[0]["text"].lstrip("\n")}
        if "text" in parts[-1]:
            parts[-1] = {"text": parts[-1]["text"].rstrip()}
    return parts
