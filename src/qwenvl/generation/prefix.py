"""What a cache holds already of a prompt: texts with their pictures as numbers that can be compared.

signs           one number for each token: its id, or what stands for its picture inside an image span
reusable        how far a text that was computed is a prompt's beginning
weights_stamp   something that changes when the weights do
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..config import QwenVLConfig
from ..errors import PromptError
from ..model.qwenvl import QwenVL

Signs: TypeAlias = npt.NDArray[np.int64]
Stamp: TypeAlias = tuple[object, ...]


def signs(ids: Sequence[int], hashes: Sequence[str], config: QwenVLConfig) -> Signs:
    """[T]: ids, which are 0 and above, and inside an image span the picture's number, below 0.

    `hashes` are of the pictures, in reading order. The numbers are the same within this process only. Raises
    PromptError for a prompt beyond the model's positions, or spans and pictures that are not equally many.
    """
    if len(ids) > config.max_position_embeddings:
        raise PromptError(
            f"the prompt has {len(ids)} tokens but the model has {config.max_position_embeddings} positions; "
            "shorten it, drop a picture, or lower max_window_size"
        )
    made = np.array(ids, dtype=np.int64)
    starts: list[int] = []
    for at in np.flatnonzero(made == config.visual.image_start_id).tolist():
        if not starts or at > starts[-1] + config.visual.n_queries:  # ids inside a span do not matter
            starts.append(at)
    if len(starts) != len(hashes):
        raise PromptError(f"the prompt has {len(starts)} image spans but {len(hashes)} images were given")
    for at, hash_ in zip(starts, hashes, strict=True):
        made[at + 1 : at + 1 + config.visual.n_queries] = -1 - (hash(hash_) & 2**62 - 1)
    return made


def reusable(held: Signs, wanted: Signs) -> int:
    """How many tokens of the prompt `wanted` need not be computed where `held` was.

    Not all, since the last gives the logits, and no part of an image span, which is filled as a whole.
    """
    length = min(len(held), len(wanted) - 1)
    differing = np.flatnonzero(held[:length] != wanted[:length])
    kept = int(differing[0]) if len(differing) else length
    while kept and wanted[kept] < 0:
        kept -= 1
    return kept


def weights_stamp(model: QwenVL) -> Stamp:
    """Something that changes when a weight is replaced, written to, moved or cast, or the model's mode is."""
    weights = (*model.parameters(), *model.buffers())
    versions = (0 if weight.is_inference() else weight._version for weight in weights)
    facts = ((id(w), w.data_ptr(), v, w.dtype, w.device) for w, v in zip(weights, versions, strict=True))
    return (model.training, *facts)
