"""The web page in a real browser: a server in a thread, chromium driven by Playwright, and the documents' screenshots.

    python tests/web_pages.py docs/images

takes the screenshots anew: the page with boxes, in Chinese, and on a phone.
"""

from __future__ import annotations

import io
import shutil
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

import qwenvl
from qwenvl.serving.service import Service
from qwenvl.serving.settings import Settings
from qwenvl.serving.web import mount_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
ANSWERS = "#chat .bot .message-content"  # without that, it is the sign that one is awaited
GREEDY = ("greedy", 1.0, 1.0, 0, 1.0, 64, "")  # values of the settings
PATIENCE = 60_000  # milliseconds; machines that test are busy


def tiny_service(**settings: Any) -> Service:
    """A service over a tiny model of its own: starting it gives the pipeline an engine."""
    return Service(qwenvl.load("tiny", device="cpu", dtype="float32", quiet=True), Settings(**{"rows": 2, **settings}))


def page_app(service: Service) -> FastAPI:
    """An app with one route of its own, and the page."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(lifespan=lifespan)
    app.get("/health")(lambda: {"active": service.engine.load.active})
    return mount_page(app, service)


@contextmanager
def served(service: Service) -> Iterator[str]:
    """The page's address, for as long as the block runs."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(page_app(service), log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser, the system's own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


def open_page(browser: Browser, url: str, viewport: dict[str, int], **listeners: Callable[[Any], None]) -> Page:
    """The page in a browser of its own, with nothing stored, ready to be used; listeners by the names of its events."""
    page: Page = browser.new_context(viewport=viewport).new_page()  # type: ignore[arg-type]
    for event, listener in listeners.items():
        page.on(event, listener)  # type: ignore[call-overload]
    page.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page.goto(url)
    expect(page.locator("#box .submit-button")).to_be_visible()
    return page


def ask(page: Page, text: str, *pictures: Path) -> str:
    """Send a message with pictures, wait for the whole answer, and return it."""
    send(page, text, *pictures)
    expect(page.locator("#box .submit-button")).to_be_visible()
    return page.locator(ANSWERS).last.inner_text()


def send(page: Page, text: str, *pictures: Path) -> None:
    """Send a message with pictures; the answer has begun when this returns."""
    answers = page.locator(ANSWERS).count()
    if pictures:
        page.locator("#box input[type=file]").set_input_files([str(path) for path in pictures])
        expect(page.locator("#box .thumbnail-item")).to_have_count(len(pictures))
    page.fill("#box textarea", text)
    page.press("#box textarea", "Enter")
    expect(page.locator(ANSWERS)).to_have_count(answers + 1)


def begin_example(page: Page, number: int) -> None:
    """Click an example, send it, wait for the whole answer."""
    page.click(f"#example-{number}")
    expect(page.locator("#box .thumbnail-item").first).to_be_visible()
    expect(page.locator(ANSWERS)).to_have_count(0)
    ask(page, page.input_value("#box textarea"))


def switch_to_chinese(page: Page) -> None:
    """And wait until the page has changed."""
    page.locator("#language label").last.click()
    expect(page.locator("#undo")).to_have_text("撤回")


def take_screenshots(folder: Path) -> None:
    """The pictures of docs/web.md."""
    folder.mkdir(parents=True, exist_ok=True)
    with served(tiny_service()) as url, chromium() as browser:
        page = open_page(browser, url, DESK)
        begin_example(page, 0)
        _shoot(page, folder / "web-desk.png")
        page = open_page(browser, url, DESK)
        switch_to_chinese(page)
        begin_example(page, 1)
        _shoot(page, folder / "web-chinese.png")
        page = open_page(browser, url, PHONE)
        begin_example(page, 0)
        _shoot(page, folder / "web-phone.png", full_page=True)


def _shoot(page: Page, path: Path, *, full_page: bool = False) -> None:
    """Write a small file: 256 colours are enough for a page."""
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    page.wait_for_timeout(500)  # for what moves to come to rest
    shot = Image.open(io.BytesIO(page.screenshot(full_page=full_page))).convert("RGB")
    shot.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    take_screenshots(Path(sys.argv[1]))
