"""`qwenvl chat` in a terminal: pictures, streamed answers, boxes drawn into files.

converse       the loop
Conversation   what lies between two lines of input
show_boxes     boxes as lines of text
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .adapt.ranks import is_shared, of_first, shared_errors
from .draw import draw_regions, save_image
from .errors import ImageError, PromptError, QwenVLError, printable, told
from .files import whole_file
from .image import open_image
from .pipeline import Pipeline
from .text.boxes import Box
from .text.parts import Turn

HELP = """\
  /image PATH     put a picture (path or URL) into the next message; as often as you like
  /box PHRASE     find PHRASE in the latest picture, and draw it
  /save PATH      write the conversation (.json), or the latest annotated picture (.png, .jpg)
  /clear          begin anew
  /help           this text
  /quit           leave (so does Ctrl-D); Ctrl-C stops an answer"""


def show_boxes(boxes: Sequence[Box]) -> None:
    """Print a line for each box, in pixels."""
    for box in boxes:
        print(f"{printable(box.label or '')}: ({box.x1:.0f},{box.y1:.0f}),({box.x2:.0f},{box.y2:.0f}) in pixels")
    if not boxes:
        print("no box found")


class Conversation:
    """One chat: its history, pictures waiting for the next message, the latest picture and its annotated copy.

    `pictures` keeps every picture under the name that the history uses: a file that is deleted or a URL that goes away
    in the middle does not end the conversation. Without `out`, no file is written.
    """

    def __init__(self, pipeline: Pipeline, out: str | Path | None, **options: Any) -> None:  # noqa: ANN401
        self.pipeline, self.out, self.options = pipeline, None if out is None else Path(out), options
        self._forget()

    def _forget(self) -> None:
        self.history: list[Turn] = []
        self.waiting: list[str] = []
        self.pictures: dict[str, Image.Image] = {}
        self.picture: Image.Image | None = None
        self.annotated: Image.Image | None = None

    def clear(self, _: str) -> None:
        """Forget everything that was said and shown."""
        self._forget()
        print("  everything said and shown is forgotten")

    def image(self, source: str) -> None:
        """Open a picture, so that a mistake shows now, and keep it for the next message."""
        if not source:
            raise PromptError("/image needs a path or URL")
        source = _path(source)
        with shared_errors(is_shared(self.pipeline.model)):  # a URL may fail in one of several processes alone
            self.picture = self.pictures[source] = open_image(source, self.pipeline.policy)
        self.waiting.append(source)
        print(f"  picture of {self.picture.width} x {self.picture.height} pixels, for your next message")

    def ask(self, text: str) -> None:
        """Stream the answer to a message and draw its boxes."""
        query = [*({"image": source} for source in self.waiting), {"text": text}]
        stream = self.pipeline.chat_stream(query, self.history, images=self.pictures, **self.options)
        try:
            for delta in stream:
                print(printable(delta), end="", flush=True)
        except KeyboardInterrupt:
            if not stream.reply:  # stopped before it began: as if it had not been asked
                raise
            stream.close()
            print(" [stopped]", end="")
        print()
        self.history, self.waiting = stream.history, []
        if self.picture is not None:
            self._keep(self.pipeline.draw(self.picture, stream.reply))

    def box(self, phrase: str) -> None:
        """Find a phrase in the latest picture."""
        if not phrase:
            raise PromptError("/box needs a phrase, such as /box the dog")
        if self.picture is None:
            raise PromptError("there is no picture yet: /image PATH")
        boxes = self.pipeline.ground(self.picture, phrase)
        show_boxes(boxes)
        if boxes:
            self._keep(draw_regions(self.picture, boxes, self.pipeline.font, self.pipeline.policy))

    def save(self, name: str) -> None:
        """Write the conversation or the annotated picture, by the ending of the name."""
        if not name:
            raise PromptError("/save needs a file name: .json for the conversation, .png or .jpg for the picture")
        if self.out is None:
            return
        path = Path(_path(name))
        if path.suffix.lower() == ".json":
            turns = json.dumps([turn.to_dict() for turn in self.history], ensure_ascii=False, indent=2) + "\n"
            try:
                with whole_file(path) as file:
                    file.write(turns.encode())
            except (OSError, ValueError) as error:
                raise PromptError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
        elif self.annotated is None:
            raise PromptError("there is no annotated picture yet: /box PHRASE, or ask for a box")
        else:
            save_image(self.annotated, path)
        print(f"  saved {path}")

    def help(self, _: str) -> None:
        """Show the commands."""
        print(HELP)

    def _keep(self, annotated: Image.Image | None) -> None:
        """Write a picture with boxes into the output folder, under the first number that is free."""
        if annotated is None or self.out is None:
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ImageError(f"cannot make the folder {self.out}: {error.strerror}") from None
        number = next(n for n in range(1, 1_000_000) if not (self.out / f"boxes-{n}.png").exists())
        save_image(annotated, self.out / f"boxes-{number}.png")
        self.annotated = annotated
        print(f"  drew the boxes: {self.out / f'boxes-{number}.png'}")


def _path(text: str) -> str:
    """A path or URL as it was typed, or dropped into the terminal, which quotes it or escapes its spaces."""
    text = os.path.expanduser(text.strip("'\""))
    return text if os.path.exists(text) else text.replace("\\ ", " ")


def _line_editing() -> None:
    """Give `input` a history, and file names on the Tab key, where Python was built with readline."""
    with contextlib.suppress(ImportError):
        import readline

        readline.set_completer_delims(" \t\n'\"")
        readline.parse_and_bind("tab: complete")  # with no completer set, these are file names


def _read_line(pipeline: Pipeline, first: bool) -> str:
    """A line of input; where several processes share the model, all get what the first one reads."""
    if not is_shared(pipeline.model):
        return input("you> ")
    line: str | None = None
    if first:
        try:
            line = input("you> ")
        except EOFError:
            pass
        except KeyboardInterrupt:
            line = ""
    if (line := of_first(line)) is None:
        raise EOFError
    return line


def converse(pipeline: Pipeline, images: Sequence[str], out: str | None, **options: Any) -> None:  # noqa: ANN401
    """Read lines and answer them until the input ends. A mistake is told in one line and loses nothing.

    Without `out`, as in a process that only computes along, no file is written.
    """
    _line_editing()
    conversation = Conversation(pipeline, out, **options)
    commands = {
        "/image": conversation.image,
        "/box": conversation.box,
        "/save": conversation.save,
        "/clear": conversation.clear,
        "/help": conversation.help,
    }
    print(f"qwenvl chat with {pipeline.name} on {pipeline.device}; /help shows the commands")
    for source in images:
        conversation.image(source)
    while True:
        try:
            line = _read_line(pipeline, out is not None).strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # clears the line, as shells do
            print()
            continue
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return
        try:
            if command in commands:
                commands[command](rest.strip())
            elif line.startswith("/"):
                print(f"there is no command {command}; /help shows those that there are")
            elif line:
                conversation.ask(line)
        except QwenVLError as error:
            print(told(error))
        except KeyboardInterrupt:
            print(" [stopped]")
