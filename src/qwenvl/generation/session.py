"""What is kept between the rounds of one conversation, so that a round prefills only what is new.

Session     a KV cache, the text that it holds, and the features of its pictures
start       a prompt behind the longest prefix that a session already holds
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..adapt.capture import Stepper
from ..errors import PromptError
from ..model.cache import KVCache
from ..model.qwenvl import QwenVL
from .decode import prefill
from .room import allocate, bounded

Sign = int | str  # of a token: its id, or its picture's hash where it stands inside an image span
Stamp = tuple[object, ...]
CACHE_BLOCK = 512  # slots; caches grow by whole blocks, so that a few more tokens do not copy everything


@dataclass
class Session:
    """One conversation's cache of one row. `signs` say what its slots hold, `stamp` which weights filled them, and
    `stepper` has the steps that were captured over it.
    """

    cache: KVCache | None = None
    stepper: Stepper | None = None
    signs: list[Sign] = field(default_factory=list)
    features: dict[str, Tensor] = field(default_factory=dict)
    stamp: Stamp = ()

    def clear(self) -> None:
        """Forget what the cache holds, and give it back."""
        self.cache, self.stepper, self.signs = None, None, []

    def extend(self, new_ids: Sequence[int]) -> None:
        """Note the ids that were generated behind the prompt. The last may not have entered the cache."""
        assert self.cache is not None
        self.signs = [*self.signs, *new_ids][: int(self.cache.host_lengths[0])]


@torch.no_grad()
def start(
    model: QwenVL, session: Session, ids: Sequence[int], images: Sequence[tuple[str, Tensor]], new_tokens: int
) -> Tensor:
    """Bring a session to exactly the prompt `ids`, with room for `new_tokens` more; the logits [1,V] that follow it.

    `images` are a hash and pixels [3,S,S] for each span. The longest common prefix of ids and image hashes is kept if
    it was computed by the same weights under the NTK alpha that this prompt has, else everything is computed anew.
    Raises PromptError for a prompt beyond the model's positions or spans that do not match.
    """
    config = model.config
    if len(ids) > config.max_position_embeddings:
        raise PromptError(
            f"the prompt has {len(ids)} tokens but the model has {config.max_position_embeddings} positions; "
            "shorten it, drop a picture, or lower max_window_size"
        )
    if session.stamp != (stamp := _stamp(model)):
        session.clear()
        session.features, session.stamp = {}, stamp
    signs = _signs(ids, [hash_ for hash_, _ in images], config.visual.image_start_id, config.visual.n_queries)
    kept = _common_prefix(session, signs)
    cache = session.cache
    if cache is not None and kept and not cache.fits(0, len(ids)):
        kept = 0
    needed = min(len(ids) + new_tokens, config.max_position_embeddings)
    session.cache = cache = _with_room(model, cache, kept, needed, len(ids))
    if session.stepper is None or session.stepper.cache is not cache:
        session.stepper = Stepper(model, cache)
    session.signs = signs[:kept]  # what the cache holds, should something fail from here on
    cache.declare([len(ids)])
    # Features of pictures that stay in the conversation are kept, others dropped.
    skipped = sum(sign == config.visual.image_start_id for sign in signs[:kept])
    new = dict(images[skipped:])
    with bounded(model, 1, cache.max_length, cache=cache):
        if missing := [hash_ for hash_ in new if hash_ not in session.features]:
            encoded = model.encode_images(torch.stack([new[hash_] for hash_ in missing]))
            session.features |= dict(zip(missing, encoded, strict=True))
        session.features = {hash_: session.features[hash_] for hash_, _ in images if hash_ in session.features}
        logits = prefill(
            model,
            cache,
            torch.tensor([list(ids[kept:])], device=cache.keys.device),
            image_features=torch.stack([session.features[hash_] for hash_, _ in images[skipped:]]) if new else None,
        )
    session.signs = signs
    return logits


def _stamp(model: QwenVL) -> Stamp:
    """Something that changes when a weight is replaced, written to, moved or cast, or the model's mode is."""
    weights = (*model.parameters(), *model.buffers())
    versions = (0 if weight.is_inference() else weight._version for weight in weights)
    return (model.training, *((id(w), v, w.dtype, w.device) for w, v in zip(weights, versions, strict=True)))


def _signs(ids: Sequence[int], hashes: Sequence[str], image_start_id: int, n_queries: int) -> list[Sign]:
    signs: list[Sign] = list(ids)
    starts = [at for at, id_ in enumerate(ids) if id_ == image_start_id]
    if len(starts) != len(hashes):
        raise PromptError(f"the prompt has {len(starts)} image spans but {len(hashes)} images were given")
    for at, hash_ in zip(starts, hashes, strict=True):
        signs[at + 1 : at + 1 + n_queries] = [hash_] * n_queries
    return signs


def _common_prefix(session: Session, signs: Sequence[Sign]) -> int:
    """How many of the prompt's tokens the session holds: not all (the last gives the logits), and no part of a span."""
    kept = 0
    for old, new in zip(session.signs, signs[:-1], strict=False):
        if old != new:
            break
        kept += 1
    while kept and isinstance(signs[kept], str):
        kept -= 1
    return kept


def _with_room(model: QwenVL, cache: KVCache | None, kept: int, needed: int, prompt_length: int) -> KVCache:
    """A cache of one row that holds the first `kept` tokens of `cache` and has at least `needed` slots."""
    if cache is not None and cache.max_length >= needed:
        cache.rewind([kept], prompt_lengths=[prompt_length])
        return cache
    length = min(-(-needed // CACHE_BLOCK) * CACHE_BLOCK, model.config.max_position_embeddings)
    new = allocate(model, 1, length)
    if cache is not None and kept:
        new.keys[:, :, :, :kept] = cache.keys[:, :, :, :kept]
        new.values[:, :, :, :kept] = cache.values[:, :, :, :kept]
        new.declare([prompt_length])
        new.advance([kept])
    return new
