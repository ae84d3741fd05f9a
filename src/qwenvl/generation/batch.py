"""A batch of prompts as tensors in, lists of new ids out: the loop or the search, from an empty cache to the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import PromptError
from ..model.qwenvl import QwenVL
from ..text.stream import ReplyStream
from ..text.tokenizer import Tokenizer
from .beam import BeamOptions
from .decode import decode, prefill, search
from .room import allocate, bounded
from .sampling import SamplingOptions


@torch.no_grad()
def generate_batch(
    model: QwenVL,
    input_ids: Tensor,
    options: SamplingOptions,
    *,
    tokenizer: Tokenizer | None = None,
    pixels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_features: Tensor | None = None,
    stop_ids: Sequence[int] = (),
    stop: str | Sequence[str] = (),
    beams: BeamOptions | None = None,
    with_log_probabilities: bool = False,
) -> tuple[list[list[int]], list[list[float]]]:
    """New ids behind each prompt of `input_ids` [B,T], and their log-probabilities (empty unless asked for).

    Rows are padded where `attention_mask` [B,T] is false, on any side. A row's ids end with its stop id, if it met one.
    `tokenizer` is needed for stop strings, and keeps ids out that it does not have. Raises PromptError.
    """
    if beams is not None and (stop or with_log_probabilities or options.do_sample):
        raise PromptError("beam search takes neither stop strings, log-probabilities nor do_sample")
    if stop and tokenizer is None:
        raise PromptError("stop strings need a tokenizer; use stop_ids")
    weight = model.decoder.wte.weight
    input_ids, mask = _left_padded(input_ids, attention_mask)
    input_ids, mask = input_ids.to(weight.device), None if mask is None else mask.to(weight.device)
    batch, width = input_ids.shape
    n_beams = 1 if beams is None else beams.num_beams
    n_vocab = None if tokenizer is None else tokenizer.n_vocab
    slots = max(width, min(width + options.max_new_tokens, model.config.max_position_embeddings))
    cache = allocate(model, batch * n_beams, slots)
    with bounded(model, batch * n_beams, slots, cache=cache):
        logits = prefill(
            model,
            cache.rows(slice(batch)),
            input_ids,
            pixels=pixels,
            image_features=image_features,
            attention_mask=mask,
        )
    if beams is not None:
        found = search(
            model, cache, logits, input_ids, options, beams, history_mask=mask, stop_ids=stop_ids, n_vocab=n_vocab
        )
        return [[*text.ids, *([] if text.stop_id is None else [text.stop_id])] for row in found for text in row], []

    streams = [ReplyStream(tokenizer, stop) for _ in range(batch)] if tokenizer is not None and stop else []

    def should_stop(row: int, id_: int) -> bool:
        streams[row].push(id_)
        return streams[row].stopped

    new: list[list[int]] = [[] for _ in range(batch)]
    likely: list[list[float]] = [[] for _ in range(batch)]
    for step in decode(
        model,
        cache,
        logits,
        input_ids,
        options,
        history_mask=mask,
        stop_ids=stop_ids,
        should_stop=should_stop if streams else None,
        n_vocab=n_vocab,
        with_log_probabilities=with_log_probabilities,
    ):
        for row, id_ in enumerate(step.ids):
            if id_ is not None:
                new[row].append(id_)
                if step.log_probabilities is not None:
                    likely[row].append(step.log_probabilities[row])
    return new, likely


def _left_padded(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same rows with all padding at the left, so that every row's last column is its last token."""
    for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if not isinstance(value, Tensor) and value is not None:
            raise PromptError(f"{name} must be a tensor [B,T], not a {type(value).__name__}")
    if input_ids.dim() != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
        raise PromptError(f"input_ids must be whole numbers [B,T], not {input_ids.dtype} {list(input_ids.shape)}")
    input_ids = input_ids.long()
    if attention_mask is None:
        return input_ids, None
    if attention_mask.shape != input_ids.shape:
        raise PromptError(f"attention_mask is {list(attention_mask.shape)} but input_ids are {list(input_ids.shape)}")
    real = attention_mask.to(input_ids.device).bool()
    if empty := [row for row, tokens in enumerate(real.sum(dim=1).tolist()) if not tokens]:
        raise PromptError(f"row {empty[0]} is all padding: there is no prompt to continue")
    order = real.to(torch.uint8).argsort(dim=1, stable=True)
    return input_ids.gather(1, order), real.gather(1, order)
