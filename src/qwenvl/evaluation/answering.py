"""A benchmark's questions, answered by an engine, many under way at once.

Asker     a model as a benchmark asks it
Answer    what came of one item
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import ImageError, PromptError, QwenVLError
from ..generation.engine import Engine
from ..generation.request import Request
from ..generation.sampling import SamplingOptions
from ..image import ImagePolicy, preprocess
from ..pipeline import Pipeline
from ..text.prompt import Prompt, raw_prompt, stop_ids
from .forms import LETTERS, Form, parts
from .items import Item

POLICY = ImagePolicy(allow_urls=False)  # a benchmark is what is in its folder
READERS = 4  # threads that decode pictures while the engine computes
AHEAD = 2  # items that are ready or under way, for each row of the engine
SPARE = 8  # examples drawn beyond those needed, for those that show the item's own picture


@dataclass(frozen=True)
class Answer:
    """What came of an item: a text or the loss of each option, in nats a token; or an error.

    `cut` says that the text ended because it had as many tokens as it may; `shots` are the ids of its examples.
    """

    id: str
    answer: str = ""
    losses: tuple[float, ...] = ()
    cut: bool = False
    shots: tuple[str, ...] = ()
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without what is empty."""
        told = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items() if value}
        return told if self.losses or self.error else {"id": self.id, "answer": self.answer, **told}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Answer:
        """From `to_dict`. Raises TypeError for what is none."""
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
        answer = cls(**given)  # type: ignore[arg-type]
        if not (isinstance(answer.id, str) and isinstance(answer.answer, str) and isinstance(answer.losses, tuple)):
            raise TypeError("an answer has an id and a text, or losses")
        return answer


class Asker:
    """A model, asked in a benchmark's form; with `few_shot` examples before each question.

    Examples are drawn anew for each item, by `seed` and the item's id: an item has the same ones whoever answers it.
    The pictures of the item itself are not among them (the reference's draw for Flickr30K could take its own caption).
    """

    def __init__(
        self,
        pipeline: Pipeline,
        engine: Engine,
        form: Form,
        *,
        shots: Sequence[Item] = (),
        few_shot: int = 0,
        seed: int = 0,
    ) -> None:
        if pipeline.tokenizer is None:
            raise PromptError(f"{pipeline.name} has no vocabulary, so it cannot be asked")
        self.pipeline, self.engine, self.form, self.tokenizer = pipeline, engine, form, pipeline.tokenizer
        self.shots, self.few_shot, self.seed = shots, few_shot, seed

    def answers(self, items: Iterable[Item]) -> Iterator[Answer]:
        """An answer for each item, in order. A mistake with one, such as a broken picture, is told in its answer."""
        ahead = AHEAD * self.engine.load.rows
        prepared: deque[tuple[Item, Future[_Prepared]]] = deque()
        asked: deque[tuple[Item, tuple[str, ...], Request | QwenVLError]] = deque()
        waiting = iter(items)
        readers = ThreadPoolExecutor(READERS)
        try:
            while True:
                while len(prepared) + len(asked) < ahead and (item := next(waiting, None)) is not None:
                    prepared.append((item, readers.submit(self._prepare, item)))
                while prepared and (prepared[0][1].done() or not asked):
                    item, ready = prepared.popleft()
                    asked.append((item, *self._ask(item, ready)))
                if not asked:
                    return
                item, shots, request = asked.popleft()
                yield self._answer(item, shots, request)
        finally:  # who stops in the middle leaves the engine to others
            readers.shutdown(cancel_futures=True)
            for _, _, request in asked:
                if isinstance(request, Request):
                    request.cancel()

    def examples(self, item: Item) -> list[Item]:
        """What stands before an item's question. Raises PromptError where the data have too few."""
        if not self.few_shot:
            return []
        draw = random.Random(f"{self.seed} {item.id}")
        found = draw.sample(self.shots, min(len(self.shots), self.few_shot + SPARE))
        others = [shot for shot in found if not set(shot.pictures) & set(item.pictures)]
        if len(others) < self.few_shot:
            raise PromptError(f"{self.few_shot} examples of other pictures were asked for, and {len(others)} found")
        return others[: self.few_shot]

    def _prepare(self, item: Item) -> _Prepared:
        """Ids and pixels, computed in a reader's thread."""
        examples = self.examples(item)
        query = parts(self.form, item, examples)
        if self.form.way == "chat":
            prompt = self.pipeline.chat_prompt(query)
        else:
            prompt = raw_prompt(self.tokenizer, query, n_queries=self.pipeline.config.visual.n_queries)
        size = self.pipeline.config.visual.image_size
        shown = [picture() if callable(picture) else picture for picture in prompt.images]
        pixels = [preprocess(picture, size, POLICY) for picture in shown]
        return _Prepared(prompt, pixels, tuple(shot.id for shot in examples))

    def _ask(self, item: Item, ready: Future[_Prepared]) -> tuple[tuple[str, ...], Request | QwenVLError]:
        try:
            prepared = ready.result()
            return prepared.shots, self._submit(item, prepared)
        except (ImageError, PromptError) as error:
            return (), error

    def _submit(self, item: Item, prepared: _Prepared) -> Request:
        ids, pixels = prepared.prompt.ids, prepared.pixels
        if self.form.way == "losses":
            letters = [self.tokenizer.encode(f" {letter}") for letter in LETTERS[: len(item.options)]]
            return self.engine.submit_score(ids, letters, pixels)
        if self.form.way == "chat":
            drawn = int.from_bytes(hashlib.sha256(f"{self.seed} {item.id}".encode()).digest()[:7], "big")
            limits = {"max_new_tokens": self.form.max_new_tokens} if self.form.max_new_tokens else {}
            options = SamplingOptions.from_config(
                self.pipeline.generation_config, **{**limits, "seed": drawn, **self.form.options}
            )
            return self.engine.submit(ids, pixels, options, stop_ids=self._ends())
        options = SamplingOptions(
            max_new_tokens=self.form.max_new_tokens or self.pipeline.generation_config.max_new_tokens,
            min_new_tokens=self.form.min_new_tokens,
        )
        return self.engine.submit(ids, pixels, options, stop_ids=(self.tokenizer.eos_id,))

    def _ends(self) -> tuple[int, ...]:
        return stop_ids(self.tokenizer, self.pipeline.generation_config.chat_format)

    def _answer(self, item: Item, shots: tuple[str, ...], request: Request | QwenVLError) -> Answer:
        if isinstance(request, QwenVLError):
            return Answer(item.id, shots=shots, error=str(request))
        ids = request.result()
        if self.form.way == "losses":
            return Answer(item.id, losses=tuple(request.losses), shots=shots)
        cut = request.finish_reason == "length"
        if self.form.way == "chat":  # tags are part of a reply
            kept = [id_ for id_ in ids if id_ not in self._ends()]
            return Answer(item.id, self.tokenizer.decode(kept).strip(), cut=cut, shots=shots)
        return Answer(item.id, self.tokenizer.decode(ids, skip_special=True).strip(), cut=cut, shots=shots)


@dataclass(frozen=True)
class _Prepared:
    prompt: Prompt
    pixels: list[Tensor]
    shots: tuple[str, ...]
