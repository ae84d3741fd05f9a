"""What an engine computes in a step, for one thread.

Scheduler   admits requests to rows, computes prompts in turns and an id for each that is beyond its prompt
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapt.capture import Stepper
from ..errors import CacheError
from ..model.cache import KVCache
from ..model.qwenvl import QwenVL
from .decode import Chosen
from .lookup import draft
from .prefix import Stamp, weights_stamp
from .prompts import Prompts
from .request import FinishReason, Request, choose
from .room import bounded, out_of_memory
from .rows import Rows
from .sampling import NO_ID, Top, log_probabilities, no_choice, top_log_probabilities


class Scheduler:
    """The requests that have a row of `rows`, and what is to be done for them next.

    chunk: tokens of prompts that a step computes. lookup: ids that are guessed at a time. So far, `steps` have been
    taken and `new_tokens` ids handed out.
    """

    def __init__(self, model: QwenVL, rows: Rows, *, chunk: int, lookup: int) -> None:
        self.model, self.rows, self.chunk, self.lookup = model, rows, chunk, lookup
        self.steps = self.new_tokens = 0
        self.put_back: list[Request] = []  # which are to wait anew, before all others
        self._prompts = Prompts(model, rows)
        self._turns: deque[Request] = deque()  # whose prompts are being computed, in the order of their turns
        self._unread: deque[tuple[Chosen, list[Request]]] = deque()
        self._steppers: dict[int, Stepper] = {}
        self._stamp: Stamp = ()
        self._looked = -1  # at the weights: before this step
        self._said = -1  # ids that the requests had when everything was last computed anew

    def admit(self, request: Request) -> None:
        """Give a request a free row."""
        if self._looked != self.steps:  # once before a step, since it takes a while
            self._look_at_weights()
        self.rows.take(request)
        self._turns.append(request)

    def step(self) -> None:
        """Take every request one step on.

        Where ids can be read late, those of this step are read in the next one, when the device has that to do.
        """
        self.steps += bool(self.rows.requests)
        earlier = len(self._unread)
        late = self._decode()
        self._compute_prompts()
        self._read(but=max(len(self._unread) - earlier, 0) if late else 0)
        self.release()
        if not self.rows.decoding:  # what was computed beyond the ends of the last is nobody's
            self._read()

    def start_over(self, error: BaseException, first: Request | None) -> None:
        """A step has been interrupted, or failed where no request can be named: compute everything anew.

        Should it fail again before anything has come of that, it is the error of all, or where nobody has a row, of the
        `first` in the queue.
        """
        requests = self.rows.clear()
        said = sum(len(request.ids) for request in requests)
        hopeless = isinstance(error, Exception) and self._said == said
        self._said, self._looked = said, -1
        self._turns.clear()
        self._unread.clear()
        for request in requests or ([first] if first is not None and hopeless else []):
            if request.ids and (request.ids[-1] in request.stop_ids or len(request.ids) >= request.limit):
                self._finish(request, "stop" if request.ids[-1] in request.stop_ids else "length")
            elif isinstance(error, Exception) and hopeless:
                self._finish(request, "error", error)
            if request.finish_reason is None and request not in self.put_back:
                request.start_over(alone=isinstance(error, Exception))
                self.put_back.append(request)

    def release(self) -> None:
        """Free the rows of those that have ended."""
        for request in [request for request in self.rows.requests if request.finish_reason is not None]:
            if request in self._turns:
                self._turns.remove(request)
            request.embeddings = request.logits = None
            request.pictures = ()
            # Before the first id, nobody has seen whether what was computed are numbers.
            self.rows.leave(request, erase=request.error is not None or not (request.ids or request.scores))

    def _look_at_weights(self) -> None:
        """Forget what was computed by others than there are now."""
        self._looked = self.steps
        if self._stamp != (stamp := weights_stamp(self.model)):
            self.rows.forget()
            self._prompts.forget()
            self._steppers.clear()  # what they have captured reads the weights that were
            self._stamp = stamp

    def _compute_prompts(self) -> None:
        """Spend the step's tokens on prompts. Behind the first, only on those that can be ended with what is left."""
        budget = self.chunk
        while self._turns and (budget == self.chunk or self._prompts.cost(self._turns[0]) <= budget):
            batch = self._prompts.together(self._turns, budget)
            for _ in batch:
                self._turns.popleft()
            try:
                budget -= self._prompts.advance(batch, budget)
                self._go_on(batch)
            except Exception as error:
                for request in batch:
                    self.rows.take_back(request)
                if len(batch) == 1:
                    self._went_wrong(batch[0], error)
                else:
                    budget -= self._compute_one_by_one(batch, budget)

    def _go_on(self, batch: Sequence[Request]) -> None:
        """What comes next for requests whose prompts, or parts of them, have been computed."""
        begun = [request for request in batch if request.logits is not None and not request.continuations]
        if begun:
            self._choose(begun, torch.cat([request.logits for request in begun if request.logits is not None]))
        for request in batch:
            if request in begun:
                request.embeddings = request.logits = None
                self.rows.start_decoding(request)
            elif request.logits is None or len(request.scores) < len(request.continuations):
                self._turns.append(request)
            else:
                self._finish(request, "stop")

    def _compute_one_by_one(self, batch: Sequence[Request], budget: int) -> int:
        """Prompts that failed together, each by itself: only those fail whose fault it was."""
        spent = 0
        for request in batch:
            try:
                if self._prompts.cost(request):
                    spent += self._prompts.advance([request], budget)
                self._go_on([request])
            except Exception as error:
                self._went_wrong(request, error)
        return spent

    def _decode(self) -> bool:
        """One id more for all that are beyond their prompts, or several. True if it can be read a step later."""
        count = self.rows.decoding
        going = self.rows.requests[:count]
        cache = self.rows.cache.rows(slice(count))
        before = cache.host_lengths.tolist()
        late = False
        try:
            if going and not (self.lookup and self._verify(going, cache)):
                stepper = self._stepper(count)
                self._choose(going, stepper(self.rows.next_ids[:count]))
                late = stepper.captures and not self.lookup
        except Exception as error:
            held = [max(length, len(r.text) - 1) for length, r in zip(before, going, strict=True)]
            cache.rewind(held, prompt_lengths=[len(request.prompt) for request in going])
            if len(going) == 1 or out_of_memory(error):
                self._went_wrong(going[-1], error)
            else:
                self._decode_one_by_one(going)
        return late

    def _decode_one_by_one(self, going: Sequence[Request]) -> None:
        """A step that failed, for each by itself: only those fail whose fault it was."""
        for request in going:
            cache = self.rows.view(request.row)
            try:
                logits = self.model(self.rows.next_ids[request.row].view(1, 1), cache=cache, logits_to_keep=1)
                self._choose([request], logits[:, -1])
            except Exception as error:
                self._went_wrong(request, error)

    def _verify(self, going: Sequence[Request], cache: KVCache) -> bool:
        """Look at guesses of what follows in one step, and keep what would have been chosen; false without any."""
        drafts = [draft(request.text, min(self.lookup, request.limit - len(request.ids) - 1)) for request in going]
        if not any(drafts):
            return False
        width = 1 + max(map(len, drafts))
        ids = torch.tensor([[r.ids[-1], *d] + [0] * (width - 1 - len(d)) for r, d in zip(going, drafts, strict=True)])
        real = torch.arange(width) <= torch.tensor([[len(guess)] for guess in drafts])
        logits = self.model(ids, attention_mask=real, cache=cache)
        agreeing = list(range(len(going)))
        for column in range(width):
            requests = [going[row] for row in agreeing]
            self._choose(requests, logits[agreeing, column])
            self._read()
            agreeing = [
                row
                for row in agreeing
                if going[row].finish_reason is None and drafts[row][column : column + 1] == going[row].ids[-1:]
            ]
            if not agreeing:
                break
        cache.rewind(
            [len(request.text) - 1 for request in going], prompt_lengths=[len(request.prompt) for request in going]
        )
        return True

    def _stepper(self, count: int) -> Stepper:
        """For so many rows."""
        if count not in self._steppers:
            beside = next(iter(self._steppers.values()), None)
            self._steppers[count] = Stepper(self.model, self.rows.cache.rows(slice(count)), beside=beside)
        return self._steppers[count]

    def _choose(self, requests: list[Request], logits: Tensor) -> None:
        """The next ids of requests behind logits [B,V]: on the device for the next step, and on their way here."""
        try:
            ids = choose(logits, requests)
            wanted = any(request.with_log_probabilities for request in requests)
            likely = log_probabilities(logits, ids.clamp(min=0)) if wanted else None
            n_top = max(request.n_top for request in requests)
            top = top_log_probabilities(logits, n_top) if n_top else None
        except BaseException:
            for request in requests:
                request.draw_again()
            raise
        for request, id_, known in zip(requests, ids, ids.clamp(min=0), strict=True):
            request.count(id_)
            self.rows.next_ids[request.row] = known
        self._unread.append((Chosen(ids, likely, top), requests))

    def _read(self, *, but: int = 0) -> None:
        """Hand out the ids that were chosen, but for the latest so many times."""
        while len(self._unread) > but:
            chosen, requests = self._unread[0]
            ids, likely, top = chosen.read()
            self._unread.popleft()
            for row, request in enumerate(requests):
                if request.finish_reason is None:
                    self._hand_out(request, ids[row], None if likely is None else likely[row], top[row] if top else [])

    def _hand_out(self, request: Request, id_: int, likely: float | None, top: Top) -> None:
        if id_ == NO_ID:
            self._finish(request, "error", no_choice(0))
            return
        self.rows.note(request, id_)
        request.take(id_, likely, top)
        self.new_tokens += 1
        try:
            stopped = id_ in request.stop_ids or (request.should_stop is not None and request.should_stop(id_))
        except Exception as error:
            self._finish(request, "error", error)
            return
        if stopped or len(request.ids) == request.limit:
            self._finish(request, "stop" if stopped else "length")

    def _went_wrong(self, request: Request, error: Exception) -> None:
        """End a request with an error; or, if beside others the device ran out of memory, try again without them."""
        cache = self.rows.cache
        if out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # which hold what the failed call had made
            if len(self.rows.requests) > 1:
                self._put_back(request)
                return
            try:
                with bounded(self.model, cache.batch, cache.max_length, cache=cache):
                    raise error
            except CacheError as told:
                error = told
        self._finish(request, "error", error)

    def _put_back(self, request: Request) -> None:
        """Have a request wait, first in the queue, until it can be computed alone."""
        self._read()  # what it has said so far is part of its prompt then
        if request.finish_reason is None:
            if request in self._turns:
                self._turns.remove(request)
            self.rows.leave(request, erase=False)
            request.start_over(alone=True)
            self.put_back.append(request)

    def _finish(self, request: Request, reason: FinishReason, error: Exception | None = None) -> None:
        if request.finish_reason is None:
            request.error, request.finish_reason = error, reason
