"""Time qwenvl against a plain eager formulation of the reference's algorithm, on one mid-size random model.

    python bench/compare_eager.py            # all figures, a few minutes on two CPU cores
    python bench/compare_eager.py --quick    # a smoke run
    python bench/compare_eager.py --save     # also append the JSON line to bench/results/compare_eager.jsonl

Both compute with the same weights (ours laid out as `qwenvl.load` lays them out), in the same process, in turn (A B,
B A, ...), so that a change of the machine's speed hits both. Printed are medians with the 10th and 90th percentile, and
the median of the ratios pair by pair. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from eager_reference import EagerReference, Past
from tqdm import tqdm

from qwenvl.adapt.layout import columns_first
from qwenvl.bench.device import processor
from qwenvl.config import QwenVLConfig, VisionConfig
from qwenvl.model.cache import KVCache
from qwenvl.model.qwenvl import QwenVL
from qwenvl.weights.checkpoint import by_columns

MID_SIZE = QwenVLConfig(
    vocab_size=32_000,
    hidden_size=1024,
    num_hidden_layers=8,
    num_attention_heads=8,
    intermediate_size=2 * 2752,
    visual=VisionConfig(width=512, layers=8, heads=8, mlp_ratio=4.0, output_dim=1024, image_start_id=31_997),
)


def interleave(ours: Callable[[], object], theirs: Callable[[], object], runs: int, name: str) -> dict[str, Any]:
    """Seconds of both, in turn, after one warm-up of each."""
    ours(), theirs()
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in tqdm(range(runs), desc=name, leave=False, disable=None):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            start = time.perf_counter()
            (ours, theirs)[which]()
            seconds[which].append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    return {
        "name": name,
        "runs": runs,
        "ours": spread(seconds[0]),
        "eager": spread(seconds[1]),
        "speedup": round(ratio, 3),
    }


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile in milliseconds."""
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return {
        k: round(1e3 * v, 2)
        for k, v in zip(("p10", "median", "p90"), (tenths[0], statistics.median(seconds), tenths[8]), strict=True)
    }


def prefill(model: QwenVL, reference: EagerReference, length: int, runs: int) -> dict[str, Any]:
    """A prompt of `length` tokens to the logits that choose the first new one."""
    ids = torch.randint(0, 31_000, (1, length))

    def ours() -> torch.Tensor:
        cache = KVCache.allocate(model.config, 1, length + 64)
        logits: torch.Tensor = model(ids, cache=cache, logits_to_keep=1)
        return logits[:, -1]

    def theirs() -> torch.Tensor:
        return reference.forward(ids, None)[0][:, -1]

    torch.testing.assert_close(ours(), theirs(), atol=2e-5, rtol=1e-4)
    return interleave(ours, theirs, runs, f"prefill {length}")


def decode(model: QwenVL, reference: EagerReference, context: int, steps: int, runs: int) -> dict[str, Any]:
    """`steps` greedy tokens behind a context of random keys and values (their numbers do not change the time)."""
    config = model.config
    cache = KVCache.allocate(config, 1, context + steps)
    cache.declare([context])
    cache.keys[:, :, :, :context].normal_()
    cache.values[:, :, :, :context].normal_()
    cache.advance([context])
    past: Past = [
        (k[:, :, :context].transpose(1, 2).contiguous(), v[:, :, :context].transpose(1, 2).contiguous())
        for k, v in zip(cache.keys, cache.values, strict=True)
    ]
    reference.build_tables(context)
    first = torch.zeros(1, 1, dtype=torch.long)

    def ours() -> list[int]:
        cache.rewind([context], prompt_lengths=[context])
        token, ids = first, []
        for _ in range(steps):
            token = model(token, cache=cache)[:, -1].argmax(-1, keepdim=True)
            ids.append(int(token))
        return ids

    def theirs() -> list[int]:
        token, ids, seen = first, [], past
        for _ in range(steps):
            logits, seen = reference.forward(token, seen)
            token = logits[:, -1].argmax(-1, keepdim=True)
            ids.append(int(token))
        return ids

    if ours() != theirs():
        raise SystemExit(f"decode at {context}: the two formulations chose different tokens; nothing was timed")
    row = interleave(ours, theirs, runs, f"decode at {context}")
    for side in ("ours", "eager"):
        row[side] = {k: round(v / steps, 2) for k, v in row[side].items()}
    return row


def encode(model: QwenVL, reference: EagerReference, runs: int) -> dict[str, Any]:
    """One image to its visual tokens."""
    size = model.config.visual.image_size
    pixels = torch.randn(1, 3, size, size)
    torch.testing.assert_close(model.encode_images(pixels), reference.encode_image(pixels), atol=2e-5, rtol=1e-4)
    return interleave(
        lambda: model.encode_images(pixels), lambda: reference.encode_image(pixels), runs, "encode one image"
    )


def main() -> None:
    """Run the comparisons, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few runs of each, to see that it works")
    parser.add_argument("--save", action="store_true", help="append the JSON line to bench/results/compare_eager.jsonl")
    options = parser.parse_args()
    torch.manual_seed(0)
    runs = 3 if options.quick else 15
    with torch.inference_mode():
        model = QwenVL(MID_SIZE).eval()
        reference = EagerReference(copy.deepcopy(model))
        for name in columns_first(model, torch.float32, torch.device("cpu")):  # as `qwenvl.load` does
            weight = model.get_parameter(name)
            weight.data = by_columns(weight.data, weight.dtype)
        rows = [
            encode(model, reference, runs),
            prefill(model, reference, 512, runs),
            decode(model, reference, 512, 4 if options.quick else 16, runs),
            decode(model, reference, 4096, 2 if options.quick else 8, runs),
        ]
    result = {
        "bench": "compare_eager",
        "date": datetime.date.today().isoformat(),
        "device": f"{processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "dtype": "float32",
        "rows": rows,
    }
    print(f"{result['device']}, torch {result['torch']}, {result['date']}; milliseconds, median (p10 to p90)")
    print(f"{'':18}{'qwenvl':>26}{'plain eager':>28}{'speedup':>10}")
    for row in rows:
        sides = ["{median} ({p10} to {p90})".format(**row[side]) for side in ("ours", "eager")]
        print(f"{row['name']:18}{sides[0]:>26}{sides[1]:>28}{row['speedup']:>9.2f}x")
    line = json.dumps(result)
    if options.save:
        path = Path(__file__).parent / "results" / "compare_eager.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
