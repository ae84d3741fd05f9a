"""What the web page shows of a reply, as escaped HTML: nothing that a model or a user wrote becomes markup.

bubble      a reply as the chat shows it, phrases in their colours, coordinates hidden
text_of     the text again; a bubble's characters are the reply's, tags and all
overlay     a picture with a reply's boxes on it, and a legend whose phrases hide and show their boxes
nothing     what stands in its place before there is one
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from ..draw import COLOURS, colours
from ..text.boxes import Region, parse_spans
from ..text.tokenizer import REGION_TAGS
from .wording import Wording

_TAG = re.compile(f"({'|'.join(map(re.escape, REGION_TAGS))})")
_COORDINATES = re.compile(r"(?:\s*[0-9(),.+\-（），．＋－０-９])*")  # also those that have not come to their end
_MARKUP = re.compile(r"<[^<>]*>")
SHOWN = 80  # characters of a phrase in the legend


def escaped(text: str) -> str:
    """Text as HTML that shows it, for between tags. Quotes stay: people see them again where they edit a message."""
    return html.escape(text, quote=False)


def bubble(reply: str) -> str:
    """A reply as HTML: phrases that it marks have the colour of their boxes, tags and coordinates are not shown.

    They are all there, so `text_of` gives back the reply as it was.
    """
    chosen = colours(region.label for region in parse_spans(reply))
    numbers = {label: number for number, label in enumerate(chosen)}
    first, *pieces = _TAG.split(reply)
    shown = [escaped(first)]
    label: str | None = None
    for at in range(0, len(pieces), 2):
        tag, text = pieces[at : at + 2]
        shown.append(_hidden(tag))
        if tag == "<ref>":
            label = text.strip() or None
            colour = f" class='c{numbers[label] % len(COLOURS)}'" if label in numbers else ""
            shown.append(f"<mark{colour}>{escaped(text)}</mark>")
        elif tag in ("<box>", "<quad>"):
            if label is None and None in numbers:
                shown.append(f"<mark class='unnamed c{numbers[None] % len(COLOURS)}'></mark>")
            whole = pieces[at + 2 : at + 3] == [tag.replace("<", "</")]
            end = len(text) if whole else _end_of_coordinates(text)
            shown += [_hidden(text[:end]), escaped(text[end:])]
        else:
            if text.strip():
                label = None
            shown.append(escaped(text))
    return "".join(shown)


def text_of(shown: str) -> str:
    """The characters of `bubble`'s or `escaped`'s HTML."""
    return html.unescape(_MARKUP.sub("", shown))


def overlay(url: str, size: tuple[int, int], reply: str, words: Wording) -> str:
    """The picture at `url`, of `size` width and height, with what `reply` marks.

    A phrase is a checkbox whose box layer follows it, so that hiding needs neither a script nor the server.
    """
    width, height = size
    regions = parse_spans(reply)
    parts = []
    for number, (label, colour) in enumerate(colours(region.label for region in regions).items()):
        found = [region for region in regions if region.label == label]
        name = words.unnamed if label is None else label if len(label) <= SHOWN else label[: SHOWN - 1] + "…"
        times = f"<span class='times'>× {len(found)}</span>" if len(found) > 1 else ""
        style = f"--phrase: rgb({', '.join(map(str, colour))}); --ink: {_ink(colour)}"
        parts.append(
            f"<div class='phrase' style='{style}'><input type='checkbox' id='phrase-{number}' checked>"
            f"<label for='phrase-{number}' dir='auto'>{quoted(name)}{times}</label>{_layer(found, size, name)}</div>"
        )
    hint = words.toggle if parts else words.no_boxes if reply else ""
    return (
        f"<div class='marked' style='--width: {width}; --height: {height}'>"
        f"<div class='stage'><img src='{quoted(url)}' alt=''></div>"
        f"<div class='phrases'>{''.join(parts)}</div><p class='hint'>{quoted(hint)}</p></div>"
    )


def quoted(text: str) -> str:
    """The same for attributes too, and for HTML in which `${` and `{{` would be placeholders."""
    return html.escape(text).replace("$", "&#36;").replace("{", "&#123;").replace("}", "&#125;")


def nothing(words: Wording) -> str:
    """What stands in the picture's place before there is one."""
    return f"<p class='nothing'>{quoted(words.empty_picture)}</p>"


def _hidden(text: str) -> str:
    return f"<span class='tag'>{escaped(text)}</span>" if text else ""


def _end_of_coordinates(text: str) -> int:
    found = _COORDINATES.match(text)
    return found.end() if found else 0


def _layer(regions: Sequence[Region], size: tuple[int, int], name: str) -> str:
    """One phrase's shapes and their labels over the whole picture."""
    width, height = size
    outlines, labels = [], []
    for region in regions:
        box = region.box(width, height)
        points = region.pixels(width, height)
        if region.kind == "box":
            points = ((box.x1, box.y1), (box.x2, box.y1), (box.x2, box.y2), (box.x1, box.y2))
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        outlines.append(f"<polygon class='halo' points='{corners}'/><polygon points='{corners}'/>")
        side = f"left: {box.x1 / width:.2%}" if box.x1 < 0.6 * width else f"right: {1 - box.x2 / width:.2%}"
        place = f"bottom: {1 - box.y1 / height:.2%}" if box.y1 > 0.1 * height else f"top: {box.y1 / height:.2%}"
        labels.append(f"<span class='label' style='{side}; {place}'>{quoted(name)}</span>")
    return (
        f"<div class='layer'><svg viewBox='0 0 {width} {height}' preserveAspectRatio='none' aria-hidden='true'>"
        f"{''.join(outlines)}</svg>{''.join(labels)}</div>"
    )


def _ink(colour: tuple[int, int, int]) -> str:
    """Black or white, whichever can be read on the colour; as `draw` chooses."""
    red, green, blue = colour
    return "#111" if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else "#fff"
