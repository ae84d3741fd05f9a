"""The small model's byte-level BPE: learned from its own questions and answers, in the real one's file format."""

from __future__ import annotations

import base64
import random
import re

from tiktoken._educational import bpe_train

from ...text.tokenizer import PATTERN
from .tiny_questions import SKILLS, compare, dialogue, raw_form
from .tiny_scenes import Split, scene
from .tiny_words import CHINESE, LANGUAGES

MERGES = 768  # the 256 single bytes among them
SCENES = 40

_PRINTED = re.compile("[A-Z]{2,}")
_NOUN = re.compile("(" + "|".join([*CHINESE.colours.values(), *(one for one, _ in CHINESE.shapes.values())]) + ")")


def corpus() -> str:
    """What the merges are learned from: every kind of question about the first training scenes.

    Printed words are left out: they stay single letters, so that the model spells what it reads, new words too. Chinese
    nouns and colours stand on lines of their own: no merge crosses from one to the next.
    """
    lines = ["system\nYou are a helpful assistant.\nuser\nassistant\nPicture 1:\nPicture 2:\n Answer:"] * 20
    for index in range(SCENES):
        rng = random.Random(index)
        here, there = (scene(Split.TRAIN.seed(2 * index + k)) for k in range(2))
        for language in LANGUAGES:
            exchanges = [ask(rng, here, language) for ask in SKILLS.values()]
            for exchange in (*exchanges, compare(rng, here, there, language), *dialogue(rng, here, language)):
                if exchange is not None:
                    lines += [exchange.question, exchange.answer, raw_form(exchange)[0]]
    return _NOUN.sub(r"\n\1\n", _PRINTED.sub("", "\n".join(lines)))


def vocabulary() -> bytes:
    """The file `qwen.tiktoken`: a line `base64 rank` for each token."""
    ranks = bpe_train(corpus(), MERGES, PATTERN, visualise=None)
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
