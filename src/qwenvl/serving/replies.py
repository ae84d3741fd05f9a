"""From answers to what is sent: whole, or event by event.

EventStream      answers as server-sent events, which end when the client leaves
unless_gone      work that is dropped when the client leaves
options_of       a request's sampling options
usage_of         tokens of a request
token_infos      log-probabilities as OpenAI shows them
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..config import SamplingOptions
from ..text.stream import texts
from ..text.tokenizer import Tokenizer
from .answers import Answer
from .refusals import Refused
from .schema import ChatRequest, CompletionRequest, PromptDetails, TokenInfo, TopToken, Usage
from .service import Service

Result = TypeVar("Result")
COLD = 1e-4  # a temperature below is greedy, as 0 is: scores divided by it may leave float32's range
OPTIONS = ("temperature", "top_p", "top_k", "seed", "frequency_penalty", "presence_penalty", "repetition_penalty")


class EventStream(StreamingResponse):
    """Events, each a JSON object, with [DONE] behind the last. Whatever ends it, the answers are closed.

    A refusal in the middle becomes an event of its own, as OpenAI's clients expect it.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any]], answers: Sequence[Answer]) -> None:
        super().__init__(_lines(events), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            for answer in self._answers:
                answer.close()


async def _lines(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield f"data: {json.dumps(event)}\n\n"
        yield "data: [DONE]\n\n"
    except Refused as refused:
        yield f"data: {json.dumps(refused.body)}\n\n"


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled as soon as the client has hung up."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refused(499, "the client has left", code="client_left")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def whole(service: Service, answers: Sequence[Answer]) -> None:
    """Read answers to their ends; close them, should that fail."""
    try:
        async for _ in service.deltas(*answers):
            pass
    finally:
        for answer in answers:
            answer.close()


def check_model(service: Service, name: str) -> None:
    """Raises Refused for a model that is not served here."""
    if name != service.name:
        raise Refused(
            404, f"there is no model {name!r} here, only {service.name!r}", code="model_not_found", param="model"
        )


def options_of(service: Service, asked: ChatRequest | CompletionRequest, max_tokens: int | None) -> SamplingOptions:
    """Sampling options: the checkpoint's, with what was asked for in their place. A temperature of 0 is greedy."""
    given = {name: value for name in OPTIONS if (value := getattr(asked, name)) is not None}
    if "temperature" in given:
        given["do_sample"] = given["temperature"] >= COLD
        if not given["do_sample"]:
            del given["temperature"]
    if "seed" in given:
        given["seed"] %= 2**63
    if "top_k" in given:
        given["top_k"] = max(given["top_k"], 0)
    return SamplingOptions.from_config(service.pipeline.generation_config, max_new_tokens=max_tokens, **given)


def stops_of(asked: ChatRequest | CompletionRequest) -> tuple[str, ...]:
    """The texts that end an answer."""
    return texts(asked.stop)


def usage_of(answers: Sequence[Answer]) -> Usage:
    """Tokens: of a prompt once, however many answers it has."""
    prompts = {tuple(answer.request.prompt): answer.request for answer in reversed(answers)}
    prompt = sum(map(len, prompts))
    new = sum(len(answer.request.ids) for answer in answers)
    reused = sum(request.reused for request in prompts.values())
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=new,
        total_tokens=prompt + new,
        prompt_tokens_details=PromptDetails(cached_tokens=reused),
    )


def head_of(kind: str, name: str, model: str) -> dict[str, Any]:
    """What every answer and every event of it begins with."""
    return {"id": f"{kind}-{uuid.uuid4().hex}", "object": name, "created": int(time.time()), "model": model}


def token_infos(tokenizer: Tokenizer, answer: Answer, ids: range) -> list[TokenInfo]:
    """Some of an answer's tokens with their log-probabilities, and of the most likely ones in their places."""
    request = answer.request

    def shown(id_: int, likely: float) -> TopToken:
        # A log-probability of minus infinity is no JSON.
        data = tokenizer.token_bytes(id_)
        return TopToken(token=data.decode("utf-8", "replace"), logprob=max(likely, -9999.0), bytes=list(data))

    infos = []
    for at in ids:
        top = request.top_log_probabilities[at] if request.top_log_probabilities else []
        top = [pair for pair in top if pair[0] < tokenizer.n_vocab]  # the head is wider
        token = shown(request.ids[at], request.log_probabilities[at])
        infos.append(TokenInfo(**token.model_dump(), top_logprobs=[shown(*pair) for pair in top]))
    return infos
