"""The terminal chat: every command, and that a mistake or Ctrl-C in the middle loses nothing."""

import errno
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from speech import DOG, DOG_PLACE, speak

import qwenvl
from qwenvl.generation.decode import prefill
from qwenvl.terminal import converse, printable
from qwenvl.text.parts import Turn

SCRIPTED = {"max_new_tokens": 4}
Line = str | type[BaseException]
Talk = Callable[..., str]


@pytest.fixture(scope="module")
def loaded() -> qwenvl.Pipeline:
    """The embedded model."""
    return qwenvl.load("tiny", "cpu", quiet=True)


@pytest.fixture
def pipeline(loaded: qwenvl.Pipeline) -> qwenvl.Pipeline:
    """The embedded model with nothing in its mind."""
    loaded._session, loaded.images = None, {}
    return loaded


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two pictures."""
    Image.new("RGB", (200, 100), (90, 90, 90)).save(tmp_path / "dog.png")
    Image.new("RGB", (50, 60), (0, 0, 200)).save(tmp_path / "my cat.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def talk(pipeline: qwenvl.Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """A function that types lines (an exception is what `input` raises, such as Ctrl-C's) and returns the screen."""

    def type_lines(*lines: Line, images: tuple[str, ...] = (), **options: Any) -> str:
        waiting: Iterator[Line] = iter([*lines, EOFError])

        def typed(prompt: str) -> str:
            print(prompt, end="")
            line = next(waiting)
            if isinstance(line, str):
                print(line)
                return line
            raise line

        monkeypatch.setattr("builtins.input", typed)
        converse(pipeline, images, "out", **{**SCRIPTED, **options})
        assert next(waiting, "left") in ("left", EOFError), "the conversation ended early"
        return capsys.readouterr().out

    return type_lines


def said(path: str = "talk.json") -> list[Turn]:
    """The conversation that `/save` wrote."""
    return [Turn.from_dict(turn) for turn in json.loads(Path(path).read_text(encoding="utf-8"))]


def test_one_message_with_several_pictures(talk: Talk, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures wait for the next message, all of them, in order; the message after it has none."""
    speak(monkeypatch, "Two.", "Yes.")
    screen = talk("/image dog.png", "/image 'my cat.png'", "What are these?", "Sure?", "/save talk.json")
    assert "picture of 200 x 100 pixels" in screen
    assert "picture of 50 x 60 pixels" in screen
    assert "you> What are these?\nTwo.\nyou> Sure?\nYes.\n" in screen
    first, second = said()
    assert [dict(part) for part in first.parts] == [
        {"image": "dog.png"},
        {"image": "my cat.png"},
        {"text": "What are these?"},
    ]
    assert (first.reply, second.reply) == ("Two.", "Yes.")
    assert [dict(part) for part in second.parts] == [{"text": "Sure?"}]
    assert here


def test_pictures_of_the_command_line(talk: Talk, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures given with `--image` are in the first message."""
    speak(monkeypatch, "Grey.")
    talk("Colour?", "/save talk.json", images=("dog.png",))
    assert said()[0].parts[0] == {"image": "dog.png"}
    assert here


@pytest.mark.parametrize("typed", ["my cat.png", "'my cat.png'", '"my cat.png"', "my\\ cat.png", "  my cat.png "])
def test_dropped_files(talk: Talk, here: Path, typed: str) -> None:
    """A file that is dropped into the terminal may come quoted, or with its spaces escaped."""
    assert "picture of 50 x 60" in talk(f"/image {typed}")
    assert here


def test_home_folder(talk: Talk, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is the home folder, for pictures and for what is saved."""
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("USERPROFILE", str(here))
    monkeypatch.chdir("/")
    assert "picture of 200 x 100" in talk("/image ~/dog.png", "/save ~/talk.json")
    assert (here / "talk.json").read_text() == "[]\n"


def test_box(talk: Talk, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`/box` prints pixels of the latest picture, and draws them into a new file each time."""
    speak(monkeypatch, DOG_PLACE, DOG_PLACE, "nowhere")
    screen = talk("/image my cat.png", "/image dog.png", "/box a dog", "/box a dog", "/box a cow", "/save boxes.png")
    assert "a dog: (20,20),(100,60) in pixels\n  drew the boxes: out/boxes-1.png" in screen
    assert "out/boxes-2.png" in screen
    assert "no box found" in screen
    assert "  saved boxes.png" in screen
    assert sorted(os.listdir("out")) == ["boxes-1.png", "boxes-2.png"]
    drawn = Image.open("boxes.png")
    assert drawn.size == (200, 100)
    assert drawn.getpixel((60, 60)) != (90, 90, 90)
    assert drawn.getpixel((60, 50)) == (90, 90, 90)
    assert here


def test_boxes_of_an_answer(talk: Talk, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes in an answer are drawn on the latest picture, also rounds after it was shown; nothing is overwritten."""
    (here / "out").mkdir()
    (here / "out" / "boxes-1.png").write_bytes(b"mine")
    speak(monkeypatch, "Hello.", f"There: {DOG}")
    screen = talk("/image dog.png", "Hello", "Where is the dog?")
    assert f"There: {DOG}\n  drew the boxes: out/boxes-2.png" in screen
    assert (here / "out" / "boxes-1.png").read_bytes() == b"mine"
    assert Image.open(here / "out" / "boxes-2.png").size == (200, 100)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/image", "error: /image needs a path or URL"),
        ("/image missing.png", "error: cannot read 'missing.png'"),
        ("/image out.txt", "error: 'out.txt' is not a picture"),
        ("/image .", "error: '.' is not a file"),
        ("/image http://127.0.0.1/dog.png", "error: "),
        ("/image a\0.png", "error: cannot read"),
        ("/box", "error: /box needs a phrase"),
        ("/save", "error: /save needs a file name"),
        ("/save picture.png", "error: there is no annotated picture yet"),
        ("/save no/where.json", "error: cannot write no/where.json: No such file"),
        ("/save out.txt/talk.json", "error: cannot write out.txt/talk.json: Not a directory"),
        ("/save a\0.json", "error: cannot write"),
        ("/save /", "error: "),
        ("/dance", "there is no command /dance; /help shows"),
        ("/Image dog.png", "there is no command /Image"),
        ("/", "there is no command /"),
        ("猫 dog " * 2000, "error: the prompt has"),
    ],
)
def test_mistake_loses_nothing(talk: Talk, here: Path, monkeypatch: pytest.MonkeyPatch, line: str, says: str) -> None:
    """A mistake is one line; what was said before it, and the pictures that wait, are there after it."""
    (here / "out.txt").write_text("not a picture")
    speak(monkeypatch, "First.", "Second.")
    screen = talk("One", "/image dog.png", line, "Two", "/save talk.json")
    assert f"you> {line}\n{says}" in screen
    assert [turn.reply for turn in said()] == ["First.", "Second."]
    assert said()[1].parts[0] == {"image": "dog.png"}
    assert sorted(os.listdir()) == ["dog.png", "my cat.png", "out.txt", "talk.json"]


def test_box_without_a_picture(talk: Talk) -> None:
    """`/box` before any picture says what to do."""
    assert "error: there is no picture yet: /image PATH" in talk("/box dog")


def test_folder_that_cannot_be_made(talk: Talk, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If boxes cannot be written, that is said, and the answer stays in the conversation and in the picture."""
    (here / "out").write_text("in the way")
    speak(monkeypatch, DOG, "Second.")
    screen = talk("/image dog.png", "Where?", "Sure?", "/save talk.json")
    assert "error: cannot make the folder out" in screen
    assert [turn.reply for turn in said()] == [DOG, "Second."]


def test_file_that_goes_away(talk: Talk, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that was shown is kept: deleting its file ends neither the message nor later rounds."""
    speak(monkeypatch, "Grey.", "Still grey.")
    (here / "again.json").symlink_to("talk.json")

    class Deleting(str):
        """A line that deletes the file when it is read."""

        def strip(self, *_: Any) -> str:
            (here / "dog.png").unlink()
            return "Colour?"

    screen = talk("/image dog.png", Deleting(), "And now?", "/save talk.json")
    assert "error" not in screen
    assert [turn.reply for turn in said()] == ["Grey.", "Still grey."]


def test_full_disk_keeps_the_old_file(talk: Talk, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation that cannot be written whole leaves the one that was there."""
    (here / "talk.json").write_text("old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "error: cannot write talk.json: No space left on device" in talk("/save talk.json")
    assert (here / "talk.json").read_text() == "old"
    assert sorted(os.listdir()) == ["dog.png", "my cat.png", "talk.json"]


def test_clear(talk: Talk, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`/clear` forgets what was said, the pictures that wait, and the annotated one."""
    speak(monkeypatch, "First.", DOG_PLACE, "Second.")
    lines = ("One", "/image dog.png", "/box dog", "/clear", "/box dog", "/save b.png", "Two", "/save talk.json")
    screen = talk(*lines)
    assert "is forgotten" in screen
    assert "error: there is no picture yet" in screen
    assert "error: there is no annotated picture yet" in screen
    (turn,) = said()
    assert [dict(part) for part in turn.parts] == [{"text": "Two"}]
    assert here


@pytest.mark.parametrize("leave", ["/quit", "/exit", " /quit "])
def test_quit(talk: Talk, leave: str) -> None:
    """`/quit` leaves without waiting for more."""
    with pytest.raises(AssertionError, match="ended early"):
        talk(leave, "Are you there?")


def test_help_names_every_command(talk: Talk) -> None:
    """`/help` names all that there is, and empty lines are no questions."""
    screen = talk("/help", "", "   ")
    assert all(name in screen for name in ("/image", "/box", "/save", "/clear", "/help", "/quit", "Ctrl-C", "Ctrl-D"))
    assert screen.count("you>") == 4


def test_interrupted_answer(talk: Talk, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C stops an answer; what came stays in the conversation, and the next question is answered."""
    speak(monkeypatch, ("One two three", KeyboardInterrupt), "Second.")
    screen = talk("/image dog.png", "Count", "Again", "/save talk.json")
    assert " [stopped]\nyou> Again\nSecond.\n" in screen
    assert [turn.reply for turn in said()] == ["One two three", "Second."]
    assert here


def test_interrupted_before_the_answer(
    talk: Talk, here: Path, monkeypatch: pytest.MonkeyPatch, pipeline: qwenvl.Pipeline
) -> None:
    """Ctrl-C while the question is still being read: as if it had not been asked, and the pictures wait on.

    The cache is then half filled; the next answer must be what it would be in a conversation without all this.
    """
    calls = itertools.chain([False, True], itertools.repeat(False))

    def interrupted(*arguments: Any, **options: Any) -> Any:
        logits = prefill(*arguments, **options)
        if next(calls):
            raise KeyboardInterrupt
        return logits

    monkeypatch.setattr("qwenvl.generation.session.prefill", interrupted)
    screen = talk("Hello", "/image dog.png", "What is in it? " * 9, "What is it?", "Sure?", "/save talk.json")
    assert screen.count("[stopped]") == 1
    assert len(said()) == 3
    assert said()[1].parts[0] == {"image": "dog.png"}
    pipeline._session = None
    talk("Hello", "/image dog.png", "What is it?", "/save plain.json")
    assert said("plain.json") == said()[:2]
    assert here


def test_interrupted_command(talk: Talk, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of `/box`, or at the prompt, keeps the conversation."""
    speak(monkeypatch, "First.", ("(1", KeyboardInterrupt), "Second.")
    screen = talk("One", "/image dog.png", "/box dog", KeyboardInterrupt, "Two", "/save talk.json")
    assert "[stopped]" in screen
    assert [turn.reply for turn in said()] == ["First.", "Second."]
    assert said()[1].parts[0] == {"image": "dog.png"}
    assert here


def test_seed_and_system_are_kept(talk: Talk, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of the command line hold in every round: the same seed, the same two answers."""
    options = {"do_sample": True, "temperature": 2.0, "seed": 5, "system": "Be brief."}
    answers = [talk("One", "Two", **options) for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0] != talk("One", "Two", **(options | {"seed": 6}))
    assert here
    assert monkeypatch


def test_answers_are_those_of_chat(talk: Talk, here: Path, pipeline: qwenvl.Pipeline) -> None:
    """The terminal's conversation is `chat`'s, round by round."""
    talk("/image dog.png", "What is it?", "Sure?", "/save talk.json")
    first, history = pipeline.chat([{"image": "dog.png"}, {"text": "What is it?"}], max_new_tokens=4)
    second, history = pipeline.chat("Sure?", history, max_new_tokens=4)
    assert [turn.reply for turn in said()] == [first, second]
    assert said() == [Turn.from_dict(turn.to_dict()) for turn in history]
    assert here


def test_nothing_steers_the_terminal(talk: Talk, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Escape sequences in an answer or a found label are shown, not obeyed; the saved conversation has them."""
    evil = "\x1b[2J\x07\r\x9b31m"
    speak(monkeypatch, f"a{evil}b", f"{DOG_PLACE}<ref>{evil}</ref><box>(1,1),(900,900)</box>")
    screen = talk("/image dog.png", "Hi", "/box dog", "/save talk.json")
    assert not {"\x1b", "\x07", "\r", "\x9b"} & set(screen)
    assert "a\ufffd[2J" in screen
    assert said()[0].reply == f"a{evil}b"
    assert here


def test_printable() -> None:
    """Only control characters are replaced, one for one; line ends, tabs, Chinese and emoji stay."""
    assert printable("a\tb\n你好😀é\u202f") == "a\tb\n你好😀é\u202f"
    assert printable("\0\x07\x08\x1b\r\x7f\x80\x9b") == "\ufffd" * 8
