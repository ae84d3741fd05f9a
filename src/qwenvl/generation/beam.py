"""Beam search over any model that can be stepped and whose cache rows can be reordered.

    BeamOptions    how wide, how long, when to stop; valid once it exists
    Hypothesis     a finished text and its score
    beam_search    the search; reproduces transformers 4.32, without its padding

The model is one callback, so that this file can be read, and tested, without a model.
Letters: B prompts, K beams, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..checks import is_number, is_whole
from ..config import SamplingOptions
from ..errors import ConfigError
from .sampling import no_choice, process

MAX_LENGTH_PENALTY = 50.0  # beyond it, length ** penalty would overflow for long texts

Step = Callable[[list[int], Tensor], Tensor]


class Candidate(NamedTuple):
    """A text one id longer: its log-probability, the row that it continues, and the id."""

    total: float
    row: int
    id: int


@dataclass(frozen=True)
class BeamOptions:
    """How to search.

    num_beams             texts kept per prompt; from 2 up (1 would be greedy decoding)
    length_penalty        a text's score is its log-probability over (prompt + new tokens) ** length_penalty: above 0
                          favours long texts, below 0 short ones
    early_stopping        True: stop at `num_beams` finished texts; False: when the best open text, at its present
                          length, could not beat them; "never": when no open text could, at any length
    num_return_sequences  texts returned per prompt, best first; at most `num_beams`

    Raises ConfigError for a value that cannot be used.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        if not (is_whole(self.num_beams) and self.num_beams >= 2):
            raise ConfigError(f"num_beams must be a whole number from 2 up, not {self.num_beams!r}")
        if not (is_number(self.length_penalty) and abs(self.length_penalty) <= MAX_LENGTH_PENALTY):
            limit = f"-{MAX_LENGTH_PENALTY:g} to {MAX_LENGTH_PENALTY:g}"
            raise ConfigError(f"length_penalty must be a number from {limit}, not {self.length_penalty!r}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ConfigError(f"early_stopping must be true, false or 'never', not {self.early_stopping!r}")
        if not (is_whole(self.num_return_sequences) and 1 <= self.num_return_sequences <= self.num_beams):
            raise ConfigError(
                f"num_return_sequences must be a whole number from 1 to num_beams ({self.num_beams}), "
                f"not {self.num_return_sequences!r}"
            )


@dataclass(frozen=True)
class Hypothesis:
    """One text that the search found: its new ids without the prompt and without the stop id.

    `score` is the length-penalised log-probability; `stop_id` is what ended the text, None if it was the length.
    """

    ids: list[int]
    score: float
    stop_id: int | None


@dataclass
class _Finished:
    """The best finished texts of one prompt, at most K of them."""

    options: BeamOptions
    prompt_length: int
    max_new_tokens: int
    texts: list[Hypothesis] = field(default_factory=list)

    def _penalized(self, log_probability: float, n_generated: int) -> float:
        divisor: float = max(1, self.prompt_length + n_generated) ** self.options.length_penalty
        return log_probability / divisor

    @property
    def _worst(self) -> Hypothesis:
        return min(self.texts, key=lambda text: text.score)

    def add(self, ids: list[int], log_probability: float, stop_id: int | None) -> None:
        """Keep this text if it is among the best K. The stop id counts in its probability, not in its length."""
        text = Hypothesis(ids, self._penalized(log_probability, len(ids)), stop_id)
        full = len(self.texts) == self.options.num_beams
        if full and text.score <= self._worst.score:
            return
        if full:
            self.texts.remove(self._worst)
        self.texts.append(text)

    def cannot_improve(self, best_log_probability: float, n_generated: int) -> bool:
        """Whether to stop, when the best candidate of this step has `n_generated` new tokens."""
        if len(self.texts) < self.options.num_beams:
            return False
        if self.options.early_stopping is True:
            return True
        if self.options.early_stopping == "never" and self.options.length_penalty > 0:
            n_generated = self.max_new_tokens  # a log-probability is negative: dividing by more can only raise it
        return self._worst.score >= self._penalized(best_log_probability, n_generated)

    def best(self) -> list[Hypothesis]:
        """Best first; of equal scores the one found later comes first, as in the reference."""
        return sorted(self.texts, key=lambda text: text.score)[::-1][: self.options.num_return_sequences]


@torch.no_grad()
def beam_search(
    logits: Tensor,
    step: Step,
    prompt: Tensor,
    beams: BeamOptions,
    options: SamplingOptions,
    *,
    limits: Sequence[int] | None = None,
    prompt_mask: Tensor | None = None,
    stop_ids: Sequence[int] = (),
    n_vocab: int | None = None,
) -> list[list[Hypothesis]]:
    """Search for the most likely texts; returns, for each prompt, up to `num_return_sequences`, best first.

    `logits` [B, V] follow the prompts `prompt` [B, T], of which `prompt_mask` [B, T] is false on left padding.
    `step(rows, ids [N]) -> logits [N, V]`, of N rows, must make row i of the cache what its row `rows[i]` was, then
    feed it `ids[i]`. The first call widens the cache from B rows to B x K; later ones reorder it, and drop the rows of
    prompts that are done.

    `limits` are new tokens for each prompt, by default `options.max_new_tokens` for all. The processors of `options`
    act on log-probabilities and nothing is renormalised afterwards (as in the reference); `stop_ids` end a text; ids
    from `n_vocab` up are never emitted. The length penalty counts the row's own prompt, without padding, so a row
    scores what it would alone (the reference counts padding). A prompt gives fewer texts than asked for only if there
    are no more. Raises QwenVLError if the logits or the options leave nothing to choose, and ConfigError for a penalty
    below 0: it would raise the total of a text as it grows, and a search ends on the ground that totals only fall.
    """
    for name in ("frequency_penalty", "presence_penalty"):
        if getattr(options, name) < 0:
            raise ConfigError(f"{name} must be 0 or above in a beam search, not {getattr(options, name)!r}")
    n_beams, width = beams.num_beams, prompt.shape[1]
    mask = torch.ones_like(prompt, dtype=torch.bool) if prompt_mask is None else prompt_mask.bool()
    limits = [options.max_new_tokens] * len(prompt) if limits is None else limits
    finished = [_Finished(beams, length, limit) for length, limit in zip(mask.sum(1).tolist(), limits, strict=True)]
    going = list(range(len(prompt)))  # the prompts whose search goes on: K rows of the tensors below for each of them
    logits, history, mask = (rows.repeat_interleave(n_beams, 0) for rows in (logits, prompt, mask))
    totals = torch.full((len(logits),), -math.inf, dtype=torch.float32, device=logits.device)
    totals[::n_beams] = 0  # the beams of a prompt are equal at first: only one of them counts

    for n_generated in range(max(limits)):
        scores = process(
            logits.float().log_softmax(-1),
            history,
            options,
            n_generated=n_generated,
            stop_ids=stop_ids,
            history_mask=mask,
            n_vocab=n_vocab,
        )
        survivors: list[Candidate] = []  # K for each prompt that goes on
        still_going: list[int] = []
        ranking = _rank(scores + totals[:, None], n_beams, n_beams * max(2, 1 + len(stop_ids)))
        for index, candidates in zip(going, ranking, strict=True):
            if not candidates:
                raise no_choice(index)
            unfinished = _set_finished_apart(candidates, finished[index], history[:, width:], stop_ids)
            if not unfinished or finished[index].cannot_improve(candidates[0].total, n_generated + 1):
                continue
            if n_generated + 1 < limits[index]:
                still_going.append(index)
                survivors += unfinished
            else:  # the length ends them
                for total, row, id_ in (c for c in unfinished if c.total > -math.inf):
                    finished[index].add([*history[row, width:].tolist(), id_], total, None)
        going = still_going
        if not going:
            break
        rows = [c.row for c in survivors]  # stays on the host, where the cache's bookkeeping is
        ids = torch.tensor([c.id for c in survivors], device=history.device)
        totals = torch.tensor([c.total for c in survivors], dtype=torch.float32, device=history.device)
        history = torch.cat([history[rows], ids[:, None]], dim=1)
        mask = torch.cat([mask[rows], torch.ones_like(mask[rows, :1])], dim=1)
        logits = step(rows if n_generated else [row // n_beams for row in rows], ids)
    return [found.best() for found in finished]


def _rank(totals: Tensor, n_beams: int, n_candidates: int) -> list[list[Candidate]]:
    """The likeliest continuations of each prompt, best first, out of totals [B x K, V]; none that is -inf or NaN."""
    n_ids = totals.shape[-1]
    per_prompt = totals.view(-1, n_beams * n_ids)
    top = per_prompt.topk(min(n_candidates, per_prompt.shape[1]))
    return [
        [
            Candidate(total, place * n_beams + index // n_ids, index % n_ids)
            for total, index in zip(row_totals, row_indices, strict=True)
            if total > -math.inf
        ]
        for place, (row_totals, row_indices) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True))
    ]


def _set_finished_apart(
    candidates: list[Candidate], finished: _Finished, texts: Tensor, stop_ids: Sequence[int]
) -> list[Candidate]:
    """Move the candidates that end in a stop id to `finished`; return the K best of the others, or none.

    A stop id ranked below the K best is ignored, as in the reference: a better open text is still there.
    """
    n_beams = finished.options.num_beams
    unfinished: list[Candidate] = []
    for rank, candidate in enumerate(candidates):
        if candidate.id not in stop_ids:
            unfinished.append(candidate)
            if len(unfinished) == n_beams:
                break
        elif rank < n_beams:
            finished.add(texts[candidate.row].tolist(), candidate.total, candidate.id)
    # Where hardly any id is allowed, dead copies fill the places: their -inf is never ranked again.
    return unfinished + [c._replace(total=-math.inf) for c in unfinished[:1]] * (n_beams - len(unfinished))
