"""An engine that answers strangers: so many at once, each in time, and nobody's trouble is another's.

    Service   admits questions, has one thread compute, and tells those who wait that there is news

Routes and the web page live on one event loop; preparing pictures and prompts takes its threads; computing has a
thread of its own, whose steps wake those who wait for ids.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future as Job
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import torch
from PIL.Image import Image
from torch import Tensor

from ..errors import ConfigError, ImageError, PromptError
from ..pictures import pixels_of
from ..pipeline import Pipeline
from ..text.tokenizer import VOCABULARY_FILE
from .answers import Answer, Delta, Question
from .metrics import Metrics
from .refusals import RETRY, Refused, mistake, stopping, too_late, too_long
from .settings import Settings

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
FETCHING = 8  # threads that open pictures, where they may wait for the network
PICTURES = 4  # of the largest size: so many pixels a request may show in all
CUTTING = 4.0  # seconds for what is cut to be told
_log = logging.getLogger(__name__)


class _Left(Exception):
    """Nobody waits any more for what is being prepared."""


class Service:
    """A pipeline's engine behind a door.

    Attributes:
        pipeline, settings, engine: what it was made of; pictures are read under the settings' policy.
        name: what the model is called; never a path.
        metrics: counts and times for Prometheus.
        ready: it answers whoever asks; not before everything has been computed once, nor when it is stopping.
        failure: what ended the thread that computes, if anything did.
        finished, cut: answers that have ended since it was told to stop: at their ends, and before.
    """

    def __init__(self, pipeline: Pipeline, settings: Settings | None = None) -> None:
        if pipeline.tokenizer is None:
            raise ConfigError(f"{pipeline.name} has no {VOCABULARY_FILE}: a server needs its vocabulary")
        self.pipeline, self.settings = pipeline, settings or Settings()
        self.tokenizer = pipeline.tokenizer
        folder = Path(pipeline.name)
        self.name = self.settings.name or (folder.resolve().name if folder.is_dir() else pipeline.name)
        self.engine = pipeline.start_engine(rows=self.settings.rows, max_length=self.settings.max_length)
        self.metrics = Metrics(self)
        self.ready = False
        self.failure: BaseException | None = None
        self.finished = self.cut = 0
        self._stopping = self._cutting = self._closing = False
        self._open: set[Answer] = set()
        self._preparing = 0  # answers that have been admitted and not been given to the engine yet
        self._jobs: dict[Job[list[Answer]], threading.Event] = {}  # that prepare them; set where nobody waits any more
        # More threads than cores would only take time from the one that computes. Texts wait for nobody's pictures.
        threads = max(CORES, FETCHING) if self.settings.allowed_domains else CORES
        self._pictures = ThreadPoolExecutor(threads, thread_name_prefix="pictures")
        self._texts = ThreadPoolExecutor(1, thread_name_prefix="texts")
        self._thread = threading.Thread(target=self._drive, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop

    # ---- its life

    async def start(self) -> None:
        """Begin to compute. Whoever waits for answers does so on the event loop that runs this."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        await self._loop.run_in_executor(self._pictures, self._warm_up)
        self.ready = not self._stopping

    def refuse_more(self) -> None:
        """Answer nobody new from now on; what runs goes on. For any thread, and for a signal's handler."""
        self._stopping, self.ready = True, False

    async def stop(self) -> None:
        """Let what runs end, for as long as the settings' grace; cut what is left; give the threads back."""
        self.refuse_more()
        await self._idle(self.settings.grace)
        self._cutting = True
        for answer in self._open:
            answer.cut("stopped")
        self._tell()
        for job, left in list(self._jobs.items()):
            left.set()
            job.cancel()
        await self._idle(CUTTING)
        self._closing = True
        await self._loop.run_in_executor(None, self._thread.join)
        for pool in (self._pictures, self._texts):
            pool.shutdown(wait=False)

    async def _idle(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.busy and time.monotonic() < end:
            await asyncio.sleep(0.02)

    @property
    def busy(self) -> int:
        """Answers that are being prepared, wait for a row, or are computed."""
        return self._preparing + sum(answer.request.finish_reason is None for answer in self._open)

    @property
    def capacity(self) -> int:
        """Answers that there may be at once."""
        return self.engine.load.rows + self.settings.queue

    # ---- answering

    async def ask(self, make: Callable[[], Sequence[Question]], count: int = 1, *, shows: bool = True) -> list[Answer]:
        """Have questions answered: `make` is called in a thread, and makes them, for `count` answers in all.

        `shows` says whether there are pictures. Read the answers by `deltas`, and close those that you do not read to
        their ends. Who is cancelled here leaves nothing behind. Raises Refused: too much at once (429), the server
        stops (503), it took too long (504), or what `make` has against the request (400).
        """
        self._admit(count)
        left = threading.Event()
        job = (self._pictures if shows else self._texts).submit(self._submit, make, time.monotonic(), left)
        self._jobs[job] = left
        future = asyncio.wrap_future(job)

        def submitted(_: asyncio.Future[list[Answer]]) -> None:
            del self._jobs[job]
            self._preparing -= count
            if not job.cancelled() and job.exception() is None:
                self._open.update(job.result())
                for answer in job.result():
                    if self._cutting or self.failure is not None:  # nobody will compute it
                        answer.cut("stopped")
                    elif left.is_set():
                        answer.close()
                self._tell()

        future.add_done_callback(submitted)
        try:
            with anyio.fail_after(self.settings.timeout):
                return await asyncio.shield(future)
        except (PromptError, ImageError) as error:
            raise mistake(error) from None
        except (_Left, TimeoutError, asyncio.CancelledError) as reason:
            if self._cutting and (isinstance(reason, _Left) or job.cancelled()):
                self.cut += count
                raise stopping() from None
            left.set()
            job.cancel()
            if isinstance(reason, TimeoutError):
                raise too_late() from None
            raise

    async def deltas(self, *answers: Answer) -> AsyncIterator[Delta]:
        """What comes of answers, as it comes. Raises Refused where one fails, takes too long, or the server stops."""
        going, news = list(answers), asyncio.Event()

        def late() -> None:
            for answer in going:
                answer.cut("late")
            news.set()

        for answer in answers:
            answer.news = news
        deadline = answers[0].begun + self.settings.timeout
        timer = self._loop.call_later(max(deadline - time.monotonic(), 0), late)
        try:
            while going:
                news.clear()  # before we look: what comes later sets it
                for answer in list(going):
                    ended = answer.request.finish_reason is not None
                    if (delta := answer.arrival()) is not None:
                        yield delta
                    if ended:
                        going.remove(answer)
                        if (delta := answer.rest()) is not None:
                            yield delta
                if going:
                    await news.wait()
        finally:
            timer.cancel()

    def _admit(self, count: int) -> None:
        if self.failure is not None:
            raise Refused(503, "the model has stopped working: restart the server", code="unavailable")
        if self._stopping:
            raise stopping()
        if count > (most := min(self.settings.max_choices, self.capacity)):
            raise Refused(400, f"a request may ask for {most} answers, not {count}", param="n")
        if self.busy + count > self.capacity:
            raise Refused(429, "the server has as much to do as it takes: try again", code="queue_full", headers=RETRY)
        self._preparing += count

    def _submit(self, make: Callable[[], Sequence[Question]], begun: float, left: threading.Event) -> list[Answer]:
        """In a thread: open the pictures, and give the questions to the engine."""
        answers: list[Answer] = []
        opened: dict[tuple[int, ...], list[Tensor]] = {}  # the prompts of a request share their pictures
        try:
            for question in make():
                if len(question.prompt.ids) >= self.engine.max_length:
                    raise too_long(self.engine.max_length, f"takes {len(question.prompt.ids)}")
                which = tuple(map(id, question.prompt.images))
                if which not in opened:
                    opened[which] = self._opened(question, left)
                for number in range(question.n):
                    answer = Answer(len(answers), self.tokenizer, question, begun)
                    answer.ask(self.engine, question, opened[which], number)
                    answers.append(answer)
        except BaseException:
            for answer in answers:
                answer.close()
            raise
        return answers

    def _opened(self, question: Question, left: threading.Event) -> list[Tensor]:
        """Pixels of a question's pictures. Raises _Left as soon as nobody waits for them."""
        settings, pixels = self.settings, 0
        if len(question.prompt.images) > settings.max_images:
            raise PromptError(f"a request may show {settings.max_images} pictures in all")

        def look(picture: Image) -> None:
            nonlocal pixels
            pixels += picture.width * picture.height
            if left.is_set():
                raise _Left
            if pixels > PICTURES * settings.max_image_pixels:
                raise PromptError(
                    f"the pictures of a request may have {PICTURES * settings.max_image_pixels} pixels in all"
                )

        size = self.pipeline.config.visual.image_size
        found = pixels_of(question.prompt, question.images, size, settings.policy, look=look)
        return [pixels for _, pixels in found]

    def require_room(self, characters: int) -> None:
        """For a prompt whose text cannot fit, before it takes seconds to encode. Raises Refused.

        Of up to four characters, normalisation makes one.
        """
        if characters > 4 * self.engine.max_length * self.tokenizer.longest:
            raise too_long(self.engine.max_length, f"has {characters} characters")

    # ---- computing

    def _drive(self) -> None:
        try:
            while not self._closing:
                if self.engine.wait(0.2):
                    self.engine.step()
                    self._loop.call_soon_threadsafe(self._tell)
        except BaseException as error:
            self.failure, self.ready = error, False
            _log.exception("the thread that computes has ended")
            self._loop.call_soon_threadsafe(self._give_up)

    def _give_up(self) -> None:
        for answer in self._open:
            answer.cut("stopped")
        self._tell()

    def _tell(self) -> None:
        """Wake those for whose answers there is news, and forget the answers that have ended."""
        for answer in self._open:
            if answer.news is not None and answer.has_news:
                answer.news.set()
        for answer in [answer for answer in self._open if answer.request.finish_reason is not None]:
            self._open.discard(answer)
            self.metrics.ended(answer)
            if self._stopping:
                self.finished += answer.request.finish_reason in ("stop", "length")
                self.cut += answer.cut_because == "stopped"
            if (error := answer.request.error) is not None:
                _log.error("an answer failed", exc_info=error)

    def _warm_up(self) -> None:
        """Compute everything once, that the first to ask need not wait for it: on a GPU, with every number of rows."""
        visual, rows = self.pipeline.config.visual, self.engine.load.rows
        start = visual.image_start_id
        ids = [start, *[start + 2] * visual.n_queries, start + 1]
        pixels = torch.zeros(1, 3, visual.image_size, visual.image_size)
        if len(ids) + rows + 1 > self.engine.max_length:
            ids, pixels = [0], pixels[:0]
        count = rows if self.engine.device.type == "cuda" else 1
        requests = [self.engine.submit(ids, pixels, max_new_tokens=2 + more, stop_ids=()) for more in range(count)]
        for request in requests:
            request.result()
