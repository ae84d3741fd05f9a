"""Prompts to calibrate with.

examples_from_file   conversations about pictures, as fine-tuning takes them
examples_for_tiny    for the embedded model, from its own recipe
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch

from ..adapt.calibrate import Example
from ..errors import ConfigError
from ..text.tokenizer import VOCABULARY_FILE, Tokenizer
from ..training.batches import Sample
from ..training.data import ConversationDataset
from ..training.loader import Dataset
from ..training.recipes.tiny_data import CHAT, SceneDataset
from ..training.recipes.tiny_scenes import Split
from ..weights.checkpoint import Checkpoint
from . import SAMPLES


def examples_from_file(
    checkpoint: Checkpoint,
    data: str | Path,
    *,
    image_root: str | Path | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    quiet: bool = False,
) -> Iterator[Example]:
    """Some conversations of a JSON or JSON-lines file, drawn with the seed; all of them if there are no more.

    The file is checked at once, pictures are decoded as they are asked for. Raises DataError for records that cannot be
    used (see `ConversationDataset`), ConfigError if the checkpoint has no vocabulary.
    """
    if not (checkpoint.folder / VOCABULARY_FILE).is_file():
        raise ConfigError(f"{checkpoint.folder} has no {VOCABULARY_FILE}, and conversations cannot be read without")
    tokenizer = Tokenizer(checkpoint.folder)
    dataset = ConversationDataset(data, tokenizer, checkpoint.config, image_root=image_root, quiet=quiet)
    chosen = random.Random(seed).sample(range(len(dataset)), min(samples, len(dataset)))
    return _examples(dataset, chosen)


def examples_for_tiny(checkpoint: Checkpoint, *, samples: int = SAMPLES, seed: int = 0) -> Iterator[Example]:
    """Conversations and base prompts about drawn pictures of the training split; another seed draws others."""
    first = random.Random(seed).randrange(len(Split.TRAIN.value) // 2)
    dataset = SceneDataset(Tokenizer(checkpoint.folder), checkpoint.config, CHAT, Split.TRAIN, samples, first)
    return _examples(dataset, range(samples))


def _examples(dataset: Dataset, chosen: range | list[int]) -> Iterator[Example]:
    for index in chosen:
        sample: Sample = dataset[index]
        yield Example(torch.tensor([sample.ids]), sample.pixels)
