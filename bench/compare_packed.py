"""Time decoding with packed weights on a CPU against float32 and bfloat16, on one mid-size model.

    python bench/compare_packed.py            # a few minutes on two CPU cores
    python bench/compare_packed.py --quick    # a smoke run
    python bench/compare_packed.py --save     # also append the JSON line to bench/results/compare_packed.jsonl

The four have random weights of the same shapes (a token takes as long with any), the head packed like the rest. They
run in one process and in turn, forwards and backwards, so that a change of the machine's speed hits all. float32 is
laid out as `qwenvl.load` lays it out. Printed are medians with the 10th and 90th percentile, and the median of the
ratios to the faster of float32 and bfloat16, round by round. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compare_eager import MID_SIZE, spread
from torch import nn
from tqdm import tqdm

from qwenvl.adapt.int4 import Int4Linear, Int8Linear
from qwenvl.adapt.layout import columns_first
from qwenvl.adapt.packed import PackedLinear
from qwenvl.config import QuantizationConfig
from qwenvl.generation.decode import decode, prefill
from qwenvl.generation.sampling import SamplingOptions
from qwenvl.model.cache import KVCache
from qwenvl.model.qwenvl import QwenVL
from qwenvl.weights.checkpoint import by_columns

CONTEXT = 512  # tokens before the first that is timed
KINDS = {"int8": (Int8Linear, QuantizationConfig(8, -1)), "int4": (Int4Linear, QuantizationConfig(4, 64))}


def laid_out(model: QwenVL) -> QwenVL:
    """float32 as `qwenvl.load` has it."""
    for name in columns_first(model, torch.float32, torch.device("cpu")):
        owner = model.get_submodule(name.removesuffix(".weight"))
        weight = owner.get_parameter("weight")
        weight.data = by_columns(weight.data, weight.dtype)
    return model


def packed(model: QwenVL, kind: str) -> QwenVL:
    """The same model with random words in place of the decoder's linears and of the head."""
    make, quantization = KINDS[kind]
    for path, linear in list(model.decoder.named_modules()):
        if isinstance(linear, nn.Linear):
            new: PackedLinear = make(linear.in_features, linear.out_features, quantization)
            new.qweight.random_(-(2**31), 2**31 - 1)
            new.qzeros.fill_(0x77777777 if quantization.bits == 4 else 0x7F7F7F7F)
            new.scales.fill_(0.06 / 2**quantization.bits)
            new.arrange()  # as `load` does
            owner, _, name = path.rpartition(".")
            setattr(model.decoder.get_submodule(owner), name, new)
    return model


def run(model: QwenVL, cache: KVCache, ids: torch.Tensor, logits: torch.Tensor, tokens: int) -> float:
    """Seconds a token of greedy decoding behind the prompt in the cache, which is left as it was."""
    start = time.perf_counter()
    for _ in decode(model, cache, logits, ids, SamplingOptions(max_new_tokens=tokens + 1)):
        pass
    seconds = time.perf_counter() - start
    cache.rewind([CONTEXT])
    return seconds / tokens


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few runs: does it work at all")
    parser.add_argument("--save", action="store_true", help="append the line to bench/results/compare_packed.jsonl")
    given = parser.parse_args()
    runs, tokens = (2, 2) if given.quick else (25, 12)
    config = replace(MID_SIZE, visual=replace(MID_SIZE.visual, layers=1))
    torch.manual_seed(0)
    base = QwenVL(config).eval().requires_grad_(False)
    models = {"float32": laid_out(copy.deepcopy(base)), "bfloat16": copy.deepcopy(base).bfloat16()}
    models |= {kind: packed(copy.deepcopy(base), kind) for kind in KINDS}
    ids = torch.randint(0, 31_000, (1, CONTEXT))
    prompts = {}
    for name, model in models.items():
        cache = KVCache.allocate(config, 1, CONTEXT + 64, model.decoder.wte.weight.dtype)
        prompts[name] = cache, prefill(model, cache, ids)
        run(model, *_prompt(prompts[name], ids), tokens)  # which chooses and packs
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in tqdm(range(runs), desc="decoding", leave=False, disable=None):
        for name in list(models) if number % 2 == 0 else reversed(models):
            seconds[name].append(run(models[name], *_prompt(prompts[name], ids), tokens))
    report(seconds, runs, tokens, given.save)


def _prompt(prefilled: tuple[KVCache, torch.Tensor], ids: torch.Tensor) -> tuple[KVCache, torch.Tensor, torch.Tensor]:
    cache, logits = prefilled
    return cache, ids, logits


def report(seconds: dict[str, list[float]], runs: int, tokens: int, save: bool) -> None:
    """The table, the ratios and the JSON line."""
    faster = min(("float32", "bfloat16"), key=lambda name: statistics.median(seconds[name]))
    figures: dict[str, Any] = {}
    print(f"ms a token behind {CONTEXT} tokens; times as fast as {faster}")
    for name, own in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(own, seconds[faster], strict=True))
        figures[name] = {**spread(own), "speedup": round(ratio, 3)}
        print(
            f"{name:10}{figures[name]['median']:10.2f} ({figures[name]['p10']} to {figures[name]['p90']}){ratio:8.2f}x"
        )
    facts = {
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "runs": runs,
        "tokens": tokens,
        "context": CONTEXT,
        "decode": figures,
    }
    line = json.dumps(facts)
    if save:
        with open(Path(__file__).parent / "results" / "compare_packed.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
