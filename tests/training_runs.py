"""Small training runs for tests; as a script, one that is run in a process of its own, to be killed or under torchrun.

python tests/training_runs.py FOLDER '{"kill": "update"}'
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import random_model, small_config
from torch import Tensor, nn

from qwenvl.adapt.adapters import save_adapter
from qwenvl.adapt.int4 import quantize_structure
from qwenvl.adapt.lora import LoraOptions, add_lora
from qwenvl.model.qwenvl import QwenVL
from qwenvl.training import checkpoints
from qwenvl.training.batches import Batch, Sample
from qwenvl.training.devices import export, joined
from qwenvl.training.loop import FitResult, fit
from qwenvl.training.objective import next_token_loss
from qwenvl.training.options import TrainingOptions
from qwenvl.training.parameters import trainable_for_fine_tuning

SPAN = [60, *[62] * 4, 61]  # an image of `small_config`
PARTLY = ("lora", "qlora", "frozen")
TIMES = ("seconds", "tokens_per_second", "updates_per_second")


def samples(count: int = 24, seed: int = 0) -> list[Sample]:
    """Random texts of 5 to 11 ids, every third one behind a picture; a quarter of the labels is masked."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(0, 50, (5 + number % 7,), generator=generator).tolist()
        labels = [i if i % 4 else -100 for i in ids[:-1]] + ids[-1:]
        pixels = None
        if number % 3 == 0:
            ids, labels = SPAN + ids, [-100] * len(SPAN) + labels
            pixels = torch.randn(1, 3, 28, 28, generator=generator)
        made.append(Sample(ids, labels, pixels, f"sample {number}"))
    return made


def options(**changes: Any) -> TrainingOptions:
    """Twelve updates of two pieces, a checkpoint every four."""
    chosen = {"steps": 12, "batch_size": 4, "accumulation": 2, "learning_rate": 1e-2, "clip": 5.0}
    return TrainingOptions(**{**chosen, "save_every": 4, "log_every": 3, "workers": 0, **changes})


def noisy_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Next tokens, with noise of all three global generators, as dropout and augmentation would draw."""
    loss, count = next_token_loss(model, batch)
    return loss * (1 + torch.rand(()) + random.random() + np.random.random()), count


def small_model(seed: int = 0) -> QwenVL:
    """A model to train."""
    return random_model(small_config(), seed)


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """The log without what a clock says."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def train(folder: Path, model: QwenVL | None = None, data: Any = None, **changes: Any) -> tuple[QwenVL, FitResult]:
    """A noisy run in `folder` and the model that it trained."""
    model = model or small_model()
    return model, fit(model, data or samples(), options(**changes), folder, objective=noisy_loss, quiet=True)


def kill_in_update(number: int) -> Any:
    """A noisy objective that ends the process, as `kill -9` does, in its n-th call."""
    calls = iter(range(1, number + 1))

    def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return noisy_loss(model, batch)

    return objective


def kill_in_save(step: int) -> None:
    """Let the process die where a checkpoint's last file would be written."""
    write = checkpoints._write_json

    def killing(path: Path, value: Any) -> None:
        if path.name == checkpoints.RUN_FILE and value["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, value)

    checkpoints._write_json = killing


def killed(folder: Path, kill: str) -> None:
    """A run that is killed in the first piece of update 11, or while it saves update 8."""
    if kill == "save":
        kill_in_save(8)
    fit(small_model(), samples(), options(), folder, objective=kill_in_update(21 if kill == "update" else 10**6))


def packed_model() -> QwenVL:
    """A small model with random weights in 4 bits."""
    config = small_config(quantization_config={"group_size": 32})
    model = random_model(config)
    quantize_structure(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, buffer in model.named_buffers():
        if name.endswith("qweight"):
            buffer.copy_(torch.randint(-(2**31), 2**31, buffer.shape, generator=generator).to(torch.int32))
        elif name.endswith("qzeros"):
            buffer.fill_(0x77777777)  # codes stand for -8 to 7
        elif name.endswith("scales"):
            buffer.fill_(0.02)
    return model


def partly_trained(method: str) -> QwenVL:
    """A small model with LoRA, LoRA over 4 bits, or its vision tower frozen."""
    model = packed_model() if method == "qlora" else small_model()
    if method == "frozen":
        trainable_for_fine_tuning(model)
        return model
    torch.manual_seed(1)
    add_lora(model, LoraOptions(r=4, dropout=0.0))
    return model


def two_ranks(folder: Path) -> None:
    """Under torchrun: a run of its own in `own`, and one that goes on in `theirs`; the weights of both.

    And runs of models that are trained in part, with their adapters, and a run in `half`, in bfloat16.
    """
    with joined() as devices:
        fit(small_model(), samples(), half_options(), folder / "half", quiet=True)
        for method in PARTLY:
            model = partly_trained(method)
            fit(model, samples(), rank_options(5), folder / method, quiet=True)
            if method != "frozen":
                save_adapter(model, folder / method / "adapter")
        for name in ("own", "theirs"):
            model = small_model()
            result = fit(model, samples(), rank_options(5), folder / name, evaluation_dataset=samples(5, seed=1))
            weights = export(model)
            assert bool(weights) == devices.first
            if devices.first:
                torch.save(weights, folder / name / "weights.pt")
                (folder / name / "result.json").write_text(json.dumps([result.loss, result.evaluation]))
            if devices.first and name == "own":
                shutil.rmtree(folder / "own" / "checkpoints" / "step-00000005")
            devices.wait()


def rank_options(steps: int) -> TrainingOptions:
    """Five updates, told one by one, a checkpoint at the third."""
    return options(steps=steps, save_every=3, log_every=1, accumulation=1, activation_checkpointing=True)


def half_options() -> TrainingOptions:
    """As the others, in bfloat16."""
    return replace(rank_options(5), precision="bfloat16", save_every=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, what = Path(sys.argv[1]), json.loads(sys.argv[2])
    if "kill" in what:
        killed(where, what["kill"])
    else:
        two_ranks(where)
