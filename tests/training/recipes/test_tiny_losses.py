"""What the small model is graded by: the next token, what it sees, where it looks and what it knows of that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import write_vocabulary
from torch import Tensor

from qwenvl.config import QwenVLConfig
from qwenvl.model.qwenvl import Output, QwenVL
from qwenvl.text.tokenizer import Tokenizer
from qwenvl.training.parameters import recomputed_activations
from qwenvl.training.recipes import tiny, tiny_guidance
from qwenvl.training.recipes.tiny import Student, answer_loss, sight_loss
from qwenvl.training.recipes.tiny_data import TASKS, SceneBatch, SceneDataset, SceneSample, collate_scenes
from qwenvl.training.recipes.tiny_guidance import (
    LAYERS,
    POINTING_HEADS,
    TALLYING_HEADS,
    Aims,
    Tallies,
    aims_of,
    picture_columns,
    pointing_loss,
    queries_and_keys,
    tallies_of,
    tallying_loss,
    telling_loss,
)
from qwenvl.training.recipes.tiny_scenes import Split

WEIGHTS = ("POINTING", "TELLING", "TALLYING")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """With some of the words."""
    return Tokenizer(write_vocabulary(tmp_path_factory.mktemp("words"), "Where is the red circle square box user"))


@pytest.fixture
def student(tokenizer: Tokenizer) -> Student:
    """With no more layers than it takes to point."""
    torch.manual_seed(0)
    real = tiny.config()
    visual = replace(real.visual, layers=1, image_start_id=tokenizer.image_start_id)
    config = replace(real, num_hidden_layers=1 + max(LAYERS), vocab_size=tokenizer.n_vocab, visual=visual)
    return Student(config).eval()


@pytest.fixture
def samples(tokenizer: Tokenizer, student: Student) -> list[SceneSample]:
    """Three sequences: the first compares two pictures, the others have something to point at."""
    return [sample(tokenizer, student.config, index, pairs) for index, pairs in enumerate((1.0, 0.0, 0.0))]


def sample(tokenizer: Tokenizer, config: QwenVLConfig, index: int, pairs: float) -> SceneSample:
    """A sequence of the second stage, about two pictures or about one."""
    stage = replace(TASKS, pairs=pairs, dialogues=0.0)
    return SceneDataset(tokenizer, config, stage, Split.TRAIN, 100)[index]


def alone(model: QwenVL, ids: list[int], labels: list[int], pixels: Tensor | None) -> Tensor:
    """The summed cross entropy of one sequence."""
    likely = model(torch.tensor([ids]), pixels)[0].log_softmax(dim=-1)
    return torch.stack([-likely[k, label] for k, label in enumerate(labels[1:]) if label != -100]).sum()


def test_the_loss_is_next_token_loss_and_sight(
    student: Student, samples: list[SceneSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one batch: the cross entropy of each row alone, added up, and `beside` times the dense loss for each label."""
    weigh(monkeypatch, 0.0, 0.0, 0.0)
    batch = collate_scenes(samples)
    with torch.no_grad():
        loss, count = answer_loss(student, batch, beside=0.0)
        expected = sum(alone(student.model, one.ids, one.labels, one.pixels) for one in samples)
        assert loss.item() == pytest.approx(float(expected), rel=1e-4)
        assert count == sum(label != -100 for one in samples for label in one.labels[1:])
        more, _ = answer_loss(student, batch, beside=0.5)
        sight, rows = sight_loss(student, batch)
        assert rows == 3
        assert (more - loss).item() == pytest.approx((0.5 * sight / 3 * count).item(), rel=1e-4)


def weigh(patch: pytest.MonkeyPatch, *weights: float) -> None:
    """Give the losses of guidance other weights: pointing, telling, tallying."""
    for name, weight in zip(WEIGHTS, weights, strict=True):
        patch.setattr(tiny_guidance, name, weight)


def guidance(student: Student, batch: SceneBatch, patch: pytest.MonkeyPatch, *weights: float) -> tuple[Tensor, Tensor]:
    """What pointing, telling and tallying, so weighed, add to the answers' loss, and the number of labels."""
    losses = []
    for own in (weights, (0.0, 0.0, 0.0)):
        with patch.context() as here:
            weigh(here, *own)
            losses.append(answer_loss(student, batch, beside=0.5))
    (whole, count), (without, same) = losses
    assert count == same
    return whole - without, count


def test_the_rest_is_guidance(student: Student, samples: list[SceneSample], monkeypatch: pytest.MonkeyPatch) -> None:
    """POINTING times the pointing loss, TELLING times the telling and TALLYING times the tallying loss for each label.

    All are about each row's own first picture, the tally of the last one too; what is told is read off behind the
    layers that point, as it is off the visual tokens.
    """
    batch = collate_scenes(samples)
    assert batch.points.any(dim=1).all()
    assert [len(one.dense) for one in samples] == [2, 1, 1]
    with torch.no_grad():
        output: Output = student.model(batch.input_ids, batch.pixels, return_attentions=True, return_hidden=True)
        maps = [(output.attentions or ())[layer] for layer in LAYERS]

        def looks(tokens: Aims | Tallies, heads: slice) -> Tensor:
            return torch.cat([map_[tokens.rows, :, tokens.columns][:, heads] for map_ in maps], dim=1)

        visual = batch.input_ids == student.config.visual.image_pad_id
        columns = [picture_columns(visual, 64, last=last) for last in (False, True)]
        found = aims_of(batch.points, torch.stack([one.dense[0] for one in samples]))
        pointing = pointing_loss(looks(found, POINTING_HEADS), columns[0], found)
        telling = telling_loss(student.token_heads, (output.hidden_states or ())[1 + max(LAYERS)], found)
        tallying = torch.zeros(())
        for picture, which in enumerate((0, -1)):
            phrases = tallies_of(batch.groups[:, picture], torch.stack([one.dense[which] for one in samples]))
            tallying += tallying_loss(looks(phrases, TALLYING_HEADS[picture]), columns[picture], phrases) / 2
            assert len(phrases.rows) > 2
        assert tallying > 0.01
        assert pointing > 1  # nobody has learned it
        assert telling > 5
        chosen = (tiny_guidance.POINTING, tiny_guidance.TELLING, tiny_guidance.TALLYING)
        for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 10.0), chosen):
            term, count = guidance(student, batch, monkeypatch, *weights)
            expected = (weights[0] * pointing + weights[1] * telling + weights[2] * tallying) * count
            assert term.item() == pytest.approx(expected.item(), rel=1e-3), weights
    assert min(chosen) > 0


def test_noting_ends(student: Student) -> None:
    """Queries and keys of the layers that point are noted within the `with` only, also when it ends by an error."""
    ids = torch.tensor([[1, 2, 3]])
    seen: list[tuple[Tensor, Tensor]] = []

    def interrupted() -> None:
        nonlocal seen
        with queries_and_keys(student.model.decoder) as seen:
            student.model(ids)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [query.shape[2] for query, _ in seen] == [3] * len(LAYERS)
    student.model(ids)
    assert len(seen) == len(LAYERS)


def test_what_is_told_comes_from_behind_the_pointing_layers(student: Student) -> None:
    """Of hidden states, that is the one after the block of the last layer that points."""
    model = QwenVL(replace(student.config, num_hidden_layers=2 + max(LAYERS))).eval()
    seen: list[Tensor] = []
    block = model.decoder.blocks[max(LAYERS)]
    block.register_forward_hook(lambda module, given, result: seen.append(result))
    output: Output = model(torch.tensor([[1, 2, 3]]), return_hidden=True)
    assert torch.equal((output.hidden_states or ())[1 + max(LAYERS)], seen[0])


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 10.0)], ids=WEIGHTS)
def test_guidance_is_learned_by_all_that_leads_to_it(
    student: Student, samples: list[SceneSample], monkeypatch: pytest.MonkeyPatch, weights: tuple[float, float, float]
) -> None:
    """The attention of every layer up to the last that points, and the resampler; the output's layer has no part."""
    term, _ = guidance(student, collate_scenes(samples), monkeypatch, *weights)
    term.backward()
    moved = {name: p.grad.abs().max().item() for name, p in student.model.named_parameters() if p.grad is not None}
    attention = [moved[f"decoder.blocks.{layer}.attn.c_attn.weight"] for layer in range(1 + max(LAYERS))]
    assert min(*attention, moved["resampler.attn.in_proj_weight"]) > 1e-2
    assert moved["decoder.lm_head.weight"] < 1e-3  # rounding apart


def test_nothing_to_look_at(student: Student, samples: list[SceneSample], monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that asks about no thing has a loss without that part, and gradients that are numbers."""
    batch = collate_scenes(samples[:1])
    batch.points.zero_()
    batch.points[:, -1] = 15  # a thing that is nowhere
    batch.groups.zero_()
    term, _ = guidance(student, batch, monkeypatch, 1.0, 1.0, 1.0)
    assert term == 0
    loss, _ = answer_loss(student, batch, beside=0.5)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("none", ["points", "groups"])
def test_one_kind_of_guidance_alone(
    student: Student, samples: list[SceneSample], monkeypatch: pytest.MonkeyPatch, none: str
) -> None:
    """Phrases without points, and points without phrases, are learned from all the same."""
    batch = collate_scenes(samples)
    getattr(batch, none).zero_()
    term, _ = guidance(student, batch, monkeypatch, 1.0, 1.0, 10.0)
    assert term.isfinite()
    assert term > 0


def test_recomputed_activations(student: Student, samples: list[SceneSample]) -> None:
    """The gradients are the same where blocks are computed twice."""
    batch = collate_scenes(samples)
    gradients = []
    for on in (False, True):
        student.zero_grad()
        with recomputed_activations(student, on):
            loss, count = answer_loss(student, batch, beside=0.1)
            (loss / count).backward()
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
