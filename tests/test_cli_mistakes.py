"""What a user's mistake looks like on the command line: one line, status 2, and nothing is written."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import Run

from qwenvl.weights.hub import embedded

SHORT = ("--max-new-tokens", "4")
pytest_plugins = ("command_fixtures",)


def mistaken(run: Run, *arguments: str, says: str) -> None:
    """The command must end with status 2, nothing on stdout and one line on stderr."""
    status, out, err = run(*arguments, "--quiet") if arguments else run()
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    assert says in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "required: command; see qwenvl --help"),
        ("shout", "invalid choice: 'shout'"),
        ("chat hi --loud", "unrecognized arguments: --loud"),
        ("chat hi --top-k many", "argument --top-k: invalid int value: 'many'"),
        ("ground dog", "required: --image; see qwenvl ground --help"),
        ("convert tiny", "required: destination"),
        ("convert tiny there --to ours", "invalid choice: 'ours'"),
        ("chat hi --image missing.png", "cannot read 'missing.png': No such file"),
        ("chat --image missing.png", "cannot read 'missing.png': No such file"),
        ("generate hi --image notes.txt", "'notes.txt' is not a picture"),
        ("ground dog --image .", "'.' is not a file"),
        ("ground dog --image empty.png", "'empty.png' is empty"),
        ("chat hi --image http://127.0.0.1/a.png", "127.0.0.1"),
        ("chat hi --model nothing", "there is no folder nothing"),
        ("chat hi --model notes.txt", "notes.txt is a file"),
        ("chat hi --model empty", "empty holds no weights"),
        ("info empty", "empty holds no weights"),
        ("info nothing", "there is no folder nothing"),
        ("chat hi --dtype int8", "dtype 'int8' is not one; use auto, float32"),
        ("chat hi --device gpu", "device 'gpu'"),
        ("chat hi --device cuda:99", "no device cuda:99"),
        ("chat hi --temperature 0", "temperature must be a number above 0"),
        ("chat hi --temperature nan", "temperature must be a number above 0"),
        ("chat hi --top-p 2", "top_p must be a number from 0 to 1"),
        ("chat hi --top-k -1", "top_k must be a whole number from 0"),
        ("chat hi --repetition-penalty 0", "repetition_penalty must be"),
        ("chat hi --frequency-penalty 3", "frequency_penalty must be a number from -2 to 2"),
        ("chat hi --presence-penalty -2.5", "presence_penalty must be a number from -2 to 2"),
        ("generate hi --max-new-tokens 0", "max_new_tokens must be a whole number from 1"),
        ("generate hi --seed -1", "seed must be a whole number from 0"),
        ("chat hi --save boxes.png", "--save needs a picture"),
        ("chat hi --json --save boxes.png", "--save needs a picture"),
        ("chat hi --image dog.png --save boxes.xyz", "end the name in .png"),
        ("chat hi --image dog.png --save boxes", "end the name in .png"),
        ("chat hi --image dog.png --json --save no/where.png", "no is not a folder that you may write into"),
        ("ground dog --image dog.png --save notes.txt/b.png", "notes.txt is not a folder"),
        ("chat --json", "need a question"),
        ("chat --image dog.png --save b.png", "need a question"),
        ("convert tiny full", "full exists and holds something else"),
        ("convert tiny notes.txt", "notes.txt exists and holds something else"),
        ("convert empty there", "empty holds no weights"),
        ("convert tiny there --max-shard-bytes 0", "max_shard_bytes must be positive"),
        ("demo --out notes.txt", "cannot make the folder notes.txt"),
    ],
)
def test_mistake(
    run: Run, dog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, says: str
) -> None:
    """A user's mistake is one line that says what was wrong, status 2, and nothing is written."""
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert Path(dog) in before
    mistaken(run, *arguments.split(), says=says)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("question", ["", " " * 10])
def test_empty_question(run: Run, question: str) -> None:
    """An empty question is a mistake; white space is text, which the model may answer."""
    if question:
        assert run("chat", question, "--quiet", *SHORT)[0] == 0
    else:
        mistaken(run, "chat", question, says="the prompt is empty")
        mistaken(run, "generate", question, says="the prompt is empty")


def test_prompt_beyond_the_positions(run: Run) -> None:
    """A prompt that is longer than the model's positions is refused with both numbers."""
    mistaken(run, "chat", "猫 dog " * 2000, says="the model has 8192 positions")


def test_names_with_line_ends_and_escapes(run: Run) -> None:
    """A name of several lines, or with an escape sequence, makes neither two lines of error nor colours."""
    mistaken(run, "info", "no\nsuch\x1b[31m", says="there is no folder no such�[31m")


def broken(tmp_path: Path, **changes: Any) -> Path:
    """The embedded checkpoint with another config.json."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in embedded("tiny").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("command", ["chat", "info", "convert"])
def test_broken_checkpoint(run: Run, tmp_path: Path, command: str) -> None:
    """Every command that reads a checkpoint says what is wrong with it, in one line, and writes nothing."""
    words = {"chat": ["hi", "--model"], "info": [], "convert": []}[command]
    after = [str(tmp_path / "there")] if command == "convert" else []
    folder = broken(tmp_path, hidden_size=96)
    mistaken(run, command, *words, str(folder), *after, says="hidden_size 96")
    (folder / "config.json").write_text("{")
    mistaken(run, command, *words, str(folder), *after, says="config.json")
    (folder / "config.json").write_bytes((embedded("tiny") / "config.json").read_bytes())
    shard = folder / "model-00001-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    mistaken(run, command, *words, str(folder), *after, says=shard.name)
    assert not list(tmp_path.glob("there*"))


def test_checkpoint_without_vocabulary(run: Run, tmp_path: Path) -> None:
    """A folder without a vocabulary can be described, and a question to it says what it lacks."""
    folder = broken(tmp_path)
    (folder / "qwen.tiktoken").unlink()
    assert run("info", str(folder))[0] == 0
    mistaken(run, "chat", "hi", "--model", str(folder), says="qwen.tiktoken")
