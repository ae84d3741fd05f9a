"""Names to folders, against a small hub on the loopback that can break, refuse and disappear."""

import errno
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from qwenvl.errors import CheckpointError
from qwenvl.weights.hub import embedded, resolve

ROOT = Path(__file__).parents[2]
COMMIT = "c0ffee" + "0" * 34
SHARD = bytes(range(256)) * 4
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
SAFETENSORS = {
    "model.safetensors.index.json": INDEX.encode(),
    "model-00001-of-00002.safetensors": SHARD,
    "model-00002-of-00002.safetensors": SHARD[::-1],
}
BIN = {"pytorch_model.bin": b"pickle"}
SIDE = {"config.json": b"{}", "qwen.tiktoken": b"IQ== 0\n", "SimSun.ttf": b"font"}
UNREAD = {
    "modeling_qwen.py": b"raise SystemExit",
    "README.md": b"#",
    "assets/demo.jpeg": b"\xff",
    "training_args.bin": b"",
}
REPOSITORIES = {
    "Qwen/both": SAFETENSORS | BIN | SIDE | UNREAD,
    "Qwen/pickled": BIN | SIDE | UNREAD,
    "Qwen/lacking": {name: data for name, data in SAFETENSORS.items() if "00002-of" not in name} | SIDE,
    "Qwen/empty": SIDE | UNREAD,
    "Qwen/large": {"model.safetensors": bytes(24_000_000)} | SIDE,
}


class Hub(ThreadingHTTPServer):
    """The endpoints that huggingface_hub asks for a snapshot, and a record of what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[tuple[str, str, str | None]] = []  # method, file, range
        self.breaks: dict[str, int] = {}  # file -> how many more transfers end in the middle

    @property
    def fetched(self) -> list[str]:
        """Files of which bytes were sent."""
        return [file for method, file, _ in self.asked if method == "GET"]


class Answer(BaseHTTPRequestHandler):
    """One request to the hub."""

    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/").replace("%2F", "/")
        parts = path.split("/")
        repository = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repository == "Qwen/gated":
            self.send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif repository not in REPOSITORIES:
            self.send(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif parts[0] == "api":
            self.listing(REPOSITORIES[repository], parts[4:])
        else:
            self.file("/".join(parts[4:]), REPOSITORIES[repository]["/".join(parts[4:])])

    def listing(self, files: dict[str, bytes], rest: list[str]) -> None:
        """`/revision/NAME` and `/tree/COMMIT`."""
        if rest and rest[1] not in ("main", COMMIT):
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif rest and rest[0] == "tree":
            tree = [
                {"type": "file", "path": f, "size": len(data), "oid": str(i)}
                for i, (f, data) in enumerate(files.items())
            ]
            self.send(200, json.dumps(tree).encode())
        else:
            siblings = [{"rfilename": file} for file in files]
            self.send(200, json.dumps({"id": "x/y", "sha": COMMIT, "siblings": siblings}).encode())

    def file(self, name: str, data: bytes) -> None:
        """A file or the part of it from `Range` on; half of that if it is to break."""
        self.server.asked.append((self.command, name, self.headers.get("Range")))
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{len(data)}-{sum(data[:1000])}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        broken = self.command == "GET" and self.server.breaks.get(name, 0) > 0
        if broken:
            self.server.breaks[name] -= 1
        self.send(206 if begin else 200, data[begin:], headers, cut=broken)

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) * 2 // 3] if cut else body)
        if cut:
            self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


class Client:
    """`resolve` in a process of its own: huggingface_hub reads its environment when it is imported."""

    SCRIPT = (
        "import json, sys\n"
        "from qwenvl.errors import CheckpointError\n"
        "from qwenvl.weights.hub import resolve\n"
        "for line in sys.stdin:\n"
        "    try: answer = {'folder': str(resolve(**json.loads(line)))}\n"
        "    except CheckpointError as error: answer = {'error': str(error)}\n"
        "    print(json.dumps(answer), flush=True)\n"
    )

    def __init__(self, port: int, **environment: str) -> None:
        settings = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}"}
        settings["PYTHONPATH"] += os.environ.get("PYTHONPATH", "")
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("HF_") and "proxy" not in name.lower()
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=kept | settings | environment,
        )

    def __call__(self, name: str, cache: Path, **options: str) -> dict[str, str]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"name": name, "cache_dir": str(cache), **options}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, str] = json.loads(self.process.stdout.readline())
        assert "\n" not in answer.get("error", "")
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub on a port of its own."""
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(hub: Hub) -> Iterator[Client]:
    """A process that resolves names at that hub."""
    made = Client(hub.server_port)
    yield made
    made.close()


def names(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if not path.is_dir()}


def test_snapshots(hub: Hub, client: Client, tmp_path: Path) -> None:
    """Safetensors are preferred, `.bin` is the fallback, code and pictures are never fetched, nothing twice."""
    both = client("Qwen/both", tmp_path)["folder"]
    assert names(both) == {*SAFETENSORS, *SIDE}
    assert (Path(both) / "model-00002-of-00002.safetensors").read_bytes() == SHARD[::-1]
    assert names(client("Qwen/pickled", tmp_path, revision="main")["folder"]) == {*BIN, *SIDE}
    count = len(hub.fetched)
    assert sorted(hub.fetched) == sorted([*SAFETENSORS, *SIDE, *BIN, *SIDE])
    assert client("Qwen/both", tmp_path, revision=COMMIT) == {"folder": both}
    assert len(hub.fetched) == count


def test_refusals(client: Client, tmp_path: Path) -> None:
    """What the hub refuses or lacks is one line that says what to do."""
    for name, options, message in (
        (
            "Qwen/unheard-of",
            {},
            "there is no folder Qwen/unheard-of, and on Hugging Face no such model that is open to",
        ),
        ("Qwen/gated", {}, "Qwen/gated asks for permission: accept its terms on its page, then run `hf auth login`"),
        ("Qwen/both", {"revision": "v9"}, "Qwen/both on Hugging Face has no revision v9"),
        (
            "Qwen/lacking",
            {},
            "lacks 1 of the 2 shards in model.safetensors.index.json: model-00002-of-00002.safetensors",
        ),
        ("Qwen/empty", {}, "holds no weights"),
    ):
        assert message in client(name, tmp_path, **options)["error"]


def test_broken_connection_is_taken_up_where_it_stopped(hub: Hub, client: Client, tmp_path: Path) -> None:
    """A transfer that ends in the middle goes on from there, at once or (older libraries) when asked again."""
    hub.breaks["model.safetensors"] = 1
    answer = client("Qwen/large", tmp_path)
    if "error" in answer:
        assert "fetching Qwen/large failed" in answer["error"]
        assert answer["error"].endswith("run this again, it keeps what is complete")
        answer = client("Qwen/large", tmp_path)
    folder = Path(answer["folder"])
    assert (folder / "model.safetensors").stat().st_size == 24_000_000
    ranges = [begin for method, file, begin in hub.asked if (method, file) == ("GET", "model.safetensors")]
    assert ranges[0] is None
    assert len(ranges) == 2
    assert ranges[1] is not None
    assert int(ranges[1].removeprefix("bytes=").rstrip("-")) > 0


def test_offline(hub: Hub, client: Client, tmp_path: Path) -> None:
    """A complete copy needs no hub, neither when it is gone nor when HF_HUB_OFFLINE is set; an absent one is told."""
    folder = client("Qwen/both", tmp_path)["folder"]
    pickled = client("Qwen/pickled", tmp_path)["folder"]
    hub.shutdown()
    hub.server_close()
    offline = Client(hub.server_port, HF_HUB_OFFLINE="1")
    for each in (client, offline):
        assert each("Qwen/both", tmp_path) == {"folder": folder}
        assert each("Qwen/pickled", tmp_path) == {"folder": pickled}
        error = each("Qwen/large", tmp_path)["error"]
        assert "Qwen/large is not complete in the cache and Hugging Face cannot be reached" in error
        assert "Qwen/both at revision v9 is not" in each("Qwen/both", tmp_path, revision="v9")["error"]
    (Path(folder) / "model-00002-of-00002.safetensors").unlink()
    assert "error" in offline("Qwen/both", tmp_path)
    offline.close()


def test_local_folder(tmp_path: Path) -> None:
    """A folder is itself, checked for weights and shards; a missing one is not asked for on any hub."""
    with pytest.raises(CheckpointError, match="holds no weights"):
        resolve(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match=r"is a file; name the folder that it lies in"):
        resolve(tmp_path / "model.safetensors")
    for typo in ("./typo", "/typo", "../typo", "a/b/c", "gpt2", "Qwen/", "", "modelscope:", "modelscope:x", "a b/c"):
        with pytest.raises(CheckpointError, match=r"there is no folder|holds no weights") as raised:
            resolve(typo)
        assert "\n" not in str(raised.value)


def test_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small checkpoint is found from any folder, in the package or in the checkout; a missing one is told."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match='embedded checkpoint "huge" is missing from this installation'):
        embedded("huge")
    for place in (tmp_path / "qwenvl" / "weights" / "tiny", tmp_path / "weights" / "tiny"):
        place.mkdir(parents=True)
        module = tmp_path / "src" / "qwenvl" / "weights" / "hub.py"
        if place.parent.parent.name == "qwenvl":
            module = tmp_path / "qwenvl" / "weights" / "hub.py"
        monkeypatch.setattr("qwenvl.weights.hub.__file__", str(module))
        assert embedded("tiny") == place


def test_modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`modelscope:` asks that library with our patterns; without the library, or when it fails, one line says so."""
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(CheckpointError, match=r"pip install qwenvl\[modelscope\]"):
        resolve("modelscope:qwen/Qwen-VL")
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        if "pytorch_model*.bin" in options["allow_patterns"]:
            (tmp_path / "pytorch_model.bin").touch()
        return str(tmp_path)

    library = types.ModuleType("modelscope")
    library.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", library)
    assert resolve("modelscope:qwen/Qwen-VL", revision="v1", cache_dir=tmp_path / "cache") == tmp_path
    assert [request["name"] for request in asked] == ["qwen/Qwen-VL"] * 2  # safetensors first, then .bin
    assert asked[0]["revision"] == "v1"
    assert asked[0]["cache_dir"] == str(tmp_path / "cache")

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    library.snapshot_download = full  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="the disk is full, modelscope:qwen/Qwen-VL is not complete"):
        resolve("modelscope:qwen/Qwen-VL")
