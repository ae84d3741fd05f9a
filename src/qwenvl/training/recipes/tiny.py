"""The small model of `weights/tiny`, from nothing to a checkpoint: `python -m qwenvl.training.recipes.tiny --help`.

    sight       the tower and the resampler learn to see, by dense targets (the paper starts from OpenCLIP's tower)
    captions    stage 1: grounded captions and phrases, from one shape a picture up to five
    tasks       stage 2: everything, with boxes and printed words
    chat        stage 3: conversations, with the vision tower frozen, as in the paper

Every phase is a `fit` in a folder of its own. A phase that is finished gives back its weights, one that was stopped
goes on: the same command, given again, does what is left.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...config import GENERATION_CONFIG_FILE, GenerationConfig, QwenVLConfig, VisionConfig
from ...errors import ConfigError, QwenVLError, told
from ...files import whole_file
from ...loading import load
from ...model.qwenvl import Output, QwenVL
from ...model.resampler import sincos_positions
from ...pipeline import Pipeline
from ...text.prompt import IGNORED_LABEL
from ...text.tokenizer import SPECIALS, VOCABULARY_FILE, Tokenizer
from ...weights.write import save
from ..loop import fit
from ..objective import Objective
from ..options import TrainingOptions
from ..parameters import Rates
from .tiny_curves import plot
from .tiny_data import CAPTIONS, CHAT, TASKS, SceneBatch, SceneDataset, Stage, collate_scenes
from .tiny_dense import DenseHeads, dense_loss
from .tiny_evaluate import LONGEST, evaluate, questions, report
from .tiny_guidance import guidance_loss, queries_and_keys
from .tiny_scenes import Split
from .tiny_vocabulary import MERGES, vocabulary

SEED = 2308
NOTE = "a demonstration: it knows drawn shapes and short printed words, not photographs"
MEASURED = 300  # test questions of each row and language, at the end
WATCHED = 12  # validation questions of each row and language, during training


def config() -> QwenVLConfig:
    """The architecture at a size that a CPU runs in a blink: a grid of queries like the grid of patches, 8 x 8."""
    return QwenVLConfig(
        vocab_size=-(-(MERGES + len(SPECIALS)) // 16) * 16,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        kv_channels=32,
        intermediate_size=1024,
        initializer_range=0.04,
        visual=VisionConfig(
            image_size=112,
            width=128,
            layers=6,
            heads=4,
            mlp_ratio=4.0,
            output_dim=192,
            image_start_id=MERGES + SPECIALS.index("<img>"),
            n_queries=64,
        ),
    )


class Student(nn.Module):
    """The model with the heads that only training has: one set reads the patches, one the visual tokens."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        self.config = config
        self.model = QwenVL(config)
        self.patch_heads = DenseHeads(config.visual.width)
        self.token_heads = DenseHeads(config.visual.output_dim)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """First values for what would hold a small model back if drawn as usual: positions, and the resampler's way
        from patch to visual token.
        """
        table = self.model.visual.positional_embedding  # would drown in what the patches show
        table.copy_(sincos_positions(round(len(table) ** 0.5), table.shape[1]))
        resampler = self.model.resampler  # four products in a row: near nothing, they find a few directions only
        assert isinstance(resampler.kv_proj, nn.Linear)
        values = resampler.attn.in_proj_weight[2 * self.config.visual.output_dim :]
        for weight in (resampler.kv_proj.weight, values, resampler.attn.out_proj.weight, resampler.proj.weight):
            nn.init.orthogonal_(weight)

    def look(self, pixels: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Visual tokens [N,Q,C] of pixels [N,3,S,S], and the dense loss of what tower and resampler make of them."""
        patches = self.model.visual(pixels)
        features = self.model.resampler(patches)
        return features, dense_loss(self.patch_heads(patches), dense) + dense_loss(self.token_heads(features), dense)


def sight_loss(student: Student, batch: SceneBatch) -> tuple[Tensor, int]:
    """The dense loss, times the number of sequences."""
    assert batch.pixels is not None
    _, dense = student.look(batch.pixels, batch.dense)
    return dense * len(batch.sources), len(batch.sources)


def answer_loss(student: Student, batch: SceneBatch, *, beside: float) -> tuple[Tensor, Tensor]:
    """Next-token cross entropy of the answers, with guidance where to look and how many there are, and `beside` times
    the dense loss, so that the tower keeps its sight.

    Padding on the right needs no mask: causal attention never sees it, and it has no labels.
    """
    assert batch.pixels is not None
    features, dense = student.look(batch.pixels, batch.dense)
    with queries_and_keys(student.model.decoder) as seen:
        output: Output = student.model(batch.input_ids, image_features=features, logits_to_keep=0, return_hidden=True)
    assert output.hidden_states is not None
    targets = batch.labels[:, 1:]
    labelled = targets != IGNORED_LABEL
    count = labelled.sum()
    logits = student.model.decoder.lm_head(output.hidden_states[-1][:, :-1][labelled])  # no others, to save work
    loss = F.cross_entropy(logits, targets[labelled], reduction="sum")
    guidance = guidance_loss(student.token_heads, student.config.visual, batch, output.hidden_states, seen)
    return loss + (beside * dense + guidance) * count, count


@dataclass(frozen=True)
class Phase:
    """One call of `fit`.

    rates: the factor on the learning rate for a parameter's name, 0 to leave it alone. rows: those of the evaluation's
    table that are watched on the way.
    """

    name: str
    stage: Stage
    objective: Objective
    options: TrainingOptions
    rates: Rates
    rows: tuple[str, ...]

    @property
    def sequences(self) -> int:
        """How many it takes."""
        assert self.options.steps is not None
        return self.options.steps * self.options.batch_size


def _gentle(name: str) -> float:
    """Less for what has learned to see: at the decoder's rate it would forget faster than the decoder learns."""
    return 1.0 if ".decoder." in name else 0.1


COMMON = TrainingOptions(
    batch_size=16,
    learning_rate=1.5e-3,
    warmup_steps=200,
    weight_decay=0.05,
    betas=(0.9, 0.98),
    precision="float32",
    seed=SEED,
    workers=1,
    log_every=50,
    evaluate_every=1000,
    save_every=250,
    keep=1,
)
PHASES = (
    Phase(
        "sight",
        replace(CAPTIONS, name="sight", skills={"caption": 1.0}, ramp=0, words=0.8),
        sight_loss,
        replace(COMMON, steps=10_000, learning_rate=2e-3, evaluate_every=0),
        lambda name: "decoder" not in name,
        (),
    ),
    Phase(
        "captions",
        CAPTIONS,
        partial(answer_loss, beside=0.1),
        replace(COMMON, steps=1500, final_ratio=1.0),
        _gentle,
        ("box (raw)",),
    ),
    Phase(
        "tasks",
        TASKS,
        partial(answer_loss, beside=0.1),
        replace(COMMON, steps=9000, final_ratio=0.1),
        _gentle,
        ("box", "box (raw)", "count", "relation", "text", "exists"),
    ),
    Phase(
        "chat",
        CHAT,
        partial(answer_loss, beside=0.0),
        replace(COMMON, steps=2000, learning_rate=3e-4),
        lambda name: 0.0 if name.startswith("model.visual.") else _gentle(name),
        ("box", "count", "relation", "text", "exists"),
    ),
)


def _folders(out: Path) -> list[Path]:
    """Where the phases are."""
    return [out / f"{number}-{phase.name}" for number, phase in enumerate(PHASES, 1)]


def train(student: Student, tokenizer: Tokenizer, out: Path, max_minutes: float | None, quiet: bool) -> bool:
    """All phases that are left, one after the other, for `max_minutes` at most. Returns whether all are finished."""
    began = time.monotonic()
    first = 0
    for folder, phase in zip(_folders(out), PHASES, strict=True):
        spent = (time.monotonic() - began) / 60
        options = replace(phase.options, max_minutes=None if max_minutes is None else max(max_minutes - spent, 1e-6))
        result = fit(
            student,
            SceneDataset(tokenizer, student.config, phase.stage, Split.TRAIN, phase.sequences, first),
            options,
            folder,
            objective=phase.objective,
            collate=collate_scenes,
            evaluate=partial(_watch, tokenizer=tokenizer, rows=phase.rows) if phase.rows else None,
            parameters=phase.rates,
            quiet=quiet,
        )
        if not result.finished:
            return False
        first += 2 * phase.sequences  # no picture is seen in two phases
    return True


def _watch(student: Student, tokenizer: Tokenizer, rows: Sequence[str]) -> dict[str, float]:
    """Shares of right answers to a few validation questions, by row, both languages together."""
    vl = Pipeline(student.model, tokenizer, GenerationConfig(eos_token_id=tokenizer.eos_id))
    scores = evaluate(vl, questions(Split.VALIDATION, WATCHED, rows=rows), quiet=True)
    found: dict[str, float] = {}
    for row in rows:
        own = [score for (name, _), score in scores.items() if name == row]
        found[row] = sum(score.right for score in own) / sum(score.asked for score in own)
        overlaps = [score.overlap for score in own if score.overlap is not None]
        if overlaps:
            found[f"{row} IoU"] = sum(overlaps) / len(overlaps)
    return found


def export(student: Student, tokenizer_file: bytes, destination: Path, quiet: bool) -> None:
    """The model as a checkpoint folder, in bfloat16, without the heads that only training has."""
    eos = MERGES + SPECIALS.index("<|endoftext|>")
    generation = {"chat_format": "chatml", "eos_token_id": eos, "pad_token_id": eos, "max_new_tokens": LONGEST}
    generation_file = (json.dumps(generation, indent=2) + "\n").encode()
    weights = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in student.model.state_dict().items()}
    save(
        weights,
        destination,
        replace(student.config, note=NOTE),
        {VOCABULARY_FILE: tokenizer_file, GENERATION_CONFIG_FILE: generation_file},
        quiet=quiet,
    )


def finish(student: Student, tokenizer_file: bytes, out: Path, quiet: bool) -> None:
    """Export the model, measure what was exported on the test split, and draw the curves; print the table."""
    plot(_folders(out), out / "curves.png")
    if not (out / "checkpoint").exists():
        export(student, tokenizer_file, out / "checkpoint", quiet)
    device = next(student.parameters()).device
    found = report(load(out / "checkpoint", device, quiet=True), MEASURED, quiet=quiet)
    with whole_file(out / "scores.json") as file:
        file.write((json.dumps(found, indent=1) + "\n").encode())
    print(found["table"])
    print(f"{out}/checkpoint holds the model, {out}/scores.json the table, {out}/curves.png the curves")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, export, evaluate, plot: whatever is left to do. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m qwenvl.training.recipes.tiny",
        description=__doc__,
        epilog="example:\n  python -m qwenvl.training.recipes.tiny --out build/train-tiny --max-minutes 8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("build/train-tiny"), help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--max-minutes", type=float, help="stop training after this long; the same command goes on")
    parser.add_argument("--quiet", action="store_true", help="no progress bars and remarks")
    given = parser.parse_args(arguments)
    if given.max_minutes is not None and not given.max_minutes > 0:
        parser.error(f"--max-minutes must be above 0, not {given.max_minutes:g}")
    try:
        _run(given.out, given.device, given.max_minutes, given.quiet)
    except QwenVLError as error:
        print(told(error), file=sys.stderr)
        return 2
    except OSError as error:  # a folder that cannot be written, a full disk
        place = error.filename or given.out
        print(f"error: {place}: {error.strerror or error}; what was finished is kept", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # outside of training, which ends by itself
        print("stopped: the same command goes on", file=sys.stderr)
        return 130
    return 0


def _run(out: Path, device: str, max_minutes: float | None, quiet: bool) -> None:
    """Everything, once the arguments are read. What would go wrong late is looked at first."""
    if find_spec("matplotlib") is None:
        raise ConfigError("training needs matplotlib, for its fonts and the curves: pip install 'qwenvl[train]'")
    torch.manual_seed(SEED)
    student = Student(config())
    try:
        student.to(device)
    except (RuntimeError, AssertionError):  # torch raises the one or the other, by the kind of device
        raise ConfigError(f"cannot compute on the device {device!r}: use cpu, or cuda where there is a GPU") from None
    out.mkdir(parents=True, exist_ok=True)
    words = out / VOCABULARY_FILE
    if not words.exists():
        if not quiet:
            print("learning the vocabulary: a minute or less", file=sys.stderr)
        with whole_file(words) as file:
            file.write(vocabulary())
    tokenizer = Tokenizer(words)
    if tokenizer.image_start_id != student.config.visual.image_start_id:
        raise ConfigError(f"{words} is the vocabulary of another model: name another folder")
    if not train(student, tokenizer, out, max_minutes, quiet):
        print("stopped before the end: the same command goes on")
        return
    finish(student, words.read_bytes(), out, quiet)


if __name__ == "__main__":
    sys.exit(main())
