"""The facade: pictures and questions in, answers out. `qwenvl.load` (in `loading`) makes one from a checkpoint's name.

Pipeline   chat, chat_stream, generate, generate_stream, generate_ids, score, ground, draw; many at once with an engine
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import torch
from PIL import Image
from torch import Tensor

from .config import GenerationConfig
from .draw import draw_reply
from .errors import PromptError
from .generation.batch import generate_batch
from .generation.beam import BeamOptions
from .generation.decode import score
from .generation.engine import Engine
from .generation.request import Request
from .generation.sampling import SamplingOptions
from .generation.session import Session, reply, start
from .generation.streams import ChatStream, TextStream
from .image import LIBRARY_POLICY, ImagePolicy, ImageSource, open_image
from .model.qwenvl import QwenVL
from .pictures import PictureStore, pixels_of, stored
from .text.boxes import Box, boxes_in
from .text.parts import Part, Query, Turn, parts_of
from .text.prompt import DEFAULT_SYSTEM, Prompt, chatml_prompt, raw_prompt, stop_ids, stop_strings
from .text.stream import ReplyStream, texts
from .text.tokenizer import VOCABULARY_FILE, Tokenizer

GROUNDING_TOKENS = 28  # the reference's limit: one box takes at most 22 ids


class Pipeline:
    """A model with everything around it. `load` makes one; so does your own code, from its own parts.

    For one thread and one answer at a time, until `start_engine`.

    Attributes:
        model, tokenizer, config, generation_config: what the checkpoint holds; tokenizer None without a vocabulary.
        name: what `load` was given.
        policy: what pictures may be read from; see `qwenvl.image.ImagePolicy`.
        images: the pictures that were given as objects or fetched from URLs, under the names that histories use.
            It grows with every such picture: give `chat` a store of your own to decide how long they are kept.
        engine: what computes answers, if `start_engine` was called.
    """

    def __init__(
        self,
        model: QwenVL,
        tokenizer: Tokenizer | None,
        generation_config: GenerationConfig | None = None,
        *,
        name: str = "qwenvl",
        font: str | Path | None = None,
        policy: ImagePolicy = LIBRARY_POLICY,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        self.generation_config = generation_config or GenerationConfig()
        self.name, self.font, self.policy = name, font, policy
        self.images: PictureStore = {}
        self.engine: Engine | None = None
        self._session: Session | None = None  # of the latest chat

    def start_engine(self, rows: int | None = None, **options: Any) -> Engine:  # noqa: ANN401 - what an Engine takes
        """Answer many at once from now on: `chat_stream`, `generate_stream` and all that run on them go to an engine.

        What they return is then computed for all together, whoever is iterated over, in any number of threads. Raises
        CacheError where there is no memory for `rows`; `options` as for `qwenvl.Engine`.
        """
        n_vocab = None if self.tokenizer is None else self.tokenizer.n_vocab
        self.engine = Engine(self.model, rows=rows, n_vocab=n_vocab, stop_ids=self._stop_ids(), **options)
        return self.engine

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.decoder.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.model.decoder.wte.weight.dtype

    def chat(
        self,
        query: Query,
        history: Sequence[Turn] | None = None,
        **options: Any,  # noqa: ANN401
    ) -> tuple[str, list[Turn]]:
        """The reply to `query` after `history`, and a new history with this turn; the one given is not changed.

        Arguments as in `chat_stream`, which this runs to its end.
        """
        stream = self.chat_stream(query, history, **options)
        for _ in stream:
            pass
        return stream.reply, stream.history

    def chat_stream(
        self,
        query: Query,
        history: Sequence[Turn] | None = None,
        *,
        system: str | None = None,
        numbered: bool = True,
        stop: str | Sequence[str] = (),
        max_window_size: int | None = None,
        images: PictureStore | None = None,
        **options: Any,  # noqa: ANN401 - the fields of SamplingOptions, each with its own type
    ) -> ChatStream:
        """Stream the reply to `query`: iterate over the result for deltas, then read its `reply` and `history`.

        Args:
            query: a text, or parts (see `qwenvl.text.parts`).
            history: the turns so far, from an earlier `reply, history = chat(...)`.
            system: the system message of ChatML, by default the reference's.
            numbered: write `Picture k:` before the query's pictures, as the reference's list format does.
            stop: texts that end the reply (and are not part of it).
            max_window_size: tokens of system message and history; older turns are left out. Default: the checkpoint's,
                or what a row of the engine has room for.
            images: a store for pictures given as objects, which the history refers to by name; default `self.images`.
            options: any field of `SamplingOptions`, in place of what the checkpoint's generation_config.json says.

        The deltas join to the stripped reply, tags kept. The KV cache of the latest chat is kept: a further round
        computes only what is new. A base checkpoint (chat_format `raw`) is given the query alone, as in the reference:
        it has neither roles nor history. Raises PromptError, ImageError, ConfigError.
        """
        tokenizer = self._require_tokenizer("chat")
        store = self.images if images is None else images
        turns = () if history is None else history
        parts = [stored(part, store, self.policy) for part in parts_of(query, numbered)]
        chosen = self._options(options)
        prompt = self.chat_prompt(
            parts, turns, system=system, max_window_size=max_window_size, max_new_tokens=chosen.max_new_tokens
        )
        ends = (*stop_strings(self.generation_config.chat_format), *texts(stop))
        session, self._session = self._session or Session(), None  # taken out: a reply begun meanwhile has its own
        ids = self._ids(prompt, store, session, ends, chosen)
        stream = TextStream(ids, ReplyStream(tokenizer, ends), self._stop_ids())
        return ChatStream(stream, list(turns), parts, keep=lambda: self.keep(session))

    def chat_prompt(
        self,
        query: Query,
        history: Sequence[Turn] = (),
        *,
        system: str | None = None,
        max_window_size: int | None = None,
        max_new_tokens: int | None = None,
    ) -> Prompt:
        """The prompt that `chat_stream` answers: ids, and the pictures of their spans, not opened yet.

        Turns that do not fit `max_window_size` are left out; with an engine, also those for which its rows have no
        room beside an answer of `max_new_tokens`, or of a quarter of a row. Raises PromptError.
        """
        tokenizer, n_queries = self._require_tokenizer("chat"), self.config.visual.n_queries
        if self.generation_config.chat_format == "raw":
            if system is not None:
                raise PromptError("this checkpoint's chat_format is raw: it has no system message")
            return raw_prompt(tokenizer, query, n_queries=n_queries)
        window = max_window_size or self.generation_config.max_window_size
        ask = partial(
            chatml_prompt, tokenizer, query, system=DEFAULT_SYSTEM if system is None else system, n_queries=n_queries
        )
        if self.engine is not None and history:  # a row is shorter than the model's positions: room for the answer
            answer = min(self._options({"max_new_tokens": max_new_tokens}).max_new_tokens, self.engine.max_length // 4)
            window = max(min(window, self.engine.max_length - len(ask().ids) - answer), 1)
        return ask(history, max_window_size=window)

    def generate(
        self,
        query: Query,
        *,
        numbered: bool = True,
        stop: str | Sequence[str] = (),
        **options: Any,  # noqa: ANN401 - the fields of SamplingOptions
    ) -> str:
        """The text with which the model goes on after `query` alone, without roles: how a base checkpoint is asked.

        Arguments as in `chat_stream`. Tags are kept, nothing is stripped, what ended the text is not part of it.
        """
        return "".join(self.generate_stream(query, numbered=numbered, stop=stop, **options))

    def generate_stream(
        self,
        query: Query,
        *,
        numbered: bool = True,
        stop: str | Sequence[str] = (),
        **options: Any,  # noqa: ANN401 - the fields of SamplingOptions
    ) -> TextStream:
        """Stream what `generate` returns."""
        tokenizer = self._require_tokenizer("generate")
        prompt = raw_prompt(tokenizer, query, n_queries=self.config.visual.n_queries, numbered=numbered)
        ids = self._ids(prompt, self.images, Session(), texts(stop), self._options(options))
        return TextStream(ids, ReplyStream(tokenizer, stop, strip=False), self._stop_ids())

    def ground(self, image: ImageSource, phrase: str, **options: Any) -> list[Box]:  # noqa: ANN401
        """Where `phrase` is in the picture: boxes in its own pixels, labelled with the phrase; none if none were found.

        The reference's grounding prompt, `<img>..</img><ref>phrase</ref><box>`, greedy, up to 28 new tokens; `options`
        as in `generate`.
        """
        picture = open_image(image, self.policy)
        greedy = {"do_sample": False, "max_new_tokens": GROUNDING_TOKENS}
        answer = self.generate(grounding_query(picture, phrase), numbered=False, **{**greedy, **options})
        return grounded(answer, phrase, *picture.size)

    def draw(self, image: ImageSource, reply: str) -> Image.Image | None:
        """The picture with the boxes of `reply` drawn on it, or None if it has none."""
        return draw_reply(image, reply, self.font, self.policy)

    @overload
    def generate_ids(
        self,
        input_ids: Tensor,
        pixels: Tensor | None = ...,
        attention_mask: Tensor | None = ...,
        *,
        return_log_probabilities: Literal[False] = ...,
        **options: Any,  # noqa: ANN401
    ) -> list[list[int]]: ...
    @overload
    def generate_ids(
        self,
        input_ids: Tensor,
        pixels: Tensor | None = ...,
        attention_mask: Tensor | None = ...,
        *,
        return_log_probabilities: Literal[True],
        **options: Any,  # noqa: ANN401
    ) -> tuple[list[list[int]], list[list[float]]]: ...
    def generate_ids(
        self,
        input_ids: Tensor,
        pixels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        stop_ids: Sequence[int] | None = None,
        stop: str | Sequence[str] = (),
        image_features: Tensor | None = None,
        beams: BeamOptions | int | None = None,
        return_log_probabilities: bool = False,
        **options: Any,
    ) -> list[list[int]] | tuple[list[list[int]], list[list[float]]]:
        """New ids behind a batch of prompts: one list a row, without the prompt, with the stop id if there was one.

        Args:
            input_ids: [B,T]; rows are padded where `attention_mask` [B,T] is false.
            pixels, image_features: of all rows' pictures, in reading order, as in `QwenVL.forward`.
            max_new_tokens: default, what generation_config.json says.
            stop_ids: ids that end a row; None means the configured ones, () means never.
            stop: texts that end a row.
            beams: search with so many beams, or as `BeamOptions` say; row b's best texts then stand at
                b x num_return_sequences and after.
            return_log_probabilities: also return the model's own log-probability of every new id (not with beams).
            options: any other field of `SamplingOptions`. Greedy unless `do_sample=True`, whatever the checkpoint says.

        Raises PromptError, CacheError, ConfigError.
        """
        defaults = GenerationConfig(max_new_tokens=self.generation_config.max_new_tokens)
        ids, likely = generate_batch(
            self.model,
            input_ids,
            SamplingOptions.from_config(defaults, max_new_tokens=max_new_tokens, **options),
            tokenizer=self._require_tokenizer("stop") if stop else self.tokenizer,
            pixels=pixels,
            attention_mask=attention_mask,
            image_features=image_features,
            stop_ids=self._stop_ids() if stop_ids is None else tuple(stop_ids),
            stop=stop,
            beams=BeamOptions(beams) if isinstance(beams, int) else beams,
            with_log_probabilities=return_log_probabilities,
        )
        return (ids, likely) if return_log_probabilities else ids

    def score(self, query: Query, continuations: Sequence[str], *, numbered: bool = True) -> list[list[float]]:
        """Log-probability of every token of each continuation of `query` (as in `generate`), one list each.

        The prompt is computed once. A continuation is encoded apart from the prompt.
        """
        tokenizer = self._require_tokenizer("score")
        prompt = raw_prompt(tokenizer, query, n_queries=self.config.visual.n_queries, numbered=numbered)
        ids = [tokenizer.encode(text) for text in texts(continuations, "continuations")]
        pictures = self._pictures(prompt, self.images)
        if self.engine is not None and ids:
            request = self.engine.submit_score(prompt.ids, ids, [pixels for _, pixels in pictures])
            request.result()
            return request.scores
        session = Session()
        logits = start(self.model, session, prompt.ids, pictures, max(map(len, ids), default=0))
        assert session.cache is not None
        return score(self.model, session.cache, logits, ids)

    def keep(self, session: Session) -> None:
        """Let the next `chat` continue from this session, as far as their texts agree."""
        self._session = session

    def _ids(
        self, prompt: Prompt, store: PictureStore, session: Session, stop: Sequence[str], options: SamplingOptions
    ) -> Generator[int] | Request:
        """New ids behind a prompt: from the engine if there is one, else computed as they are asked for."""
        tokenizer, stop_ids = self._require_tokenizer("text"), self._stop_ids()
        pictures = self._pictures(prompt, store)
        if self.engine is not None:
            ahead = ReplyStream(tokenizer, stop)  # the engine may be ahead of who reads

            def should_stop(id_: int) -> bool:
                ahead.push(id_)
                return ahead.stopped

            pixels = [pixels for _, pixels in pictures]
            return self.engine.submit(
                prompt.ids, pixels, options, stop_ids=stop_ids, should_stop=should_stop if stop else None
            )
        return reply(self.model, session, prompt.ids, pictures, options, stop_ids=stop_ids, n_vocab=tokenizer.n_vocab)

    def _pictures(self, prompt: Prompt, store: PictureStore) -> list[tuple[str, Tensor]]:
        return pixels_of(prompt, store, self.config.visual.image_size, self.policy)

    def _options(self, given: dict[str, Any]) -> SamplingOptions:
        return SamplingOptions.from_config(self.generation_config, **given)

    def _stop_ids(self) -> tuple[int, ...]:
        """What the checkpoint and its chat format say."""
        configured = self.generation_config.eos_token_ids
        if self.tokenizer is None:
            return configured
        return tuple(dict.fromkeys((*configured, *stop_ids(self.tokenizer, self.generation_config.chat_format))))

    def _require_tokenizer(self, purpose: str) -> Tokenizer:
        if self.tokenizer is None:
            raise PromptError(
                f"{purpose} needs a vocabulary, but {self.name} has no {VOCABULARY_FILE}; use generate_ids, or put the "
                "file into the folder"
            )
        return self.tokenizer


def grounding_query(image: ImageSource, phrase: str) -> list[Part]:
    """What `ground` asks, to be written without `Picture k:`. Raises PromptError for an empty phrase."""
    if not phrase.strip():
        raise PromptError("ground needs a phrase to find, such as 'the dog'")
    return [{"image": image}, {"ref": phrase, "box": None}]


def grounded(answer: str, phrase: str, width: int, height: int) -> list[Box]:
    """The boxes in what a model answered to that, in pixels of the picture."""
    found = boxes_in(f"<box>{answer}", width, height)
    return [Box(box.x1, box.y1, box.x2, box.y2, box.label or phrase) for box in found]
