"""`qwenvl chat` in a terminal: pictures, streamed answers, boxes drawn into files.

converse       the loop
Conversation   what lies between two lines of input
printable      text that cannot steer the terminal
"""

from __future__ import annotations

import contextlib
import json
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .draw import draw_regions, save_image
from .errors import ImageError, PromptError, QwenVLError
from .image import open_image
from .pipeline import Pipeline
from .text.parts import Turn

HELP = """\
  /image PATH     put a picture (path or URL) into the next message; as often as you like
  /box PHRASE     find PHRASE in the latest picture, and draw it
  /save PATH      write the conversation (.json), or the latest annotated picture (.png, .jpg)
  /clear          begin anew
  /help           this text
  /quit           leave (so does Ctrl-D); Ctrl-C stops an answer"""


def printable(text: str) -> str:
    """The text without control characters other than line ends and tabs: a model's bytes may spell escape sequences."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


class Conversation:
    """One chat: its history, pictures waiting for the next message, the latest picture and its annotated copy."""

    def __init__(self, pipeline: Pipeline, out: str | Path, **options: Any) -> None:  # noqa: ANN401
        self.pipeline, self.out, self.options = pipeline, Path(out), options
        self.clear("")

    def clear(self, _: str) -> None:
        """Forget everything that was said and shown."""
        self.history: list[Turn] = []
        self.waiting: list[str] = []
        self.picture: Image.Image | None = None
        self.annotated: Image.Image | None = None

    def image(self, source: str) -> None:
        """Open a picture, so that a mistake shows now, and keep it for the next message."""
        if not source:
            raise PromptError("/image needs a path or URL")
        source = os.path.expanduser(source.strip("'\""))
        self.picture = open_image(source, self.pipeline.policy)
        self.waiting.append(source)
        print(f"  picture of {self.picture.width} x {self.picture.height} pixels, for your next message")

    def ask(self, text: str) -> None:
        """Stream the answer to a message and draw its boxes."""
        query = [*({"image": source} for source in self.waiting), {"text": text}]
        stream = self.pipeline.chat_stream(query, self.history, **self.options)
        try:
            for delta in stream:
                print(printable(delta), end="", flush=True)
        except KeyboardInterrupt:
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
        for found in boxes:
            print(f"{found.label}: ({found.x1:.0f},{found.y1:.0f}),({found.x2:.0f},{found.y2:.0f}) in pixels")
        if boxes:
            self._keep(draw_regions(self.picture, boxes, self.pipeline.font))
        else:
            print("no box found")

    def save(self, path: str) -> None:
        """Write the conversation or the annotated picture, by the ending of the name."""
        if not path:
            raise PromptError("/save needs a file name: .json for the conversation, .png or .jpg for the picture")
        if path.endswith(".json"):
            turns = [turn.to_dict() for turn in self.history]
            try:
                Path(path).write_text(json.dumps(turns, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            except OSError as error:
                raise PromptError(f"cannot write {path}: {error.strerror}") from None
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
        if annotated is None:
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ImageError(f"cannot make the folder {self.out}: {error.strerror}") from None
        number = next(n for n in range(1, 1_000_000) if not (self.out / f"boxes-{n}.png").exists())
        save_image(annotated, self.out / f"boxes-{number}.png")
        self.annotated = annotated
        print(f"  drew the boxes: {self.out / f'boxes-{number}.png'}")


def converse(pipeline: Pipeline, images: Sequence[str], out: str, **options: Any) -> None:  # noqa: ANN401
    """Read lines and answer them until the input ends. A mistake is told in one line and loses nothing."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` line editing and a history
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
            line = input("you> ").strip()
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
            print(f"error: {error}")
