"""What training makes small.

Objective         any such function: the model and a batch to a summed loss, and what it is a sum of
next_token_loss   the objective of language modelling
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from ..config import VisionConfig
from ..model.qwenvl import QwenVL
from ..text.prompt import IGNORED_LABEL
from .batches import Batch

# The loss comes summed, with the number of its terms, and not as a mean: the loop divides by the terms of the whole
# update, so that pieces of a batch, on one device or several, weigh what they would weigh in one.
Objective: TypeAlias = Callable[[Any, Any], tuple[Tensor, "Tensor | int"]]


def next_token_loss(model: QwenVL, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy of every labelled token given those before it, summed, and how many they are.

    In float32, as the exponentials of a large vocabulary need. A batch without a picture gets a blank one, in a row
    that carries no loss, where the vision tower or resampler is trained or spread over ranks: every parameter then has
    a gradient in every update, and all ranks run, and wait for each other in, the same layers.
    """
    if batch.pixels is None and _needs_a_picture(model):
        batch = _with_blank_picture(batch, model.config.visual)
    logits: Tensor = model(batch.input_ids, batch.pixels, attention_mask=batch.attention_mask)
    targets = batch.labels[:, 1:]
    labelled = targets != IGNORED_LABEL
    loss = F.cross_entropy(logits[:, :-1][labelled].float(), targets[labelled], reduction="sum")
    return loss, labelled.sum()


def _needs_a_picture(model: QwenVL) -> bool:
    towers = (model.visual, model.resampler)
    return isinstance(model, FSDPModule) or any(p.requires_grad for tower in towers for p in tower.parameters())


def _with_blank_picture(batch: Batch, vision: VisionConfig) -> Batch:
    """One more row: an image span without labels, and pixels [1,3,S,S] of mean colour."""
    device = batch.input_ids.device
    span = [vision.image_start_id, *[vision.image_pad_id] * vision.n_queries, vision.image_end_id]
    rows, width = batch.input_ids.shape
    new_width = max(width, len(span))
    mask = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask

    def widened(table: Tensor, filling: int) -> Tensor:
        return F.pad(table, (0, new_width - width, 0, 1), value=filling)

    input_ids, new_mask = widened(batch.input_ids, 0), widened(mask, False)
    input_ids[rows, : len(span)] = torch.tensor(span, device=device)
    new_mask[rows, : len(span)] = True
    pixels = torch.zeros(1, 3, vision.image_size, vision.image_size, device=device)
    labels = widened(batch.labels, IGNORED_LABEL)
    return replace(batch, input_ids=input_ids, labels=labels, attention_mask=new_mask, pixels=pixels)
