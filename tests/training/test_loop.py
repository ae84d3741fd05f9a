"""The loop: one update is one update however it is cut, it stops when asked, and it learns to see."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from support import one_line_error, random_model, small_config, write_vocabulary
from torch import Tensor, nn
from training_runs import log_lines, noisy_loss, options, samples, small_model, train

from qwenvl.config import GenerationConfig
from qwenvl.errors import ConfigError
from qwenvl.model.qwenvl import QwenVL
from qwenvl.pipeline import Pipeline
from qwenvl.text.boxes import boxes_in
from qwenvl.text.parts import Turn
from qwenvl.text.tokenizer import Tokenizer
from qwenvl.training.batches import Batch, collate
from qwenvl.training.data import ConversationDataset
from qwenvl.training.errors import TrainingError
from qwenvl.training.loop import FitResult, fit
from qwenvl.training.objective import next_token_loss
from qwenvl.training.options import TrainingOptions
from qwenvl.training.parameters import optimizer_for, trainable_for_fine_tuning


def run(folder: Path, data: Any = None, model: QwenVL | None = None, **changes: Any) -> tuple[QwenVL, FitResult]:
    """Four updates without noise."""
    keywords = {name: changes.pop(name) for name in ("objective", "parameters", "evaluate") if name in changes}
    model = model or small_model()
    chosen = options(**{"steps": 4, "accumulation": 1, "log_every": 1, **changes})
    return model, fit(model, data or samples(), chosen, folder, quiet=True, **keywords)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """To the bit."""
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def test_one_update_by_hand(tmp_path: Path) -> None:
    """Mean over all labels of the batch, clipped, AdamW with decay on matrices alone: against torch's own pieces."""
    data = samples(4)
    ours, _ = run(tmp_path, data, steps=1, clip=0.5, warmup_steps=0)
    model = small_model().train()
    plain, decayed = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            table = name.endswith(("wte.weight", "positional_embedding", "query"))
            (plain if parameter.dim() < 2 or table else decayed).append(parameter)
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    loss, count = next_token_loss(model, collate(data))
    (loss / count).backward()
    norm = nn.utils.clip_grad_norm_([*plain, *decayed], 0.5)
    optimizer.step()
    (line,) = log_lines(tmp_path)
    assert line["loss"] == pytest.approx((loss / count).item(), rel=1e-5)
    assert line["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)  # which hides in AdamW, as scale does
    for (name, one), other in zip(ours.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3, msg=name)
        assert (one - other).abs().median() < 1e-6, name


def test_pieces_are_one_batch(tmp_path: Path) -> None:
    """Pieces with unequal numbers of labels, one after the other, weigh what they weigh together."""
    run(tmp_path / "whole", clip=0.0)
    run(tmp_path / "pieces", accumulation=4, clip=0.0)
    for ours, theirs in zip(log_lines(tmp_path / "pieces"), log_lines(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_workers_and_recomputation_change_nothing(tmp_path: Path) -> None:
    """Two workers, or activations computed twice (dropout and all), give the same weights to the bit."""
    expected, _ = train(tmp_path / "plain", steps=4)
    for name, changes in {"workers": {"workers": 2}, "twice": {"activation_checkpointing": True}}.items():
        model, _ = train(tmp_path / name, steps=4, **changes)
        assert same_weights(model, expected), name
        assert log_lines(tmp_path / name) == log_lines(tmp_path / "plain")


def test_recomputation_saves_activations(tmp_path: Path) -> None:
    """With activation checkpointing a fraction of the tensors is kept for the backward pass; then all is as before."""
    kept: dict[bool, int] = {}

    def counting(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            found = next_token_loss(model, batch)
        kept[on] = sum(saved)
        return found

    for on in (False, True):
        model, _ = run(tmp_path / str(on), steps=1, objective=counting, activation_checkpointing=on)
        assert model.state_dict().keys() == small_model().state_dict().keys()
        assert not [module for module in model.modules() if "forward" in vars(module)]
    assert kept[True] < kept[False] / 2


def test_bfloat16(tmp_path: Path) -> None:
    """Autocast over float32 weights: near float32's losses, not equal, and the weights stay float32."""
    run(tmp_path / "float32")
    model, _ = run(tmp_path / "bfloat16", precision="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ours, theirs = ([line["loss"] for line in log_lines(tmp_path / name)] for name in ("bfloat16", "float32"))
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=0.03)


def test_rates_by_name(tmp_path: Path) -> None:
    """A factor of 0 leaves a parameter alone for this run only; another is its part of the learning rate."""
    start = small_model().state_dict()

    def rates(name: str) -> float:
        return 0 if name.startswith("visual.") else 0.5 if "lm_head" in name else 1

    model, _ = run(tmp_path, steps=1, warmup_steps=0, weight_decay=0.0, parameters=rates)
    moved = {name: (tensor - start[name]).abs().max().item() for name, tensor in model.state_dict().items()}
    assert max(change for name, change in moved.items() if name.startswith("visual.")) == 0
    assert moved["resampler.pos_embed"] == 0
    assert moved["decoder.lm_head.weight"] == pytest.approx(0.005, rel=0.01)  # AdamW's first step is its rate
    assert moved["decoder.blocks.0.mlp.w1.weight"] == pytest.approx(0.01, rel=0.01)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["resampler.pos_embed"]
    with one_line_error(TrainingError, "no parameter"):
        run(tmp_path, parameters=lambda name: 0)


class Numbers(list[float]):
    """The least that the loop takes for a batch."""

    @property
    def sources(self) -> list[str]:
        return [str(number) for number in self]

    def to(self, device: torch.device) -> Tensor:
        return torch.tensor(self, device=device)[:, None]


def test_any_model_batch_and_objective(tmp_path: Path) -> None:
    """Of a batch the loop needs `to` and `sources` alone, of an objective a sum and a count, of a model parameters."""
    model = nn.Linear(1, 1)

    def objective(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        return (model(x) - 3 * x).square().sum(), len(x)

    chosen = TrainingOptions(steps=150, batch_size=4, learning_rate=0.1, workers=0)
    result = fit(model, [1.0, 2.0, -1.0, 0.5], chosen, tmp_path, objective=objective, collate=Numbers, quiet=True)
    assert result.loss == pytest.approx(0, abs=1e-2)
    assert "tokens_per_second" not in (tmp_path / "log.jsonl").read_text()


# Evaluation


def test_evaluation(tmp_path: Path) -> None:
    """At its steps and at the end, in eval mode, without gradients; no trace is left in weights, modes, randomness."""
    held_out = samples(5, seed=1)
    seen = []

    def evaluate(model: QwenVL) -> dict[str, float]:
        seen.append((model.training, torch.is_grad_enabled()))
        torch.rand(7)
        return {"accuracy": 0.5}

    model = small_model()
    result = fit(
        model,
        samples(),
        options(steps=5, evaluate_every=2),
        tmp_path / "with",
        objective=noisy_loss,
        evaluate=evaluate,
        evaluation_dataset=held_out,
        quiet=True,
    )
    assert seen == [(False, False)] * 3
    assert not model.training  # as it came
    found = {line["step"]: line["evaluation"] for line in log_lines(tmp_path / "with") if "evaluation" in line}
    assert list(found) == [2, 4, 5]
    assert result.evaluation == found[5]
    assert found[5]["accuracy"] == 0.5
    plain, _ = train(tmp_path / "without", steps=5)
    assert same_weights(model, plain)

    loss = fit(model, samples(), options(steps=5), tmp_path / "with", objective=noisy_loss, evaluation_dataset=held_out)
    assert loss.evaluation == {}  # finished before


def test_evaluation_loss_is_the_mean_over_all_labels(tmp_path: Path) -> None:
    """Whatever the batches that it is computed in."""
    held_out = samples(5, seed=1)
    model = small_model()
    result = fit(model, samples(), options(steps=1, batch_size=2), tmp_path, evaluation_dataset=held_out, quiet=True)
    with torch.no_grad():
        loss, count = next_token_loss(model, collate(held_out))
    assert result.evaluation["loss"] == pytest.approx((loss / count).item(), rel=1e-5)


# Stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(number: signal.Signals, tmp_path: Path) -> None:
    """The update at hand is finished and saved, the next call goes on; handlers are what they were."""
    before = signal.getsignal(number)
    calls = iter(range(100))

    def interrupted(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        if next(calls) == 2:
            os.kill(os.getpid(), number)
        return next_token_loss(model, batch)

    _, result = run(tmp_path / "stopped", objective=interrupted, workers=1)
    assert (result.steps, result.stopped, result.finished) == (3, "signal", False)
    assert signal.getsignal(number) is before
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["step-00000003"]
    model, result = run(tmp_path / "stopped")
    assert (result.steps, result.stopped) == (4, "finished")
    assert same_weights(model, run(tmp_path / "whole")[0])


def test_minutes(tmp_path: Path) -> None:
    """A call of a given length ends with a checkpoint; calls until it is finished are the whole run."""
    calls = 1
    while not run(tmp_path / "short", max_minutes=1e-9)[1].finished:
        calls += 1
    assert calls == 4
    assert same_weights(run(tmp_path / "short")[0], run(tmp_path / "whole")[0])
    assert log_lines(tmp_path / "short") == log_lines(tmp_path / "whole")


def test_a_thread_can_train(tmp_path: Path) -> None:
    """Only the main thread may handle signals; another trains without."""
    results: list[FitResult] = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path, steps=1)[1]))
    thread.start()
    thread.join()
    assert results[0].finished


@pytest.mark.parametrize("where", ["loss", "gradient", "labels"])
def test_numbers_that_are_not_finite(where: str, tmp_path: Path) -> None:
    """The update is not made, the batch's samples are in a file, the checkpoint before it is whole."""
    calls = iter(range(100))

    def failing(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, count = next_token_loss(model, batch)
        if next(calls) != 5:
            return loss, count
        if where == "gradient":  # of a root at zero
            return loss + (0 * next(model.parameters()).sum()).sqrt(), count
        return (loss * float("nan"), count) if where == "loss" else (0 * loss, 0 * count)

    model = small_model()
    with one_line_error(TrainingError, "update 6", "failed-batch.json"):
        run(tmp_path, steps=8, model=model, objective=failing, save_every=5, accumulation=1)
    facts = json.loads((tmp_path / "failed-batch.json").read_text())
    assert facts["step"] == 6
    assert len(facts["sources"]) == 4
    assert set(facts["sources"]) <= {sample.source for sample in samples()}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    assert same_weights(
        model, run(tmp_path / "five", steps=8, max_minutes=None, save_every=5, objective=stop_after(5))[0]
    )


@pytest.mark.parametrize("error", [TrainingError("broken"), None])
def test_an_error_loses_no_updates(error: TrainingError | None, tmp_path: Path) -> None:
    """A picture is broken or a loss is no number in update 3: two are kept, and the run goes on to the bit."""
    calls = iter(range(100))

    def failing(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, count = noisy_loss(model, batch)
        if next(calls) != 2:
            return loss, count
        if error:
            raise error
        return loss * float("nan"), count

    with pytest.raises(TrainingError):
        run(tmp_path / "failed", objective=failing)
    assert [path.name for path in (tmp_path / "failed" / "checkpoints").iterdir()] == ["step-00000002"]
    model, _ = run(tmp_path / "failed", objective=noisy_loss)
    assert same_weights(model, run(tmp_path / "whole", objective=noisy_loss)[0])


def test_a_log_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, whatever is in the way; what was trained before the log failed is in a checkpoint."""
    (tmp_path / "one" / "log.jsonl").mkdir(parents=True)
    with one_line_error(TrainingError, "the log cannot be written"):
        run(tmp_path / "one")
    (tmp_path / "file").write_text("")
    with one_line_error(TrainingError, "cannot be made"):
        run(tmp_path / "file")
    if Path("/dev/full").exists():
        opened = Path.open
        full = Path("/dev/full")
        monkeypatch.setattr(Path, "open", lambda p, *a, **k: opened(full if p.name == "log.jsonl" else p, *a, **k))
        with one_line_error(TrainingError, "the log cannot be written", "No space left"):
            run(tmp_path / "two")
        assert [path.name for path in (tmp_path / "two" / "checkpoints").iterdir()] == ["step-00000001"]


def test_evaluation_without_numbers(tmp_path: Path) -> None:
    """NaN is null in the log, as JSON has no NaN; an empty set of samples is a mistake, not none."""
    run(tmp_path / "nan", steps=1, evaluate=lambda model: {"accuracy": float("nan")})
    assert log_lines(tmp_path / "nan")[-1]["evaluation"] == {"accuracy": None}
    with one_line_error(ConfigError, "evaluation_dataset is empty"):
        fit(small_model(), samples(), options(), tmp_path / "empty", evaluation_dataset=[])


def stop_after(updates: int) -> Any:
    """An objective that asks to stop in its n-th call."""
    calls = iter(range(1, updates + 1))

    def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        if next(calls) == updates:
            os.kill(os.getpid(), signal.SIGTERM)
        return next_token_loss(model, batch)

    return objective


def test_data_with_an_order_of_its_own(tmp_path: Path) -> None:
    """A dataset whose `in_order` is true is seen from its first sample to its last, as a curriculum needs."""

    class Curriculum(list[float]):
        in_order = True

    seen: list[float] = []

    def objective(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        seen.extend(x.flatten().tolist())
        return model(x).square().sum(), len(x)

    data = Curriculum(map(float, range(8)))
    chosen = TrainingOptions(steps=4, batch_size=2, workers=0)
    fit(nn.Linear(1, 1), data, chosen, tmp_path, objective=objective, collate=Numbers, quiet=True)
    assert seen == data


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    """Said before anything is written."""
    with one_line_error(ConfigError, "batch_size 4", "accumulation"):
        run(tmp_path / "none", accumulation=3)
    assert not (tmp_path / "none").exists()


# What is trained


def test_fine_tuning_freezes_what_the_reference_freezes() -> None:
    """All of `visual` in the reference's names but `attn_pool`, whose table of positions is constant."""
    model = small_model()
    names = trainable_for_fine_tuning(model)
    frozen = {name for name, _ in model.named_parameters()} - set(names)
    resampler = {"resampler.pos_embed", "resampler.ln_post.weight", "resampler.ln_post.bias", "resampler.proj.weight"}
    assert frozen == resampler | {name for name in frozen if name.startswith("visual.")}
    assert len(frozen) - 4 == len(list(model.visual.parameters()))
    assert set(trainable_for_fine_tuning(model, train_vision=True)) == {
        name for name, _ in model.named_parameters() if name != "resampler.pos_embed"
    }
    packed = small_config(quantization_config={"bits": 4, "group_size": 128})
    with one_line_error(ConfigError, "int4", "LoRA"):
        trainable_for_fine_tuning(random_model(packed))


def test_what_decays() -> None:
    """Matrices, but neither norms, biases, the token table nor positions and queries."""
    model = small_model()
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = optimizer_for(model, dict.fromkeys(names.values(), 1.0), options(weight_decay=0.3))
    decay = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    for name in ("decoder.lm_head.weight", "decoder.blocks.0.attn.c_attn.weight", "visual.conv1.weight"):
        assert decay[name] == 0.3
    for name in ("decoder.wte.weight", "visual.positional_embedding", "resampler.query", "resampler.pos_embed"):
        assert decay[name] == 0
    assert not [name for name in decay if (".ln_" in name or name.endswith("bias")) and decay[name]]


# Seeing

PLACES = [  # of a red and of a blue square in each picture, on the 0..1000 scale
    ((100, 150, 450, 500), (500, 520, 900, 920)),
    ((550, 80, 850, 380), (50, 500, 450, 900)),
    ((200, 550, 600, 950), (620, 100, 920, 400)),
    ((560, 500, 960, 900), (60, 60, 400, 400)),
]
COLOURS = ("red", "blue")


def draw_pictures(folder: Path) -> list[dict[str, Any]]:
    """A picture of 200 x 200 for each pair of places, and a conversation about it: where is the red one, the blue."""
    records = []
    for number, places in enumerate(PLACES):
        image = Image.new("RGB", (200, 200), "white")
        messages = []
        for colour, (x1, y1, x2, y2) in zip(COLOURS, places, strict=True):
            ImageDraw.Draw(image).rectangle([x1 / 5, y1 / 5, x2 / 5, y2 / 5], fill=colour)
            picture = "" if messages else f"<img>{number}.png</img>"
            messages.append({"from": "user", "value": f"{picture}<ref>{colour} square</ref>"})
            messages.append({"from": "assistant", "value": f"<box>({x1},{y1}),({x2},{y2})</box>"})
        image.save(folder / f"{number}.png")
        records.append({"conversations": messages})
    return records


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of boxes x1, y1, x2, y2."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0) * max(height, 0)
    return both / (sum((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)) - both)


def test_it_learns_to_see(tmp_path: Path) -> None:
    """From a file of conversations to boxes: four pictures, all with the same two questions, are told apart.

    A fixed number of updates, then greedy replies through the pipeline must overlap with what was drawn by 0.9.
    """
    tokenizer = Tokenizer(write_vocabulary(tmp_path))
    sizes = {"seq_length": 256, "num_hidden_layers": 1, "image_size": 56, "n_queries": 16, "width": 64}
    ids = {"vocab_size": tokenizer.n_vocab, "image_start_id": tokenizer.image_start_id}
    model = random_model(small_config(**sizes, **ids, initializer_range=0.05))
    (tmp_path / "train.json").write_text(json.dumps(draw_pictures(tmp_path)))
    data = ConversationDataset(tmp_path / "train.json", tokenizer, model.config, quiet=True)
    chosen = TrainingOptions(steps=120, batch_size=4, learning_rate=3e-3, betas=(0.9, 0.98), workers=0)
    assert fit(model, data, chosen, tmp_path / "run", quiet=True).finished
    vl = Pipeline(model, tokenizer, GenerationConfig(chat_format="chatml", max_new_tokens=40))
    for number, places in enumerate(PLACES):
        history: list[Turn] = []
        for colour, place in zip(COLOURS, places, strict=True):
            picture = [] if history else [{"image": str(tmp_path / f"{number}.png"), "numbered": False}]
            reply, history = vl.chat([*picture, {"ref": f"{colour} square"}], history=history)
            (box,) = boxes_in(reply, 1000, 1000)
            assert overlap((box.x1, box.y1, box.x2, box.y2), place) > 0.9, (number, colour, reply)
