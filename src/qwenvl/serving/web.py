"""The web page: pictures, a chat in rounds, boxes on the picture, in English and Chinese, on the server's own app.

mount_page     put the page at "/" of an app
create_page    the page alone

The server keeps no conversation: the chat comes with each click from the browser and goes back to it. Only the files
of pictures stay, for as long as `KEPT`. Answers come from the same engine as the API's.
"""

from __future__ import annotations

import asyncio
import html
import io
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import gradio as gr
from fastapi import FastAPI
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder
from PIL import Image
from starlette.routing import Mount

from ..draw import draw_regions
from ..errors import QwenVLError
from ..text.boxes import parse_spans
from .desk import STYLE, Desk, Updates
from .examples import EXAMPLES
from .gate import Gate, Page, log_in
from .panel import escaped, nothing, overlay
from .refusals import Refused, mistake
from .rounds import Message, Round, answer, kept, messages_of, opened, rounds_of
from .service import Service
from .wording import WORDINGS, Wording

KEPT = 2 * 3600  # seconds that a picture's file stays
DOWNLOADED = 2048  # pixels that the longer side of the annotated picture has at most
# What Gradio imports at the first click if it is there, on the event loop, where everyone would wait for it.
AHEAD, AHEAD_AFTER = ("pandas", "matplotlib.pyplot"), 2.0  # seconds, when the server has started
FONTS = ("system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif")
NOTHING_TYPED: dict[str, Any] = {"text": "", "files": []}
_log = logging.getLogger(__name__)


def mount_page(app: FastAPI, service: Service) -> FastAPI:
    """Put the page at "/" of an app. What the app answers already goes on; what is added later would not be reached.

    Where the settings have API keys, the page asks for one of them.
    """
    keys = service.settings.api_keys
    theme = gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=("ui-monospace", "monospace")
    )
    gr.mount_gradio_app(
        app,
        create_page(service),
        path="/",
        auth=log_in(keys) if keys else None,
        allowed_paths=[],
        max_file_size=service.settings.max_image_bytes,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=STYLE,
        css_paths=[Path(__file__).with_name("page.css")],
    )
    mounted = next(route.app for route in reversed(app.routes) if isinstance(route, Mount))
    cast(FastAPI, mounted).add_middleware(Gate)
    ahead = threading.Timer(AHEAD_AFTER, _import_ahead)
    ahead.daemon = True
    ahead.start()
    return app


def _import_ahead() -> None:
    for name in AHEAD:
        with suppress(ImportError):
            import_module(name)


def create_page(service: Service) -> gr.Blocks:
    """The page over a service, not mounted yet."""
    page = Page(analytics_enabled=False, title=service.name, delete_cache=(KEPT // 8, KEPT))
    with page:
        _Clerk(service).connect()
    page.queue(api_open=False, default_concurrency_limit=None)  # the service has limits of its own
    return page


class _Clerk:
    """What happens at the desk: a method for each thing that people press."""

    def __init__(self, service: Service) -> None:
        self.service, self.desk = service, Desk(service)

    def connect(self) -> None:
        """Have the components call the methods."""
        desk = self.desk
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        chat, asked = [desk.chat, desk.language], [desk.chat, desk.language, *desk.chosen]
        running: list[Any] = [
            desk.box.submit(self.send, [desk.box, *asked], desk.changing, **quiet),
            desk.again.click(self.regenerate, asked, desk.changing, **quiet),
            desk.chat.edit(self.edit, asked, desk.changing, **quiet),
        ]
        desk.box.stop(self.stopped, chat, desk.changing, cancels=running, **quiet)
        desk.undo.click(self.take_back, chat, desk.changing, **quiet)
        desk.clear.click(self.empty, [desk.language], desk.changing, **quiet)
        for number, button in enumerate(desk.examples):
            button.click(self.offer(number), [desk.language], desk.changing, **quiet)
        labelled = list(desk.labels("en"))
        desk.language.change(self.translate, chat, [*labelled, desk.picture], **quiet)

    # ---- answers

    async def send(
        self,
        typed: dict[str, Any],
        messages: list[Message],
        language: str,
        *chosen: Any,  # noqa: ANN401
    ) -> AsyncIterator[Updates]:
        """Answer what was typed."""
        words, most = WORDINGS[language], self.service.settings.max_images
        asked = Round(tuple(typed["files"]), typed["text"].strip())
        if not (asked.text or asked.pictures):
            _tell(words.nothing_to_send)
            yield self.desk.ready(words)
        elif len(asked.pictures) > most:
            _tell(words.too_many.format(most))
            yield self.desk.ready(words)
        else:
            past = rounds_of(messages)
            before = {self.desk.chat: _value(messages_of(past)), self.desk.box: _value(_typed(asked))}
            async for updates in self._answer([*past, asked], before, words, chosen):
                yield updates

    async def regenerate(
        self,
        messages: list[Message],
        language: str,
        *chosen: Any,  # noqa: ANN401
    ) -> AsyncIterator[Updates]:
        """Answer the latest message anew."""
        words, rounds = WORDINGS[language], rounds_of(messages)
        if not rounds:
            _tell(words.nothing_to_repeat)
            yield self.desk.ready(words)
            return
        before = {self.desk.chat: _value(messages_of(rounds))}
        async for updates in self._answer([*rounds[:-1], replace(rounds[-1], reply=None)], before, words, chosen):
            yield updates

    async def edit(
        self,
        event: gr.EditData,
        messages: list[Message],
        language: str,
        *chosen: Any,  # noqa: ANN401
    ) -> AsyncIterator[Updates]:
        """Answer an edited message; what was said after it is forgotten. If it is refused, nothing has changed."""
        words, rounds = WORDINGS[language], rounds_of(messages)
        place, texts = event.index, (event.value, event.previous_value)
        number = len(rounds_of(messages[: place + 1])) - 1 if isinstance(place, int) and place >= 0 else -1
        if number < 0 or not all(isinstance(text, str) for text in texts):
            yield self.desk.ready(words)
            return
        text, previous = map(html.unescape, texts)
        edited = Round(rounds[number].pictures, text.strip())
        rounds[number] = replace(rounds[number], text=previous)  # the browser has put the new text there already
        before = {self.desk.chat: _value(messages_of(rounds)), self.desk.box: _value({"text": text, "files": []})}
        async for updates in self._answer([*rounds[:number], edited], before, words, chosen):
            yield updates

    async def _answer(
        self, rounds: Sequence[Round], before: Updates, words: Wording, chosen: Sequence[Any]
    ) -> AsyncIterator[Updates]:
        """Answer the last of these rounds. If nothing comes of it, the page goes back to `before`."""
        *past, asked = rounds
        marked = 0
        shown = {self.desk.chat: _value(messages_of(rounds)), self.desk.box: _value(NOTHING_TYPED)}
        yield _merged(self.desk.busy(words), shown)
        try:
            options = self.desk.options(chosen)
            picture = await self._latest_picture(rounds)
            yield {self.desk.picture: _value(_shown(picture, "", words))}
            async with aclosing(answer(self.service, rounds, options)) as replies:
                async for reply in replies:
                    asked = replace(asked, reply=reply)
                    updates: Updates = {self.desk.chat: _value(messages_of([*past, asked]))}
                    if marked != (marked := len(parse_spans(reply))):
                        updates[self.desk.picture] = _value(_shown(picture, reply, words))
                    yield updates
            asked = replace(asked, reply=asked.reply or "")
        except QwenVLError as error:
            _tell(words.refusal(mistake(error)))
        except Refused as error:
            _tell(words.refusal(error))
        except Exception:
            _log.exception("an answer on the page failed")
            _tell(words.refusal(Refused(500, "the server's log says why", code="internal_error")))
        result = before if asked.reply is None else await self._result([*past, asked], words)
        yield _merged(self.desk.ready(words), result)

    async def stopped(self, messages: list[Message], language: str) -> Updates:
        """Gradio has ended the answer, which frees the engine. What has been said stays."""
        words = WORDINGS[language]
        return _merged(self.desk.ready(words), await self._result(rounds_of(messages), words))

    # ---- the conversation

    async def take_back(self, messages: list[Message], language: str) -> Updates:
        """Take the latest message out of the chat, to where it was typed."""
        words, rounds = WORDINGS[language], rounds_of(messages)
        typed = {self.desk.box: _value(_typed(rounds[-1]))} if rounds else {}
        return _merged(self.desk.ready(words), {**await self._result(rounds[:-1], words), **typed})

    async def empty(self, language: str) -> Updates:
        """Begin anew."""
        words = WORDINGS[language]
        return _merged(self.desk.ready(words), await self._result([], words))

    def offer(self, number: int) -> Callable[[str], Any]:
        """What an example's button does: begin anew, with its question typed."""

        async def offered(language: str) -> Updates:
            typed = {"text": EXAMPLES[number].questions[language], "files": self.desk.example_files[number]}
            return _merged(await self.empty(language), {self.desk.box: _value(typed)})

        return offered

    async def translate(self, messages: list[Message], language: str) -> Updates:
        """Another language, everywhere."""
        result = await self._result(rounds_of(messages), WORDINGS[language])
        return {**self.desk.labels(language), self.desk.picture: result[self.desk.picture]}

    async def _result(self, rounds: Sequence[Round], words: Wording) -> Updates:
        """A conversation that rests: the chat, the latest picture with what the latest reply marks, its download."""
        reply = (rounds[-1].reply or "") if rounds else ""
        shown, file = nothing(words), None
        try:
            if picture := await self._latest_picture(rounds):
                shown = _shown(picture, reply, words)
                file = await asyncio.to_thread(self._annotated, picture[1], reply)
        except (QwenVLError, Refused):
            pass  # its file has been cleared away, which is no reason to lose the words
        return {
            self.desk.chat: _value(messages_of(rounds)),
            self.desk.picture: _value(shown),
            self.desk.download: gr.update(value=file, visible=file is not None),
        }

    async def _latest_picture(self, rounds: Sequence[Round]) -> tuple[str, Image.Image] | None:
        """The path and the picture that boxes are drawn on: as in the reference, the last one that was shown."""
        path = next((one.pictures[-1] for one in reversed(rounds) if one.pictures), None)
        return None if path is None else (path, await asyncio.to_thread(opened, path, self.service))

    def _annotated(self, picture: Image.Image, reply: str) -> str | None:
        """The file of the annotated picture, in Gradio's folder; None where a reply marks nothing."""
        if not (regions := parse_spans(reply)):
            return None
        picture.thumbnail((DOWNLOADED, DOWNLOADED))
        file = io.BytesIO()
        draw_regions(picture, regions, self.service.pipeline.font, self.service.settings.policy).save(file, "PNG")
        path: str = save_bytes_to_cache(file.getvalue(), "boxes.png", get_upload_folder())
        return path


def _shown(picture: tuple[str, Image.Image] | None, reply: str, words: Wording) -> str:
    """The picture with what a reply marks, as the page shows it."""
    if picture is None:
        return nothing(words)
    path, image = picture
    return overlay(f"gradio_api/file={quote(path)}", image.size, reply, words)


def _typed(one: Round) -> dict[str, Any]:
    """A message as the box takes it, without pictures that are gone."""
    return {"text": one.text, "files": [path for path in one.pictures if kept(path)]}


def _tell(line: str) -> None:
    """One line to the person, which is gone after a while."""
    gr.Warning(escaped(line))


def _value(value: Any) -> dict[str, Any]:  # noqa: ANN401 - as the component takes it
    update: dict[str, Any] = gr.update(value=value)
    return update


def _merged(first: Updates, second: Updates) -> Updates:
    """Both; where they concern the same component, the second's properties beside the first's."""
    return {key: {**first.get(key, {}), **second.get(key, {})} for key in {**first, **second}}
