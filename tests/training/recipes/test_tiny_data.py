"""Sequences for the small model: each a function of its number, of bounded length, with labels where answers are."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import write_vocabulary
from torch import Tensor, nn

from qwenvl.image import preprocess
from qwenvl.text.tokenizer import Tokenizer
from qwenvl.training.loop import fit
from qwenvl.training.options import TrainingOptions
from qwenvl.training.recipes import tiny, tiny_data
from qwenvl.training.recipes.tiny_data import (
    CAPTIONS,
    CHAT,
    TASKS,
    SceneBatch,
    SceneDataset,
    SceneSample,
    Stage,
    collate_scenes,
)
from qwenvl.training.recipes.tiny_dense import LETTERS, dense_targets
from qwenvl.training.recipes.tiny_guidance import MOST
from qwenvl.training.recipes.tiny_pointing import LETTER
from qwenvl.training.recipes.tiny_questions import place
from qwenvl.training.recipes.tiny_scenes import Split, draw, scene
from qwenvl.training.recipes.tiny_words import ENGLISH, LANGUAGES

STAGED = pytest.mark.parametrize("stage", [CAPTIONS, TASKS, CHAT], ids=lambda stage: stage.name)
MERGES = """Describe the image with boxes Box everything in picture Detect all objects Where Find How many are there
    Which colour shape Read text What does say is written Picture left right above below circle square triangle star
    diamond cross red green blue yellow purple orange black white Answer system user assistant You helpful Generate
    caption English grounding 红色 绿色 蓝色 黄色 紫色 橙色 黑色 白色 圆形 正方形 三角形 星形 菱形 十字形
    描述 图片 什么 位置"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Words as short as the small model's own vocabulary has them, about."""
    return Tokenizer(write_vocabulary(tmp_path_factory.mktemp("words"), MERGES))


def dataset(tokenizer: Tokenizer, stage: Stage, count: int = 60_000, first: int = 0) -> SceneDataset:
    """A stage's, for the small model's shape."""
    config = tiny.config()
    visual = replace(config.visual, image_start_id=tokenizer.image_start_id)
    return SceneDataset(
        tokenizer, replace(config, visual=visual, vocab_size=tokenizer.n_vocab), stage, Split.TRAIN, count, first
    )


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures: only the texts matter, and drawing takes most of the time."""
    monkeypatch.setattr(tiny_data, "draw", lambda scene: None)
    monkeypatch.setattr(tiny_data, "preprocess", lambda picture, size: torch.zeros(3, size, size))
    monkeypatch.setattr(tiny_data, "dense_targets", lambda scene, grid: torch.zeros(grid * grid, 8, dtype=torch.long))


def same(one: SceneSample, other: SceneSample) -> bool:
    """Everything in them."""
    assert one.pixels is not None
    assert other.pixels is not None
    texts = all(getattr(one, name) == getattr(other, name) for name in ("ids", "labels", "source", "points", "groups"))
    return texts and torch.equal(one.pixels, other.pixels) and torch.equal(one.dense, other.dense)


@STAGED
def test_a_sample_is_a_function_of_its_number(tokenizer: Tokenizer, stage: Stage) -> None:
    """Whatever was asked for before, of whichever dataset object; the next number is another sample."""
    ones, others = dataset(tokenizer, stage), dataset(tokenizer, stage)
    forward = [ones[k] for k in range(6)]
    backward = [others[k] for k in reversed(range(6))][::-1]
    assert all(map(same, forward, backward))
    assert not same(forward[0], forward[1])
    late = dataset(tokenizer, replace(stage, ramp=0), first=4)
    assert same(late[0], dataset(tokenizer, replace(stage, ramp=0))[2])
    assert [sample.source for sample in forward[:2]] == ["train seed 0", "train seed 2"]


@STAGED
def test_form_of_samples(tokenizer: Tokenizer, stage: Stage, undrawn: None) -> None:
    """Labels repeat ids or are masked, there are as many spans as pictures, and no sequence is cut."""
    del undrawn
    data = dataset(tokenizer, stage)
    pad, start, end = tokenizer.image_pad_id, tokenizer.image_start_id, tokenizer.image_end_id
    pairs = longest = 0
    for index in range(30_000, 30_600):
        sample = data[index]
        assert {len(sample.ids)} == set(map(len, (sample.labels, sample.points, *sample.groups)))
        assert all(label in (id_, -100) for id_, label in zip(sample.ids, sample.labels, strict=True))
        assert not {pad, start, end} & set(sample.labels)  # a picture is never an answer
        assert sum(label != -100 for label in sample.labels) >= 2
        assert sample.pixels is not None
        spans = [k for k, id_ in enumerate(sample.ids) if id_ == start]
        assert len(spans) == len(sample.pixels) == len(sample.dense) <= 2
        for at in spans:
            assert sample.ids[at : at + 66] == [start, *[pad] * 64, end]
        assert sample.ids.count(pad) == 64 * len(spans)
        assert max(sample.ids) < data.config.vocab_size
        pairs += len(spans) == 2
        longest = max(longest, len(sample.ids))
    assert longest < 380 < data.config.seq_length
    assert bool(pairs) == bool(stage.pairs)


def test_answers_are_learned_and_questions_are_not(tokenizer: Tokenizer, undrawn: None) -> None:
    """The labelled runs of the base form are the answers with their end; of ChatML, the answers and the format."""
    del undrawn
    eos, opened, closed = tokenizer.eos_id, tokenizer.im_start_id, tokenizer.im_end_id
    forms = set()
    for index in range(200):
        sample = dataset(tokenizer, TASKS)[index]
        text, learned = tokenizer.decode(sample.ids), [label for label in sample.labels if label != -100]
        forms.add(opened in sample.ids)
        if opened in sample.ids:
            rest = "".join(re.findall(r"<\|im_start\|>assistant\n(.*?)<\|im_end\|>", text, re.DOTALL))
            shown = tokenizer.decode(i for i in learned if i not in (opened, closed)).replace("\n", "")
            assert shown == rest
            assert learned.count(opened) == sample.ids.count(opened)
        else:
            runs = labelled(tokenizer, sample)
            assert len(runs) == sample.ids.count(eos)
            assert sample.ids[-1] == eos
            for run in runs:  # an answer behind `Answer:` or a prompt, or the rest of a box
                assert run.endswith("<|endoftext|>")
                assert run.startswith((" ", "("))
    assert forms == {True, False}


def labelled(tokenizer: Tokenizer, sample: SceneSample) -> list[str]:
    """The runs of labels that follow each other without a masked one between, as texts."""
    runs = itertools.groupby(sample.labels, key=lambda label: label != -100)
    return [tokenizer.decode(run) for learned, run in runs if learned]


@STAGED
def test_no_place_is_asked_for_twice(tokenizer: Tokenizer, stage: Stage, undrawn: None) -> None:
    """Outside of captions, a box is an answer once in a sequence: copied, it would teach nothing; nor is a question."""
    del undrawn
    data, alone = dataset(tokenizer, stage), 0
    for index in range(40_000, 40_300):
        scene_ = scene(Split.TRAIN.seed(2 * index), words=stage.words)
        for language in LANGUAGES:
            exchanges = data._exchanges(random.Random(index), scene_, language, raw=bool(index % 2))
            assert exchanges
            targets = [target for exchange in exchanges for target in exchange.targets]
            assert len(targets) == len(set(targets))
            questions = [exchange.question for exchange in exchanges]
            assert len(questions) == len(set(questions))
            told = [exchange.skill in tiny_data.CLOSING for exchange in exchanges]
            assert not any(told[:-1])  # after everything was told, nothing is asked
            alone += told == [True]
            assert {exchange.skill for exchange in exchanges} <= {*stage.skills, "boxes", "absent"}
    assert 60 < alone < 150  # of 600: with nothing before, there is nothing to copy from


def test_no_word_is_asked_for_twice(tokenizer: Tokenizer, undrawn: None) -> None:
    """The second time it could be copied, whatever the question is; other answers may come again."""
    del undrawn
    stage = replace(TASKS, skills={"text": 1.0, "exists": 1.0}, words=1.0)
    data, again = dataset(tokenizer, stage), 0
    for index in range(40):
        exchanges = data._exchanges(random.Random(index), scene(index, words=1.0), ENGLISH, raw=False)
        answers = [exchange.answer for exchange in exchanges if exchange.skill == "text"]
        assert len(answers) == len(set(answers))
        others = [exchange.answer for exchange in exchanges if exchange.skill == "exists"]
        again += len(others) > len(set(others))
    assert again > 20


@STAGED
def test_points_are_about_the_picture(tokenizer: Tokenizer, stage: Stage, undrawn: None) -> None:
    """Every box that is spelled points at the thing that has it, one in a question too, and every word at its letters.

    Comparisons of two pictures have no more than one phrase.
    """
    del undrawn
    data = dataset(tokenizer, stage, first=6)
    kinds: set[str] = set()
    for index in range(30_000, 30_300):
        sample, shown = data[index], scene(Split.TRAIN.seed(6 + 2 * index), words=stage.words)
        if sample.ids.count(tokenizer.image_start_id) == 2:
            first, last = ([group for group in groups if group] for groups in sample.groups)
            assert sum(point > 0 for point in sample.points) <= len(first) == len(last) == 1
            kinds |= {"pair", "different"} if first != last else {"pair"}
            continue
        assert len(shown.things) <= MOST
        assert sample.groups[0] == sample.groups[1]
        letters = "".join(LETTERS[point - LETTER - 1] for point in sample.points if point > LETTER)
        word = "" if shown.text is None else str(shown.text.word)
        assert letters == word * (len(letters) // max(len(word), 1))
        kinds |= {"word"} if letters else set()
        for at in (at for at, id_ in enumerate(sample.ids) if id_ == tokenizer.box_end_id):
            asked = sample.labels[at] == -100
            point = sample.points[at if asked else at - 1]
            start = max(k for k in range(at) if sample.ids[k] == tokenizer.box_start_id)
            corners = [int(n) for n in re.findall("[0-9]+", tokenizer.decode(sample.ids[start:at]))]
            off = max(abs(a - b) for a, b in zip(place(shown, shown.things[point - 1]), corners, strict=True))
            assert 0 < point <= len(shown.things)
            assert off <= 12 * asked
            kinds.add("question" if asked else "answer")
    assert kinds == {"answer", "word"} | ({"question", "pair", "different"} if stage.pairs else set())


@pytest.mark.parametrize("index", [0, 1])
def test_the_picture_is_the_one_that_is_asked_about(tokenizer: Tokenizer, index: int) -> None:
    """Pixels and dense targets are those of the scenes of the sample's seeds; several questions share one picture."""
    data = dataset(tokenizer, replace(TASKS, pairs=float(index)))
    for number in range(5):
        sample = data[number]
        scenes = [scene(Split.TRAIN.seed(2 * number + k), words=TASKS.words) for k in range(1 + index)]
        assert sample.pixels is not None
        assert torch.equal(sample.pixels, torch.stack([preprocess(draw(one), 112) for one in scenes]))
        assert torch.equal(sample.dense, torch.stack([dense_targets(one, 8) for one in scenes]))


def test_several_questions_share_a_picture(tokenizer: Tokenizer, undrawn: None) -> None:
    """A picture is paid once: on average a sequence of the second stage asks three questions about it."""
    del undrawn
    data = dataset(tokenizer, replace(TASKS, pairs=0.0, dialogues=0.0))
    ends = (tokenizer.im_end_id, tokenizer.eos_id)
    asked = 0
    for index in range(100):
        ids = data[index].ids
        asked += (ids.count(ends[0]) - 1) // 2 if ends[0] in ids else ids.count(ends[1])
    assert asked / 100 > 3


def test_the_curriculum(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> None:
    """From one shape a picture to five over the ramp, and five from the beginning where there is none."""
    del undrawn
    most: list[int] = []
    monkeypatch.setattr(tiny_data, "scene", lambda seed, **limits: most.append(limits["most"]) or scene(seed, **limits))
    data, flat = dataset(tokenizer, CAPTIONS), dataset(tokenizer, TASKS)
    for fifths in (0, 0.99, 1, 2, 3, 3.99, 4, 5, 11):
        data[round(CAPTIONS.ramp * fifths / 5)]
    assert most[::2] == [1, 1, 2, 3, 4, 4, 5, 5, 5]
    most.clear()
    flat[0]
    assert set(most) == {5}


def test_the_trainer_takes_samples_in_order(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Shuffled, there would be no curriculum: the updates see numbers 0, 1, 2, ... as they come."""
    seen: list[str] = []

    def objective(model: nn.Linear, batch: SceneBatch) -> tuple[Tensor, int]:
        seen.extend(batch.sources)
        return model(torch.ones(1, 1)).square().sum(), 1

    chosen = TrainingOptions(steps=3, batch_size=4, workers=0, warmup_steps=0)
    data = dataset(tokenizer, CAPTIONS, 12, first=6)
    fit(nn.Linear(1, 1), data, chosen, tmp_path, objective=objective, collate=collate_scenes, quiet=True)
    assert seen == [f"train seed {6 + 2 * k}" for k in range(12)]


def test_workers_do_not_matter(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Two processes make the same batches, in the same order, as none."""

    def batches(workers: int) -> list[SceneBatch]:
        seen: list[SceneBatch] = []

        def objective(model: nn.Linear, batch: SceneBatch) -> tuple[Tensor, int]:
            seen.append(batch)
            return model(torch.ones(1, 1)).square().sum(), 1

        chosen = TrainingOptions(steps=2, batch_size=2, workers=workers, warmup_steps=0)
        data = dataset(tokenizer, TASKS, 4)
        folder = tmp_path / str(workers)
        fit(nn.Linear(1, 1), data, chosen, folder, objective=objective, collate=collate_scenes, quiet=True)
        return seen

    for one, other in zip(batches(0), batches(2), strict=True):
        assert one.sources == other.sources
        for name in ("input_ids", "labels", "pixels", "dense", "points", "groups"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_a_batch_holds_all_pictures(tokenizer: Tokenizer) -> None:
    """Pictures and dense targets of all rows stand in order, one row with two among them; `to` moves all of it."""
    data = dataset(tokenizer, TASKS)
    single, pair = (dataset(tokenizer, replace(TASKS, pairs=p))[3] for p in (0.0, 1.0))
    batch = collate_scenes([data[0], pair, single]).to(torch.device("meta"))
    assert isinstance(batch, SceneBatch)
    assert batch.dense.shape == (4, 64, 8)
    assert batch.pixels is not None
    assert batch.pixels.shape == (4, 3, 112, 112)
    tensors = (batch.dense, batch.points, batch.groups, batch.pixels, batch.input_ids, batch.labels)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert torch.equal(collate_scenes([pair, single]).dense, torch.cat([pair.dense, single.dense]))


def test_points_and_groups_stand_beside_the_ids(tokenizer: Tokenizer) -> None:
    """In a batch each row has its own, from the first column, and nothing to look at where it is padded."""
    samples = [dataset(tokenizer, replace(TASKS, pairs=0.5))[index] for index in range(6)]
    batch = collate_scenes(samples)
    assert batch.points.shape == batch.input_ids.shape == batch.groups[:, 0].shape == batch.groups[:, 1].shape
    assert batch.points.dtype == batch.groups.dtype == torch.int64
    assert batch.points.any()
    assert not torch.equal(batch.groups[:, 0], batch.groups[:, 1])
    for points, groups, sample in zip(batch.points.tolist(), batch.groups.tolist(), samples, strict=True):
        padding = [0] * (len(points) - len(sample.ids))
        assert points == sample.points + padding
        assert groups == [own + padding for own in sample.groups]


def test_stages() -> None:
    """The paper's three, by name; every skill that a stage mixes exists."""
    assert [stage.name for stage in (CAPTIONS, TASKS, CHAT)] == ["captions", "tasks", "chat"]
    for stage in (CAPTIONS, TASKS, CHAT):
        assert set(stage.skills) <= set(tiny_data.SKILLS)
        assert min(stage.skills.values()) > 0
    assert set(TASKS.skills) == set(tiny_data.SKILLS)
