"""Many requests over one model: they share its steps, and what it has computed.

    Engine   submit a prompt for its ids, score for the losses of continuations; step
    Load     how much of an engine is in use
    Totals   what it has done so far

A request waits for a row of the cache, has its prompt computed in chunks, and then gets one id in each step with all
others. In a step, every request with a row goes on: those that decode by one id; those whose prompts are being computed
in turn, a chunk to a step. So one that has a row, a prompt of T tokens with N pictures, and M ids to come, leaves it
within B (ceil(T / chunk) + N + 1) + M + 1 steps of an engine of B rows; for M continuations to score, these are B M. As
rows are given in the order of arrival, one with K others before it in the queue has its row after at most
floor(K / B) + 1 such spans. Nobody waits for ever.

Whoever wants ids drives: iterating over a request runs steps until there is one for it, in any number of threads.
"""

from __future__ import annotations

import operator
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapt.ranks import common_seed
from ..checks import is_whole
from ..config import QwenVLConfig
from ..errors import CacheError, PromptError
from ..image import image_hash
from ..model.qwenvl import QwenVL
from .prefix import signs
from .request import Request
from .room import allocate, fitting_rows
from .rows import Rows
from .sampling import SamplingOptions
from .schedule import Scheduler

# What is computed of prompts between two steps of those that decode, in multiplications and additions: so much that
# a GPU is busy with it for some 15 ms, and a few cores for some 300 ms. And tokens: at least so many, for large
# products to be worth it, and at most so many.
CHUNK_OPERATIONS = {"cuda": 8e12, "cpu": 4e10}
LEAST_CHUNK, LARGEST_CHUNK = 64, 2048
MOST_TOP = 20  # of `top_log_probabilities`, as in OpenAI's interface


@dataclass(frozen=True)
class Load:
    """How much of an engine is in use: requests that have a row and that wait, rows, tokens in the cache, its slots."""

    active: int
    waiting: int
    rows: int
    tokens: int
    slots: int


@dataclass(frozen=True)
class Totals:
    """What an engine has done since it was made. Nothing of it ever falls.

    prompt_tokens   of the prompts that were given a row, each counted once, however often it had to be computed
    reused_tokens   those of them that were taken from an earlier text
    new_tokens      ids that requests have got
    steps           that had a request to take on

    Tokens of continuations to score are not counted.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    steps: int


class Engine:
    """Answers many requests at once, each as it would be answered alone.

    Args:
        rows: requests that are computed at once; each has a row of the cache. Default: 32 on a GPU, or as many as its
            free memory has room for; 8 elsewhere, or of a small model up to 32.
        max_length: tokens of a row, prompt and answer together; default, the length that the model was trained for.
        chunk: tokens of prompts computed between two steps of those that decode; default by device and size.
        stop_ids: what ends an answer, unless a request says otherwise.
        n_vocab: ids from here up do not exist for the tokenizer and are never chosen.
        lookup: guess so many ids at a time from the text so far, and verify them in one step (see `lookup.py`). The
            ids stay the same; it can only be faster where answers repeat their prompts, and its steps are not captured.

    The cache is allocated here, 2 x layers x rows x max_length x hidden_size elements. Features of pictures are kept by
    the hash of their pixels, and what a request leaves in its row serves later prompts that begin alike (under the same
    NTK alpha). If the weights change, both are forgotten when the next request is admitted. Raises CacheError for
    numbers that make no engine, or where there is no memory.
    """

    def __init__(
        self,
        model: QwenVL,
        *,
        rows: int | None = None,
        max_length: int | None = None,
        chunk: int | None = None,
        stop_ids: Sequence[int] = (),
        n_vocab: int | None = None,
        lookup: int = 0,
    ) -> None:
        config = model.config
        for name, value, least in (
            ("rows", rows, 1),
            ("max_length", max_length, 2),
            ("chunk", chunk, 1),
            ("lookup", lookup, 0),
        ):
            if value is not None and not (isinstance(value, int) and value >= least):
                raise CacheError(f"an engine's {name} must be a whole number from {least} up, not {value!r}")
        length = min(max_length or config.seq_length, config.max_position_embeddings)
        self.model, self.stop_ids, self.n_vocab = model, tuple(stop_ids), n_vocab
        self._rows = Rows(allocate(model, fitting_rows(model, length) if rows is None else rows, length))
        self.device = self._rows.cache.keys.device
        # Steps are in order on it, whichever thread drives.
        self._stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        self._waiting: deque[Request] = deque()
        self._scheduler = Scheduler(model, self._rows, chunk=chunk or _chunk_for(config, self.device), lookup=lookup)
        self._news = threading.Condition()
        self._driven, self._taken = False, 0  # somebody is in `step`; steps so far

    def submit(
        self,
        input_ids: Sequence[int] | Tensor,
        pixels: Tensor | Sequence[Tensor] | None = None,
        options: SamplingOptions | None = None,
        *,
        stop_ids: Sequence[int] | None = None,
        should_stop: Callable[[int], bool] | None = None,
        with_log_probabilities: bool = False,
        top_log_probabilities: int = 0,
        **overrides: Any,  # noqa: ANN401 - the fields of SamplingOptions
    ) -> Request:
        """Ask for the ids that follow a prompt; iterate over what is returned for them.

        Args:
            input_ids: the prompt, one row of ids.
            pixels: [N,3,S,S], its pictures in reading order.
            options, overrides: how ids are chosen; greedy unless they say otherwise.
            stop_ids: default, the engine's; () means never.
            should_stop: called with each new id; true ends the request. It must not call the engine.
            with_log_probabilities: note how likely the model found each new id.
            top_log_probabilities: note that, and in each place as many of the ids that it found likeliest; up to 20.

        Raises PromptError for what cannot be answered, at once. What goes wrong later is raised where the request is
        iterated over.
        """
        options = SamplingOptions.from_config(options or SamplingOptions(), **overrides)
        if not (is_whole(top_log_probabilities) and 0 <= top_log_probabilities <= MOST_TOP):
            raise PromptError(
                f"top_log_probabilities must be a whole number from 0 to {MOST_TOP}, not {top_log_probabilities!r}"
            )
        return self._enqueue(
            input_ids,
            pixels,
            options,
            stop_ids=self.stop_ids if stop_ids is None else stop_ids,
            should_stop=should_stop,
            with_log_probabilities=with_log_probabilities,
            n_top=top_log_probabilities,
        )

    def submit_score(
        self,
        input_ids: Sequence[int] | Tensor,
        continuations: Sequence[Sequence[int]],
        pixels: Tensor | Sequence[Tensor] | None = None,
    ) -> Request:
        """Ask how likely continuations of a prompt are, which is computed once: `losses` and `scores` of the request.

        Raises PromptError.
        """
        if not continuations:
            raise PromptError("there are no continuations to score")
        checked = [self._checked(ids, f"continuation {number}") for number, ids in enumerate(continuations, 1)]
        return self._enqueue(input_ids, pixels, SamplingOptions(), continuations=checked)

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
    def max_length(self) -> int:
        """Tokens of a row, prompt and answer together."""
        return self._rows.cache.max_length

    @property
    def load(self) -> Load:
        """How much is in use now."""
        cache, active = self._rows.cache, len(self._rows.requests)
        tokens = int(cache.host_lengths[:active].sum())
        return Load(active, len(self._waiting), cache.batch, tokens, cache.batch * cache.max_length)

    @property
    def totals(self) -> Totals:
        """What has been done so far."""
        rows, scheduler = self._rows, self._scheduler
        return Totals(rows.prompt_tokens, rows.reused_tokens, scheduler.new_tokens, scheduler.steps)

    def step(self) -> bool:
        """Take every request one step on; false if there is none. One thread at a time: others wait until it is done.

        Nobody needs to call it who iterates over requests.
        """
        with self._news:
            if self._driven:
                taken = self._taken  # not until nobody drives: whoever does may go on before we are awake
                self._news.wait_for(lambda: self._taken != taken)
                return True
            self._driven = True
        try:
            with torch.no_grad(), torch.cuda.stream(self._stream):
                return self._step()
        finally:
            with self._news:
                self._driven = False
                self._taken += 1
                self._news.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Until there is something to do, at most so many seconds; whether there is. For a thread that does nothing but
        `step`.
        """
        with self._news:
            return self._news.wait_for(lambda: bool(self._rows.requests or self._waiting), timeout)

    def _step(self) -> bool:
        scheduler = self._scheduler
        with self._news:
            self._waiting = deque(request for request in self._waiting if request.finish_reason is None)
        try:
            scheduler.release()  # those cancelled since
            while self._rows.free and (request := self._next()) is not None:
                scheduler.admit(request)
                with self._news:
                    self._waiting.remove(request)
            scheduler.step()
        except BaseException as error:
            scheduler.start_over(error, self._waiting[0] if self._waiting else None)
            if not isinstance(error, Exception):
                raise
        finally:
            with self._news:
                back = [request for request in scheduler.put_back if request not in self._waiting]
                self._waiting.extendleft(reversed(back))
                scheduler.put_back.clear()
        return bool(self._rows.requests or self._waiting)

    def _next(self) -> Request | None:
        """The one that has waited longest, if it can be computed now."""
        active = self._rows.requests
        with self._news:
            if not self._waiting or (active and (active[0].alone or self._waiting[0].alone)):
                return None
            return self._waiting[0]

    def _enqueue(
        self,
        input_ids: Sequence[int] | Tensor,
        pixels: Tensor | Sequence[Tensor] | None,
        options: SamplingOptions,
        *,
        continuations: Sequence[Sequence[int]] = (),
        **more: Any,  # noqa: ANN401 - what a Request takes
    ) -> Request:
        prompt = self._checked(input_ids, "the prompt")
        shown = [] if pixels is None else [picture.detach().clone() for picture in pixels]  # theirs may change
        for picture in shown:
            self.model.check_pixels(picture[None])
        pictures = [(image_hash(picture), picture) for picture in shown]
        self.model.find_spans(torch.tensor([prompt], device="cpu"), None)
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
            seed=common_seed(self.model, options.seed) if options.do_sample else None,
            limit=min(options.max_new_tokens, slots - len(prompt)),
            n_vocab=self.n_vocab,
            continuations=continuations,
            **more,
        )
        with self._news:
            self._waiting.append(request)
            self._news.notify_all()
        return request

    def _checked(self, given: Sequence[int] | Tensor, name: str) -> list[int]:
        if isinstance(given, Tensor) and given.dim() == 2 and len(given) == 1:
            given = given[0]
        try:
            ids = [operator.index(id_) for id_ in given]
        except TypeError:
            told = list(given.shape) if isinstance(given, Tensor) else repr(given)[:80]
            raise PromptError(f"{name} must be one row of whole numbers, not {told}") from None
        if not ids or not all(0 <= id_ < self.model.config.vocab_size for id_ in ids):
            largest = self.model.config.vocab_size - 1
            raise PromptError(f"{name} must be at least one id from 0 to {largest}, the model's vocabulary")
        return ids


def _chunk_for(config: QwenVLConfig, device: torch.device) -> int:
    """Tokens whose computation takes about as long as others may be kept waiting."""
    weights = config.num_hidden_layers * config.hidden_size * (4 * config.hidden_size + 3 * config.mlp_width)
    operations = CHUNK_OPERATIONS.get(device.type, CHUNK_OPERATIONS["cpu"])
    return min(max(int(operations / (2 * weights)) // LEAST_CHUNK * LEAST_CHUNK, LEAST_CHUNK), LARGEST_CHUNK)
