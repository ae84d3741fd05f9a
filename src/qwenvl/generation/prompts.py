"""How an engine computes prompts: piece by piece, so that nobody else waits long.

Prompts   the features of pictures, and the next piece of a request's prompt or of the continuations to score
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..model.qwenvl import QwenVL
from .decode import score
from .prefix import reusable
from .request import Request
from .rows import Rows
from .sampling import no_choice

FEATURES_KEPT = 64  # pictures whose features are kept beside those that are needed; 2 MB each in the real model
WORTH_WAITING = 32  # tokens that a prompt need not compute if it waits for another's


class Prompts:
    """Computes the prompts of requests that have a row of `rows`. The unit of work is a token of a prompt."""

    def __init__(self, model: QwenVL, rows: Rows) -> None:
        self.model, self.rows = model, rows
        self._features: OrderedDict[str, Tensor] = OrderedDict()  # by the hash of the pixels; the latest used last
        visual = model.config.visual
        self._per_picture = (visual.image_size // visual.patch_size) ** 2  # a patch is about as much work as a token

    def cost(self, request: Request) -> int:
        """What is left to do for a request."""
        scored = sum(map(len, request.continuations[len(request.scores) :]))
        return len(self._missing(request)) * self._per_picture + len(request.signs) - request.done + scored

    def together(self, turns: Sequence[Request], budget: int) -> list[Request]:
        """The request whose turn it is, and those of the next ones that can be computed in one batch with it.

        These are prompts which the budget ends, and which would not rather wait for what one of the others computes.
        """
        batch: list[Request] = []
        pictures = width = 0
        for request in turns:
            self.rows.catch_up(request)
            tokens = len(request.signs) - request.done
            pictures += len(self._missing(request)) * self._per_picture
            width = max(width, tokens)
            if batch and (
                request.logits is not None
                or (len(batch) + 1) * width + pictures > budget
                or any(reusable(other.signs, request.signs) >= request.done + WORTH_WAITING for other in batch)
            ):
                break
            batch.append(request)
            if request.logits is not None or tokens + pictures > budget:
                break
        return batch

    def advance(self, requests: Sequence[Request], budget: int) -> int:
        """Do as much for requests that are `together` as the budget has tokens, at least something; what it took.

        A request's `logits` are there when its prompt has been computed.
        """
        spent = self._encode(requests, budget)
        ready = [request for request in requests if request.embeddings is not None or not self._missing(request)]
        for request in ready:
            if request.embeddings is None:
                self._embed(request)
        if spent >= budget or not ready:
            return spent
        return spent + (self._chunk(ready, budget - spent) if ready[0].logits is None else self._score(ready[0]))

    def forget(self) -> None:
        """Drop the features of all pictures."""
        self._features.clear()

    def _encode(self, requests: Sequence[Request], budget: int) -> int:
        """Encode the next pictures that have no features yet."""
        missing = {hash_: pixels for request in requests for hash_, pixels in self._missing(request).items()}
        now = dict(list(missing.items())[: max(budget // self._per_picture, 1)])
        if now:
            encoded = self.model.encode_images(torch.stack(list(now.values())))
            self._features.update(zip(now, encoded, strict=True))
        return len(now) * self._per_picture

    def _missing(self, request: Request) -> dict[str, Tensor]:
        """Pictures that the rest of a prompt shows and that have no features yet, by hash."""
        if request.embeddings is not None:
            return {}
        return {hash_: pixels for hash_, pixels in self._shown(request) if hash_ not in self._features}

    def _shown(self, request: Request) -> list[tuple[str, Tensor]]:
        """The pictures of the part of a prompt that is still to compute."""
        passed = request.signs[: min(request.done, len(request.prompt))] == self.model.config.visual.image_start_id
        return list(request.pictures[int(passed.sum()) :])

    def _embed(self, request: Request) -> None:
        """Look up what is still to compute of a text, and put its pictures in."""
        device = self.rows.next_ids.device
        features = []
        for hash_, _ in self._shown(request):
            self._features.move_to_end(hash_)
            features.append(self._features[hash_])
        shown = {hash_ for other in self.rows.requests if other.embeddings is None for hash_, _ in other.pictures}
        for hash_ in [hash_ for hash_ in self._features if hash_ not in shown][: len(self._features) - FEATURES_KEPT]:
            del self._features[hash_]
        parts = []
        if prompt := request.prompt[request.done :]:
            stacked = torch.stack(features) if features else None
            parts.append(self.model.embed(torch.tensor([prompt], device=device), image_features=stacked))
        if said := request.text[max(request.done, len(request.prompt)) :]:  # before it was put back; tags mean nothing
            parts.append(self.model.decoder.wte(torch.tensor([said], device=device)))
        request.embeddings, request.embedded = torch.cat(parts, dim=1), request.done

    def _chunk(self, requests: Sequence[Request], budget: int) -> int:
        """Compute the next tokens of prompts: of one as many as the budget has, of several all."""
        parts = []
        for request in requests:
            assert request.embeddings is not None
            end = len(request.signs) if len(requests) > 1 else min(request.done + budget, len(request.signs))
            parts.append(request.embeddings[0, request.done - request.embedded : end - request.embedded])
        mask = None
        if len(requests) > 1:
            mask = pad_sequence([part.new_ones(len(part), dtype=torch.bool) for part in parts], True, 0, "left")
        logits = self.model(
            None,
            embeddings=pad_sequence(parts, batch_first=True, padding_side="left"),
            attention_mask=mask,
            cache=self.rows.side_by_side(requests),
            logits_to_keep=1,
        )
        for request, part, following in zip(requests, parts, logits, strict=True):
            self.rows.computed(request, request.done + len(part))
            if request.done == len(request.signs):
                request.logits = following
        return len(requests) * max(map(len, parts))

    def _score(self, request: Request) -> int:
        """Compute how likely the next continuation is."""
        assert request.logits is not None
        ids = request.continuations[len(request.scores)]
        (found,) = score(self.model, self.rows.view(request.row), request.logits, [ids])
        if not all(map(math.isfinite, found)):
            raise no_choice(0)
        request.scores.append(found)
        return len(ids)
