"""A conversation as the web page has it: it travels with the browser, so nothing in it is trusted.

Round        a message with its pictures, and the reply
rounds_of    what the browser sent as rounds; messages_of, the way back
kept         an uploaded file's path, checked
opened       such a picture, under the server's policy
answer       the reply to the latest round, as it grows
"""

from __future__ import annotations

import html
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder
from PIL import Image

from ..config import SamplingOptions
from ..errors import ImageError
from ..image import open_image
from ..pictures import PictureStore, stored
from ..text.parts import Part, Turn
from ..text.prompt import stop_strings
from .answers import Question
from .panel import bubble, escaped, text_of
from .refusals import Refused
from .service import Service

Message = dict[str, Any]


@dataclass(frozen=True)
class Round:
    """A message: paths of uploaded pictures, and a text. `reply` is None as long as there is none."""

    pictures: tuple[str, ...]
    text: str
    reply: str | None = None


def rounds_of(messages: Sequence[Mapping[str, Any]]) -> list[Round]:
    """The rounds that these messages of a chat show. What is neither a text nor a picture is left out."""
    rounds: list[Round] = []
    open_ = False  # pictures have been shown, and what is asked about them comes next
    for message in messages:
        text = "\n".join(piece["text"] for piece in message["content"] if piece["type"] == "text")
        if message["role"] == "user":
            pictures = tuple(piece["file"]["path"] for piece in message["content"] if piece["type"] == "file")
            shown = rounds.pop().pictures if open_ else ()
            rounds.append(Round((*shown, *pictures), html.unescape(text)))
            open_ = not text
        elif message["role"] == "assistant" and rounds:
            rounds[-1] = replace(rounds[-1], reply=text_of(text))
            open_ = False
    return rounds


def messages_of(rounds: Sequence[Round]) -> list[Message]:
    """The messages that show these rounds, escaped. A message is of one piece: others cannot be edited."""
    messages: list[Message] = []
    for one in rounds:
        pieces = [*({"path": path} for path in one.pictures), *([_text(escaped(one.text))] if one.text else [])]
        messages += [{"role": "user", "content": [piece]} for piece in pieces]
        if one.reply is not None:
            messages.append({"role": "assistant", "content": [_text(bubble(one.reply))]})
    return messages


def _text(shown: str) -> Message:
    return {"type": "text", "text": shown}


def kept(path: str) -> Path | None:
    """The path of a file that lies in Gradio's folder of uploads, links resolved; None for any other."""
    folder = Path(get_upload_folder()).resolve()
    try:
        real = Path(path).resolve(strict=True)
        return real if real.is_file() and folder in real.parents else None
    except (OSError, ValueError, RuntimeError):  # not there, a null character, a loop of links
        return None


def opened(path: str, service: Service) -> Image.Image:
    """An uploaded picture, turned as its camera says, so that the model sees what the browser shows.

    Raises Refused where it is not there, ImageError where it is no picture or too large.
    """
    if (real := kept(path)) is None:
        raise Refused(400, "a picture of this conversation is not here: add it again", code="picture_gone")
    policy = service.settings.policy
    try:
        with real.open("rb") as file:
            data = file.read(policy.max_bytes + 1)  # one more than allowed, so that the policy can tell
    except OSError as error:
        raise ImageError(f"cannot read the picture: {error.strerror}") from None
    return open_image(data, policy, exif_orientation=True)


def question(service: Service, rounds: Sequence[Round], options: SamplingOptions) -> Question:
    """The latest round as a question after the others. The oldest are left out where there are too many pictures.

    Raises Refused, ImageError, PromptError. For a thread: it opens the pictures.
    """
    pipeline, settings = service.pipeline, service.settings
    *past, asked = rounds
    images: PictureStore = {}

    def parts(one: Round) -> list[Part]:
        shown: list[Part] = [stored({"image": opened(path, service)}, images, settings.policy) for path in one.pictures]
        return [*shown, {"text": one.text}] if one.text else shown

    query = parts(asked)
    turns: list[Turn] = []
    room = settings.max_images - len(asked.pictures)
    for one in reversed(past if pipeline.generation_config.chat_format != "raw" else []):
        room -= len(one.pictures)
        if room < 0:
            break
        turns.insert(0, Turn(parts(one), one.reply))
    prompt = pipeline.chat_prompt(query, turns, max_new_tokens=options.max_new_tokens)
    return Question(prompt, options, stop=stop_strings(pipeline.generation_config.chat_format), images=images)


async def answer(service: Service, rounds: Sequence[Round], options: SamplingOptions) -> AsyncGenerator[str, None]:
    """The reply to the latest round so far, each time that it has grown. Raises Refused.

    Closing this iterator ends the answer, and gives its row of the engine back.
    """
    shows = any(one.pictures for one in rounds)
    (found,) = await service.ask(lambda: [question(service, rounds, options)], shows=shows)
    try:
        async for delta in service.deltas(found):
            if delta.text:
                yield found.text
    finally:
        found.close()
