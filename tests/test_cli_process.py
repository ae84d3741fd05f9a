"""Commands in processes of their own: what a shell, a pipe and a real terminal see of them."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import ENVIRONMENT, outside
from support import chat_config, random_model, write_checkpoint, write_vocabulary

from qwenvl.text.parts import Turn
from qwenvl.text.tokenizer import Tokenizer

COMMANDS = ("chat", "generate", "ground", "info", "convert", "quantize", "train", "demo", "bench")
SHORT = ("--max-new-tokens", "4")
pytest_plugins = ("command_fixtures",)


def test_help_does_not_wait_for_torch() -> None:
    """Help of every command answers without the heavy imports, and so at once."""
    script = f"""
import sys
from qwenvl.cli import main
for command in {("", *COMMANDS)!r}:
    try:
        main([*command.split(), "--help"])
    except SystemExit:
        pass
heavy = {{"torch", "numpy", "PIL", "tiktoken", "safetensors", "huggingface_hub"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert done.returncode == 0, done.stderr


def test_json_in_a_process_of_its_own(dog: str, tmp_path: Path) -> None:
    """From another folder, with an ASCII locale and a question that is not UTF-8: one JSON object, status 0."""
    words = ["chat", b"\xff \xe7\x8c\xab?", "--image", dog, "--json", *SHORT]
    command = [sys.executable, "-m", "qwenvl.cli", *words]
    locale = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env={**ENVIRONMENT, **locale}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"\n") == 1
    assert isinstance(json.loads(done.stdout)["reply"], str)


def test_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    """What a shell sees of a mistake: status 2, one line on stderr, nothing on stdout."""
    done = outside("chat", "hi", "--image", "no.png", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: cannot read 'no.png': No such file or directory\n"


@pytest.mark.parametrize("arguments", [["--help"], ["info", "tiny"]])
def test_broken_pipe(arguments: list[str]) -> None:
    """A reader that goes away, as `head` does, is no error: no traceback, status 0."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "qwenvl.cli", *arguments]
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options for an answer of many seconds: nothing that ends one is ever the likeliest."""
    folder = tmp_path_factory.mktemp("endless")
    vocabulary = write_vocabulary(folder)
    tokenizer = Tokenizer(vocabulary)
    model = random_model(chat_config(tokenizer, max_position_embeddings=16_384))
    with torch.no_grad():
        model.decoder.lm_head.weight[[tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eos_id]] = 0
    generation = {"chat_format": "chatml", "eos_token_id": tokenizer.eos_id}
    checkpoint = write_checkpoint(folder / "checkpoint", model, vocabulary, generation)
    return "--model", str(checkpoint), "--max-new-tokens", "16000", "--greedy"


def test_interrupt(endless: tuple[str, ...]) -> None:
    """Ctrl-C in the middle of an answer ends the command with status 130 and no traceback."""
    command = [sys.executable, "-m", "qwenvl.cli", "chat", "Hi", "--quiet", *endless]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        process.stdout.read(1)  # it speaks
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")


class Screen:
    """`qwenvl chat` in a pseudo-terminal: what it shows is `shown`."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qwenvl.cli", "chat", "--quiet", *arguments],
            cwd=folder,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # which makes it the controlling terminal
            env={**ENVIRONMENT, "TERM": "dumb", "LC_ALL": "C.UTF-8"},
        )
        os.close(slave)
        self.shown = ""

    def wait_for(self, pattern: str, seconds: float = 30) -> str:
        """Read until the pattern is on the screen; returns all up to its end and forgets it."""
        ends = time.monotonic() + seconds
        while not (match := re.search(pattern, self.shown)):
            assert time.monotonic() < ends, f"{pattern!r} did not appear: {self.shown!r}"
            if not select.select([self.master], [], [], 0.2)[0]:
                continue
            try:
                self.shown += os.read(self.master, 4096).decode("utf-8", "replace")
            except OSError:  # the other side has closed
                pytest.fail(f"ended without {pattern!r}: {self.shown!r}")
        before, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return before

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self.master, keys.encode())


def test_in_a_real_terminal(dog: str, endless: tuple[str, ...]) -> None:
    """Keys as a person presses them: Tab completes a file, Ctrl-C stops an answer, Ctrl-D leaves with status 0."""
    here = Path(dog).parent
    screen = Screen(here, *endless)
    try:
        screen.wait_for("/help shows the commands")
        screen.wait_for("you> ")
        screen.type("/image do\t\n")
        screen.wait_for("picture of 200 x 100 pixels")
        screen.wait_for("you> ")
        screen.type("What is it?\n")
        screen.wait_for(r"What is it\?\r\n.")
        screen.type("\x03")
        screen.wait_for(r"\[stopped\]\r\nyou> ")
        screen.type("/save talk.json\n")
        screen.wait_for(r"  saved talk.json\r\n")
        screen.wait_for("you> ")
        screen.type("\x04")
        assert screen.process.wait(30) == 0
    finally:
        screen.process.send_signal(signal.SIGKILL)
        screen.process.wait()
        os.close(screen.master)
    (turn,) = map(Turn.from_dict, json.loads((here / "talk.json").read_text(encoding="utf-8")))
    assert turn.reply
    assert turn.parts[0] == {"image": "dog.png"}
