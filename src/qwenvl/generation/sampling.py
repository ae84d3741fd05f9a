"""From logits to the next id: one frozen set of options and pure functions, in the reference's order.

    SamplingOptions      what may be asked for, valid once it exists
    process              penalties, no-repeat n-grams, minimum new tokens, ids that must never be emitted
    looks_back           whether that depends on the text so far
    warp                 temperature, top-k, top-p (only when sampling)
    sample               the most likely id, or one drawn at random with a generator per row
    row_generators       those generators, from one seed
    log_probabilities    how likely the model itself found an id
    top_log_probabilities   which ids it found likeliest, and how likely

Everything computes in float32, changes none of its arguments and never waits for the device.
Letters: B batch, T tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import SamplingOptions as SamplingOptions
from ..errors import QwenVLError

NO_ID = -1  # what `sample` returns for a row in which no id can be chosen
Top = list[tuple[int, float]]  # ids and their log-probabilities, the likeliest first
_FLOAT32 = torch.finfo(torch.float32)


# --- processors: always applied -------------------------------------------------------------------------------------


def process(
    logits: Tensor,
    history: Tensor,
    options: SamplingOptions,
    *,
    n_generated: int,
    stop_ids: Sequence[int] = (),
    history_mask: Tensor | None = None,
    n_vocab: int | None = None,
) -> Tensor:
    """Apply what holds for greedy decoding and sampling alike: logits [B, V] to float32 [B, V].

    `history` [B, T] is each row's text so far, prompt included, of which the last `n_generated` ids are new;
    `history_mask` [B, T] is false on padding. Padding then counts neither as repeated nor as part of an n-gram, so that
    a row is what it would be alone (the reference counts it; without a mask so do we). `n_vocab` is the number of ids
    that the tokenizer has: those above are never emitted.

    The reference has no frequency and presence penalty: they come right behind the repetition penalty, as in vLLM.
    """
    scores = logits.float()
    if options.repetition_penalty != 1:
        scores = penalize_repetition(scores, history, options.repetition_penalty, history_mask)
    if options.frequency_penalty or options.presence_penalty:
        new_ids = history[:, history.shape[1] - n_generated :]
        scores = penalize_presence(scores, new_ids, options.frequency_penalty, options.presence_penalty)
    if options.no_repeat_ngram_size:
        scores = forbid_repeated_ngrams(scores, history, options.no_repeat_ngram_size, history_mask)
    if n_generated < options.min_new_tokens:
        scores = scores.clone()
        for i in stop_ids:
            scores[:, i : i + 1] = -math.inf  # a slice, as a small model's vocabulary may end before the configured id
    return forbid_unknown(scores, n_vocab)


def looks_back(options: SamplingOptions) -> bool:
    """Whether what `process` does depends on the ids of the text so far."""
    penalties = options.repetition_penalty != 1 or options.frequency_penalty != 0 or options.presence_penalty != 0
    return penalties or options.no_repeat_ngram_size > 0


def penalize_repetition(scores: Tensor, history: Tensor, penalty: float, history_mask: Tensor | None = None) -> Tensor:
    """Make ids of `history` [B, T] less likely, each once: scores [B, V] -> [B, V] (CTRL, arXiv 1909.05858, 4.1).

    Negative scores are multiplied and others divided, so that a penalty above 1 always lowers.
    """
    seen = _among(history, history_mask, scores.shape[-1])
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def penalize_presence(scores: Tensor, new_ids: Tensor, frequency: float, presence: float) -> Tensor:
    """Lower ids of `new_ids` [B, N] by `frequency` for each time, and by `presence` once: scores [B, V] -> [B, V].

    As OpenAI's interface has it: the prompt's ids do not count, and what is negative raises.
    """
    counts = torch.zeros_like(scores).scatter_add_(1, new_ids, torch.ones_like(new_ids, dtype=scores.dtype))
    return scores - frequency * counts - presence * (counts > 0)


def forbid_repeated_ngrams(scores: Tensor, history: Tensor, size: int, history_mask: Tensor | None = None) -> Tensor:
    """Forbid each id that would complete an n-gram of `history` [B, T] again: scores [B, V] -> [B, V]."""
    length = history.shape[-1]
    if length < size:
        return scores
    ngrams = history.unfold(-1, size, 1)  # [B, T - size + 1, size]
    ending = history[:, length - size + 1 :]  # [B, size - 1]: what the next id would complete
    repeats = (ngrams[..., :-1] == ending[:, None]).all(-1)
    if history_mask is not None:
        repeats &= history_mask.bool().unfold(-1, size, 1).all(-1)
    return scores.masked_fill(_among(ngrams[..., -1], repeats, scores.shape[-1]), -math.inf)


def forbid_unknown(scores: Tensor, n_vocab: int | None) -> Tensor:
    """Forbid ids from `n_vocab` up, which the tokenizer does not have (the head is wider): scores [B, V] -> [B, V]."""
    surplus = 0 if n_vocab is None else scores.shape[-1] - n_vocab
    if surplus <= 0:
        return scores
    return torch.nn.functional.pad(scores[..., :n_vocab], (0, surplus), value=-math.inf)


def _among(ids: Tensor, counted: Tensor | None, n_vocab: int) -> Tensor:
    """Which ids of the vocabulary occur in `ids` [B, T] where `counted` [B, T] is true: bool [B, V]."""
    if counted is not None:
        ids = ids.masked_fill(~counted.bool(), n_vocab)  # one column more than the vocabulary takes what is not counted
    table = torch.zeros(len(ids), n_vocab + 1, dtype=torch.bool, device=ids.device)
    return table.scatter_(1, ids, True)[:, :n_vocab]


# --- warpers: only when sampling ------------------------------------------------------------------------------------


def warp(scores: Tensor, options: SamplingOptions, *, min_keep: int = 1) -> Tensor:
    """Apply temperature, top-k and top-p in this order: scores [B, V] to float32 [B, V], dropped ids at -inf.

    Top-k and top-p keep at least `min_keep` ids.
    """
    scores = scores.float()
    if options.temperature != 1:
        scores = scores / options.temperature
    if options.top_k:
        scores = keep_top_k(scores, max(options.top_k, min_keep))
    if options.top_p < 1:
        scores = keep_top_p(scores, options.top_p, min_keep)
    return scores


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Keep the k highest scores of each row, and every score tied with the k-th: [B, V] -> [B, V]."""
    kth = scores.topk(min(k, scores.shape[-1])).values[..., -1:]
    return scores.masked_fill(scores < kth, -math.inf)


def keep_top_p(scores: Tensor, p: float, min_keep: int = 1) -> Tensor:
    """Keep the smallest set of ids whose probability reaches p: [B, V] -> [B, V] (nucleus, arXiv 1904.09751, 3.1).

    As in the reference, the unlikely tail that holds no more than 1 - p is dropped in ascending order. The stable sort
    makes the outcome defined where scores tie: the higher ids stay.
    """
    ascending, ids = scores.sort(dim=-1, stable=True)
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - p
    dropped[..., -min_keep:] = False
    return scores.masked_fill(torch.zeros_like(dropped).scatter_(-1, ids, dropped), -math.inf)


# --- choosing -------------------------------------------------------------------------------------------------------


def row_generators(seed: int | None, n_rows: int, device: torch.device | str) -> list[torch.Generator]:
    """One generator per row, row i seeded with seed + i, or with fresh entropy if `seed` is None.

    A row of a batch thus draws what it would draw alone with its own seed. Devices draw differently from one another.
    """
    generators = [torch.Generator(device) for _ in range(n_rows)]
    for i, generator in enumerate(generators):
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed + i)
    return generators


def sample(scores: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
    """Choose an id per row: scores [B, V] -> ids [B], the most likely or, with a generator for each row, at random.

    A row that has nothing to choose from (NaN, or every id forbidden) gives NO_ID instead of an error, as raising here
    would wait for the device at every step: the loop, which reads the ids anyway, calls `require_ids` on them.
    """
    scores = scores.float()
    if generators is not None:
        # The Gumbel-max trick: with -log(exponential noise) added, the largest score is a draw from the softmax. Unlike
        # torch.multinomial it takes a generator per row and cannot abort a CUDA context. Zero noise would make NaN.
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, generators, strict=True):
            row.exponential_(generator=generator)
        scores = scores - noise.clamp_(min=_FLOAT32.tiny).log_()
    best, ids = scores.max(-1)
    return ids.masked_fill(~best.isfinite(), NO_ID)


def require_ids(ids: Sequence[int]) -> None:
    """Raise QwenVLError if one of the ids that `sample` chose, one per row, is NO_ID."""
    if NO_ID in ids:
        raise no_choice(list(ids).index(NO_ID))


def no_choice(row: int) -> QwenVLError:
    """The error for a row of the batch in which no id can be chosen."""
    return QwenVLError(
        f"row {row}: no next id can be chosen: either the logits are not finite (try dtype='float32'), "
        "or no_repeat_ngram_size and min_new_tokens forbid every id"
    )


def log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of `ids` [...] under the model itself, before any processor: logits [..., V] -> float32 [...]."""
    logits = logits.float()
    return logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)


def top_log_probabilities(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k ids that the model itself found likeliest, and their log-probabilities, the likeliest first.

    logits [B, V] -> ids [B, k] and float32 [B, k]; all V of them if k is more. Of equals, the lower id comes first.
    """
    logits = logits.float()
    bits = (logits + 0.0).view(torch.int32).long()  # the sum makes 0 of -0, which is equal and has other bits
    ranks = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # whole numbers in the order of the floats
    # `topk` leaves open which of equals it takes, and logits of 16 bits have many: with the id behind it, no rank is
    # equal to another. A stable sort would say the same, and take several times as long.
    ranks = (ranks << 32) - torch.arange(logits.shape[-1], device=logits.device)
    ids = ranks.topk(min(k, logits.shape[-1])).indices
    return ids, logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
