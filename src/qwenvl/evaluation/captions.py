"""How near a model's captions come to people's: BLEU-1..4, ROUGE-L and CIDEr, with the numbers of pycocoevalcap 1.2.

CaptionScores       the corpus's scores and every image's
score_captions      tokenize and score captions of images
bleu, rouge_l, cider    each on tokenized sentences

pycocoevalcap itself is 100 MB of Java, so these are our own, with its choices where the papers leave one open.
METEOR and SPICE are not here: both are Java programs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ..errors import PromptError
from .ptb import tokenize

ORDERS = 4  # n-grams of one to four words
CIDER_SIGMA = 6.0  # width of the penalty on lengths, in bigrams
ROUGE_BETA = 1.2  # weight of recall against precision

# What bleu keeps its divisions defined with; the references' scores carry it in the tenth digit.
TINY, SMALL = 1e-15, 1e-9

Ngram = tuple[str, ...]
Vector = list[dict[Ngram, float]]  # per order, the weight of each n-gram


@dataclass(frozen=True)
class CaptionScores:
    """Scores of captions; keys are "Bleu_1" .. "Bleu_4", "ROUGE_L", "CIDEr", as pycocoevalcap writes them.

    corpus  one number per metric, 0..1 (CIDEr 0..10). For BLEU this is not the mean over images.
    images  the same per image, under the image's key
    """

    corpus: dict[str, float]
    images: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Score:
    """One metric: of the whole corpus, and of each image in the order given."""

    corpus: float
    images: list[float]


def score_captions(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> CaptionScores:
    """Score one candidate per image against that image's references; both hold raw text under the same image keys.

    CIDEr weighs words by the references of the images scored together, so an image's CIDEr depends on the others.
    Raises PromptError for an empty corpus, an image without references, and keys that differ.
    """
    if candidates.keys() != references.keys():
        odd = sorted(map(str, candidates.keys() ^ references.keys()))[0]
        raise PromptError(f"image {odd!r} needs both a candidate and references")
    keys = list(candidates)
    for key in keys:
        if isinstance(references[key], str) or not references[key]:
            raise PromptError(f"image {key!r} has no list of references to score against")
    said = [sentence.split(" ") for sentence in tokenize([candidates[key] for key in keys])]
    wanted = [[sentence.split(" ") for sentence in tokenize(references[key])] for key in keys]
    metrics = {f"Bleu_{order}": score for order, score in enumerate(bleu(said, wanted), start=1)}
    metrics |= {"ROUGE_L": rouge_l(said, wanted), "CIDEr": cider(said, wanted)}
    return CaptionScores(
        {name: score.corpus for name, score in metrics.items()},
        {key: {name: score.images[row] for name, score in metrics.items()} for row, key in enumerate(keys)},
    )


def bleu(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[Score]:
    """BLEU-1 .. BLEU-4 (Papineni 2002) of words, per image candidates and references; one Score per order.

    The corpus adds up matches and lengths before dividing, and takes of each image the reference of the nearest length
    (the shorter on a tie). Image scores are smoothed by TINY and SMALL: no match of an order gives nearly 0, not 0.
    Raises PromptError as score_captions does.
    """
    _require_corpus(candidates, references)
    images: list[list[float]] = []
    matched, possible = [0] * ORDERS, [0] * ORDERS
    length, nearest = 0, 0
    for candidate, wanted in zip(candidates, references, strict=True):
        words = _words(candidate)
        counts = _ngrams(words)
        ceiling: Counter[Ngram] = Counter()
        for reference in wanted:
            ceiling |= _ngrams(_words(reference))
        here = [0] * ORDERS
        for ngram, count in (counts & ceiling).items():
            here[len(ngram) - 1] += count
        room = [max(0, len(words) - order) for order in range(ORDERS)]
        near = min((len(_words(reference)) for reference in wanted), key=lambda n: (abs(n - len(words)), n))
        images.append(_bleu_of(here, room, len(words), near))
        matched = [total + more for total, more in zip(matched, here, strict=True)]
        possible = [total + more for total, more in zip(possible, room, strict=True)]
        length, nearest = length + len(words), nearest + near
    corpus = _bleu_of(matched, possible, length, nearest)
    return [Score(corpus[order], [image[order] for image in images]) for order in range(ORDERS)]


def rouge_l(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> Score:
    """ROUGE-L (Lin 2004) of words: an F-measure over the longest common subsequence; the corpus is the mean.

    Quirk of the reference: the best precision and the best recall may come from two different references.
    Raises PromptError as score_captions does.
    """
    _require_corpus(candidates, references)
    images = []
    for candidate, wanted in zip(candidates, references, strict=True):
        common = [_common(candidate, reference) for reference in wanted]
        precision = max(shared / max(1, len(candidate)) for shared in common)
        recall = max(shared / max(1, len(reference)) for shared, reference in zip(common, wanted, strict=True))
        squared = ROUGE_BETA**2
        found = precision > 0 and recall > 0
        images.append((1 + squared) * precision * recall / (recall + squared * precision) if found else 0.0)
    return Score(fmean(images), images)


def cider(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> Score:
    """CIDEr-D (Vedantam 2015), 0..10, of words: cosines of n-gram vectors weighted by rarity; the corpus is the mean.

    Quirks of the reference: rarity is counted over the references of these images, so a corpus of one image scores 0;
    the penalty on lengths counts bigrams, not words. Raises PromptError as score_captions does.
    """
    _require_corpus(candidates, references)
    seen: Counter[Ngram] = Counter()
    for wanted in references:
        seen.update({ngram for reference in wanted for ngram in _ngrams(_words(reference))})
    log_images = math.log(len(references))

    def vector(words: Sequence[str]) -> Vector:
        weights: Vector = [{} for _ in range(ORDERS)]
        for ngram, count in _ngrams(_words(words)).items():
            weights[len(ngram) - 1][ngram] = count * (log_images - math.log(max(1, seen[ngram])))
        return weights

    images = []
    for candidate, wanted in zip(candidates, references, strict=True):
        ours, ours_bigrams = vector(candidate), max(0, len(_words(candidate)) - 1)
        total = 0.0
        for reference in wanted:
            difference = ours_bigrams - max(0, len(_words(reference)) - 1)
            penalty = math.exp(-(difference**2) / (2 * CIDER_SIGMA**2))
            total += penalty * fmean(map(_cosine, ours, vector(reference)))
        images.append(10 * total / len(wanted))
    return Score(fmean(images), images)


def _require_corpus(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> None:
    """Refuse what no score is defined for."""
    if not candidates:
        raise PromptError("no captions to score: the corpus is empty")
    if len(candidates) != len(references):
        raise PromptError(f"{len(candidates)} candidates do not match the references of {len(references)} images")
    for row, wanted in enumerate(references):
        if not wanted:
            raise PromptError(f"image number {row} has no references to score against")


def _words(sentence: Sequence[str]) -> list[str]:
    """What BLEU and CIDEr count: they split at no-break spaces too, and know no empty word. ROUGE-L has both."""
    return " ".join(sentence).split()


def _ngrams(words: Sequence[str]) -> Counter[Ngram]:
    """How often each run of one to four words occurs."""
    spans = ((start, order) for order in range(1, ORDERS + 1) for start in range(len(words) - order + 1))
    return Counter(tuple(words[start : start + order]) for start, order in spans)


def _bleu_of(matched: Sequence[int], possible: Sequence[int], length: int, nearest: int) -> list[float]:
    """BLEU of each order from counts, times the brevity penalty of `length` words against `nearest`."""
    ratio = (length + TINY) / (nearest + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for order, (hits, room) in enumerate(zip(matched, possible, strict=True), start=1):
        product *= (hits + TINY) / (room + SMALL)
        scores.append(product ** (1 / order) * brevity)
    return scores


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, in words."""
    row = [0] * (len(other) + 1)
    for word in one:
        above_left = 0
        for column, match in enumerate(other, start=1):
            above = row[column]
            row[column] = above_left + 1 if word == match else max(above, row[column - 1])
            above_left = above
    return row[-1]


def _cosine(candidate: Mapping[Ngram, float], reference: Mapping[Ngram, float]) -> float:
    """Cosine of two sparse vectors, the candidate's weights clipped to the reference's: repeating earns nothing."""
    dot = sum(
        min(weight, reference[ngram]) * reference[ngram] for ngram, weight in candidate.items() if ngram in reference
    )
    lengths = math.sqrt(sum(w * w for w in candidate.values())) * math.sqrt(sum(w * w for w in reference.values()))
    return dot / lengths if lengths else dot
