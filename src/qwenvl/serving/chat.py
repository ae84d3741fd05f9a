"""/v1/chat/completions: a conversation in, the next message out.

answer_chat   one request, whole or as events
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from fastapi import Request

from .answers import Answer, Question
from .messages import Conversation, conversation_of, prompt_of
from .react import STOP, Call, ReactStream, reply_prefix, tools_of
from .refusals import Refused
from .replies import (
    EventStream,
    check_model,
    head_of,
    options_of,
    stops_of,
    token_infos,
    unless_gone,
    usage_of,
    whole,
)
from .schema import (
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    FunctionCall,
    ImagePart,
    NamedTool,
    ReplyMessage,
    ToolCall,
)
from .service import Service


async def answer_chat(service: Service, request: Request, asked: ChatRequest) -> ChatCompletion | EventStream:
    """Answer a conversation. Raises Refused, PromptError, ConfigError."""
    check_model(service, asked.model)
    if service.pipeline.generation_config.chat_format == "raw":
        raise Refused(400, f"{service.name} is a base checkpoint, which does not chat: use /v1/completions")
    if asked.top_logprobs and not asked.logprobs:
        raise Refused(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    options = options_of(service, asked, asked.max_completion_tokens or asked.max_tokens)
    given = [tool.model_dump(exclude_none=True) for tool in asked.tools or ()]
    choice = asked.tool_choice.model_dump() if isinstance(asked.tool_choice, NamedTool) else asked.tool_choice
    tools, count = tools_of(given, choice), asked.n or 1
    stop = (*stops_of(asked), STOP) if tools else stops_of(asked)
    top = (asked.top_logprobs or 0) if asked.logprobs else None

    def make() -> list[Question]:
        conversation = conversation_of([message.model_dump() for message in asked.messages], given, choice)
        service.require_room(sum(map(len, _texts(conversation))))
        prompt = prompt_of(service.tokenizer, conversation, service.pipeline.config.visual.n_queries)
        return [Question(prompt, options, count, stop=stop, top=top)]

    shows = any(isinstance(part, ImagePart) for message in asked.messages for part in message.content or ())
    answers = await unless_gone(request, service.ask(make, count, shows=shows))
    readers = [ReactStream(tools) if tools else None for _ in answers]
    for reader in readers:
        if reader is not None:
            reader.push(reply_prefix(choice))
    if asked.stream:
        return EventStream(_events(service, asked, answers, readers), answers)
    await unless_gone(request, whole(service, answers))
    return ChatCompletion(
        **head_of("chatcmpl", "chat.completion", service.name),
        choices=[_choice(service, answer, reader) for answer, reader in zip(answers, readers, strict=True)],
        usage=usage_of(answers),
    )


def _texts(conversation: Conversation) -> Iterator[str]:
    yield from (conversation.system, conversation.reply_begun)
    parts = [*conversation.query, *(part for turn in conversation.history for part in turn.parts)]
    yield from (part["text"] for part in parts if "text" in part)
    yield from (turn.reply or "" for turn in conversation.history)


def _choice(service: Service, answer: Answer, reader: ReactStream | None) -> ChatChoice:
    content, calls = answer.text, []
    if reader is not None:
        begun = reader.push(answer.text)
        rest, called = reader.finish()
        content, calls = begun + rest, _tool_calls(called)
    known = answer.request.log_probabilities
    return ChatChoice(
        index=answer.index,
        message=ReplyMessage(content=content or (None if calls else ""), tool_calls=calls or None),
        logprobs=ChatLogprobs(content=token_infos(service.tokenizer, answer, answer.shown)) if known else None,
        finish_reason="tool_calls" if calls else answer.finish_reason,
    )


async def _events(
    service: Service, asked: ChatRequest, answers: Sequence[Answer], readers: Sequence[ReactStream | None]
) -> AsyncIterator[dict[str, Any]]:
    """OpenAI's chunks: roles, deltas, ends, and the usage if it was asked for."""
    head = head_of("chatcmpl", "chat.completion.chunk", service.name)
    with_usage = asked.stream_options is not None and asked.stream_options.include_usage
    if with_usage:
        head["usage"] = None

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, known: object = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": index, "delta": delta, "finish_reason": reason, "logprobs": known}]}

    for answer in answers:
        yield chunk(answer.index, {"role": "assistant", "content": ""})
    async for delta in service.deltas(*answers):
        answer, reader = answers[delta.index], readers[delta.index]
        text = delta.text if reader is None else reader.push(delta.text)
        infos = token_infos(service.tokenizer, answer, delta.ids) if asked.logprobs else []
        if text or infos:
            known = ChatLogprobs(content=infos).model_dump() if infos else None
            yield chunk(delta.index, {"content": text}, known=known)
    for answer, reader in zip(answers, readers, strict=True):
        rest, calls = ("", []) if reader is None else reader.finish()
        if rest:
            yield chunk(answer.index, {"content": rest})
        if calls:
            shown = [{"index": at, **call.model_dump()} for at, call in enumerate(_tool_calls(calls))]
            yield chunk(answer.index, {"tool_calls": shown})
        yield chunk(answer.index, {}, "tool_calls" if calls else answer.finish_reason)
    if with_usage:
        yield {**head, "choices": [], "usage": usage_of(answers).model_dump()}


def _tool_calls(calls: Sequence[Call]) -> list[ToolCall]:
    return [
        ToolCall(id=f"call_{uuid.uuid4().hex[:24]}", function=FunctionCall(name=call.name, arguments=call.arguments))
        for call in calls
    ]
