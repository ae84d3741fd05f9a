"""The command line: what scripts read from it, what a mistake looks like, what it costs to ask for help."""

import io
import json
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run
from PIL import Image
from safetensors.torch import load_file
from speech import DOG, DOG_PLACE, speak

import qwenvl
from qwenvl import cli
from qwenvl.weights.hub import embedded

pytest_plugins = ("command_fixtures",)
COMMANDS = ("chat", "generate", "ground", "info", "convert", "quantize", "train", "demo", "bench")
SHORT = ("--max-new-tokens", "4")
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


def test_version(run: Run) -> None:
    """`--version` is the package's own."""
    assert run("--version")[:2] == (0, f"qwenvl {qwenvl.__version__}\n")


# ---- chat


def test_chat_json(
    run: Run, shared: qwenvl.Pipeline, dog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert f"tiny: {shared.config.note}" in err  # remarks do not mix with the answer
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
    penalties = "--frequency-penalty 0.5 --presence-penalty -0.5"
    run("chat", "Hi", "--quiet", *SHORT, *words.split(), *penalties.split())
    assert given == {
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
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
    ids = qwenvl.Pipeline._ids

    def note(self: qwenvl.Pipeline, prompt: Any, *rest: Any) -> Any:
        assert self.tokenizer is not None
        prompts.append(self.tokenizer.decode(prompt.ids))
        return ids(self, prompt, *rest)

    monkeypatch.setattr(qwenvl.Pipeline, "_ids", note)
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
    """Every tensor's name, dtype, shape and bytes, and the bytes of the files beside them."""
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


def test_tool_is_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`tools/convert_weights.py` is `qwenvl convert`."""
    tool = Path(__file__).parents[1] / "tools" / "convert_weights.py"
    monkeypatch.setattr(sys, "argv", [str(tool), "tiny", str(tmp_path / "there"), "--quiet"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(tool), run_name="__main__")
    assert (stop.value.code, capsys.readouterr().out) == (0, f"wrote {tmp_path / 'there'}\n")


# ---- the rest


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
