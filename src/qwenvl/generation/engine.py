"""Many requests over one model: they share its steps, and what it has computed.

    Engine   submit a prompt for its ids, submit_score or score for the losses of continuations; step
    Load     how much of an engine is in use

A request waits for a row of the cache, has its prompt computed in chunks, and then gets one id in each step with all
others. In a step, every request with a row goes on: those that decode by one id; those whose prompts are being computed
in turn, a chunk to a step. So one that has a row, a prompt of T tokens with N pictures, and M ids to come, leaves it
within B (T / chunk + N + 1) + M steps of an engine of B rows; and as rows are given in the order of arrival, the one
that is number K in the queue has its row after at most K + 1 such spans. Nobody waits for ever.

Whoever wants ids drives: iterating over a request runs steps until there is one for it, in any number of threads.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapt.capture import Stepper
from ..config import QwenVLConfig
from ..errors import CacheError, PromptError
from ..image import image_hash
from ..model.cache import KVCache
from ..model.qwenvl import QwenVL
from .decode import Chosen
from .lookup import draft
from .prefix import Stamp, signs, weights_stamp
from .prompts import Prompts
from .request import FinishReason, Request, choose
from .room import allocate, bounded, out_of_memory
from .rows import Rows
from .sampling import NO_ID, SamplingOptions, log_probabilities, no_choice

# What is computed of prompts between two steps of those that decode, in multiplications and additions: so much that
# a GPU is busy with it for some 15 ms, and a few cores for some 200 ms. And tokens: at least so many, for large
# products to be worth it, and at most so many.
CHUNK_OPERATIONS = {"cuda": 8e12}
CPU_OPERATIONS = 2e10
LEAST_CHUNK, LARGEST_CHUNK = 64, 2048


@dataclass(frozen=True)
class Load:
    """How much of an engine is in use: requests that have a row and that wait, rows, tokens in the cache, its slots."""

    active: int
    waiting: int
    rows: int
    tokens: int
    slots: int


class Engine:
    """Answers many requests at once, each as it would be answered alone.

    Args:
        rows: requests that are computed at once; each has a row of the cache.
        max_length: tokens of a row, prompt and answer together; default, the length that the model was trained for.
        chunk: tokens of prompts computed between two steps of those that decode; default by device and size.
        stop_ids: what ends an answer, unless a request says otherwise.
        n_vocab: ids from here up do not exist for the tokenizer and are never chosen.
        lookup: guess so many ids at a time from the text so far, and verify them in one step (see `lookup.py`). The
            ids stay the same; it is faster where answers repeat their prompts, and slower where they do not.

    The cache is allocated here, 2 x layers x rows x max_length x hidden_size elements. Features of pictures are kept by
    the hash of their pixels, and what a request leaves in its row serves later prompts that begin alike (under the same
    NTK alpha). If the weights change, both are forgotten when the next request is admitted. Raises CacheError.
    """

    def __init__(
        self,
        model: QwenVL,
        *,
        rows: int = 8,
        max_length: int | None = None,
        chunk: int | None = None,
        stop_ids: Sequence[int] = (),
        n_vocab: int | None = None,
        lookup: int = 0,
    ) -> None:
        config = model.config
        length = min(max_length or config.seq_length, config.max_position_embeddings)
        self.model, self.stop_ids, self.n_vocab, self.lookup = model, tuple(stop_ids), n_vocab, lookup
        self._rows = Rows(allocate(model, rows, length))
        self.device = self._rows.cache.keys.device
        self.chunk = chunk or _chunk_for(config, self.device)
        self._waiting: deque[Request] = deque()
        self._turns: deque[Request] = deque()  # whose prompts are being computed, in the order of their turns
        self._unread: deque[tuple[Chosen, list[Request]]] = deque()
        self._steppers: dict[int, Stepper] = {}
        self._prompts = Prompts(model, self._rows)
        self._late = False  # the ids of the last step have not been read yet
        self._stamp: Stamp = ()
        self._news = threading.Condition()
        self._driven = False  # somebody is in `step`

    def submit(
        self,
        input_ids: Sequence[int] | Tensor,
        pixels: Tensor | Sequence[Tensor] | None = None,
        options: SamplingOptions | None = None,
        *,
        stop_ids: Sequence[int] | None = None,
        should_stop: Callable[[int], bool] | None = None,
        with_log_probabilities: bool = False,
        **overrides: Any,  # noqa: ANN401 - the fields of SamplingOptions
    ) -> Request:
        """Ask for the ids that follow a prompt; iterate over what is returned for them.

        Args:
            input_ids: the prompt, one row of ids.
            pixels: [N,3,S,S], its pictures in reading order.
            options, overrides: how ids are chosen; greedy unless they say otherwise.
            stop_ids: default, the engine's; () means never.
            should_stop: called with each new id; true ends the request. It must not call the engine.

        Raises PromptError for a prompt that cannot be answered, at once. What goes wrong later is raised where the
        request is iterated over.
        """
        options = SamplingOptions.from_config(options or SamplingOptions(), **overrides)
        return self._enqueue(
            input_ids,
            pixels,
            options,
            stop_ids=self.stop_ids if stop_ids is None else stop_ids,
            should_stop=should_stop,
            with_log_probabilities=with_log_probabilities,
        )

    def submit_score(
        self,
        input_ids: Sequence[int] | Tensor,
        continuations: Sequence[Sequence[int]],
        pixels: Tensor | Sequence[Tensor] | None = None,
    ) -> Request:
        """Ask for the mean loss of each continuation of a prompt, which is computed once: `losses` of what is returned.

        Raises PromptError.
        """
        if not continuations:
            raise PromptError("there are no continuations to score")
        for number, ids in enumerate(continuations, 1):
            if not ids:
                raise PromptError(f"continuation {number} is empty: there is nothing to score")
            self._check_ids(ids, f"continuation {number}")
        return self._enqueue(input_ids, pixels, SamplingOptions(), continuations=[list(ids) for ids in continuations])

    def score(
        self,
        input_ids: Sequence[int] | Tensor,
        continuations: Sequence[Sequence[int]],
        pixels: Tensor | Sequence[Tensor] | None = None,
    ) -> list[float]:
        """Mean loss of each continuation of a prompt, in nats a token: what least-loss benchmarks choose by."""
        request = self.submit_score(input_ids, continuations, pixels)
        request.result()
        return request.losses

    @property
    def load(self) -> Load:
        """How much is in use now."""
        cache, active = self._rows.cache, len(self._rows.requests)
        tokens = int(cache.host_lengths[:active].sum())
        return Load(active, len(self._waiting), cache.batch, tokens, cache.batch * cache.max_length)

    def step(self) -> bool:
        """Take every request one step on; false if there is none. One thread at a time: others wait until it is done.

        Nobody needs to call it who iterates over requests.
        """
        with self._news:
            if self._driven:
                self._news.wait_for(lambda: not self._driven)
                return True
            self._driven = True
        try:
            on_gpu = self.device.type == "cuda"
            with torch.no_grad(), torch.cuda.device(self.device) if on_gpu else contextlib.nullcontext():
                return self._step()
        finally:
            with self._news:
                self._driven = False
                self._news.notify_all()

    def _enqueue(
        self,
        input_ids: Sequence[int] | Tensor,
        pixels: Tensor | Sequence[Tensor] | None,
        options: SamplingOptions,
        *,
        continuations: Sequence[Sequence[int]] = (),
        **more: Any,  # noqa: ANN401 - what a Request takes
    ) -> Request:
        prompt = input_ids.flatten().tolist() if isinstance(input_ids, Tensor) else list(input_ids)
        self._check_ids(prompt, "the prompt")
        pictures = [(image_hash(picture), picture) for picture in (() if pixels is None else pixels)]
        slots = self._rows.cache.max_length
        longest = len(prompt) + max((len(ids) - 1 for ids in continuations), default=1)
        if longest > slots:
            raise PromptError(
                f"the prompt and what is to follow take at least {longest} tokens, but a row of the engine's cache has "
                f"{slots}: shorten the prompt, or make the engine with a larger max_length"
            )
        request = Request(
            prompt,
            signs(prompt, [hash_ for hash_, _ in pictures], self.model.config),
            pictures,
            options,
            drive=self.step,
            device=self.device,
            limit=min(options.max_new_tokens, slots - len(prompt)),
            n_vocab=self.n_vocab,
            continuations=continuations,
            **more,
        )
        with self._news:
            self._waiting.append(request)
        return request

    def _check_ids(self, ids: Sequence[int], name: str) -> None:
        if not ids:
            raise PromptError(f"{name} is empty")
        if not all(isinstance(id_, int) and 0 <= id_ < self.model.config.vocab_size for id_ in ids):
            raise PromptError(f"{name} must be whole numbers from 0 to {self.model.config.vocab_size - 1}")

    # --- one step, in one thread ------------------------------------------------------------------------------------

    def _step(self) -> bool:
        self._release()  # those cancelled since
        self._admit()
        self._compute_prompts()
        if not self._late:
            self._read()
            self._release()
        self._late = self._decode()
        self._read(but=1 if self._late else 0)
        self._release()
        return bool(self._rows.requests or self._waiting)

    def _admit(self) -> None:
        """Give free rows to those that have waited longest."""
        while self._rows.free:
            with self._news:
                while self._waiting and self._waiting[0].finish_reason is not None:
                    self._waiting.popleft()
                if not self._waiting or (self._waiting[0].alone and self._rows.requests):
                    return
                request = self._waiting.popleft()
            if self._stamp != (stamp := weights_stamp(self.model)):
                self._rows.forget()
                self._prompts.forget()
                self._stamp = stamp
            self._rows.take(request)
            self._turns.append(request)

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
                self._rows.start_decoding(request)
            elif request.logits is None or len(request.losses) < len(request.continuations):
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
        count = self._rows.decoding
        going = self._rows.requests[:count]
        cache = self._rows.cache.rows(slice(count))
        before = cache.host_lengths.tolist()
        late = False
        try:
            if going and not (self.lookup and self._verify(going, cache)):
                stepper = self._stepper(count)
                self._choose(going, stepper(self._rows.next_ids[:count]))
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
            cache = self._rows.view(request.row)
            try:
                logits = self.model(self._rows.next_ids[request.row].view(1, 1), cache=cache, logits_to_keep=1)
                self._choose([request], logits[:, -1])
            except Exception as error:
                self._went_wrong(request, error)

    def _verify(self, going: Sequence[Request], cache: KVCache) -> bool:
        """Look at guesses of what follows in one step, and keep what would have been chosen; false if none were made."""
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
            self._steppers[count] = Stepper(self.model, self._rows.cache.rows(slice(count)), beside=beside)
        return self._steppers[count]

    def _choose(self, requests: list[Request], logits: Tensor) -> None:
        """The next ids of requests behind logits [B,V]: on the device for the next step, and on their way to be read."""
        ids = choose(logits, requests)
        wanted = any(request.with_log_probabilities for request in requests)
        self._unread.append((Chosen(ids, log_probabilities(logits, ids.clamp(min=0)) if wanted else None), requests))
        self._rows.next_ids[[request.row for request in requests]] = ids.clamp(min=0)

    def _read(self, *, but: int = 0) -> None:
        """Hand out the ids that were chosen, but for those of the latest so many steps."""
        while len(self._unread) > but:
            chosen, requests = self._unread.popleft()
            ids, likely = chosen.read()
            for row, request in enumerate(requests):
                if request.finish_reason is None:
                    self._hand_out(request, ids[row], None if likely is None else likely[row])

    def _hand_out(self, request: Request, id_: int, likely: float | None) -> None:
        if id_ == NO_ID:
            self._finish(request, "error", no_choice(0))
            return
        if request.with_log_probabilities and likely is not None:
            request.log_probabilities.append(likely)
        request.ids.append(id_)
        self._rows.note(request)
        try:
            stopped = id_ in request.stop_ids or (request.should_stop is not None and request.should_stop(id_))
        except Exception as error:
            self._finish(request, "error", error)
            return
        if stopped or len(request.ids) == request.limit:
            self._finish(request, "stop" if stopped else "length")

    def _went_wrong(self, request: Request, error: Exception) -> None:
        """End a request with an error; or, if beside others the device ran out of memory, try again without them."""
        cache = self._rows.cache
        if out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # which hold what the failed call had made
            if len(self._rows.requests) > 1:
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
            self._rows.leave(request, erase=False)
            request.start_over()
            with self._news:
                self._waiting.appendleft(request)

    def _finish(self, request: Request, reason: FinishReason, error: Exception | None = None) -> None:
        with self._news:  # in which it may be cancelled
            if request.finish_reason is None:
                request.error, request.finish_reason = error, reason

    def _release(self) -> None:
        """Free the rows of those that have ended."""
        for request in [request for request in self._rows.requests if request.finish_reason is not None]:
            if request in self._turns:
                self._turns.remove(request)
            request.embeddings = request.logits = None
            self._rows.leave(request, erase=request.error is not None)


def _chunk_for(config: QwenVLConfig, device: torch.device) -> int:
    """Tokens whose computation takes about as long as others may be kept waiting."""
    weights = config.num_hidden_layers * config.hidden_size * (4 * config.hidden_size + 3 * config.mlp_width)
    operations = CHUNK_OPERATIONS.get(device.type, CPU_OPERATIONS)
    return min(max(int(operations / (2 * weights)) // LEAST_CHUNK * LEAST_CHUNK, LEAST_CHUNK), LARGEST_CHUNK)
