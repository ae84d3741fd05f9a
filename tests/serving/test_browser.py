"""The web page as a person uses it: in chromium, with a mouse, a keyboard and files."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import web_pages
from PIL import Image, ImageChops
from playwright.sync_api import Browser, Page, expect
from web_pages import ANSWERS, DESK, PHONE, ask, begin_example, chromium, open_page, send, served, switch_to_chinese

from qwenvl.demo import draw_scene
from qwenvl.serving import web
from qwenvl.serving.service import Service

# Answers in many small updates: in three of four runs of all tests, on 2026-11-24, one of these found the page without
# the last update, and alone they pass. Until the reason is known they are run by themselves.
slowly = pytest.mark.slow
pytestmark = pytest.mark.skipif(web_pages.CHROMIUM is None, reason="there is no chromium here")

SOUP = (
    "<img src=http://elsewhere.test/a onerror=alert(1)> <script>alert(2)</script> ![](http://elsewhere.test/b) $$x^2$$"
)


@pytest.fixture(scope="module")
def service() -> Service:
    """One for all tests here, whose steps `slow` can slow down."""
    return web_pages.tiny_service()


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    """The page's address."""
    with served(service) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for all tests here."""
    with chromium() as started:
        yield started


@pytest.fixture
def opened(browser: Browser, url: str) -> Iterator[Callable[..., Page]]:
    """Open the page. Afterwards: it asked no other host for anything, and no text of anyone's ran."""
    asked: list[str] = []
    dialogs: list[str] = []
    pages: list[Page] = []

    def open_(viewport: dict[str, int] = DESK) -> Page:
        listeners = {
            "request": lambda request: asked.append(request.url),
            "dialog": lambda dialog: dialogs.append(dialog.message),
        }
        pages.append(open_page(browser, url, viewport, **listeners))
        return pages[-1]

    yield open_
    for page in pages:
        page.context.close()
    assert asked
    assert [where for where in asked if not where.startswith((url, "data:", "blob:"))] == []
    assert dialogs == []


@pytest.fixture
def slow(service: Service, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Have each step take so many seconds more, that one can watch."""
    step = service.engine.step

    def slow_(seconds: float) -> None:
        monkeypatch.setattr(service.engine, "step", lambda: (time.sleep(seconds), step()))

    return slow_


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """A picture with a red circle, a blue square and a green triangle."""
    path = tmp_path / "scene.png"
    draw_scene()[0].save(path)
    return path


def idle(service: Service) -> bool:
    """Whether the engine's rows are all free, before long."""
    end = time.monotonic() + 20
    while service.engine.load.active and time.monotonic() < end:
        time.sleep(0.05)
    return service.engine.load.active == 0


@slowly
def test_a_conversation(opened: Callable[..., Page], scene: Path, slow: Callable[[float], None]) -> None:
    """A picture, a question, text that grows, a box where the thing is; a phrase that hides it; a second round."""
    page = opened()
    expect(page.locator("h1")).to_have_text("tiny")
    expect(page.locator(".note")).to_contain_text("a demonstration")

    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
            const answer = document.querySelector('#chat .bot .message-content');
            if (answer) window.seen.push(answer.innerText) }).observe(document.querySelector('#chat'),
            { subtree: true, childList: true, characterData: true }) }"""
    )
    slow(0.03)
    assert ask(page, "Detect all objects.", scene) == "red circle, blue square and green triangle"
    seen = list(dict.fromkeys(filter(None, page.evaluate("window.seen"))))
    assert len(seen) > 2
    assert all(later.startswith(earlier) for earlier, later in pairwise(seen))

    boxes = draw_scene()[1]
    labels = page.locator(".phrases label")
    expect(labels).to_have_text(["red circle", "blue square", "green triangle"])
    image = page.locator(".stage img").bounding_box()
    found = page.locator(".layer polygon:not(.halo)")
    for number, box in enumerate(boxes):
        drawn = found.nth(number).bounding_box()
        assert image
        assert drawn
        scale = image["width"] / 640
        assert drawn["x"] - image["x"] == pytest.approx(box.x1 * scale, abs=12)
        assert drawn["y"] - image["y"] == pytest.approx(box.y1 * scale, abs=12)
        assert drawn["width"] == pytest.approx((box.x2 - box.x1) * scale, abs=16)
    colours = {found.nth(i).evaluate("e => getComputedStyle(e).stroke") for i in range(3)}
    assert len(colours) == 3

    labels.nth(1).click()
    expect(found.nth(1)).to_be_hidden()
    expect(found.nth(0)).to_be_visible()
    labels.nth(1).click()
    expect(found.nth(1)).to_be_visible()

    with page.expect_download() as download:
        page.click("#download")
    drawn_on = Image.open(io.BytesIO(download.value.path().read_bytes()))
    assert download.value.suggested_filename == "boxes.png"
    assert drawn_on.size == (640, 448)
    assert ImageChops.difference(drawn_on.convert("RGB"), draw_scene()[0]).getbbox()

    assert ask(page, "How many shapes are there?") == "3"
    expect(page.locator("#download")).to_be_hidden()


def test_undo_regenerate_edit_clear(opened: Callable[..., Page], scene: Path) -> None:
    """What was typed comes back; an answer is made anew; an edited message, which keeps its picture, as well."""
    page = opened()
    first = ask(page, "Box the red circle.", scene)
    assert ask(page, "How many shapes are there?") == "3"
    page.click("#undo")
    expect(page.locator("#box textarea")).to_have_value("How many shapes are there?")
    expect(page.locator(ANSWERS)).to_have_count(1)

    page.click("#again")
    expect(page.locator("#box .stop-button")).to_be_visible()
    expect(page.locator("#box .submit-button")).to_be_visible()
    expect(page.locator(ANSWERS)).to_have_text([first], use_inner_text=True)

    page.locator("#chat button[title=Edit]").last.click()
    page.fill("#chat textarea", "Box the blue square.")
    page.click("#chat button[title=Submit]")
    expect(page.locator(".phrases label")).to_have_text(["blue square"])
    expect(page.locator("#chat .user img")).to_have_count(1)

    expect(page.locator("#box .submit-button")).to_be_visible()
    page.click("#undo")
    expect(page.locator("#box .thumbnail-item")).to_have_count(1)
    expect(page.locator("#box textarea")).to_have_value("Box the blue square.")
    page.press("#box textarea", "Enter")
    expect(page.locator(".phrases label")).to_have_text(["blue square"])
    expect(page.locator("#box .submit-button")).to_be_visible()
    page.click("#clear")
    expect(page.locator("#chat .message")).to_have_count(0)
    expect(page.locator(".stage")).to_have_count(0)


def test_two_pictures_pasted_and_uploaded(opened: Callable[..., Page], scene: Path) -> None:
    """Several pictures in one message, one of them from the clipboard."""
    page = opened()
    page.locator("#box textarea").evaluate(
        """async (box, data) => {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
            const held = new DataTransfer();
            held.items.add(new File([bytes], 'pasted.png', { type: 'image/png' }));
            const options = { clipboardData: held, bubbles: true, cancelable: true };
            box.dispatchEvent(new ClipboardEvent('paste', options)) }""",
        _base64(Image.new("RGB", (120, 120), "white")),
    )
    expect(page.locator("#box .thumbnail-item")).to_have_count(1)
    page.locator("#box input[type=file]").set_input_files(str(scene))
    expect(page.locator("#box .thumbnail-item")).to_have_count(2)
    assert ask(page, "Which picture has more shapes?") == "Picture 2"
    expect(page.locator("#chat .user img")).to_have_count(2)


def test_chinese(opened: Callable[..., Page]) -> None:
    """Every label changes at once; questions and answers are Chinese; and back."""
    page = opened()
    switch_to_chinese(page)
    for where, text in (
        ("#again", "重新回答"),
        ("#clear", "清空"),
        (".note", "演示"),
        ("#settings button", "生成方式"),
    ):
        expect(page.locator(where).first).to_contain_text(text)
    expect(page.locator("#box textarea")).to_have_attribute("placeholder", "就图片提问")
    begin_example(page, 1)
    expect(page.locator(".phrases label")).to_have_text(["黄色菱形× 2"])
    expect(page.locator(".hint")).to_have_text("点击短语可以隐藏或显示它的方框。")
    page.locator("#language label").first.click()
    expect(page.locator(".hint")).to_have_text("Click a phrase to hide or show its boxes.")
    expect(page.locator(".phrases label")).to_have_text(["黄色菱形× 2"])


@slowly
def test_stop_and_a_closed_tab_free_the_engine(
    opened: Callable[..., Page], scene: Path, service: Service, slow: Callable[[float], None]
) -> None:
    """What was said stays, the next question can be asked, and nobody computes for those who have left."""
    page = opened()
    slow(0.3)
    send(page, "Detect all objects.", scene)
    expect(page.locator(ANSWERS)).to_contain_text("red", use_inner_text=True)
    assert service.engine.load.active == 1
    page.click("#box .stop-button")
    assert idle(service)
    expect(page.locator("#box .submit-button")).to_be_visible()
    said = page.locator(ANSWERS).inner_text()
    assert said.startswith("red")
    assert "triangle" not in said
    send(page, "Detect all objects.")
    assert service.engine.load.active == 1
    page.close()
    assert idle(service)


def test_a_refusal_loses_nothing(opened: Callable[..., Page], service: Service, tmp_path: Path) -> None:
    """One line says what was wrong, and text and picture are back where they were typed."""
    page = opened()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture at all")
    page.locator("#box input[type=file]").set_input_files(str(broken))
    expect(page.locator("#box .thumbnail-item")).to_have_count(1)
    page.fill("#box textarea", "Box the <red> circle.")
    page.press("#box textarea", "Enter")
    expect(page.get_by_test_id("toast-body")).to_contain_text("No answer: the picture is not a picture")
    expect(page.locator("#box textarea")).to_have_value("Box the <red> circle.")
    expect(page.locator("#box .thumbnail-item")).to_have_count(1)
    expect(page.locator("#chat .message")).to_have_count(0)
    assert idle(service)


def test_text_is_text(opened: Callable[..., Page], scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Markup, Markdown and formulas of a person and of the model are shown as they were written, and load nothing."""

    async def soup(*_: object) -> AsyncIterator[str]:
        yield f"{SOUP} <ref>{SOUP} ${{1+1}} {{{{2}}}}</ref><box>(100,100),(300,300)</box>"

    monkeypatch.setattr(web, "answer", soup)
    page = opened()
    answered = ask(page, f"  {SOUP}\n  & **two** lines &lt;", scene)
    assert answered == f"{SOUP} {SOUP} ${{1+1}} {{{{2}}}}"
    assert page.locator("#chat .user").last.inner_text() == f"{SOUP}\n  & **two** lines &lt;"
    expect(page.locator(".phrases label")).to_have_text([(SOUP)[:79] + "…"])
    assert page.locator("#chat .message-content img, #chat script, #picture script, .phrases img").count() == 0
    page.locator("#language label").last.click()  # the chat comes back from the browser, and is shown anew
    expect(page.locator("#undo")).to_have_text("撤回")
    assert page.locator(ANSWERS).inner_text() == answered


def test_on_a_phone(opened: Callable[..., Page], scene: Path) -> None:
    """Nothing is wider than the screen, whatever is said; what is needed first comes first."""

    def fits(page: Page) -> bool:
        widths = page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]")
        return max(widths) == PHONE["width"]

    page = opened(PHONE)
    assert fits(page)
    ask(page, "Detect all objects " + "w" * 200, scene)
    assert fits(page)
    page.click("#settings button")
    expect(page.locator("#settings input[type=range]").first).to_be_visible()
    assert fits(page)
    order = [page.locator(where).bounding_box() for where in ("#chat", "#box", "#picture", "#examples", "#settings")]
    tops = [place["y"] for place in order if place]
    assert len(tops) == 5
    assert tops == sorted(tops)


def _base64(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
