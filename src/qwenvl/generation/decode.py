"""The decoding loop of one text or a batch: a prompt's logits in, new ids out, step by step.

    prefill          a prompt through the model and into its cache; the logits that follow it
    decode           a generator of new ids, for every row of a batch at once
    search           beam search over the same cache
    score            how likely given continuations of a prompt are

Blocking and streaming, chat and batch all run on these; many requests that come and go, on `engine.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapt.capture import Stepper
from ..adapt.ranks import common_seed
from ..errors import PromptError
from ..model.cache import KVCache
from ..model.qwenvl import QwenVL
from .beam import BeamOptions, Hypothesis, beam_search
from .room import bounded
from .sampling import SamplingOptions, Top, log_probabilities, process, require_ids, row_generators, sample, warp

AHEAD = 3  # steps that a GPU is told of before the first one's ids are read


@dataclass(frozen=True)
class NewIds:
    """What one step added: an id for each row, None for rows that ended earlier.

    `log_probabilities` are the model's own, before any processor, one for each row (meaningless where the row ended);
    None if they were not asked for.
    """

    ids: list[int | None]
    log_probabilities: list[float] | None = None


@torch.no_grad()
def prefill(
    model: QwenVL,
    cache: KVCache,
    input_ids: Tensor,
    *,
    pixels: Tensor | None = None,
    image_features: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Logits [B,V] that follow prompts [B,T], left-padded where `attention_mask` [B,T] is false. Fills the cache."""
    logits: Tensor = model(
        input_ids,
        pixels,
        attention_mask=attention_mask,
        cache=cache,
        image_features=image_features,
        logits_to_keep=1,
    )
    return logits[:, -1]


def room(cache: KVCache, options: SamplingOptions) -> list[int]:
    """How many new tokens each row of a prefilled cache may get: what is asked for, as far as its positions last.

    Raises PromptError if a row has no position left for one.
    """
    lengths, positions = cache.host_lengths.tolist(), cache.config.max_position_embeddings
    if max(lengths) >= positions:
        raise PromptError(
            f"the prompt takes all {positions} positions of the model; shorten it to leave room to answer"
        )
    return [min(options.max_new_tokens, positions - length) for length in lengths]


@torch.no_grad()
def decode(
    model: QwenVL,
    cache: KVCache,
    logits: Tensor,
    history: Tensor,
    options: SamplingOptions,
    *,
    history_mask: Tensor | None = None,
    stop_ids: Sequence[int] = (),
    should_stop: Callable[[int, int], bool] | None = None,
    n_vocab: int | None = None,
    with_log_probabilities: bool = False,
    stepper: Stepper | None = None,
) -> Generator[NewIds]:
    """Yield the ids that follow, until every row has stopped.

    Args:
        logits: [B,V], from `prefill`.
        history: the prompts [B,T], for penalties and n-grams; `history_mask` [B,T] is false on padding.
        stop_ids: a row ends with the first of them (and it is yielded).
        should_stop: `should_stop(row, id)` ends a row after this id; how stop strings are found.
        n_vocab: ids from here up do not exist for the tokenizer and are never emitted.
        stepper: of this cache, from an earlier call; what it has captured need not be captured again.

    A row also ends after `max_new_tokens`, or where the model's positions do. Rows that have ended are stepped along,
    unseen, until the last ends; the row that ended last then holds its prompt and all its new ids but the last in the
    cache. On a GPU, ids are read AHEAD steps after they were chosen, so that it never waits for the host; the steps
    beyond the end are taken back. Raises QwenVLError if a row has no id to choose.
    """
    stepper = Stepper(model, cache) if stepper is None else stepper
    width, limits, begun = history.shape[1], room(cache, options), cache.host_lengths.clone()
    seed = common_seed(model, options.seed) if options.do_sample else None
    generators = row_generators(seed, len(logits), logits.device) if options.do_sample else None
    text = torch.nn.functional.pad(history, (0, max(limits)))
    mask = torch.ones_like(text, dtype=torch.bool)
    if history_mask is not None:
        mask[:, :width] = history_mask.bool()
    going = set(range(len(logits)))
    chosen: deque[Chosen] = deque()  # not read yet
    read = 0  # steps that have been
    try:
        for n_generated in range(max(limits)):
            so_far = width + n_generated
            scores = process(
                logits,
                text[:, :so_far],
                options,
                n_generated=n_generated,
                stop_ids=stop_ids,
                history_mask=mask[:, :so_far],
                n_vocab=n_vocab,
            )
            if options.do_sample:
                scores = warp(scores, options)
            ids = sample(scores, generators)
            likely = log_probabilities(logits, ids.clamp(min=0)) if with_log_probabilities else None
            chosen.append(Chosen(ids, likely))
            last = n_generated + 1 == max(limits)
            # The first is read at once, for whoever waits for it; and an answer may end with it.
            while len(chosen) > (AHEAD if stepper.captures and n_generated and not last else 0):
                found, told, _ = chosen.popleft().read()
                require_ids([id_ if row in going else 0 for row, id_ in enumerate(found)])
                read += 1
                yield NewIds([id_ if row in going else None for row, id_ in enumerate(found)], told)
                for row in sorted(going):
                    id_ = found[row]
                    stopped = id_ in stop_ids or (should_stop is not None and should_stop(row, id_))
                    if stopped or read == limits[row]:
                        going.remove(row)
                if not going:
                    return
            ids = ids.clamp(min=0)  # an ended row may have had nothing to choose
            text[:, so_far] = ids
            # A row that has run out of positions cannot be stepped along: from then on, those that ended stand still.
            full = int(cache.host_lengths.max()) + 1 == model.config.max_position_embeddings
            real = torch.tensor([[row in going] for row in range(len(ids))], device="cpu") if full else None
            with bounded(model, cache.batch, cache.max_length, cache=cache):
                logits = stepper(ids, real)
    finally:
        kept = torch.minimum(cache.host_lengths, begun + max(read - 1, 0))
        if not torch.equal(kept, cache.host_lengths):
            cache.rewind(kept.tolist(), prompt_lengths=begun.tolist())


class Chosen:
    """Ids [B] of a step, on the way to the host; if they were asked for, also their log-probabilities [B], and the
    likeliest ids and their log-probabilities, both [B,k].
    """

    def __init__(self, ids: Tensor, told: Tensor | None, top: tuple[Tensor, Tensor] | None = None) -> None:
        self._ids, self._told = _to_host(ids), None if told is None else _to_host(told)
        self._top = None if top is None else (_to_host(top[0]), _to_host(top[1]))
        self._arrived = torch.cuda.Event() if ids.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(ids.device))

    def read(self) -> tuple[list[int], list[float] | None, list[Top] | None]:
        """Wait for them. An id is NO_ID where there was none to choose."""
        if self._arrived is not None:
            self._arrived.synchronize()
        told = None if self._told is None else self._told.tolist()
        top = None
        if self._top is not None:
            ids, likely = (tensor.tolist() for tensor in self._top)
            top = [list(zip(*row, strict=True)) for row in zip(ids, likely, strict=True)]
        return self._ids.tolist(), told, top


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, which may still be on its way."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


@torch.no_grad()
def search(
    model: QwenVL,
    cache: KVCache,
    logits: Tensor,
    history: Tensor,
    options: SamplingOptions,
    beams: BeamOptions,
    *,
    history_mask: Tensor | None = None,
    stop_ids: Sequence[int] = (),
    n_vocab: int | None = None,
) -> list[list[Hypothesis]]:
    """Beam search behind B prompts whose prefill stands in the first B of the cache's B x num_beams rows.

    Arguments as in `decode`; returns, for each prompt, its best texts, best first.
    """
    limits = room(cache.rows(slice(len(logits))), options)

    def step(rows: list[int], ids: Tensor) -> Tensor:
        with bounded(model, cache.batch, cache.max_length, cache=cache):
            new: Tensor = model(ids[:, None], cache=cache.reorder(rows), logits_to_keep=1)
        return new[:, -1]

    return beam_search(
        logits,
        step,
        history,
        beams,
        options,
        limits=limits,
        prompt_mask=history_mask,
        stop_ids=stop_ids,
        n_vocab=n_vocab,
    )


@torch.no_grad()
def score(model: QwenVL, cache: KVCache, logits: Tensor, continuations: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probability of every id of each continuation of one prefilled prompt (cache of one row, logits [1,V]).

    The prompt is prefilled once: the cache is rewound to it after each continuation, and left so. Raises PromptError
    if a continuation is empty.
    """
    length = int(cache.host_lengths[0])
    scores = []
    for number, ids in enumerate(continuations, 1):
        if not ids:
            raise PromptError(f"continuation {number} is empty: there is nothing to score")
        new = torch.tensor([list(ids)], device=logits.device)
        rest = model(new[:, :-1], cache=cache) if len(ids) > 1 else logits[:, None][:, :0]
        scores.append(log_probabilities(torch.cat((logits[:, None], rest), dim=1), new)[0].tolist())
        cache.rewind([length], prompt_lengths=[length])
    return scores
