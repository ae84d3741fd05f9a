"""Time packed weights on a CPU: decoding against float32 and bfloat16, on one mid-size model; and one layer's product.

    python bench/compare_packed.py            # a few minutes on two CPU cores
    python bench/compare_packed.py --quick    # a smoke run
    python bench/compare_packed.py --save     # also append the JSON line to bench/results/compare_packed.jsonl

The four have random weights of the same shapes (a token takes as long with any), the head packed like the rest. They
run in one process and in turn, forwards and backwards, so that a change of the machine's speed hits all. float32 is
laid out as `qwenvl.load` lays it out. Printed are medians with the 10th and 90th percentile, and the median of the
ratios to the faster of float32 and bfloat16, round by round.

The second table is one product of so many rows with a layer of SIDE x SIDE, by the kernel for arranged weights, by
unpacking, and in float32: where the first two meet, `CPU_ROWS` in adapt/packed.py changes from one to the other. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compare_eager import MID_SIZE, spread
from torch import nn
from tqdm import tqdm

from qwenvl.adapt import packed as packed_layers
from qwenvl.adapt.int4 import Int4Linear, Int8Linear
from qwenvl.adapt.layout import columns_first
from qwenvl.adapt.packed import PackedLinear
from qwenvl.bench.device import processor
from qwenvl.config import QuantizationConfig
from qwenvl.generation.decode import decode, prefill
from qwenvl.generation.sampling import SamplingOptions
from qwenvl.model.cache import KVCache
from qwenvl.model.qwenvl import QwenVL
from qwenvl.weights.checkpoint import by_columns

CONTEXT = 512  # tokens before the first that is timed
SIDE, ROWS = 4096, (1, 8, 32, 64, 128)  # of the layer, and of what is multiplied with it
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
    for path, linear in list(model.decoder.named_modules()):
        if isinstance(linear, nn.Linear):
            owner, _, name = path.rpartition(".")
            setattr(model.decoder.get_submodule(owner), name, layer(kind, linear.in_features, linear.out_features))
    return model


def layer(kind: str, inputs: int, outputs: int) -> PackedLinear:
    """One of random words."""
    make, quantization = KINDS[kind]
    new: PackedLinear = make(inputs, outputs, quantization)
    new.qweight.random_(-(2**31), 2**31 - 1)
    new.qzeros.fill_(0x77777777 if quantization.bits == 4 else 0x7F7F7F7F)
    new.scales.fill_(0.06 / 2**quantization.bits)
    new.arrange()  # as `load` does
    return new


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
    report(seconds, products(runs), runs, tokens, given.save)


@torch.no_grad()
def products(runs: int) -> dict[str, dict[int, dict[str, float]]]:
    """Milliseconds of one product, by way and number of rows, the ways in turn and each called once before."""
    plain = nn.Linear(SIDE, SIDE)
    plain.weight.data = by_columns(plain.weight.data, plain.weight.dtype)
    ways: dict[str, tuple[nn.Module, int]] = {"float32": (plain, 0)}  # the layer, and what CPU_ROWS is for it
    for kind in KINDS:
        linear = layer(kind, SIDE, SIDE)
        ways |= {f"{kind} arranged": (linear, max(ROWS)), f"{kind} unpacked": (linear, 0)}
    found: dict[str, dict[int, dict[str, float]]] = {way: {} for way in ways}
    usual = packed_layers.CPU_ROWS
    for rows in tqdm(ROWS, desc="products", leave=False, disable=None):
        x = torch.randn(rows, SIDE)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(-1, runs):
            for way in list(ways) if number % 2 == 0 else reversed(ways):
                module, packed_layers.CPU_ROWS = ways[way]
                start = time.perf_counter()
                module(x)
                if number >= 0:
                    seconds[way].append(time.perf_counter() - start)
        for way, own in seconds.items():
            found[way][rows] = spread(own)
    packed_layers.CPU_ROWS = usual
    return found


def _prompt(prefilled: tuple[KVCache, torch.Tensor], ids: torch.Tensor) -> tuple[KVCache, torch.Tensor, torch.Tensor]:
    cache, logits = prefilled
    return cache, ids, logits


def report(
    seconds: dict[str, list[float]],
    layers: dict[str, dict[int, dict[str, float]]],
    runs: int,
    tokens: int,
    save: bool,
) -> None:
    """The tables, the ratios and the JSON line."""
    faster = min(("float32", "bfloat16"), key=lambda name: statistics.median(seconds[name]))
    figures: dict[str, Any] = {}
    print(f"ms a token behind {CONTEXT} tokens; times as fast as {faster}")
    for name, own in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(own, seconds[faster], strict=True))
        figures[name] = {**spread(own), "speedup": round(ratio, 3)}
        print(
            f"{name:10}{figures[name]['median']:10.2f} ({figures[name]['p10']} to {figures[name]['p90']}){ratio:8.2f}x"
        )
    print(f"ms a product with a layer of {SIDE} x {SIDE}, of so many rows")
    print(f"{'':16}" + "".join(f"{rows:>10}" for rows in ROWS))
    for way, by_rows in layers.items():
        print(f"{way:16}" + "".join(f"{by_rows[rows]['median']:10.2f}" for rows in ROWS))
    facts = {
        "date": datetime.date.today().isoformat(),
        "device": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "runs": runs,
        "tokens": tokens,
        "context": CONTEXT,
        "decode": figures,
        "side": SIDE,
        "products": layers,
    }
    line = json.dumps(facts)
    if save:
        with open(Path(__file__).parent / "results" / "compare_packed.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
