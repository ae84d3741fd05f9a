"""The command line: what scripts read from it, what a mistake looks like, what it costs to ask for help."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from speech import DOG, DOG_PLACE, speak

import qwenvl
from qwenvl import cli, loading
from qwenvl.weights.hub import embedded

COMMANDS = ("chat", "generate", "ground", "info", "convert", "demo")
SHORT = ("--max-new-tokens", "4")
# A process of its own finds this checkout's package from every folder.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(qwenvl.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def dog(tmp_path: Path) -> str:
    """A grey picture of 200 x 100 pixels."""
    Image.new("RGB", (200, 100), (90, 90, 90)).save(tmp_path / "dog.png")
    return str(tmp_path / "dog.png")


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch, shared: qwenvl.Pipeline) -> None:
    """Load the embedded model once for the whole module; whatever else a command names is really loaded."""
    load = loading.load

    def load_or_share(name: Any, device: Any, dtype: Any, **options: Any) -> qwenvl.Pipeline:
        return shared if (name, device, dtype) == ("tiny", "auto", "auto") else load(name, device, dtype, **options)

    monkeypatch.setattr(loading, "load", load_or_share)


@pytest.fixture(scope="module")
def shared() -> qwenvl.Pipeline:
    """The embedded model."""
    return qwenvl.load("tiny", "cpu", quiet=True)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command here; returns its status, what it printed, and its remarks."""

    def run_here(*arguments: str) -> tuple[int, str, str]:
        try:
            status = cli.main(arguments)
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return run_here


def outside(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "qwenvl.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, **options)


# ---- help


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_shows_an_example(run: Run, command: str) -> None:
    """`--help` of everything says how it is used, with a line that can be copied."""
    status, out, _ = run(*command.split(), "--help")
    assert status == 0
    example = out[out.index("example") :]
    assert f"  qwenvl {command or 'chat'} " in example


def test_examples_of_the_help_can_be_parsed() -> None:
    """Every example in the help names options that exist."""
    for lines in cli.EXAMPLES.values():
        for line in lines.splitlines():
            if line.startswith("  qwenvl "):
                words = shlex.split(line, comments=True)
                assert cli._parser().parse_args(words[1:]).run, line


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


def test_version(run: Run) -> None:
    """`--version` is the package's own."""
    assert run("--version")[:2] == (0, f"qwenvl {qwenvl.__version__}\n")


# ---- mistakes


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
        ("chat hi --device gpu", "device 'gpu' is not one; use auto, cpu"),
        ("chat hi --temperature 0", "temperature must be a number above 0"),
        ("chat hi --temperature nan", "temperature must be a number above 0"),
        ("chat hi --top-p 2", "top_p must be a number from 0 to 1"),
        ("chat hi --top-k -1", "top_k must be a whole number from 0"),
        ("chat hi --repetition-penalty 0", "repetition_penalty must be"),
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


# ---- chat


def test_chat_json(run: Run, dog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question with two pictures prints one JSON object and nothing else; its boxes are pixels of the last one."""
    other = tmp_path / "other.png"
    Image.new("RGB", (1000, 500)).save(other)
    target = tmp_path / "boxes.png"
    speak(monkeypatch, f" There: {DOG} and 猫")
    status, out, err = run("chat", "Where?", "--image", dog, "--image", str(other), "--json", "--save", str(target))
    assert status == 0
    assert out.count("\n") == 1
    assert out.isascii()  # every terminal and every pipe can carry it
    assert json.loads(out) == {
        "model": "tiny",
        "images": [dog, str(other)],
        "question": "Where?",
        "reply": f"There: {DOG} and 猫",
        "boxes": [{"x1": 100.0, "y1": 100.0, "x2": 500.0, "y2": 300.0, "label": "the dog"}],
        "saved": str(target),
    }
    assert "untrained" in err  # remarks do not mix with the answer
    with Image.open(target) as drawn:
        assert drawn.size == (1000, 500)
        assert drawn.getpixel((300, 300)) != (0, 0, 0)  # on the box's lower side
        assert drawn.getpixel((300, 200)) == (0, 0, 0)  # inside it
        assert drawn.getpixel((900, 400)) == (0, 0, 0)


def test_chat_json_without_pictures(run: Run) -> None:
    """Without pictures there are no boxes, and with `--quiet` no remarks."""
    status, out, err = run("chat", "Hello", "--json", "--quiet", *SHORT)
    assert (status, err) == (0, "")
    assert json.loads(out)["boxes"] == []
    assert json.loads(out)["saved"] is None


def test_chat_prints_the_reply(run: Run, dog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `--json` stdout is the reply alone; a picture without boxes is saved as it is, and that is said."""
    speak(monkeypatch, "A grey dog.")
    status, out, err = run("chat", "What?", "--image", dog, "--save", str(tmp_path / "same.png"))
    assert (status, out) == (0, "A grey dog.\n")
    assert "there was no box to draw" in err
    assert Image.open(tmp_path / "same.png").tobytes() == Image.open(dog).tobytes()


def test_json_and_text_are_the_same_reply(run: Run) -> None:
    """The streamed text is the JSON object's reply."""
    _, out, _ = run("chat", "What is in the picture?", "--quiet", *SHORT)
    _, as_json, _ = run("chat", "What is in the picture?", "--quiet", "--json", *SHORT)
    assert out == json.loads(as_json)["reply"] + "\n"


def test_reply_cannot_steer_the_terminal(run: Run, dog: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Escape sequences, bells and the C1 controls of a reply, of a box's label and in JSON never come out raw."""
    evil = "\x1b[2J\x1b]0;title\x07\r\x9b31m"
    speak(monkeypatch, f"a{evil}", f"b{evil}", f"c{evil}", f"{DOG_PLACE}<ref>{evil}</ref><box>(1,1),(9,9)</box>")
    printed = [run("chat", "?", "--quiet"), run("chat", "?", "--json"), run("generate", "?", "--quiet")]
    printed.append(run("ground", "dog", "--image", dog))
    for status, out, _ in printed:
        assert status == 0
        assert not {"\x1b", "\x07", "\r", "\x9b"} & set(out), out
    assert json.loads(printed[1][1])["reply"] == f"b{evil}"  # a script gets what was said
    assert "\ufffd[2J" in printed[3][1]


def test_failing_to_save_does_not_lose_the_answer(
    run: Run, dog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the disk is full after minutes of thinking, the JSON object still comes, with `saved` null, and the error."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    speak(monkeypatch, DOG)
    status, out, err = run("chat", "?", "--image", dog, "--json", "--save", str(tmp_path / "b.png"), "--quiet")
    assert status == 2
    assert json.loads(out)["saved"] is None
    assert len(json.loads(out)["boxes"]) == 1
    assert "No space left on device" in err
    assert not list(tmp_path.glob("*b.png*"))


def test_seed(run: Run) -> None:
    """With `--sample`, a seed makes the answer the same again; another seed another; greedy needs none."""
    ask = ("chat", "What is in the picture?", "--quiet", "--sample", "--temperature", "2")
    first, again, other = (run(*ask, "--seed", seed)[1] for seed in ("1", "1", "2"))
    assert first == again != other
    assert run("chat", "Hi", "--quiet", "--greedy", *SHORT) == run("chat", "Hi", "--quiet", *SHORT)


def test_options_reach_the_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decoding option and the system message arrive under their names; what is not given is left out."""
    given: dict[str, Any] = {}
    chat_stream = qwenvl.Pipeline.chat_stream

    def note(self: qwenvl.Pipeline, query: Any, history: Any = None, **options: Any) -> Any:
        given.update(options)
        return chat_stream(self, query, history, **options)

    monkeypatch.setattr(qwenvl.Pipeline, "chat_stream", note)
    run("chat", "Hi", "--quiet", *SHORT)
    assert given == {"max_new_tokens": 4}
    words = "--sample --temperature 0.5 --top-k 3 --top-p 0.9 --repetition-penalty 1.2 --seed 7 --system Be.brief"
    run("chat", "Hi", "--quiet", *SHORT, *words.split())
    assert given == {
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "max_new_tokens": 4,
        "seed": 7,
        "system": "Be.brief",
    }


def test_dtype(run: Run) -> None:
    """`--dtype` and `--device` are really those of the model; a small one speaks in bfloat16, too."""
    assert run("chat", "Hi", "--dtype", "bfloat16", "--device", "cpu", "--quiet", *SHORT)[0] == 0


# ---- generate, ground, demo


def test_generate(run: Run, dog: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` prints what comes after the prompt, unstripped; as JSON, with boxes."""
    speak(monkeypatch, f" {DOG}.", f" {DOG}.")
    assert run("generate", "Caption:", "--image", dog, "--bare", "--quiet")[1] == f" {DOG}.\n"
    result = json.loads(run("generate", "Caption:", "--image", dog, "--bare", "--json")[1])
    assert result["text"] == f" {DOG}."
    assert result["boxes"] == [{"x1": 20.0, "y1": 20.0, "x2": 100.0, "y2": 60.0, "label": "the dog"}]


def test_generate_bare(run: Run, dog: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--bare` leaves out `Picture k:`, which base checkpoints were not trained with."""
    prompts: list[str] = []
    stream = qwenvl.Pipeline._stream

    def note(self: qwenvl.Pipeline, prompt: Any, *rest: Any) -> Any:
        assert self.tokenizer is not None
        prompts.append(self.tokenizer.decode(prompt.ids))
        return stream(self, prompt, *rest)

    monkeypatch.setattr(qwenvl.Pipeline, "_stream", note)
    run("generate", "Caption:", "--image", dog, *SHORT)
    run("generate", "Caption:", "--image", dog, "--bare", *SHORT)
    assert prompts[0].startswith("Picture 1:<img>")
    assert prompts[1].startswith("<img>")


def test_ground(run: Run, dog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ground` prints boxes in the picture's own pixels, with the phrase, draws them, and says if there is none."""
    speak(monkeypatch, DOG_PLACE, DOG_PLACE, "nowhere")
    target = tmp_path / "boxes.jpg"
    assert run("ground", "a dog", "--image", dog, "--save", str(target))[1] == "a dog: (20,20),(100,60) in pixels\n"
    assert Image.open(target).size == (200, 100)
    result = json.loads(run("ground", "a dog", "--image", dog, "--json")[1])
    assert result["boxes"] == [{"x1": 20.0, "y1": 20.0, "x2": 100.0, "y2": 60.0, "label": "a dog"}]
    assert (result["phrase"], result["images"], result["saved"]) == ("a dog", [dog], None)
    assert run("ground", "a dog", "--image", dog)[1] == "no box found\n"


def test_photographs(run: Run, reference_dir: Path) -> None:
    """Real photographs go through every command that takes one."""
    for photograph in sorted((reference_dir / "images").glob("*.jp*g")):
        name = str(photograph)
        assert run("chat", "What is this?", "--image", name, "--json", *SHORT)[0] == 0
        assert run("ground", "the dog", "--image", name, "--json")[0] == 0


# ---- convert


def contents(folder: Path) -> tuple[dict[str, tuple[Any, ...]], dict[str, bytes]]:
    """Every tensor's name, dtype, shape and bytes, and the bytes of the files beside them that belong to a checkpoint."""
    tensors = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    return (
        {name: (t.dtype, t.shape, t.view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()},
        {file.name: file.read_bytes() for file in folder.glob("*") if file.suffix in (".json", ".tiktoken")},
    )


def test_convert_there_and_back(run: Run, tmp_path: Path) -> None:
    """Ours to the reference's layout and back keeps every name, dtype, shape and byte; a second run writes nothing."""
    there, back = tmp_path / "there", tmp_path / "back"
    assert run("convert", "tiny", str(there))[:2] == (0, f"wrote {there}\n")
    assert run("convert", str(there), str(back), "--quiet")[:2] == (0, f"wrote {back}\n")
    assert any(name.startswith("transformer.h.0.") for name in contents(there)[0])
    assert contents(back) == contents(embedded("tiny"))
    assert run("convert", "tiny", str(there))[:2] == (0, f"{there} already is this conversion, whole\n")


def test_convert_into_the_same_layout(run: Run, tmp_path: Path) -> None:
    """`--to` names the layout: ours to ours only cuts the shards anew."""
    cut = tmp_path / "cut"
    assert run("convert", "tiny", str(cut), "--to", "qwenvl", "--max-shard-bytes", "500000", "--quiet")[0] == 0
    assert len(list(cut.glob("*.safetensors"))) > 3
    assert run("chat", "Hi", "--model", str(cut), "--quiet", *SHORT) == run("chat", "Hi", "--quiet", *SHORT)


def test_tool_is_the_command(tmp_path: Path) -> None:
    """`tools/convert_weights.py` is `qwenvl convert`."""
    tool = Path(__file__).parents[1] / "tools" / "convert_weights.py"
    command = [sys.executable, str(tool), "tiny", str(tmp_path / "there"), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path / 'there'}\n"), done.stderr


# ---- the outside world


def test_json_in_a_process_of_its_own(dog: str, tmp_path: Path) -> None:
    """From another folder, with an ASCII locale and a question that is not UTF-8: one JSON object, status 0."""
    words = ["chat", b"\xff \xe7\x8c\xab?", "--image", dog, "--json", *SHORT]
    command = [sys.executable, "-m", "qwenvl.cli", *words]
    locale = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env={**ENVIRONMENT, **locale}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"\n") == 1
    assert json.loads(done.stdout)["reply"]


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


def test_interrupt() -> None:
    """Ctrl-C in the middle of an answer ends the command with status 130 and no traceback."""
    command = [sys.executable, "-m", "qwenvl.cli", "chat", "Hi", "--quiet", "--max-new-tokens", "8000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        process.stdout.read(1)  # it speaks
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")


def test_bug_is_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not a user's mistake is not dressed up as one."""

    def wrong(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(qwenvl.Pipeline, "chat_stream", wrong)
    with pytest.raises(ZeroDivisionError):
        cli.main(["chat", "hi", "--quiet"])


def test_odd_bytes_on_stdin(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that is not UTF-8 does not end a conversation."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nHi\n"), encoding="utf-8"))
    status, out, _ = run("chat", "--quiet", *SHORT)
    assert (status, out.count("you> ")) == (0, 3)
