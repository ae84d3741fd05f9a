"""The memory estimate against what an update really holds, and its counts against the real model's tensors."""

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import random_model, small_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwenvl.adapt.lora import LoraOptions, add_lora
from qwenvl.config import QuantizationConfig, QwenVLConfig
from qwenvl.model.qwenvl import QwenVL
from qwenvl.training.batches import Batch
from qwenvl.training.memory import (
    QWEN_VL,
    Memory,
    Workload,
    estimate,
    parameter_counts,
    trained_parameters,
    weight_bytes,
)
from qwenvl.training.objective import next_token_loss
from qwenvl.training.options import TrainingOptions
from qwenvl.training.parameters import optimizer_for, recomputed_activations, selected, trainable_for_fine_tuning
from qwenvl.weights.keymap import entries

TARGETS = LoraOptions().targets
ROWS, TOKENS = 2, 96
SMALL = Workload("lora", ROWS, TOKENS, ROWS, 4, 4, rank=16, targets=TARGETS, mask_bytes=4)
REAL_INT4 = replace(QWEN_VL, quantization_config=QuantizationConfig())


class Live(TorchDispatchMode):
    """Bytes of all tensors that are alive: every storage counts from the operation that made it until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


@contextmanager
def ready(model: QwenVL, work: Workload) -> Iterator[Any]:
    """One call is one update of the model under this workload."""
    options = TrainingOptions(steps=10)
    vision = model.config.visual
    ids = torch.randint(3, 50, (ROWS, TOKENS))
    ids[:, 1] = vision.image_start_id
    ids[:, 2 : 2 + vision.n_queries] = vision.image_pad_id
    ids[:, 2 + vision.n_queries] = vision.image_end_id
    batch = Batch(ids, ids, None, torch.randn(ROWS, 3, vision.image_size, vision.image_size), [], ids.numel())
    narrow = work.compute_bytes < 4
    with selected(model.train(), None) as rates, recomputed_activations(model, work.checkpointing):
        optimizer = optimizer_for(model, rates, options)

        def update() -> None:
            for _ in range(2 if work.accumulates else 1):
                with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                    loss = next_token_loss(model, batch)[0]
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
            optimizer.step()
            optimizer.zero_grad()

        yield update, optimizer


def measured(config: QwenVLConfig, work: Workload) -> tuple[int, int]:
    """Bytes of weights and optimizer, and what the second update adds to them at its peak."""
    model = random_model(config).to(torch.float32 if work.weight_bytes == 4 else torch.bfloat16)
    if work.method == "lora":
        add_lora(model, LoraOptions(r=work.rank, train_embeddings=work.train_embeddings))
    else:
        trainable_for_fine_tuning(model, train_vision=work.train_vision)
    live = Live()
    with ready(model, work) as (update, optimizer):
        update()
        for tensor in [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]:
            live.add(tensor)
        states = live.peak = live.now
        with live:
            update()
    return states, live.peak - states


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compute_bytes": 2},
        {"compute_bytes": 2, "weight_bytes": 2, "mask_bytes": 2},
        {"train_embeddings": True, "compute_bytes": 2, "weight_bytes": 2, "mask_bytes": 2},
        {"method": "full"},
        {"method": "full", "compute_bytes": 2},
        {"method": "full", "accumulates": True},
        {"method": "full", "train_vision": True},
    ],
    ids=["lora", "lora autocast", "lora bf16", "embeddings", "full", "full autocast", "accumulation", "vision"],
)
def test_estimate_is_what_an_update_holds(changes: dict[str, Any], checkpointing: bool) -> None:
    """The formula is within 15% of the measured peak: what is there anyway to the byte, and what an update adds."""
    config = small_config(num_hidden_layers=4, vocab_size=500, intermediate_size=688)
    work = replace(SMALL, checkpointing=checkpointing, **changes)
    told = estimate(config, work)
    states, added = measured(config, work)
    assert told.weights + told.optimizer == pytest.approx(states, rel=0.005)  # AdamW's counters
    assert told.gradients + told.activations + told.logits == pytest.approx(added, rel=0.15)


def test_logits_of_a_large_vocabulary() -> None:
    """Where the vocabulary rules, as it does in the real model with checkpointing, the estimate holds, too."""
    config = small_config(vocab_size=8000)
    work = replace(SMALL, checkpointing=True)
    told, (_, added) = estimate(config, work), measured(config, work)
    assert told.logits > told.activations
    assert told.gradients + told.activations + told.logits == pytest.approx(added, rel=0.15)


def stored_bytes(config: QwenVLConfig, width: int) -> int:
    """The table's own count: words and indices take four bytes, scales two."""
    widths = {"float": width, "scale": 2, "packed": 4}
    return sum(widths[entry.kind] * math.prod(entry.our_shape) for entry in entries(config))


REAL_INT8 = replace(QWEN_VL, quantization_config=QuantizationConfig(bits=8, group_size=-1, lm_head=True))


@pytest.mark.parametrize(
    "config",
    [QWEN_VL, REAL_INT4, REAL_INT8, small_config(width=128)],
    ids=["16 bits", "int4", "int8 with the head", "small"],
)
def test_weights_are_the_tables(config: QwenVLConfig) -> None:
    """Arithmetic without torch and the table of tensors count the same bytes; the published sizes come out."""
    for width in (2, 4):
        assert weight_bytes(config, width) == stored_bytes(config, width)
    assert sum(parameter_counts(QWEN_VL).values()) == 9_656_935_168
    assert weight_bytes(REAL_INT4, 2) == 9_731_786_240


@pytest.mark.parametrize(
    "work",
    [
        SMALL,
        replace(SMALL, train_embeddings=True),
        replace(SMALL, targets=("h.1.mlp.w1", "mlp.c_proj")),
        replace(SMALL, method="full"),
        replace(SMALL, method="full", train_vision=True),
    ],
)
def test_trained_parameters_are_counted(work: Workload) -> None:
    """Adapters and full fine-tuning train as many parameters as the arithmetic says."""
    model = random_model(small_config())
    if work.method == "lora":
        add_lora(model, LoraOptions(work.rank, targets=tuple(work.targets), train_embeddings=work.train_embeddings))
    else:
        trainable_for_fine_tuning(model, train_vision=work.train_vision)
    counted = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained_parameters(model.config, work) == counted


def test_ranks_share_what_lasts() -> None:
    """Eight devices hold an eighth of weights, gradients and optimizer each; activations and gathered weights alone."""
    work = replace(SMALL, method="full", tokens=2048, accumulates=True)
    alone, shared = estimate(QWEN_VL, work), estimate(QWEN_VL, replace(work, ranks=8))
    assert shared.states == pytest.approx(alone.states / 8, rel=1e-6)
    assert shared.logits == alone.logits
    assert shared.activations > alone.activations


def test_told_in_gigabytes() -> None:
    """What a message says is the sum and its parts; parts that are nothing are left out."""
    assert str(Memory(19_300_000_000, 0, 900_000_000, 0, 12_000_000)) == (
        "20.2 GB (weights 19.3, optimizer 0.9, logits 0.012)"
    )
