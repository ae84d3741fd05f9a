"""Sequences that the small model learns from: pictures with several questions each, so that a picture is paid once.

Stage                   which tasks a stage mixes, and how many pictures its curriculum takes
CAPTIONS, TASKS, CHAT   the three of the paper, in miniature
SceneDataset            index -> SceneSample, a pure function
collate_scenes          samples -> SceneBatch
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from ...config import QwenVLConfig
from ...image import preprocess
from ...text.prompt import IGNORED_LABEL, training_example
from ...text.tokenizer import IMAGE_TAGS, Tokenizer
from ..batches import Batch, Sample, collate
from .tiny_dense import dense_targets
from .tiny_pointing import find_groups, find_points
from .tiny_questions import SKILLS, Exchange, compare, dialogue, raw_form
from .tiny_scenes import Scene, Split, draw, scene
from .tiny_words import LANGUAGES, Language

CLOSING = ("caption", "description")  # they tell everything, so they come last
TRIES = 24  # draws of a question: a picture of one thing has few
CHAT_FRAME, ROUND_FRAME = 18, 10  # tokens around the picture and around a round in ChatML, about


@dataclass(frozen=True)
class Stage:
    """What a stage trains on.

    skills       how often each skill is asked for, as weights
    raw          share of sequences in the base form; the others are ChatML
    dialogues    share of ChatML sequences that are rounds about one thing
    pairs        share of sequences that compare two pictures
    alone        share of the other sequences that tell everything at once, with no question before
    ramp         pictures over which the most shapes grow from one to five; 0: five from the beginning
    budget       tokens of a sequence, about
    words        share of pictures with a printed word
    """

    name: str
    skills: Mapping[str, float]
    raw: float
    dialogues: float = 0.0
    pairs: float = 0.0
    alone: float = 0.15
    ramp: int = 0
    budget: int = 224
    words: float = 0.35


CAPTIONS = Stage("captions", {"caption": 1.0, "box": 4.0}, raw=1.0, ramp=9600, budget=200)
TASKS = Stage(
    "tasks",
    {
        "caption": 0.6,
        "description": 0.4,
        "box": 3.5,
        "inside": 1.0,
        "count": 1.5,
        "colour": 0.8,
        "shape": 0.8,
        "exists": 1.2,
        "relation": 1.5,
        "text": 4.0,
    },
    raw=0.4,
    dialogues=0.1,
    pairs=0.1,
    words=0.45,
)
CHAT = Stage("chat", TASKS.skills, raw=0.2, dialogues=0.3, pairs=0.1, words=0.45)


@dataclass(frozen=True)
class SceneSample(Sample):
    """A sample, what the cells of its pictures hold (dense [N,Q,8]), and for each token what it points at in the first
    of them, and which things its phrase means in the first and in the last (`tiny_pointing`).
    """

    dense: Tensor = field(repr=False)
    points: list[int]
    groups: list[list[int]]


@dataclass(frozen=True)
class SceneBatch(Batch):
    """A batch, what the cells of its pictures hold (dense [N,Q,8]), points [B,T] and groups [B,2,T], 0 at padding."""

    dense: Tensor = field(repr=False)
    points: Tensor
    groups: Tensor

    def to(self, device: torch.device) -> SceneBatch:
        """The same on another device."""
        moved = super().to(device)
        assert isinstance(moved, SceneBatch)
        return replace(moved, dense=self.dense.to(device), points=self.points.to(device), groups=self.groups.to(device))


def collate_scenes(samples: Sequence[SceneSample]) -> SceneBatch:
    """Samples as a batch."""
    batch = collate(samples)
    parts = {part.name: getattr(batch, part.name) for part in fields(batch)}
    points = torch.zeros_like(batch.input_ids)
    groups = torch.stack((points, points), dim=1)
    for row, sample in enumerate(samples):
        points[row, : len(sample.points)] = torch.tensor(sample.points)
        groups[row, :, : len(sample.ids)] = torch.tensor(sample.groups)
    return SceneBatch(**parts, dense=torch.cat([sample.dense for sample in samples]), points=points, groups=groups)


class SceneDataset:
    """Sequence `index` of a stage: a pure function of the index, `first`, the stage and the split."""

    in_order = True  # the curriculum is one

    def __init__(
        self, tokenizer: Tokenizer, config: QwenVLConfig, stage: Stage, split: Split, count: int, first: int = 0
    ) -> None:
        self.tokenizer, self.config, self.stage, self.split = tokenizer, config, stage, split
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> SceneSample:
        """The sample; `first + 2 * index` and the next are its seeds within the split."""
        stage = self.stage
        seeds = [self.split.seed(self.first + 2 * index + k) for k in range(2)]
        most = min(5, 1 + 5 * index // stage.ramp) if stage.ramp else 5
        scenes = [scene(s, most=most, words=stage.words) for s in seeds]
        rng = random.Random(f"{stage.name} {seeds[0]}")
        language = rng.choice(LANGUAGES)
        if rng.random() < stage.pairs:
            exchange = compare(rng, scenes[0], scenes[1], language)
            ids, labels = self._chat([exchange], pictures=2)
        else:
            scenes = scenes[:1]
            if rng.random() < stage.raw:
                ids, labels = self._raw(self._exchanges(rng, scenes[0], language, raw=True))
            elif rng.random() < stage.dialogues and (rounds := dialogue(rng, scenes[0], language)):
                ids, labels = self._chat(rounds)
            else:
                ids, labels = self._chat(self._exchanges(rng, scenes[0], language, raw=False))
        visual = self.config.visual
        pixels = torch.stack([preprocess(draw(s), visual.image_size) for s in scenes])
        dense = torch.stack([dense_targets(s, round(visual.n_queries**0.5)) for s in scenes])
        source = f"{self.split.name.lower()} seed {seeds[0]}"
        points = find_points(self.tokenizer, ids, labels, scenes[0])
        groups = [find_groups(self.tokenizer, ids, labels, shown) for shown in (scenes[0], scenes[-1])]
        return SceneSample(ids, labels, pixels, source, dense, points, groups)

    def _exchanges(self, rng: random.Random, scene: Scene, language: Language, raw: bool) -> list[Exchange]:
        """Questions about a scene, none asked twice, as many as a sequence's budget holds, or one."""
        telling = [skill for skill in CLOSING if skill in self.stage.skills]
        if telling and rng.random() < self.stage.alone:
            exchange = SKILLS[rng.choice(telling)](rng, scene, language)
            assert exchange is not None, "there is always something to tell"
            return [exchange]
        room = self.stage.budget - self.config.visual.n_queries - (2 if raw else CHAT_FRAME)
        asked: list[Exchange] = []
        closing: list[Exchange] = []
        seen: set[object] = set()
        for _ in range(TRIES):
            skill = rng.choices(list(self.stage.skills), list(self.stage.skills.values()))[0]
            exchange = SKILLS[skill](rng, scene, language)
            if exchange is None or exchange.question in seen or (exchange.skill in CLOSING and closing):
                continue
            if exchange.answer in seen and (exchange.targets or exchange.skill == "text"):  # it could be copied
                continue
            length = self._length(exchange, raw)
            if seen & set(exchange.targets) or (length > room and (asked or closing)):
                continue
            room -= length
            (closing if exchange.skill in CLOSING else asked).append(exchange)
            seen |= {exchange.question, exchange.answer, *exchange.targets}
        return asked + closing

    def _length(self, exchange: Exchange, raw: bool) -> int:
        """Tokens of an exchange with what frames it."""
        texts, frame = (raw_form(exchange), 1) if raw else ((exchange.question, exchange.answer), ROUND_FRAME)
        return frame + sum(len(self.tokenizer.encode_tagged(text, IMAGE_TAGS)) for text in texts)

    def _chat(self, exchanges: list[Exchange], pictures: int = 1) -> tuple[list[int], list[int]]:
        """ChatML, as `Pipeline.chat` asks."""
        shown = "".join(f"Picture {k}:<img>{k}</img>\n" for k in range(1, pictures + 1))
        messages = []
        for exchange in exchanges:
            messages.append({"from": "user", "value": shown + exchange.question})
            messages.append({"from": "assistant", "value": exchange.answer})
            shown = ""
        n_queries = self.config.visual.n_queries
        example = training_example(self.tokenizer, messages, self.config.seq_length, n_queries=n_queries)
        return example.ids, example.labels

    def _raw(self, exchanges: list[Exchange]) -> tuple[list[int], list[int]]:
        """The picture, then prompts of the base form, each with its answer and an end."""
        tokenizer = self.tokenizer
        ids = [
            tokenizer.image_start_id,
            *[tokenizer.image_pad_id] * self.config.visual.n_queries,
            tokenizer.image_end_id,
        ]
        labels = [IGNORED_LABEL] * len(ids)
        for exchange in exchanges:
            asked, answer = (tokenizer.encode_tagged(text, IMAGE_TAGS) for text in raw_form(exchange))
            ids += [*asked, *answer, tokenizer.eos_id]
            labels += [*[IGNORED_LABEL] * len(asked), *answer, tokenizer.eos_id]
        return ids, labels
