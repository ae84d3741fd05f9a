"""What is shipped for containers, as far as it can be looked at without an engine for them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from servers import running

import qwenvl
from qwenvl.cli import _parser
from qwenvl.serving.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
REQUIREMENT = re.compile(r"\.\[([\w,]+)\]")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, each with its arguments on one line."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in whole.splitlines() if line)]


def those(name: str) -> list[str]:
    """The arguments of all instructions of a name."""
    return [rest for found, rest in instructions() if found == name]


def compose() -> Any:
    """The compose file's content."""
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the compose file; it comes with the ray extra")
    return yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))


def test_the_image_is_made_of_what_there_is() -> None:
    """All that is copied exists and is not kept out of the build by .dockerignore, which lets nothing else in."""
    first, *allowed = [
        line
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert first == "*"
    copied = {name for rest in those("COPY") if "--from" not in rest for name in rest.split()[:-1]}
    assert copied == {name.removeprefix("!") for name in allowed if name.startswith("!")}
    for name in copied:
        assert (ROOT / name).exists(), name
    for stage in re.findall(r"--from=(\w+)", " ".join(those("COPY"))):
        assert any(rest.endswith(f"AS {stage}") for rest in those("FROM"))


def test_the_image_installs_what_is_declared() -> None:
    """Under the versions that are tested, with an extra that there is, from the index that may be chosen."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    installs = [rest for rest in those("RUN") if "pip install" in rest]
    extras = [extra for rest in installs for found in REQUIREMENT.findall(rest) for extra in found.split(",")]
    assert extras == ["serve"]
    for extra in extras:
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)
    assert all("--constraint constraints.txt" in rest and "--no-cache-dir" in rest for rest in installs)
    declared = {rest.partition("=")[0] for rest in those("ARG")}
    for service in compose()["services"].values():
        assert set(service["build"].get("args", ())) <= declared


def test_the_images_command_is_ours() -> None:
    """Ours takes the image's command and compose's, which names a file of keys; the grace lies within compose's."""
    assert json.loads(those("ENTRYPOINT")[0]) == ["qwenvl"]
    assert _parser().parse_args(json.loads(those("CMD")[0])).host == "0.0.0.0"
    content = compose()
    assert {name for service in content["services"].values() for name in service["profiles"]} == {"cpu", "gpu"}
    for service in content["services"].values():
        assert (ROOT / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]).samefile(DOCKERFILE)
        given = _parser().parse_args([word.replace("${MODEL:-tiny}", "tiny") for word in service["command"]])
        assert (given.host, given.model) == ("0.0.0.0", "tiny")
        secret = Path(given.api_keys)
        assert secret.parent == Path("/run/secrets")
        assert secret.name in service["secrets"]
        assert secret.name in content["secrets"]
        assert int(service["stop_grace_period"].removesuffix("s")) >= Settings().grace + 10
        assert f"{given.port}:{given.port}" in service["ports"][0]
        assert [str(given.port)] == those("EXPOSE")


def test_nothing_is_written_but_into_the_volume() -> None:
    """The root may be read-only: every folder that a library writes into is the volume or the temporary one."""
    (rest,) = [rest for rest in those("ENV") if "HF_HOME" in rest]
    folders = dict(word.split("=", 1) for word in shlex.split(rest))
    (volume,) = those("VOLUME")
    assert folders["HF_HOME"].startswith(f"{volume}/")
    assert folders["TRITON_CACHE_DIR"].startswith(f"{volume}/")  # not /tmp, from which compose lets nothing be run
    for service in compose()["services"].values():
        assert service["read_only"] is True
        assert folders["HOME"] in [place.partition(":")[0] for place in service["tmpfs"]]
        assert [mount.split(":")[1] for mount in service["volumes"]] == [volume]
    assert those("USER") == ["1000:1000"]


def test_the_health_check_tells_the_living_from_the_dead(chat_folder: Path) -> None:
    """The image's own line: status 0 where a server answers, another one where none does."""
    (rest,) = those("HEALTHCHECK")
    python, *arguments = json.loads(rest[rest.index("[") :])
    assert python == "python"

    def check(port: str) -> int:
        line = [sys.executable, *(argument.replace("8000", port) for argument in arguments)]
        return subprocess.run(line, stderr=subprocess.DEVNULL, timeout=60, check=False).returncode

    with running(qwenvl.load(chat_folder, device="cpu", dtype="float32", quiet=True)) as server:
        port = server.url.rpartition(":")[2]
        assert check(port) == 0
    assert check(port) != 0
