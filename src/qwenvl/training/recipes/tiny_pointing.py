"""What a sequence is about, token by token: the things and letters that attention is taught to look at.

From answers alone, a decoder needs tens of thousands of pictures before it begins to tie a phrase to a place, and more
to count. The generator knows which things are meant, so it says so; `tiny_guidance` makes losses of it.

    find_points    for every token of a sequence, what to look at
    find_groups    likewise, all that a question's phrase means
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from ...text.prompt import IGNORED_LABEL
from ...text.tokenizer import Tokenizer
from .tiny_dense import LETTERS
from .tiny_questions import group, place
from .tiny_scenes import COLOURS, SHAPES, Scene
from .tiny_words import LANGUAGES

# What a phrase means; in this order, the longest is found first.
PHRASES = {
    language.phrase(colour, shape, number).encode(): (colour, shape)
    for language in LANGUAGES
    for colour in (*COLOURS, None)
    for shape in (*SHAPES, None)
    for number in (2, 1)
}
MENTION = re.compile(rb"(?<!What )(?:" + b"|".join(PHRASES) + rb")")  # the `shape` of "What shape" means none
NEAR = 100  # thousandths, summed over its four numbers, that a box may be off: questions name them inexactly
LETTER = 16  # from here on, the letters' classes; below, the things' numbers


def find_points(tokenizer: Tokenizer, ids: Sequence[int], labels: Sequence[int], scene: Scene) -> list[int]:
    """For each of `ids` what to look at while the next is found: a thing's number (from 1, in `scene.things`), LETTER
    + a letter's class, or 0 for nothing.

    In an answer: a thing from its `<ref>` to the end of its box, and all along another box; every letter of a printed
    word. In a question: where a box or the phrase of one thing alone ends, since nobody can know before that.
    """
    found = [0] * len(ids)
    for at, meant in _mentions(tokenizer, ids, scene):
        if labels[at] == IGNORED_LABEL and len(meant) == 1:
            found[at] = meant[0]
    phrase = box = 0
    for at, id_ in enumerate(ids):
        learned = labels[at] != IGNORED_LABEL
        if id_ == tokenizer.ref_start_id and learned:
            phrase = at
        elif id_ == tokenizer.box_start_id:
            box = at
        elif id_ == tokenizer.box_end_id:
            first, last = (phrase or box, at) if learned else (at, at + 1)
            found[first:last] = [_nearest(scene, tokenizer.decode(ids[box:at]))] * (last - first)
            phrase = 0
    for start, word in _readings(tokenizer, ids, labels, scene):
        for at, id_ in enumerate(word, start):
            letter = tokenizer.decode([id_]).strip()  # the first may be one token with the space before it
            if len(letter) == 1:  # no space alone
                found[at - 1] = LETTER + 1 + LETTERS.index(letter)
    return found


def find_groups(tokenizer: Tokenizer, ids: Sequence[int], labels: Sequence[int], scene: Scene) -> list[int]:
    """For each of `ids`, where a phrase ends in a question: 1, and 2 ** n for every thing n that it means; else 0."""
    found = [0] * len(ids)
    for at, meant in _mentions(tokenizer, ids, scene):
        if labels[at] == IGNORED_LABEL:
            found[at] = 1 + sum(2**number for number in meant)
    return found


def _mentions(tokenizer: Tokenizer, ids: Sequence[int], scene: Scene) -> Iterator[tuple[int, list[int]]]:
    """Where a phrase ends, and the numbers of the things that it means."""
    special = set(tokenizer.special_ids.values())  # there is a star in `<|im_start|>`
    pieces = [b"\n" if id_ in special else tokenizer.token_bytes(id_) for id_ in ids]
    ends = list(accumulate(map(len, pieces)))  # they need not be those of words, nor of characters
    for phrase in MENTION.finditer(b"".join(pieces)):
        meant = group(scene, *PHRASES[phrase[0]]).things
        yield bisect_left(ends, phrase.end()), [1 + scene.things.index(thing) for thing in meant]


def _nearest(scene: Scene, corners: str) -> int:
    """The number of the thing whose box is spelt, 0 if it is nobody's."""
    spelt = [int(number) for number in re.findall("[0-9]+", corners)]
    distances = [sum(abs(a - b) for a, b in zip(place(scene, t), spelt, strict=True)) for t in scene.things]
    nearest = min(distances)
    return 1 + distances.index(nearest) if nearest <= NEAR else 0


def _readings(
    tokenizer: Tokenizer, ids: Sequence[int], labels: Sequence[int], scene: Scene
) -> Iterator[tuple[int, list[int]]]:
    """Where the printed word stands as an answer or as a phrase, and its tokens there."""
    if scene.text is None:
        return
    closing = tokenizer.im_end_id, tokenizer.eos_id, tokenizer.ref_end_id
    ends = [at for at, id_ in enumerate(ids) if id_ in closing and labels[at] != IGNORED_LABEL]
    for word in (tokenizer.encode(space + (scene.text.word or "")) for space in ("", " ")):
        for start in (end - len(word) for end in ends):
            if list(ids[start : start + len(word)]) == word:
                yield start, word
