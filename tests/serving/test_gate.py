"""What is reachable of Gradio, and what it takes from a browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from fastapi.testclient import TestClient
from gradio.route_utils import delete_files_created_by_app
from pictures import encoded
from PIL import Image
from starlette.routing import Mount
from web_pages import GREEDY, page_app, tiny_service

from qwenvl.serving.gate import HEADERS, is_open, log_in, refuse_foreign_files
from qwenvl.serving.rounds import kept


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


def test_files_are_uploads_or_nothing(uploads: Path, upload: Callable[..., str], tmp_path: Path) -> None:
    """No way leads out of the folder: not dots, not links, not another kind of file."""
    mine = upload(b"x")
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"x")
    (uploads / "link.png").symlink_to(outside)
    (uploads / "loop.png").symlink_to(uploads / "loop.png")
    assert kept(mine) == Path(mine).resolve()
    others = ("/etc/passwd", str(outside), f"{uploads}/../outside.png", f"{uploads}/link.png", f"{uploads}/loop.png")
    for path in (
        *others,
        str(uploads),
        str(uploads / "a"),
        f"{uploads}/none.png",
        "",
        "\0",
        f"{mine}\0",
        "a/picture.png",
    ):
        assert kept(path) is None, path


@pytest.mark.parametrize(
    "data",
    [
        {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
        {"path": "https://elsewhere.test/a.png", "meta": {"_type": "gradio.FileData"}},
        {"path": "/etc/passwd"},
        {"path": None},
        {"path": ["/etc/passwd"]},
        {"type": "component", "component": "image", "value": None, "constructor_args": {}, "props": {}},
    ],
)
def test_what_a_browser_sends_names_no_foreign_file(data: Any) -> None:
    """Wherever it stands: in a chat, among typed pictures, as the value of a slider."""
    for sent in (
        [data],
        [{"text": "", "files": [data]}],
        [[{"role": "user", "content": [{"file": data}]}], 1.0],
        [1, (data,)],
    ):
        with pytest.raises(gr.Error):
            refuse_foreign_files(sent)


def test_uploaded_files_are_taken(upload: Callable[..., str]) -> None:
    """Guards the test above: what was uploaded passes."""
    refuse_foreign_files(
        [{"text": "{}", "files": [{"path": upload(b"x"), "meta": {"_type": "gradio.FileData"}}]}, None, 1]
    )


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/gradio_api/file=/etc/passwd",
            "/gradio_api/file=https://elsewhere.test/",
            "/gradio_api/proxy=https://x.test/",
        ),
        *("/gradio_api/file/etc/passwd", "/gradio_api/call/send", "/gradio_api/run/send", "/gradio_api/api/send"),
        *("/gradio_api/openapi.json", "/gradio_api/vibe-edit", "/gradio_api/process_recording", "/monitoring"),
        *("/gradio_api/deep_link", "/gradio_api/component_server", "/gradio_api/stream/x", "/gradio_api/dev/reload"),
        *(
            "/gradio_api/runs",
            "/gradio_api/custom_component/x",
            "/docs",
            "/v1/models",
            "/manifest.json",
            "//etc/passwd",
        ),
    ],
)
def test_gradios_other_doors_are_shut(path: str) -> None:
    """What the page does not need is not there: it fetches nothing for strangers, and shows no file but uploads."""
    assert not is_open(path)


def test_a_password_is_one_of_the_keys() -> None:
    """Any name; the whole key; characters of any kind."""
    check = log_in(("first key", "秘密"))
    assert check("anyone", "first key")
    assert check("", "秘密")
    for wrong in ("", "first", "first key ", "秘", "\udcff"):
        assert not check("anyone", wrong)


@pytest.fixture(scope="module")
def client() -> Any:
    """A client of the app with the page."""
    with TestClient(page_app(tiny_service(max_image_bytes=100_000))) as started:
        yield started


def test_the_page_and_the_apps_own_routes(client: TestClient) -> None:
    """Both on one app; the page's headers keep it to itself; the title is the model's name."""
    assert client.get("/health").json() == {"active": 0}
    page = client.get("/")
    assert page.status_code == 200
    assert "<title>tiny</title>" in page.text or '"title":"tiny"' in page.text.replace(" ", "")
    assert {name: page.headers[name] for name in HEADERS} == HEADERS
    assert "googleapis" not in client.get("/theme.css").text
    assert client.get("/gradio_api/info").json()["named_endpoints"] == {}


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "http://127.0.0.1/", "https://example.com/", "../../etc/passwd", __file__]
)
def test_no_file_is_served_that_was_not_uploaded(client: TestClient, path: str) -> None:
    """By no spelling, and nothing is fetched."""
    for prefix in ("/gradio_api/file=", "/gradio_api/file/", "/gradio_api/proxy=", "/file="):
        assert client.get(prefix + path).status_code in (403, 404)


def test_uploads_are_bounded(client: TestClient) -> None:
    """By the settings' size of a picture's file; what was uploaded can be seen again."""
    picture = encoded(Image.new("RGB", (9, 9), "red"))
    stored = client.post("/gradio_api/upload", files={"files": ("a.png", picture)})
    assert stored.status_code == 200
    assert client.get(f"/gradio_api/file={stored.json()[0]}").content == picture
    assert client.post("/gradio_api/upload", files={"files": ("a.png", b"x" * 100_001)}).status_code == 413


def test_api_keys_lock_the_page() -> None:
    """Without one of them: the log-in page and nothing else."""
    with TestClient(page_app(tiny_service(api_keys=("secret", "other"))), base_url="https://testserver") as client:
        assert "auth_required" in client.get("/").text
        locked = client.post("/gradio_api/upload", files={"files": ("a.png", b"x")})
        assert locked.status_code == 401
        assert client.get("/config").status_code == 401
        assert client.post("/login", data={"username": "me", "password": "wrong"}).status_code == 400
        assert client.post("/login", data={"username": "me", "password": "other"}).status_code == 200
        assert client.get("/config").status_code == 200


def test_a_forged_message_is_refused_before_anything_is_read(client: TestClient) -> None:
    """As a script would send it: a foreign path, a URL, a component in the chat; an honest message is answered."""
    (send,) = [
        dependency["id"]
        for dependency in client.get("/config").json()["dependencies"]
        if any(event == "submit" for _, event in dependency["targets"])
    ]

    def told(session: str, files: list[Any], chat: list[Any]) -> str:
        data = [{"text": "Hello", "files": files}, chat, "en", *GREEDY]
        sent = {"data": data, "fn_index": send, "session_hash": session, "event_data": None, "trigger_id": None}
        assert client.post("/gradio_api/queue/join", json=sent).status_code == 200
        return client.get("/gradio_api/queue/data", params={"session_hash": session}).text

    meta = {"_type": "gradio.FileData"}
    image = {"type": "component", "component": "image", "value": None, "constructor_args": {}, "props": {}}
    for number, (files, chat) in enumerate(
        (
            ([{"path": "/etc/passwd", "meta": meta}], []),
            ([{"path": "http://127.0.0.1:9/", "meta": meta}], []),
            ([], [{"role": "user", "content": [image]}]),
        )
    ):
        answer = told(f"forged{number}", files, chat)
        assert "not a picture that was uploaded here" in answer
        assert "root:" not in answer
    assert '"success":true' in told("honest", [], [])


def test_files_are_cleared_away_but_the_examples(client: TestClient) -> None:
    """What people upload goes when it is old; the pictures that the page itself needs stay."""
    mounted = next(route.app for route in client.app.routes if isinstance(route, Mount))  # type: ignore[attr-defined]
    page = mounted.get_blocks()
    path = client.post("/gradio_api/upload", files={"files": ("a.png", encoded())}).json()[0]
    (button,) = [block for block in page.blocks.values() if block.elem_id == "example-0"]
    delete_files_created_by_app(page, 3600)
    assert Path(path).exists()
    delete_files_created_by_app(page, -1)
    assert not Path(path).exists()
    assert button.keep_in_cache
    assert all(Path(kept_for_ever).exists() for kept_for_ever in button.keep_in_cache)
