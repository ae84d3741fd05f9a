"""/v1/completions and /v1/grounding: how base checkpoints are asked.

answer_completion   texts that go on
answer_grounding    where a phrase is in a picture
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from typing import Any

from fastapi import Request

from ..generation.sampling import SamplingOptions
from ..image import open_image
from ..pipeline import GROUNDING_TOKENS, grounded, grounding_query
from ..text.prompt import raw_prompt
from .answers import Answer, Question
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
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    FoundBox,
    Grounding,
    GroundingRequest,
    ImageUrl,
    TokenInfo,
)
from .service import Service


async def answer_completion(service: Service, request: Request, asked: CompletionRequest) -> Completion | EventStream:
    """Go on with texts. Raises Refused, PromptError, ConfigError."""
    check_model(service, asked.model)
    options = options_of(service, asked, asked.max_tokens)
    prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
    n, stop = asked.n or 1, stops_of(asked)
    pictures = [{"image": _url(image)} for image in asked.images or ()]

    def make() -> list[Question]:
        for text in prompts:
            service.require_room(len(text))
        n_queries = service.pipeline.config.visual.n_queries
        return [
            Question(
                raw_prompt(service.tokenizer, [*pictures, {"text": text}], n_queries=n_queries, numbered=False),
                options,
                n,
                stop=stop,
                strip=False,
                top=asked.logprobs,
            )
            for text in prompts
        ]

    answers = await unless_gone(request, service.ask(make, n * len(prompts), shows=bool(asked.images)))
    if asked.stream:
        return EventStream(_events(service, asked, answers), answers)
    await unless_gone(request, whole(service, answers))
    choices = [
        CompletionChoice(
            index=answer.index,
            text=answer.text,
            logprobs=None
            if asked.logprobs is None
            else _logprobs(token_infos(service.tokenizer, answer, answer.shown)),
            finish_reason=answer.finish_reason,
        )
        for answer in answers
    ]
    return Completion(**head_of("cmpl", "text_completion", service.name), choices=choices, usage=usage_of(answers))


async def _events(
    service: Service, asked: CompletionRequest, answers: Sequence[Answer]
) -> AsyncIterator[dict[str, Any]]:
    """OpenAI's chunks: deltas, ends, and the usage if it was asked for."""
    head = head_of("cmpl", "text_completion", service.name)
    with_usage = asked.stream_options is not None and asked.stream_options.include_usage
    if with_usage:
        head["usage"] = None

    def chunk(index: int, text: str, reason: str | None = None, logprobs: object = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}]}

    offsets = [0] * len(answers)
    async for delta in service.deltas(*answers):
        known = None
        if asked.logprobs is not None and delta.ids:
            infos = token_infos(service.tokenizer, answers[delta.index], delta.ids)
            known = _logprobs(infos, offsets[delta.index]).model_dump()
            offsets[delta.index] += sum(len(info.token) for info in infos)
        if delta.text or known:
            yield chunk(delta.index, delta.text, logprobs=known)
    for answer in answers:
        yield chunk(answer.index, "", answer.finish_reason)
    if with_usage:
        yield {**head, "choices": [], "usage": usage_of(answers).model_dump()}


def _logprobs(infos: Sequence[TokenInfo], offset: int = 0) -> CompletionLogprobs:
    """The older form of log-probabilities; `offset` is where the first token's text begins."""
    offsets = []
    for info in infos:
        offsets.append(offset)
        offset += len(info.token)
    return CompletionLogprobs(
        tokens=[info.token for info in infos],
        token_logprobs=[info.logprob for info in infos],
        top_logprobs=[{top.token: top.logprob for top in info.top_logprobs} for info in infos],
        text_offset=offsets,
    )


async def answer_grounding(service: Service, request: Request, asked: GroundingRequest) -> Grounding:
    """Find a phrase in a picture, as `Pipeline.ground` does. Raises Refused, PromptError."""
    if asked.model is not None:
        check_model(service, asked.model)
    size = [0, 0]

    def make() -> list[Question]:
        picture = open_image(_url(asked.image), service.settings.policy)
        size[:] = picture.size
        query = grounding_query(picture, asked.phrase)
        prompt = raw_prompt(
            service.tokenizer, query, n_queries=service.pipeline.config.visual.n_queries, numbered=False
        )
        return [Question(prompt, SamplingOptions(max_new_tokens=GROUNDING_TOKENS), strip=False)]

    (answer,) = await unless_gone(request, service.ask(make))
    await unless_gone(request, whole(service, [answer]))
    boxes = grounded(answer.text, asked.phrase, size[0], size[1])
    return Grounding(
        model=service.name,
        boxes=[FoundBox(**asdict(box)) for box in boxes],
        width=size[0],
        height=size[1],
        usage=usage_of([answer]),
    )


def _url(image: str | ImageUrl) -> str:
    return image if isinstance(image, str) else image.url
