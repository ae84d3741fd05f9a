"""One prompt that an engine answers: what is asked, and what has come of it.

Request   iterate over it for its new ids; cancel it; read its `finish_reason`
choose    the next id of each of several requests, by their own options
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .prefix import Signs
from .sampling import SamplingOptions, Top, looks_back, process, row_generators, sample, warp

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Request(Iterator[int]):
    """A prompt's answer on its way; `Engine.submit` makes one. Its ids may be iterated over while it is being computed.

    Iterating raises what went wrong with this request, once the ids from before that have been read. It may be done in
    any thread; `cancel` as well.

    Attributes:
        ids: the new ids so far, the stop id included if there was one.
        log_probabilities: the model's own, one for each id, if they were asked for.
        top_log_probabilities: for each id the likeliest in its place, and the model's own log-probabilities of these,
            the likeliest first and of equals the lower id; as many as were asked for. Before any processor: an id that
            the tokenizer does not have may be among them.
        scores: of each continuation the log-probability of every id, if it was made by `Engine.submit_score`.
        prompt: the prompt's ids.
        reused: how many of the prompt's tokens were taken from an earlier text.
        finish_reason: None while it is going on; then "stop" (a stop id, `should_stop`, or all scores known), "length"
            (as many ids as were asked for, or as there was room for), "cancelled" or "error".
        error: what went wrong, if anything.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        signs: Signs,
        pictures: Sequence[tuple[str, Tensor]],
        options: SamplingOptions,
        *,
        drive: Callable[[], bool],
        device: torch.device,
        seed: int | None = None,
        limit: int = 0,
        stop_ids: Sequence[int] = (),
        should_stop: Callable[[int], bool] | None = None,
        n_vocab: int | None = None,
        with_log_probabilities: bool = False,
        n_top: int = 0,
        continuations: Sequence[Sequence[int]] = (),
    ) -> None:
        self.prompt, self.options = list(prompt), options
        self.ids: list[int] = []
        self.log_probabilities: list[float] = []
        self.top_log_probabilities: list[Top] = []
        self.scores: list[list[float]] = []
        self.reused = 0
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        # What follows is the engine's.
        self.signs, self.pictures, self.continuations = signs, pictures, continuations
        self.stop_ids, self.should_stop, self.n_vocab = tuple(stop_ids), should_stop, n_vocab
        self.with_log_probabilities, self.n_top = with_log_probabilities or n_top > 0, n_top
        self.limit = limit  # of new ids
        self.chosen = 0  # new ids that have been chosen, of which the last may not have been read yet
        self.again = False  # it has been put back, to be computed anew
        self.alone = False  # to be computed without others, since with them the device ran out of memory
        self.row = -1
        self.done = 0  # tokens of the text that its row holds
        self.embeddings: Tensor | None = None  # [1,T,C] of the tokens from `embedded` on
        self.embedded = 0
        self.logits: Tensor | None = None  # [1,V] behind the prompt
        self.generator = row_generators(seed, 1, device)[0] if options.do_sample else None
        self._drawn = deque([self._state()])  # of the generator behind the last id that was read, and each chosen since
        self._text: Tensor | None = None
        if looks_back(options):
            with torch.inference_mode(False):  # it is written to later, also where that mode is not on
                self._text = torch.zeros(1, len(prompt) + limit, dtype=torch.int64, device=device)
                self._text[0, : len(prompt)] = torch.tensor(self.prompt)
        self._drive, self._read = drive, 0

    def __iter__(self) -> Request:
        return self

    def __next__(self) -> int:
        while self._read == len(self.ids):
            if self.finish_reason is not None:
                if self._read < len(self.ids):  # it came just now, with the end
                    break
                if self.error is not None:
                    raise self.error
                raise StopIteration
            if not self._drive() and self.finish_reason is None:
                raise RuntimeError("the engine has lost a request")
        self._read += 1
        return self.ids[self._read - 1]

    def result(self) -> list[int]:
        """All ids, once it has ended. Raises what went wrong."""
        for _ in self:
            pass
        return self.ids

    def cancel(self) -> None:
        """End it. Its row of the cache is free from the engine's next step on. Of no effect once it has ended."""
        if self.finish_reason is None:
            self.finish_reason = "cancelled"

    def start_over(self, *, alone: bool) -> None:
        """Forget what was computed, but not what was said: that is part of the prompt now. `alone`: without others."""
        self.signs = np.concatenate((self.signs[: len(self.prompt)], np.array(self.ids, np.int64)))
        self.embeddings = self.logits = None
        self.chosen, self.again, self.alone, self.row = len(self.ids), True, alone, -1
        for told in (self.log_probabilities, self.top_log_probabilities):
            del told[len(self.ids) :]  # of an id that an interruption kept from being read
        while len(self._drawn) > 1:
            self._drawn.pop()
        self.draw_again()

    def draw_again(self) -> None:
        """Take back what was drawn for an id that has not been counted."""
        state = self._drawn[-1]
        if self.generator is not None and state is not None:
            self.generator.set_state(state)

    def _state(self) -> Tensor | None:
        return None if self.generator is None else self.generator.get_state()

    @property
    def losses(self) -> list[float]:
        """Mean loss of each continuation, in nats a token."""
        return [-sum(found) / len(found) for found in self.scores]

    @property
    def text(self) -> list[int]:
        """The prompt and what has come behind it."""
        return [*self.prompt, *self.ids]

    @property
    def recipe(self) -> Hashable:
        """What must be equal for two requests' ids to be chosen together."""
        alone = id(self) if self._text is not None else None
        held_up = self.stop_ids if self.chosen < self.options.min_new_tokens else None
        options = self.options
        return alone, held_up, self.n_vocab, options.do_sample and (options.temperature, options.top_k, options.top_p)

    @property
    def history(self) -> Tensor:
        """The text so far [1,T], for what looks back at it; else nothing of it, [1,0]."""
        if self._text is None:
            return torch.zeros(1, 0, dtype=torch.int64, device="cpu")
        return self._text[:, : len(self.prompt) + self.chosen]

    def count(self, id_: Tensor) -> None:
        """Note that its next id has been chosen, which nobody need have read."""
        if self._text is not None and self.chosen < self.limit:
            self._text[0, len(self.prompt) + self.chosen] = id_.clamp(min=0)
        self.chosen += 1
        self._drawn.append(self._state())

    def take(self, id_: int, log_probability: float | None, top: Top) -> None:
        """Note that it has been read."""
        if self.with_log_probabilities and log_probability is not None:
            self.log_probabilities.append(log_probability)
        if self.n_top:
            self.top_log_probabilities.append(top[: self.n_top])
        self._drawn.popleft()
        self.ids.append(id_)


def choose(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """The next id of each request [B] behind logits [B,V], as each would have it alone; NO_ID where there is none."""
    together: dict[Hashable, list[int]] = {}
    for row, request in enumerate(requests):
        together.setdefault(request.recipe, []).append(row)
    ids: dict[int, Tensor] = {}
    for rows in together.values():
        first = requests[rows[0]]
        # Not `logits[rows]`: to bring a list of rows to the device is to wait for the device.
        scores = process(
            logits if len(rows) == len(requests) else torch.stack([logits[row] for row in rows]),
            first.history,
            first.options,
            n_generated=first.chosen,
            stop_ids=first.stop_ids,
            n_vocab=first.n_vocab,
        )
        generators = None
        if first.options.do_sample:
            scores = warp(scores, first.options)
            generators = [generator for row in rows if (generator := requests[row].generator) is not None]
        ids.update(zip(rows, sample(scores, generators), strict=True))
    return torch.stack([ids[row] for row in range(len(requests))])
