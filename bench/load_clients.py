"""Clients of a server under load: questions of mixed lengths about mixed pictures, some who hang up, some who lie.

Mix      what a client does next, drawn by a seed
Tally    what came of it all
crowd    so many clients at once, each one thing after the other, for so long
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx

from qwenvl.training.recipes.tiny_scenes import Split, draw, enlarged, scene

CHAT, PATIENCE = "/v1/chat/completions", 120.0
PICTURES = 24
QUESTIONS = (  # answered in one token to a hundred, by what is in the picture
    "How many shapes are there?",
    "What colour is the circle?",
    "What does the text say?",
    "Describe the picture.",
    "Describe the picture with boxes.",
    "Describe the picture with boxes.",
    "Box the square.",
    "Find all the shapes.",
    "框出所有图形。",
    "图里有什么？",
)
HANGING_UP, LYING = 0.08, 0.12  # shares of what clients do
SVG = "data:image/svg+xml;base64," + base64.b64encode(b'<svg xmlns="http://www.w3.org/2000/svg"/>').decode()
BOMB = b'{"messages": ' + b"[" * 100_000


@dataclass
class Tally:
    """What came of requests. Times are seconds.

    end                 when no client begins anything more, by `time.monotonic`
    answers, tokens     that were wanted and came whole, and the tokens of those that came until then
    refusals            by status, of lies and of what came at a full queue
    first, whole        times to the first text of a stream, and to the end of any answer
    lost                what went otherwise than it should, in words
    """

    end: float
    answers: int = 0
    tokens: int = 0
    hung_up: int = 0
    refusals: Counter[int] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    said: dict[str, str] = field(default_factory=dict)  # to a question that is asked again it says the same

    def heard(self, question: str, text: str) -> None:
        """An answer to a question; greedy, so it is always the same."""
        if self.said.setdefault(question, text) != text:
            self.lost["another answer to the same question"] += 1


class Mix:
    """Draws what clients send to the model of this name."""

    def __init__(self, model: str, seed: int = 0) -> None:
        self.model, self._random = model, random.Random(seed)
        self._pictures = [_picture(number) for number in range(PICTURES)]

    def question(self) -> dict[str, Any]:
        """A request's body: up to two pictures, up to two rounds, an answer of up to 128 tokens."""
        rng = self._random
        shown = rng.choices(self._pictures, k=rng.choice((0, 1, 1, 1, 2)))
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in shown]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": rng.choice(QUESTIONS)}]}]
        if rng.random() < 0.3:
            messages += [{"role": "assistant", "content": "Three."}, {"role": "user", "content": rng.choice(QUESTIONS)}]
        return {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": rng.choice((16, 64, 128, 128)),
            "n": 2 if rng.random() < 0.05 else 1,
            **({"stream": True, "stream_options": {"include_usage": True}} if rng.random() < 0.6 else {}),
        }

    def lie(self) -> bytes:
        """What is to be refused."""
        rng = self._random
        body = self.question()
        part: dict[str, Any] = {"type": "image_url", "image_url": {"url": rng.choice(("file:///etc/passwd", SVG))}}
        wrong = rng.choice(
            (
                {"messages": [{"role": "user", "content": [part]}]},
                {"temperature": "hot"},
                {"max_tokens": -1},
                {"n": 10**9},
                {"nonsense": True},
                {"messages": [{"role": "user", "content": "long " * 20_000}]},
            )
        )
        return rng.choice((json.dumps({**body, **wrong}).encode(), BOMB, b"\xff\x00garbage"))

    def does(self) -> str:
        """What is next."""
        chance = self._random.random()
        return "hang up" if chance < HANGING_UP else "lie" if chance < HANGING_UP + LYING else "ask"

    def moment(self) -> float:
        """Seconds until a client has had enough."""
        return self._random.uniform(0, 0.5)


async def crowd(url: str, mix: Mix, clients: int, seconds: float) -> Tally:
    """Have so many clients at once do one thing after the other. What has begun within the time is ended."""
    tally = Tally(time.monotonic() + seconds)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False, limits=limits) as http:
            while time.monotonic() < tally.end:
                action: Callable[[httpx.AsyncClient, Mix, Tally], Awaitable[None]]
                action = {"ask": _ask, "lie": _lie, "hang up": _hang_up}[mix.does()]
                try:
                    await action(http, mix, tally)
                except httpx.HTTPError as error:
                    tally.lost[type(error).__name__] += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return tally


async def _ask(http: httpx.AsyncClient, mix: Mix, tally: Tally) -> None:
    """A question, until it is answered: after a refusal at a full queue, again, when the server says."""
    body = mix.question()
    while True:
        begun = time.monotonic()
        async with http.stream("POST", CHAT, json=body) as reply:
            if reply.status_code == 200:
                texts, tokens = await (_events(reply, begun, tally) if "stream" in body else _whole(reply))
                break
            await reply.aread()
            if reply.status_code != 429:
                tally.lost[f"status {reply.status_code} to a question"] += 1
                return
            tally.refusals[429] += 1
        await asyncio.sleep(float(reply.headers["Retry-After"]))
    tally.whole.append(time.monotonic() - begun)
    if len(texts) != body["n"]:
        tally.lost["an answer without an end"] += 1
        return
    tally.answers += len(texts)
    tally.tokens += tokens if time.monotonic() < tally.end else 0
    question = json.dumps([body["messages"], body["max_tokens"]])
    for text in texts:
        tally.heard(question, text)


async def _whole(reply: httpx.Response) -> tuple[list[str], int]:
    """The texts of an answer in one piece, and its tokens."""
    await reply.aread()
    found = reply.json()
    ended = [choice for choice in found["choices"] if choice["finish_reason"] in ("stop", "length")]
    return [choice["message"]["content"] for choice in ended], found["usage"]["completion_tokens"]


async def _events(reply: httpx.Response, begun: float, tally: Tally) -> tuple[list[str], int]:
    """The same of a stream."""
    texts: dict[int, str] = {}
    ended, tokens, last = set(), 0, ""
    async for line in reply.aiter_lines():
        if not line or (last := line.removeprefix("data: ")) == "[DONE]":
            continue
        event = json.loads(last)
        for choice in event.get("choices", ()):
            if text := choice["delta"].get("content"):
                if not texts:
                    tally.first.append(time.monotonic() - begun)
                texts[choice["index"]] = texts.get(choice["index"], "") + text
            if choice["finish_reason"]:
                ended.add(choice["index"])
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return ([texts.get(index, "") for index in sorted(ended)] if last == "[DONE]" else []), tokens


async def _lie(http: httpx.AsyncClient, mix: Mix, tally: Tally) -> None:
    """Something that is to be refused, by 4xx and OpenAI's form of an error."""
    reply = await http.post(CHAT, content=mix.lie(), headers={"Content-Type": "application/json"})
    tally.refusals[reply.status_code] += 1
    if not 400 <= reply.status_code < 500 or set(reply.json()) != {"error"}:
        tally.lost[f"status {reply.status_code} to a lie"] += 1


async def _hang_up(http: httpx.AsyncClient, mix: Mix, tally: Tally) -> None:
    """A question whose answer nobody waits for."""
    with anyio.move_on_after(mix.moment()):
        async with http.stream("POST", CHAT, json=mix.question()) as reply:
            await reply.aread()
    tally.hung_up += 1


def _picture(number: int) -> str:
    """A data URL of a picture: from 128 to 960 pixels wide, PNG or JPEG."""
    file = io.BytesIO()
    drawn = draw(enlarged(scene(Split.TEST.seed(number)), 1 + number % 4))
    kind = ("PNG", "JPEG")[number % 2]
    drawn.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
