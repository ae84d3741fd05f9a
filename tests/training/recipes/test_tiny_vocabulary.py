"""The small model's own vocabulary: the same every time, and printed words stay single letters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from qwenvl.text.tokenizer import SPECIALS, VOCABULARY_FILE, Tokenizer
from qwenvl.training.recipes import tiny, tiny_vocabulary
from qwenvl.training.recipes.tiny_scenes import WORDS, Split, scene
from qwenvl.training.recipes.tiny_words import LANGUAGES


@pytest.fixture(scope="module")
def learned() -> Sequence[bytes]:
    """The vocabulary's file, learned twice, with few merges from few scenes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_vocabulary, "MERGES", 290)
        patch.setattr(tiny_vocabulary, "SCENES", 4)
        return [tiny_vocabulary.vocabulary() for _ in range(2)]


def test_the_same_words_every_time(learned: Sequence[bytes]) -> None:
    """The same bytes, so that a run begun anew goes on with the same ids."""
    assert learned[0] == learned[1]


def test_the_vocabulary_is_one(learned: Sequence[bytes], tmp_path: Path) -> None:
    """The tokenizer reads it; every text comes back; every special id is there, the image's where the config says."""
    (tmp_path / VOCABULARY_FILE).write_bytes(learned[0])
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.n_vocab == 290 + len(SPECIALS)
    assert [tokenizer.special_ids[form] for form in SPECIALS] == list(range(290, tokenizer.n_vocab))
    assert tokenizer.encode_tagged("".join(SPECIALS), SPECIALS) == list(range(290, tokenizer.n_vocab))
    for text in ("Where is the red circle?", "红色圆形在哪里？", "naïve 😀 \x00", *WORDS):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_printed_words_are_spelled(learned: Sequence[bytes], tmp_path: Path) -> None:
    """Letter by letter, digit by digit, so that the model reads and does not recognise; common words are whole."""
    (tmp_path / VOCABULARY_FILE).write_bytes(learned[0])
    tokenizer = Tokenizer(tmp_path)
    for word in (*WORDS, "QZXJ", "407"):
        assert [tokenizer.decode([i]) for i in tokenizer.encode(word)] == list(word)
    assert len(tokenizer.encode(" the")) == 1


def test_the_corpus_is_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sentence about a held-out picture; every skill in both languages; no printed word."""
    seeds: list[int] = []
    monkeypatch.setattr(tiny_vocabulary, "SCENES", 8)
    monkeypatch.setattr(tiny_vocabulary, "scene", lambda seed: seeds.append(seed) or scene(seed))
    text = tiny_vocabulary.corpus()
    assert seeds
    assert all(seed in Split.TRAIN.value for seed in seeds)
    assert not [word for word in WORDS if word in text]
    for language in LANGUAGES:
        assert language.raw_caption.split(" ")[0] in text
        for template in language.count:
            assert template.split("{}")[0] in text


@pytest.mark.slow
def test_the_real_vocabulary(tmp_path: Path) -> None:
    """With all its merges it has the size that the config counts on, and nouns are nearly whole in both languages."""
    (tmp_path / VOCABULARY_FILE).write_bytes(tiny_vocabulary.vocabulary())
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.image_start_id == tiny.config().visual.image_start_id
    assert tokenizer.n_vocab <= tiny.config().vocab_size < tokenizer.n_vocab + 16
    for language in LANGUAGES:
        for noun in (*language.colours.values(), *(one for one, _ in language.shapes.values())):
            assert len(tokenizer.encode((" " if language.spaced else "") + noun)) <= 2, noun
