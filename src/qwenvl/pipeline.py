"""The facade: pictures and questions in, answers out. `qwenvl.load` (in `loading`) makes one from a checkpoint's name.

Pipeline     chat, chat_stream, generate, generate_ids, score, ground, draw
ChatStream   a reply on its way
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from PIL import Image
from torch import Tensor

from .config import GenerationConfig
from .draw import draw_reply
from .errors import PromptError, QwenVLError
from .generation.batch import generate_batch
from .generation.beam import BeamOptions
from .generation.decode import decode, score
from .generation.sampling import SamplingOptions
from .generation.session import Session, start
from .image import LIBRARY_POLICY, ImagePolicy, ImageSource, image_hash, open_image, preprocess
from .model.qwenvl import QwenVL
from .text.boxes import Box, boxes_in
from .text.parts import Part, Query, Turn, parts_of
from .text.prompt import DEFAULT_SYSTEM, Prompt, chatml_prompt, raw_prompt, stop_ids, stop_strings
from .text.stream import ReplyStream, texts
from .text.tokenizer import VOCABULARY_FILE, Tokenizer

ImageStore = MutableMapping[str, Image.Image]
STORED = "image:"  # how the names begin under which pictures are kept in a store
GROUNDING_TOKENS = 28  # the reference's limit: one box takes at most 22 ids


class Pipeline:
    """A model with everything around it, for one thread. `load` makes one; so does your own code, from its own parts.

    Attributes:
        model, tokenizer, config, generation_config: what the checkpoint holds; tokenizer None without a vocabulary.
        name: what `load` was given.
        policy: what pictures may be read from; see `qwenvl.image.ImagePolicy`.
        images: the pictures that were given as objects or fetched from URLs, under the names that histories use.
            It grows with every such picture: give `chat` a store of your own to decide how long they are kept.
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
        self.images: ImageStore = {}
        self._session: Session | None = None  # of the latest chat

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
        images: ImageStore | None = None,
        **options: Any,  # noqa: ANN401 - the fields of SamplingOptions, each with its own type
    ) -> ChatStream:
        """Stream the reply to `query`: iterate over the result for deltas, then read its `reply` and `history`.

        Args:
            query: a text, or parts (see `qwenvl.text.parts`).
            history: the turns so far, from an earlier `reply, history = chat(...)`.
            system: the system message of ChatML, by default the reference's.
            numbered: write `Picture k:` before the query's pictures, as the reference's list format does.
            stop: texts that end the reply (and are not part of it).
            max_window_size: tokens of system message and history; older turns are left out. Default: the checkpoint's.
            images: a store for pictures given as objects, which the history refers to by name; default `self.images`.
            options: any field of `SamplingOptions`, in place of what the checkpoint's generation_config.json says.

        The deltas join to the stripped reply, tags kept. The KV cache of the latest chat is kept: a further round
        computes only what is new. A base checkpoint (chat_format `raw`) is given the query alone, as in the reference:
        it has neither roles nor history. Raises PromptError, ImageError, ConfigError.
        """
        tokenizer = self._require_tokenizer("chat")
        store = self.images if images is None else images
        turns = () if history is None else history
        parts = [self._to_reference(part, store) for part in parts_of(query, numbered)]
        chat_format = self.generation_config.chat_format
        n_queries = self.config.visual.n_queries
        if chat_format == "raw":
            if system is not None:
                raise PromptError("this checkpoint's chat_format is raw: it has no system message")
            prompt = raw_prompt(tokenizer, parts, n_queries=n_queries)
        else:
            prompt = chatml_prompt(
                tokenizer,
                parts,
                turns,
                system=DEFAULT_SYSTEM if system is None else system,
                max_window_size=max_window_size or self.generation_config.max_window_size,
                n_queries=n_queries,
            )
        text = ReplyStream(tokenizer, (*stop_strings(chat_format), *texts(stop)))
        chosen, pictures = self._options(options), self._pictures(prompt, store)
        session, self._session = self._session or Session(), None  # taken out: a reply begun meanwhile has its own
        return ChatStream(self._stream(prompt, pictures, session, text, chosen), list(turns), parts, self, session)

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
        tokenizer = self._require_tokenizer("generate")
        prompt = raw_prompt(tokenizer, query, n_queries=self.config.visual.n_queries, numbered=numbered)
        text = ReplyStream(tokenizer, stop, strip=False)
        pictures = self._pictures(prompt, self.images)
        return "".join(self._stream(prompt, pictures, Session(), text, self._options(options)))

    def ground(self, image: ImageSource, phrase: str, **options: Any) -> list[Box]:  # noqa: ANN401
        """Where `phrase` is in the picture: boxes in its own pixels, labelled with the phrase; none if none were found.

        The reference's grounding prompt, `<img>..</img><ref>phrase</ref><box>`, greedy, up to 28 new tokens; `options`
        as in `generate`.
        """
        if not phrase.strip():
            raise PromptError("ground needs a phrase to find, such as 'the dog'")
        picture = open_image(image, self.policy)
        asked: list[Part] = [{"image": picture}, {"ref": phrase, "box": None}]
        greedy = {"do_sample": False, "max_new_tokens": GROUNDING_TOKENS}
        answer = self.generate(asked, numbered=False, **{**greedy, **options})
        return [
            Box(box.x1, box.y1, box.x2, box.y2, box.label or phrase)
            for box in boxes_in(f"<box>{answer}", *picture.size)
        ]

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
        session = Session()
        logits = start(
            self.model, session, prompt.ids, self._pictures(prompt, self.images), max(map(len, ids), default=0)
        )
        assert session.cache is not None
        return score(self.model, session.cache, logits, ids)

    def keep(self, session: Session) -> None:
        """Let the next `chat` continue from this session, as far as their texts agree."""
        self._session = session

    def _stream(
        self,
        prompt: Prompt,
        pictures: Sequence[tuple[str, Tensor]],
        session: Session,
        text: ReplyStream,
        options: SamplingOptions,
    ) -> Generator[str]:
        """Deltas of the reply to a prompt; the session then holds the prompt and the reply."""
        tokenizer, ends = self._require_tokenizer("text"), self._stop_ids()
        logits = start(self.model, session, prompt.ids, pictures, options.max_new_tokens)
        assert session.cache is not None
        history = torch.tensor([prompt.ids], device=self.device)
        new: list[int] = []
        try:
            for step in decode(
                self.model,
                session.cache,
                logits,
                history,
                options,
                stop_ids=ends,
                n_vocab=tokenizer.n_vocab,
                stepper=session.stepper,
            ):
                (id_,) = step.ids
                assert id_ is not None
                new.append(id_)
                if id_ not in ends and (delta := text.push(id_)):
                    yield delta
                if text.stopped:
                    break
            if delta := text.flush():
                yield delta
        except QwenVLError:
            session.clear()  # it may hold what is no number, which a mask does not hide from a captured step
            raise
        finally:
            if session.cache is not None:
                session.extend(new)

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

    def _to_reference(self, part: Part, store: ImageStore) -> Part:
        """A part whose picture is a str: the path or URL that it was, or the name of a picture put into the store."""
        source = part.get("image", "")
        if isinstance(source, str):
            return part
        if isinstance(source, os.PathLike):
            return {**part, "image": os.fspath(source)}
        picture = open_image(source, self.policy)
        name = f"{STORED}{hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()[:32]}"
        store[name] = picture
        return {**part, "image": name}

    def _pictures(self, prompt: Prompt, store: ImageStore) -> list[tuple[str, Tensor]]:
        """Hash and pixels of every picture of a prompt, in order."""
        pictures = []
        for source in prompt.images:
            picture = store.get(source) if isinstance(source, str) else None
            if picture is None:
                if isinstance(source, str) and source.startswith(STORED):
                    raise PromptError(f"the history shows a picture {source} that the image store does not hold")
                picture = open_image(source, self.policy)
                if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
                    store[source] = picture  # fetched once for as long as the store is kept, not once a round
            pixels = preprocess(picture, self.config.visual.image_size, self.policy)
            pictures.append((image_hash(pixels), pixels))
        return pictures


class ChatStream(Iterator[str]):
    """The deltas of one reply. When they are through (or whenever you stop), `reply` and `history` say what came."""

    def __init__(
        self, deltas: Generator[str], history: list[Turn], parts: list[Part], pipeline: Pipeline, session: Session
    ) -> None:
        self._deltas, self._history, self._parts = deltas, history, parts
        self._pipeline = pipeline
        self._session: Session | None = session
        self.reply = ""

    def __next__(self) -> str:
        try:
            delta = next(self._deltas)
        except BaseException:  # the end, or what went wrong: either way, what the cache holds is still good
            self.close()
            raise
        self.reply += delta
        return delta

    @property
    def history(self) -> list[Turn]:
        """The history given, and this turn with what has been said so far."""
        return [*self._history, Turn(self._parts, self.reply)]

    def close(self) -> None:
        """Stop here. The conversation's cache goes back to the pipeline, for the next round."""
        self._deltas.close()
        if self._session is not None:  # handed back once: by the next time, another reply may be using it
            self._pipeline.keep(self._session)
            self._session = None
