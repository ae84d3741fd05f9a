"""Whose the rows of an engine's cache are, and what the free ones still hold.

The rows stand in this order: those whose next token is due, [0, decoding); those whose prompt is being computed, up to
[.., len(requests)); the free ones, which keep what their last request left for a later prompt that begins alike. So a
step of all that decode is a step of the cache's first rows, and nothing is computed for the others. Who leaves or goes
from one part to the next changes places for that, which copies two rows: little, beside the tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..model.cache import KVCache
from .prefix import Signs, reusable
from .request import Request


class Rows:
    """The rows of `cache`.

    Attributes:
        requests: those that have a row, in the order of the rows.
        decoding: so many of them, from the first, are beyond their prompts.
        next_ids: [B] on the device, the ids with which these go on.
        prompt_tokens: of all prompts that have had a row, each counted once.
        reused_tokens: those of them that were taken from what a row held.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.requests: list[Request] = []
        self.decoding = self.prompt_tokens = self.reused_tokens = 0
        with torch.inference_mode(False):
            self.next_ids = torch.zeros(cache.batch, dtype=torch.int64, device=cache.keys.device)
        self._texts = np.zeros((cache.batch, cache.max_length + 1), np.int64)  # the signs of what the rows hold
        self._known = np.zeros(cache.batch, np.int64)  # tokens of each row that are computed and noted in `_texts`
        self._left = np.zeros(cache.batch, np.int64)  # when it was left, by counting
        self._current = np.zeros(cache.batch, bool)  # computed by the weights that there are now
        self._states = (self._texts, self._known, self._left, self._current)
        self._departures = 0

    @property
    def free(self) -> int:
        """Rows that nobody has."""
        return self.cache.batch - len(self.requests)

    def view(self, row: int) -> KVCache:
        """One row as a cache of its own."""
        return self.cache.rows(slice(row, row + 1))

    def take(self, request: Request) -> None:
        """Give a free row to a request, filled with as much of its prompt as any row holds."""
        wanted, row = request.signs, len(self.requests)
        source, kept = self._longest(wanted, len(request.prompt))
        oldest = row + int(self._left[row:].argmin())
        goes_on = source >= row and (kept == self._known[source] or source == oldest)
        if kept and goes_on:  # nothing is lost that would not be lost anyway
            self._swap(source, row)
            self.view(row).rewind([kept], prompt_lengths=[len(request.prompt)])
        else:
            self._move(row, oldest)  # over the text that has been free longest
            source = oldest if source == row else source
            self.view(row).rewind([0])
            if kept:
                self.view(row).copy_from(self.view(source), kept)
        request.row, request.done = row, kept
        self._texts[row, : len(wanted)] = wanted
        self._known[row], self._current[row] = kept, True
        self.requests.append(request)
        if not request.again:
            self.prompt_tokens += len(request.prompt)
        self._reuse(request, kept)
        self.view(row).declare([len(request.prompt)])

    def side_by_side(self, requests: Sequence[Request]) -> KVCache:
        """The rows of requests whose prompts are being computed, in this order."""
        first = requests[0].row
        if [request.row for request in requests] != list(range(first, first + len(requests))):
            first = self.decoding
            for place, request in enumerate(requests, first):
                self._swap(request.row, place)
        return self.cache.rows(slice(first, first + len(requests)))

    def catch_up(self, request: Request) -> None:
        """Take over what another row has computed of the same prompt since."""
        source, kept = self._longest(request.signs, len(request.prompt))
        if source != request.row and kept > request.done:
            self.view(request.row).copy_from(self.view(source), kept)
            self._reuse(request, kept - request.done)
            self.computed(request, kept)

    def computed(self, request: Request, done: int) -> None:
        """The row of a request holds so many tokens of its prompt now."""
        request.done = self._known[request.row] = done

    def take_back(self, request: Request) -> None:
        """Drop what a computation that failed has left behind what is known of a prompt."""
        row = self.view(request.row)
        row.rewind([request.done], prompt_lengths=[len(request.prompt)])
        row.declare([len(request.prompt)])

    def note(self, request: Request, id_: int) -> None:
        """A request's next id has been read; the ones before it have been fed to the model."""
        end = len(request.prompt) + len(request.ids)
        self._texts[request.row, end] = id_
        self._known[request.row] = end

    def start_decoding(self, request: Request) -> None:
        """Its prompt has been computed."""
        self._swap(request.row, self.decoding)
        self.decoding += 1

    def leave(self, request: Request, *, erase: bool) -> None:
        """Free a request's row, which keeps what is known of its text; nothing if it is to be erased."""
        if request.row < self.decoding:
            self._swap(request.row, self.decoding - 1)
            self.decoding -= 1
        self._swap(request.row, len(self.requests) - 1)
        self.requests.pop()
        row, request.row = request.row, -1
        self._departures += 1
        self._left[row] = self._departures
        if erase or not self._current[row]:
            self.view(row).erase()
            self._known[row] = self._left[row] = 0
        else:
            known, cache = int(self._known[row]), self.view(row)
            for layer in (*cache.keys, *cache.values) if cache.host_lengths[0] > known else ():
                layer[:, :, known : int(cache.host_lengths[0])] = 0  # nobody has seen whether these are numbers
            cache.rewind([known], prompt_lengths=[len(request.prompt)])

    def forget(self) -> None:
        """Use nothing again of what has been computed until now."""
        self._current[:] = False
        for row in range(len(self.requests), self.cache.batch):
            self.view(row).rewind([0])
            self._known[row] = self._left[row] = 0

    def clear(self) -> list[Request]:
        """Drop everything; return whom the rows belonged to."""
        requests, self.requests, self.decoding = self.requests, [], 0
        self.cache.erase()
        self._known[:] = self._left[:] = 0
        return requests

    def _reuse(self, request: Request, tokens: int) -> None:
        """Count what a prompt took from a row; not what it has back of its own, if it is computed anew."""
        if not request.again:
            request.reused += tokens
            self.reused_tokens += tokens

    def _longest(self, wanted: Signs, prompt_length: int) -> tuple[int, int]:
        """The row that holds most of a prompt's beginning, under the NTK alpha that the prompt has, and how much."""
        length = len(wanted) - 1
        same = (self._texts[:, :length] == wanted[:length]) & (np.arange(length) < self._known[:, None])
        agreeing = np.logical_and.accumulate(same, axis=1).sum(axis=1) * self._current
        for row in np.argsort(-agreeing, kind="stable")[: np.count_nonzero(agreeing)].tolist():
            if self.cache.fits(row, prompt_length):
                return row, reusable(self._texts[row, : self._known[row]], wanted)
        return 0, 0

    def _move(self, row: int, place: int) -> None:
        """Have a free row's text lie in another one's place, whose own is forgotten."""
        if row != place:
            self.view(place).copy_from(self.view(row), int(self._known[row]))
            for state in self._states:
                state[place] = state[row]

    def _swap(self, a: int, b: int) -> None:
        """Let two rows change places, and whoever has them."""
        if a == b:
            return
        self.cache.reorder([b, a], places=[a, b])
        self.next_ids[[a, b]] = self.next_ids[[b, a]]
        for state in self._states:
            state[[a, b]] = state[[b, a]]
        if max(a, b) < len(self.requests):
            for row, request in ((b, self.requests[a]), (a, self.requests[b])):
                self.requests[row], request.row = request, row
