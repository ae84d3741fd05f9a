"""Captions' words and scores against stored output of pycocoevalcap 1.2 (captions and texts invented for it)."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwenvl.evaluation.captions import bleu, cider, rouge_l, score_captions
from qwenvl.evaluation.items import DataError
from qwenvl.evaluation.ptb import SPANNING, _words, tokenize

GOLDENS = Path(__file__).parents[1] / "goldens" / "metrics"
TEXTS = json.loads((GOLDENS / "ptb_tokenizer.json").read_text(encoding="utf-8"))["items"]
CAPTIONS = json.loads((GOLDENS / "captions.json").read_text(encoding="utf-8"))
NAMES = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]


def near(value: Any) -> Any:
    """Within the goldens' tolerance."""
    return pytest.approx(value, abs=1e-9, rel=0)


def corpus(images: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The first images' candidates and references, as raw text."""
    items = CAPTIONS["items"][:images]
    candidates = {str(item["image_id"]): item["candidate"] for item in items}
    return candidates, {str(item["image_id"]): item["references"] for item in items}


@pytest.mark.parametrize("item", TEXTS, ids=lambda item: ascii(item["text"]))
def test_words_are_the_references(item: dict[str, str]) -> None:
    """Protects the words of every stored text, and that they are the Java program's line less its punctuation."""
    dropped = {"'", "''", "`", "``", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
    assert tokenize([item["text"]]) == [item["tokenized"]]
    assert item["tokenized"].split() == [word for word in item["java_line"].split() if word not in dropped]


def test_words_of_captions_are_the_references() -> None:
    """Protects the words of every stored caption and reference, tokenized in one call, in order."""
    for item in CAPTIONS["items"]:
        texts = [*item["references"], item["candidate"]]
        assert tokenize(texts) == [*item["references_tokenized"], item["candidate_tokenized"]]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\v", "\f", "\x85", "\u2028", "\u2029"])
def test_a_line_end_stays_in_its_caption(end: str) -> None:
    """Protects later captions from being shifted to other images, which the reference does at all of these but LF."""
    assert tokenize([f"a dog{end}runs", "a cat"]) == ["a dog runs", "a cat"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a (red) [b] {c}", "a -lrb- red -rrb- -lsb- b -rsb- -lcb- c -rcb-"),
        ("wow! wow!!! what?!", "wow wow !!! what ?!"),
        ("€5 £5 5¢", "$ 5 # 5 5 cents"),
        ("a dog 🐶", "a dog"),
        ("1 1/2 cups, 555 555 5555", "1\u00a01/2 cups 555\u00a0555\u00a05555"),
        ("", ""),
    ],
    ids=["brackets", "runs", "money", "emoji", "hard-spaces", "empty"],
)
def test_quirks_of_the_words(text: str, words: str) -> None:
    """Protects the reference's oddities: spelled brackets, kept runs, money in 7 bits, no emoji, words over spaces."""
    assert tokenize([text]) == [words]


# What rules are about, so that chance finds their corners; between them, whatever Unicode has.
PIECES = [
    *"aAnNtTyYdD'’‘`.,:;!?-–_/\\@#&$€()[]<>=*\"^0159 \u00a0\n\r\v\u2028\u00adé你🐶",
    "can't",
    "cannot",
    "art.",
    ". .",
    "1/2",
]
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.characters()), max_size=25).map("".join)


@given(st.lists(TEXT, max_size=4))
def test_any_text_becomes_one_line_of_words(captions: list[str]) -> None:
    """Protects the scorer from hostile captions: one string for each, never an error, a line end or a doubled space."""
    lines = tokenize(captions)
    assert len(lines) == len(captions)
    for line in lines:
        assert line == " ".join(word for word in line.split(" ") if word)
        assert len(line.splitlines()) <= 1


@given(st.lists(st.from_regex("[a-z]{1,9}", fullmatch=True)).map(" ".join))
def test_plain_words_are_settled(caption: str) -> None:
    """Protects captions that were tokenized before, which stay; plain words only part, as "cannot" does."""
    (line,) = tokenize([caption])
    assert tokenize([line]) == [line]
    assert line.replace(" ", "") == caption.replace(" ", "")


@given(TEXT)
@example("a <b c='d'>")
@example("art. 5")
@example("call 555 555 5555")
@example("well . . . no")
def test_words_are_the_same_read_between_spaces(caption: str) -> None:
    """Protects the short cut that remembers what stands between spaces: it is taken only where no rule spans them."""
    whole = list(_words(caption))
    assert tokenize([caption]) == [" ".join(whole)]
    assert SPANNING.search(caption) or [word for part in caption.split() for word in _words(part)] == whole


def test_scores_of_the_corpus_and_of_every_image() -> None:
    """Protects every metric's number from raw text to score, over all stored images together."""
    scores = score_captions(*corpus(len(CAPTIONS["items"])))
    assert scores.corpus == near({name: CAPTIONS["corpus"][name] for name in NAMES})
    for item in CAPTIONS["items"]:
        assert scores.images[str(item["image_id"])] == near({name: item["scores"][name] for name in NAMES})


@pytest.mark.parametrize("images", [1, 2])
def test_scores_of_small_corpora(images: int) -> None:
    """Protects what depends on the corpus: CIDEr's rarity (one image alone scores 0) and BLEU's sums."""
    stored = CAPTIONS["small_corpora"][f"first_{images}_images"]
    scores = score_captions(*corpus(images))
    assert [scores.corpus[name] for name in NAMES] == near([*stored["Bleu"], stored["ROUGE_L"], stored["CIDEr"]])
    rows = [*stored["Bleu_per_image"], stored["ROUGE_L_per_image"], stored["CIDEr_per_image"]]
    for name, row in zip(NAMES, rows, strict=True):
        assert [image[name] for image in scores.images.values()] == near(row)


def test_bleu_of_a_corpus_is_no_mean() -> None:
    """Protects BLEU's sum over images before the division, which weighs long captions more."""
    score = bleu([["a"], ["b", "c", "d"]], [[["a"]], [["x", "y", "z"]]])[0]
    assert score.images == pytest.approx([1.0, 0.0], abs=1e-8)
    assert score.corpus == pytest.approx(0.25, abs=1e-8)


def test_rouge_takes_the_best_of_different_references() -> None:
    """Protects the quirk that precision and recall may come from two references, whose F-measure is neither's."""
    assert rouge_l([["a", "b"]], [[["a"], ["a", "b", "c", "d"]]]).corpus == near(1.0)


def test_cider_counts_bigrams_for_length() -> None:
    """Protects the quirk that sentences of no word and of one word are equally long to the penalty."""
    scores = cider([["a"], ["b"]], [[["a"]], [["c"]]])
    assert scores.images == near([2.5, 0.0])


def test_no_candidate_is_worth_nearly_nothing() -> None:
    """Protects an empty caption from an error: a model may say nothing."""
    scores = score_captions({"a": "", "b": "a dog"}, {"a": ["a cat"], "b": ["a dog"]})
    assert list(scores.images["a"].values()) == near([0.0] * 6)


@pytest.mark.parametrize(
    ("candidates", "references"),
    [({}, {}), ({"a": "x"}, {"a": []}), ({"a": "x"}, {"a": "x"}), ({"a": "x"}, {}), ({}, {"a": ["x"]})],
    ids=["empty", "no-references", "a-string", "no-entry", "no-candidate"],
)
def test_what_cannot_be_scored_is_refused(candidates: dict[str, str], references: dict[str, list[str]]) -> None:
    """Protects the user from a score of nothing, or of captions matched with other images' references."""
    with pytest.raises(DataError, match=r"picture|captions"):
        score_captions(candidates, references)


@pytest.mark.parametrize("metric", [bleu, rouge_l, cider])
@pytest.mark.parametrize(("said", "wanted"), [([], []), ([["a"]], [[]]), ([["a"]], [])], ids=["empty", "none", "fewer"])
def test_metrics_refuse_alone_too(metric: Any, said: list[list[str]], wanted: list[list[list[str]]]) -> None:
    """Protects callers that tokenize for themselves."""
    with pytest.raises(DataError):
        metric(said, wanted)
