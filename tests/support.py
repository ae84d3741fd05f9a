"""What several test modules share: the golden models, small random ones, and the shape of a good error."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwenvl.config import QwenVLConfig, VisionConfig
from qwenvl.errors import QwenVLError
from qwenvl.model.qwenvl import QwenVL
from qwenvl.pipeline import Pipeline
from qwenvl.text.stream import ReplyStream
from qwenvl.text.tokenizer import VOCABULARY_FILE, Tokenizer
from qwenvl.weights.write import save

TOLERANCE = 2e-5  # absolute, on float32 logits and features; what goldens/README promises


@dataclass(frozen=True)
class Case:
    """One golden prompt: what goes in, and every number that the reference stored for it."""

    name: str
    input_ids: Tensor
    mask: Tensor
    pixels: Tensor | None
    greedy: list[list[int]]
    kept: int
    stored: dict[str, Tensor]

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of `QwenVL.forward`."""
        return {"input_ids": self.input_ids, "pixels": self.pixels, "attention_mask": self.mask}


@dataclass(frozen=True)
class Golden:
    """A golden folder: the loaded model, the reference's numbers and the pictures as pixels."""

    name: str
    folder: Path
    vl: Pipeline
    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    pixels: dict[str, Tensor]

    @property
    def model(self) -> QwenVL:
        """The model, float32, in eval mode."""
        return self.vl.model

    def case(self, name: str) -> Case:
        """A prompt of `cases.json` by name."""
        (facts,) = [case for case in self.facts["cases"] if case["name"] == name]
        images = [self.pixels[image] for row in facts["images"] for image in row]
        prefix = f"{name}."
        stored = {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}
        return Case(
            name,
            stored["input_ids"].long(),
            stored["attention_mask"].bool(),
            torch.stack(images) if images else None,
            facts["greedy"],
            facts["kept_positions"],
            stored,
        )

    def prompt(self, *pieces: int | str, seed: int = 0) -> Tensor:
        """Ids [T]: so many random ordinary ids for a number, a whole image span for a picture's name."""
        generator = torch.Generator().manual_seed(seed)
        vision = self.model.config.visual
        span = [vision.image_start_id, *[vision.image_pad_id] * vision.n_queries, vision.image_end_id]
        ids: list[int] = []
        for piece in pieces:
            ids += span if isinstance(piece, str) else torch.randint(3, 300, (piece,), generator=generator).tolist()
        return torch.tensor(ids)

    def pictures(self, *names: str) -> Tensor:
        """Pixels [N,3,S,S] of pictures by name."""
        return torch.stack([self.pixels[name] for name in names])


def small_config(**changes: Any) -> QwenVLConfig:
    """A configuration for which everything takes milliseconds: spans of 4 ids, `seq_length` 64; changes by name.

    Names of the vision part are taken as such. Its weights are spread wide, so that no two texts look alike.
    """
    vision = {
        "image_size": 28,
        "width": 32,
        "layers": 1,
        "heads": 2,
        "mlp_ratio": 2.0,
        "output_dim": 128,
        "image_start_id": 60,
        "n_queries": 4,
    }
    vision |= {name: changes.pop(name) for name in list(changes) if name in VisionConfig.__dataclass_fields__}
    sizes = {
        "vocab_size": 64,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 32,
        "intermediate_size": 256,
        "max_position_embeddings": 512,
        "seq_length": 64,
        "initializer_range": 0.1,
    }
    return QwenVLConfig.from_dict({**sizes, **changes, "visual": vision})


def random_model(config: QwenVLConfig, seed: int = 0) -> QwenVL:
    """A model with the weights that training from scratch begins with, in eval mode."""
    torch.manual_seed(seed)
    return QwenVL(config).eval()


def padded(rows: list[Tensor], side: str | list[str] = "left", pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Rows [T_b] of ids as one batch [B,T] and its mask; `side` (one for each row, if a list) is left, right or both.

    "both" puts the padding half before and half behind.
    """
    width = max(map(len, rows))
    sides = [side] * len(rows) if isinstance(side, str) else side
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (real, where) in enumerate(zip(rows, sides, strict=True)):
        spare = width - len(real)
        begin = {"left": spare, "right": 0, "both": spare // 2}[where]
        ids[row, begin : begin + len(real)] = real
        mask[row, begin : begin + len(real)] = True
    return ids, mask


@contextmanager
def one_line_error(kind: type[QwenVLError], *says: str | int) -> Iterator[None]:
    """The block must raise exactly this error, in one line that holds each of `says`."""
    with pytest.raises(QwenVLError) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is kind, f"{type(caught.value).__name__}: {message}"
    assert len(message.splitlines()) == 1, message
    assert not [word for word in map(str, says) if word not in message], message


def write_vocabulary(folder: Path, words: str = "the dog cat is in this picture box what where user assistant") -> Path:
    """A small vocabulary in a folder: every byte, some words with and without a space, halves of two characters."""
    merges: dict[bytes, None] = {bytes([byte]): None for byte in range(256)}
    for form in [form.encode() for word in words.split() for form in (word, f" {word}")]:
        for end in range(2, len(form) + 1):  # every beginning, so that the merges can be reached
            merges[form[:end]] = None
    merges |= dict.fromkeys(["你".encode()[:2], "你".encode(), "😀".encode()[:2]])
    path = folder / VOCABULARY_FILE
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(merges)))
    return path


def chat_config(tokenizer: Tokenizer, **changes: Any) -> QwenVLConfig:
    """A small configuration with a tokenizer's ids, spans of 16, `seq_length` 192 and a wider output."""
    sizes = {
        "vocab_size": tokenizer.n_vocab + 12,
        "image_start_id": tokenizer.image_start_id,
        "image_size": 56,
        "n_queries": 16,
        "seq_length": 192,
        "max_position_embeddings": 1024,
    }
    return small_config(**(sizes | changes))


def write_checkpoint(folder: Path, model: QwenVL, vocabulary: Path | None, generation: dict[str, Any] | None) -> Path:
    """A checkpoint folder in our layout, with or without a vocabulary and a generation config."""
    files = {} if vocabulary is None else {VOCABULARY_FILE: vocabulary.read_bytes()}
    if generation is not None:
        files["generation_config.json"] = json.dumps(generation).encode()
    save(model.state_dict(), folder, model.config, files, quiet=True)
    return folder


def reply_text(tokenizer: Tokenizer, new_ids: Iterable[int], stops: Iterable[int], strings: Iterable[str] = ()) -> str:
    """What newly generated ids say before the first of `stops` or `strings`, stripped; region tags are kept.

    Without a stop, as when the length ended generation, every id counts. Takes the new ids alone: a prompt is cut off
    by counting ids, as its text may decode to other characters than were written.
    """
    stops = frozenset(stops)
    text = tokenizer.decode(itertools.takewhile(lambda i: i not in stops, new_ids))
    return text[: min((at for at in map(text.find, strings) if at >= 0), default=None)].strip()


def streamed_reply(
    tokenizer: Tokenizer, new_ids: Iterable[int], stops: Iterable[int], strings: Sequence[str] = ()
) -> str:
    """The same from the class that every reply goes through, id by id."""
    stops, stream = frozenset(stops), ReplyStream(tokenizer, strings)
    deltas = [stream.push(id_) for id_ in itertools.takewhile(lambda i: i not in stops, new_ids)]
    return "".join(deltas) + stream.flush()
