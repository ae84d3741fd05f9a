"""Captions beside people's: BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D, and METEOR where it can be had.

score_captions      captions of pictures, as text
CaptionScores       what that gives: of all pictures, and of each
bleu, rouge_l, cider    each metric alone, of sentences that are lists of words
Score               what these give

Written from the papers: BLEU, Papineni 2002; ROUGE-L, Lin 2004; CIDEr-D, Vedantam 2015. Where a paper leaves a choice
open the numbers are those of pycocoevalcap 1.2, quirks included; each function says which.

METEOR is not written anew: it is a Java program with 100 MB of data, which `meteor` runs where the extra of that name
and Java are installed. Without them there is no METEOR, and nothing else changes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import TypeAlias

from .items import DataError
from .ptb import tokenize

Sentence: TypeAlias = "Sequence[str]"
Ngram: TypeAlias = "tuple[str, ...]"
Counts: TypeAlias = "Counter[Ngram]"  # how often a sentence has each n-gram of one order

ORDERS = range(1, 5)  # n-grams of one word to four
RECALL_WEIGHT = 1.2**2  # ROUGE-L's beta, squared: recall counts for more than precision
LENGTH_DEVIATION = 6.0  # CIDEr-D's sigma: how many bigrams more or fewer cost a factor of exp(-1/2)
CIDER_SCALE = 10.0
# Added above and below the line of BLEU's divisions, so that a picture without a match has a score close to 0, not 0.
ABOVE, BELOW = 1e-15, 1e-9


@dataclass(frozen=True)
class CaptionScores:
    """Scores by metric: "Bleu_1" to "Bleu_4", "ROUGE_L" and "CIDEr", and "METEOR" if it was asked for and can be had.

    Attributes:
        corpus: of all pictures together, from 0 to 1, CIDEr to 10; of BLEU this is not the mean over the pictures.
        images: of each picture, by its key.
    """

    corpus: dict[str, float]
    images: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Score:
    """One metric, of all pictures together and of each, in the order given."""

    corpus: float
    images: list[float]


def score_captions(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], *, with_meteor: bool = False
) -> CaptionScores:
    """A caption of each picture beside people's captions of it, as text, by the same keys.

    CIDEr weighs words by all references here, so a picture's score depends on which other pictures are scored with it.
    Raises DataError for no picture, a picture without references, and keys that differ.
    """
    if odd := candidates.keys() ^ references.keys():
        raise DataError(f"picture {min(odd)!r} should have both a caption and references")
    for key, texts in references.items():
        if isinstance(texts, str) or not texts:
            raise DataError(f"picture {key!r} has no list of references")
    said = [text.split(" ") for text in tokenize(list(candidates.values()))]
    wanted = [[text.split(" ") for text in tokenize(references[key])] for key in candidates]
    metrics = {f"Bleu_{order}": score for order, score in zip(ORDERS, bleu(said, wanted), strict=True)}
    metrics |= {"ROUGE_L": rouge_l(said, wanted), "CIDEr": cider(said, wanted)}
    if with_meteor:
        from .meteor import meteor

        if (found := meteor(said, wanted)) is not None:
            metrics["METEOR"] = found
    return CaptionScores(
        {name: score.corpus for name, score in metrics.items()},
        {key: {name: score.images[at] for name, score in metrics.items()} for at, key in enumerate(candidates)},
    )


def bleu(candidates: Sequence[Sentence], references: Sequence[Sequence[Sentence]]) -> list[Score]:
    """BLEU-1 to BLEU-4. All pictures together are scored as one, whose counts are the sums of theirs.

    The length that counts is that of the reference nearest in length, and of two as near, of the shorter.
    Raises DataError for no picture and for one without references.
    """
    said, wanted = _counted_words(candidates, references)
    lengths = [len(words) for words in said]
    nearest = [_nearest(length, group) for length, group in zip(lengths, wanted, strict=True)]
    brevity = [_brevity(own, other) for own, other in zip(_with_sum(lengths), _with_sum(nearest), strict=True)]
    products = [1.0] * len(brevity)
    scores = []
    for order in ORDERS:
        matched = [_matches(words, group, order) for words, group in zip(said, wanted, strict=True)]
        possible = [max(0, length - order + 1) for length in lengths]
        for at, (hits, most) in enumerate(zip(_with_sum(matched), _with_sum(possible), strict=True)):
            products[at] *= (hits + ABOVE) / (most + BELOW)
        *images, corpus = (product ** (1 / order) * factor for product, factor in zip(products, brevity, strict=True))
        scores.append(Score(corpus, images))
    return scores


def rouge_l(candidates: Sequence[Sentence], references: Sequence[Sequence[Sentence]]) -> Score:
    """ROUGE-L: the F-measure of the longest common subsequence; of all pictures, the mean.

    A quirk: the highest precision and the highest recall are taken, be they of different references.
    Raises DataError for no picture and for one without references.
    """
    _check(candidates, references)
    images = []
    for words, group in zip(candidates, references, strict=True):
        common = _common_lengths(words, group)
        precision = max(common) / max(1, len(words))
        recall = max(length / max(1, len(other)) for length, other in zip(common, group, strict=True))
        weighed = recall + RECALL_WEIGHT * precision
        images.append((1 + RECALL_WEIGHT) * precision * recall / weighed if weighed else 0.0)
    return Score(fmean(images), images)


def cider(candidates: Sequence[Sentence], references: Sequence[Sequence[Sentence]]) -> Score:
    """CIDEr-D, to 10: how much of what is rare elsewhere captions share, the mean over the orders and the references.

    Quirks: an n-gram is as rare as these pictures' references have it, so one picture alone scores 0; and lengths are
    compared in bigrams. Raises DataError for no picture and for one without references.
    """
    said, wanted = _counted_words(candidates, references)
    nearness = [
        [_length_nearness(len(words), len(other)) for other in group] for words, group in zip(said, wanted, strict=True)
    ]
    by_order = [_shared_rarity(said, wanted, nearness, order) for order in ORDERS]
    images = [CIDER_SCALE * fmean(orders) for orders in zip(*by_order, strict=True)]
    return Score(fmean(images), images)


def _check(candidates: Sequence[Sentence], references: Sequence[Sequence[Sentence]]) -> None:
    if not candidates:
        raise DataError("there are no captions to score")
    if len(candidates) != len(references):
        raise DataError(f"there are {len(candidates)} captions, and references of {len(references)} pictures")
    for number, group in enumerate(references, 1):
        if not group:
            raise DataError(f"picture number {number} has no references")


def _counted_words(
    candidates: Sequence[Sentence], references: Sequence[Sequence[Sentence]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Sentences as BLEU and CIDEr count them: no-break spaces part words too, and none is empty. Raises DataError.

    ROUGE-L takes sentences as they are.
    """
    _check(candidates, references)
    return [_parted(words) for words in candidates], [[_parted(words) for words in group] for group in references]


def _parted(words: Sentence) -> list[str]:
    return " ".join(words).split()


def _counts(words: Sentence, order: int) -> Counts:
    """How often each run of `order` words occurs."""
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def _with_sum(numbers: Sequence[int]) -> list[int]:
    """The numbers, and their sum after them."""
    return [*numbers, sum(numbers)]


def _nearest(length: int, group: Sequence[Sentence]) -> int:
    """The length nearest to it; of two as near, the shorter."""
    return min((len(other) for other in group), key=lambda other: (abs(other - length), other))


def _brevity(length: int, nearest: int) -> float:
    """BLEU's penalty on captions shorter than the reference."""
    ratio = (length + ABOVE) / (nearest + BELOW)
    return math.exp(1 - 1 / ratio) if ratio < 1 else 1.0


def _matches(words: Sentence, group: Sequence[Sentence], order: int) -> int:
    """How many n-grams are in a reference, each as often as the reference that has it most often."""
    others = [_counts(other, order) for other in group]
    return sum(min(count, max(other[ngram] for other in others)) for ngram, count in _counts(words, order).items())


def _common_lengths(words: Sentence, group: Sequence[Sentence]) -> list[int]:
    """The length of the longest subsequence in common with each of the others (Hunt and Szymanski 1977)."""
    places: dict[str, list[int]] = {}
    for place in reversed(range(len(words))):
        places.setdefault(words[place], []).append(place)
    lengths = []
    for other in group:
        ends: list[int] = []  # by length, where the subsequence that ends first does so
        for place in chain.from_iterable(places.get(word, ()) for word in other):
            length = bisect_left(ends, place)
            ends[length : length + 1] = [place]
        lengths.append(len(ends))
    return lengths


def _length_nearness(one: int, other: int) -> float:
    """CIDEr-D's Gaussian of the difference in length; sentences of one word and of none have no bigrams alike."""
    difference = max(one, 1) - max(other, 1)
    return math.exp(-0.5 * (difference / LENGTH_DEVIATION) ** 2)


def _shared_rarity(
    said: Sequence[Sentence], wanted: Sequence[Sequence[Sentence]], nearness: Sequence[Sequence[float]], order: int
) -> list[float]:
    """CIDEr-D of one order, from 0 to 1, of each picture.

    A sentence is a vector of counts times logarithms of rarity; that is kept as counts, and the squares of the latter.
    """
    groups = [[_counts(other, order) for other in group] for group in wanted]
    pictures_with = Counter(chain.from_iterable(set().union(*group) for group in groups))
    squares = {ngram: math.log(len(groups) / pictures) ** 2 for ngram, pictures in pictures_with.items()}
    unseen = math.log(len(groups)) ** 2

    def length(counts: Counts) -> float:
        return math.sqrt(sum(count * count * squares.get(ngram, unseen) for ngram, count in counts.items()))

    def similarity(own: Counts, own_length: float, other: Counts) -> float:
        """The cosine; an n-gram that is repeated more often than the reference has it earns no more."""
        shared = own.keys() & other.keys()
        product = sum(min(own[ngram], other[ngram]) * other[ngram] * squares[ngram] for ngram in shared)
        return product / (own_length * length(other)) if product else 0.0

    scores = []
    for words, group, factors in zip(said, groups, nearness, strict=True):
        own = _counts(words, order)
        own_length = length(own)
        scores.append(
            fmean(factor * similarity(own, own_length, other) for factor, other in zip(factors, group, strict=True))
        )
    return scores
