"""What is kept between the rounds of one conversation, so that a round prefills only what is new.

Session     a KV cache, the text that it holds, and the features of its pictures
start       a prompt behind the longest prefix that a session already holds
reply       the ids that follow it
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..adapt.capture import Stepper
from ..errors import QwenVLError
from ..model.cache import KVCache
from ..model.qwenvl import QwenVL
from .decode import decode, prefill
from .prefix import Signs, Stamp, reusable, signs, weights_stamp
from .room import allocate, bounded
from .sampling import SamplingOptions

NOTHING: Signs = np.zeros(0, np.int64)
CACHE_BLOCK = 512  # slots; caches grow by whole blocks, so that a few more tokens do not copy everything


@dataclass
class Session:
    """One conversation's cache of one row. `signs` say what its slots hold, `stamp` which weights filled them, and
    `stepper` has the steps that were captured over it.
    """

    cache: KVCache | None = None
    stepper: Stepper | None = None
    signs: Signs = field(default_factory=lambda: NOTHING)
    features: dict[str, Tensor] = field(default_factory=dict)
    stamp: Stamp = ()

    def clear(self) -> None:
        """Forget what the cache holds, and give it back."""
        self.cache, self.stepper, self.signs = None, None, NOTHING

    def extend(self, new_ids: Sequence[int]) -> None:
        """Note the ids that were generated behind the prompt. The last may not have entered the cache."""
        assert self.cache is not None
        self.signs = np.append(self.signs, np.array(new_ids, np.int64))[: int(self.cache.host_lengths[0])]


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
    wanted = signs(ids, [hash_ for hash_, _ in images], config)
    if session.stamp != (stamp := weights_stamp(model)):
        session.clear()
        session.features, session.stamp = {}, stamp
    kept = reusable(session.signs, wanted)
    cache = session.cache
    if cache is not None and kept and not cache.fits(0, len(ids)):
        kept = 0
    needed = min(len(ids) + new_tokens, config.max_position_embeddings)
    session.cache = cache = _with_room(model, cache, kept, needed, len(ids))
    if session.stepper is None or session.stepper.cache is not cache:
        session.stepper = Stepper(model, cache)
    session.signs = wanted[:kept]  # what the cache holds, should something fail from here on
    cache.declare([len(ids)])
    # Features of pictures that stay in the conversation are kept, others dropped.
    skipped = int((wanted[:kept] == config.visual.image_start_id).sum())
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
    session.signs = wanted
    return logits


def reply(
    model: QwenVL,
    session: Session,
    ids: Sequence[int],
    images: Sequence[tuple[str, Tensor]],
    options: SamplingOptions,
    *,
    stop_ids: Sequence[int] = (),
    n_vocab: int | None = None,
) -> Generator[int]:
    """New ids behind a prompt, one by one; the session then holds the prompt and what was taken of the reply.

    Arguments as in `start` and `decode`.
    """
    logits = start(model, session, ids, images, options.max_new_tokens)
    assert session.cache is not None
    history = torch.tensor([list(ids)], device=logits.device)
    new: list[int] = []
    steps = decode(
        model, session.cache, logits, history, options, stop_ids=stop_ids, n_vocab=n_vocab, stepper=session.stepper
    )
    try:
        for step in steps:
            (id_,) = step.ids
            assert id_ is not None
            new.append(id_)
            yield id_
    except QwenVLError:
        session.clear()  # it may hold what is no number, which a mask does not hide from a captured step
        raise
    finally:
        steps.close()
        if session.cache is not None:
            session.extend(new)


def _with_room(model: QwenVL, cache: KVCache | None, kept: int, needed: int, prompt_length: int) -> KVCache:
    """A cache of one row that holds the first `kept` tokens of `cache` and has at least `needed` slots."""
    if cache is not None and cache.max_length >= needed:
        cache.rewind([kept], prompt_lengths=[prompt_length])
        return cache
    length = min(-(-needed // CACHE_BLOCK) * CACHE_BLOCK, model.config.max_position_embeddings)
    new = allocate(model, 1, length)
    if cache is not None and kept:
        new.copy_from(cache, kept)
    return new
