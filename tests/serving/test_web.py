"""What happens at the page's desk: handlers, without a browser."""

from __future__ import annotations

import asyncio
import dataclasses
import html
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from pictures import encoded
from PIL import Image
from web_pages import GREEDY, tiny_service

from qwenvl.config import SamplingOptions
from qwenvl.demo import draw_scene
from qwenvl.errors import ConfigError, ImageError
from qwenvl.serving.desk import Desk
from qwenvl.serving.examples import EXAMPLES
from qwenvl.serving.refusals import Refused
from qwenvl.serving.rounds import Round, messages_of, opened, question, rounds_of
from qwenvl.serving.service import Service
from qwenvl.serving.web import _Clerk, create_page
from qwenvl.serving.wording import CHINESE, ENGLISH, TINY_NOTE, WORDINGS


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Gradio's folder of uploads."""
    folder = tmp_path / "uploads"
    (folder / "a").mkdir(parents=True)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    return folder


@pytest.fixture
def upload(uploads: Path) -> Callable[..., str]:
    """Put a file there, as an upload does."""

    def put(data: bytes | Image.Image, name: str = "picture.png") -> str:
        path = uploads / "a" / name
        path.write_bytes(encoded(data) if isinstance(data, Image.Image) else data)
        return str(path)

    return put


def at_the_desk(act: Callable[[_Clerk], Coroutine[Any, Any, None]], **settings: Any) -> None:
    """Run `act` with the handlers of a page over a service that runs."""

    async def run() -> None:
        service = tiny_service(**settings)
        with gr.Blocks(analytics_enabled=False):
            clerk = _Clerk(service)
        await service.start()
        try:
            await act(clerk)
            assert service.busy == 0
        finally:
            await service.stop()

    asyncio.run(run())


async def shown_by(clerk: _Clerk, updates: AsyncIterator[dict[Any, Any]]) -> dict[Any, dict[str, Any]]:
    """What stands on the page after all of these updates: component -> its properties."""
    state: dict[Any, dict[str, Any]] = {}
    async for update in updates:
        assert set(update) <= set(clerk.desk.changing)
        for component, properties in update.items():
            state.setdefault(component, {}).update(properties)
    return state


def rounds_in(clerk: _Clerk, state: dict[Any, dict[str, Any]]) -> list[Round]:
    """The rounds that the chat shows, through Gradio's forms."""
    chat = clerk.desk.chat
    return rounds_of(chat.preprocess(chat.postprocess(state[chat]["value"])))


def messages(clerk: _Clerk, *rounds: Round) -> list[Any]:
    """What a browser would send of these rounds."""
    chat = clerk.desk.chat
    sent: list[Any] = chat.preprocess(chat.postprocess(messages_of(rounds)))
    return sent


def test_send_regenerate_edit_take_back(upload: Callable[..., str]) -> None:
    """The life of a conversation, of which the server keeps nothing."""
    path = upload(draw_scene()[0])

    async def act(clerk: _Clerk) -> None:
        desk = clerk.desk
        state = await shown_by(clerk, clerk.send({"text": " Box the red circle. ", "files": [path]}, [], "en", *GREEDY))
        (first,) = rounds_in(clerk, state)
        assert first.pictures == (path,)
        assert first.text == "Box the red circle."
        assert re.fullmatch(r"<ref>red circle</ref><box>\([\d,()]*\)</box>", first.reply or "")
        assert "red circle" in state[desk.picture]["value"]
        assert Image.open(state[desk.download]["value"]).size == (640, 448)
        assert state[desk.box] == {**gr.update(value={"text": "", "files": []}, submit_btn="Send", stop_btn=False)}
        assert state[desk.again]["interactive"] is True

        sent = messages(clerk, first)
        state = await shown_by(clerk, clerk.send({"text": "What colour is it?", "files": []}, sent, "zh", *GREEDY))
        both = rounds_in(clerk, state)
        assert both == [first, Round((), "What colour is it?", "red")]
        assert state[desk.download]["visible"] is False

        sent = messages(clerk, *both)
        assert rounds_in(clerk, await shown_by(clerk, clerk.regenerate(sent, "en", *GREEDY))) == both
        words = {"index": 1, "value": "Box the blue &lt;square.", "previous_value": "Box the red circle."}
        sent[1]["content"][0]["text"] = words["value"]  # as the browser does
        state = await shown_by(clerk, clerk.edit(gr.EditData(None, words), sent, "en", *GREEDY))
        (edited,) = rounds_in(clerk, state)
        assert edited.pictures == (path,)
        assert edited.text == "Box the blue <square."

        state = await clerk.take_back(messages(clerk, *both), "en")
        assert rounds_in(clerk, state) == [first]
        assert state[desk.box]["value"] == {"text": "What colour is it?", "files": []}
        state = await clerk.take_back(messages(clerk, first), "en")
        assert rounds_in(clerk, state) == []
        assert state[desk.box]["value"] == {"text": "Box the red circle.", "files": [path]}
        assert rounds_in(clerk, await clerk.take_back([], "en")) == []

    at_the_desk(act)


def test_refusals_give_everything_back(upload: Callable[..., str]) -> None:
    """A broken picture, too many, nothing at all, impossible settings, a server that stops: one line."""
    good, broken = upload(Image.new("RGB", (30, 30))), upload(b"nothing", "broken.png")

    async def act(clerk: _Clerk) -> None:
        desk, before = clerk.desk, Round((), "Hello", "there")

        async def refused(typed: dict[str, Any], says: str, *chosen: Any) -> None:
            sent = messages(clerk, before)
            with pytest.warns(UserWarning, match=re.escape(html.escape(says, quote=False))):
                state = await shown_by(clerk, clerk.send(typed, sent, "en", *(chosen or GREEDY)))
            if desk.chat in state and "value" in state[desk.chat]:
                assert rounds_in(clerk, state) == [before]
                assert state[desk.box]["value"] == typed
            assert state[desk.box]["submit_btn"] == "Send"
            assert state[desk.chat]["editable"] == "user"

        await refused({"text": "a", "files": [broken]}, "is not a picture")
        await refused({"text": "a", "files": [good] * 3}, "2 pictures")
        await refused({"text": " ", "files": []}, ENGLISH.nothing_to_send)
        await refused({"text": "a", "files": []}, "seed must be", *GREEDY[:-1], "x<y")
        await refused({"text": "a", "files": []}, "top_k must be", "sampled", 1.0, 1.0, -1, 1.0, 64, "")
        await refused({"text": "a" * 3000, "files": []}, "the model's context is")
        edited = gr.EditData(None, {"index": 0, "value": "new " * 3000, "previous_value": "Hello"})
        with pytest.warns(UserWarning, match="context"):
            state = await shown_by(clerk, clerk.edit(edited, messages(clerk, before), "en", *GREEDY))
        assert rounds_in(clerk, state) == [before]
        assert state[desk.box]["value"] == {"text": "new " * 3000, "files": []}
        clerk.service.refuse_more()
        await refused({"text": "a", "files": []}, "stopping")
        with pytest.warns(UserWarning, match="正在停止"):
            state = await shown_by(clerk, clerk.regenerate(messages(clerk, before), "zh", *GREEDY))
        assert rounds_in(clerk, state) == [before]

    at_the_desk(act, max_images=2)


def test_a_fault_of_ours_is_a_line_as_well(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The traceback is in the log, and the page can be used again."""

    async def broken(*_: object) -> AsyncIterator[str]:
        yield "begun"
        raise KeyError("of ours")

    monkeypatch.setattr("qwenvl.serving.web.answer", broken)

    async def act(clerk: _Clerk) -> None:
        with pytest.warns(UserWarning, match="the server's log says why"):
            state = await shown_by(clerk, clerk.send({"text": "a", "files": []}, [], "en", *GREEDY))
        assert rounds_in(clerk, state) == [Round((), "a", "begun")]
        assert state[clerk.desk.box]["submit_btn"] == "Send"

    at_the_desk(act)
    assert "KeyError" in caplog.text


def test_whoever_leaves_frees_the_engine() -> None:
    """Closing the handler ends the answer, wherever it is."""

    async def act(clerk: _Clerk) -> None:
        chosen = ("sampled", 1.0, 1.0, 0, 1.0, 1000, "1")
        for reads in (1, 2, 4):
            updates = clerk.send({"text": "Describe everything", "files": []}, [], "en", *chosen)
            for _ in range(reads):
                await anext(updates)
            await updates.aclose()  # type: ignore[attr-defined]
            for _ in range(200):
                if not clerk.service.busy:
                    break
                await asyncio.sleep(0.02)
            assert clerk.service.busy == 0

    at_the_desk(act)


def test_pictures_gone_and_too_many(uploads: Path, upload: Callable[..., str]) -> None:
    """A picture that was cleared away is named; of a long conversation the oldest rounds are left out."""
    service = tiny_service(max_images=2)
    path = upload(Image.new("RGB", (30, 30)))
    with pytest.raises(Refused) as caught:
        opened(str(uploads / "a" / "gone.png"), service)
    assert caught.value.code == "picture_gone"
    assert CHINESE.refusal(caught.value).startswith("对话中的一张图片")
    rounds = [Round((path,), f"{i}", "a") for i in range(4)] + [Round((path,), "now")]
    asked = question(service, rounds, SamplingOptions(max_new_tokens=8))
    assert len(asked.prompt.images) == 2
    assert len(asked.images) == 1  # the same picture twice
    large = upload(b"x" * 2000, "large.png")
    with pytest.raises(ImageError, match="limit of 1000"):
        opened(large, tiny_service(max_image_bytes=1000))


def test_pictures_stand_as_they_were_taken(upload: Callable[..., str]) -> None:
    """A phone's photograph is turned as its camera noted: browsers show it so, and boxes must fit what they show."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = upload(encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif), "phone.jpg")
    assert opened(path, tiny_service()).size == (20, 40)


def test_every_label_is_translated() -> None:
    """Every component that says something says it in Chinese, and nothing else of it changes."""

    async def act(clerk: _Clerk) -> None:
        chosen = await clerk.translate(messages(clerk, Round((), "hello", "there")), "zh")
        for component, update in chosen.items():
            texts = [text for text in update.values() if isinstance(text, str) and text != "update"]
            assert any(re.search(r"[\u4e00-\u9fff]", text) for text in texts), (component, update)
        assert "value" not in chosen[clerk.desk.chat]
        speaking = (gr.Button, gr.DownloadButton, gr.Markdown, gr.HTML, gr.Radio, gr.Slider, gr.Number, gr.Textbox)
        others = (gr.Accordion, gr.Chatbot, gr.MultimodalTextbox)
        said = {component for component in vars(clerk.desk).values() if isinstance(component, speaking + others)}
        assert said | set(clerk.desk.examples) == set(chosen)

    at_the_desk(act)


def test_the_page_says_what_the_model_is() -> None:
    """Its name, escaped; that it is a demonstration; that a base checkpoint does not remember."""
    service = tiny_service(name="<i>my</i> ${model}")
    with gr.Blocks(analytics_enabled=False):
        head = Desk(service).head.value
    assert "<h1>&lt;i&gt;my&lt;/i&gt; &#36;&#123;model&#125;</h1>" in head
    assert TINY_NOTE in head
    assert ENGLISH.base not in head
    service.pipeline.generation_config = dataclasses.replace(service.pipeline.generation_config, chat_format="raw")
    with gr.Blocks(analytics_enabled=False):
        assert ENGLISH.base in Desk(service).head.value
    asked = question(service, [Round((), "first", "reply"), Round((), "second")], SamplingOptions())
    assert asked.prompt.ids == service.tokenizer.encode("second")
    assert asked.stop == ("Human:",)


def test_settings_become_options() -> None:
    """As they stand; what is left empty is the checkpoint's."""
    with gr.Blocks(analytics_enabled=False):
        desk = Desk(tiny_service())
    assert desk.options(("sampled", 0.5, 0.9, 20, 1.1, 33, " 7 ")) == SamplingOptions(
        do_sample=True, temperature=0.5, top_p=0.9, top_k=20, repetition_penalty=1.1, max_new_tokens=33, seed=7
    )
    assert desk.options(("greedy", None, None, None, None, None, None)) == SamplingOptions(max_new_tokens=192)
    for seed in ("-1", "x", "1" * 30):
        with pytest.raises(ConfigError, match="seed"):
            desk.options(("greedy", 1.0, 1.0, 0, 1.0, 8, seed))


def test_the_page_is_quiet() -> None:
    """No function can be called by name, the limits are the service's, and files do not stay for ever."""
    page = create_page(tiny_service())
    assert all(function.api_visibility == "private" for function in page.fns.values())
    assert page._queue.default_concurrency_limit is None
    assert page.delete_cache
    assert not page.analytics_enabled


def test_examples_are_what_the_small_model_can_answer() -> None:
    """The first thing that anybody sees is right, in both languages."""
    vl = tiny_service().pipeline
    vl.engine = None
    expected = (("cross", "十字"), ("yellow diamond", "黄色菱形"), ("FROG", "FROG"), ("Picture 2", "图片2"))
    for example, answers in zip(EXAMPLES, expected, strict=True):
        for language, answer in zip(WORDINGS, answers, strict=True):
            parts = [*({"image": picture} for picture in example.pictures), {"text": example.questions[language]}]
            assert answer in vl.chat(parts, do_sample=False)[0]


def test_service_is_not_imported_with_gradio() -> None:
    """A server without its page does not wait for Gradio, which takes seconds to import."""
    code = "import sys, qwenvl.serving.service; assert 'gradio' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert Service.__module__ == "qwenvl.serving.service"


def test_languages_say_the_same_things() -> None:
    """Every text is there in both, none in both the same, with the same gaps; refusals have their translations."""
    for field in dataclasses.fields(ENGLISH):
        english, chinese = getattr(ENGLISH, field.name), getattr(CHINESE, field.name)
        if isinstance(english, str):
            assert english.strip()
            assert re.search(r"[\u4e00-\u9fff]", chinese), field.name
            assert english.count("{}") == chinese.count("{}")
    for example in EXAMPLES:
        assert set(example.questions) == set(WORDINGS)
    assert "演示" in CHINESE.note(TINY_NOTE)
    assert CHINESE.note("something else").endswith("something else。")
    busy = Refused(429, "the server has as much to do as it takes: try again", code="queue_full")
    assert ENGLISH.refusal(busy) == "No answer: the server has as much to do as it takes: try again"
    assert CHINESE.refusal(busy) == "服务器现在太忙：请稍后再试。"
    assert CHINESE.refusal(Refused(400, "a new one")) == "无法回答：a new one"
