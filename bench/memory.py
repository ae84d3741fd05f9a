"""Peak anonymous memory of converting and of loading a checkpoint.

    python bench/memory.py --gigabytes 4 [--folder DIR]

makes random bfloat16 checkpoints of about that size in the reference's layout, as safetensors and as `.bin` shards,
converts and loads them, each in a process of its own, and deletes them. The parent samples RssAnon in
`/proc/PID/status` every few milliseconds; pages of mapped files are not anonymous, the kernel may drop them at any
time. Numbers are above what the process held before it began. Linux only. 1 GB = 1e9 bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from qwenvl.adapt.layout import columns_first
from qwenvl.config import QwenVLConfig, VisionConfig
from qwenvl.model.qwenvl import QwenVL
from qwenvl.weights.checkpoint import Checkpoint, load_into
from qwenvl.weights.convert import convert
from qwenvl.weights.keymap import entries

ALLOWANCE = 1_000_000_000  # above one shard or the weights
INTERVAL = 0.003  # seconds


def make_config(gigabytes: float) -> QwenVLConfig:
    """As many decoder layers as make that size; the real widths and vocabulary where there is room for them."""
    real = gigabytes >= 3
    hidden, inner, vocabulary = (4096, 22016, 151936) if real else (1024, 5504, 8192)
    vision = VisionConfig(width=1664, layers=4) if real else VisionConfig(width=128, layers=2, heads=4)
    config = QwenVLConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=hidden // 128,
        intermediate_size=inner,
        visual=replace(vision, output_dim=hidden, image_start_id=vocabulary - 79),
    )
    one, two = total_bytes(config), total_bytes(replace(config, num_hidden_layers=2))
    return replace(config, num_hidden_layers=max(1, 1 + round((gigabytes * 1e9 - one) / (two - one))))


def total_bytes(config: QwenVLConfig) -> int:
    """Size in bfloat16."""
    return sum(2 * torch.Size(entry.reference_shape).numel() for entry in entries(config))


def make_checkpoint(folder: Path, config: QwenVLConfig, kind: str, shard_bytes: int) -> None:
    """Write shards of at most `shard_bytes`, unless one tensor is larger, and an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    placed: dict[str, str] = {}

    def flush() -> None:
        file = f"model-{len(shards):05}.safetensors" if kind == "safetensors" else f"pytorch_model-{len(shards):05}.bin"
        write: Callable[..., None] = save_file if kind == "safetensors" else torch.save
        write(shards[-1], folder / file)
        placed.update(dict.fromkeys(shards[-1], file))
        shards[-1] = {}
        shards.append({})

    for entry in entries(config):
        tensor = torch.empty(entry.reference_shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05, generator=generator)
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_bytes:
            flush()
        shards[-1][entry.reference] = tensor
    flush()
    index = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"metadata": {"total_size": total_bytes(config)}, "weight_map": placed}))


def anonymous_bytes(process: int) -> int:
    """RssAnon of a process, 0 once it has gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def measure(*job: str) -> tuple[int, float]:
    """Peak anonymous bytes above the start, and seconds, of a job in a process of its own."""
    command = [sys.executable, __file__, "--job", *job]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()  # it has imported everything and waits
        start, peak, begin = anonymous_bytes(child.pid), 0, time.perf_counter()
        child.stdin.write(b"\n")
        child.stdin.flush()
        while child.poll() is None:
            peak = max(peak, anonymous_bytes(child.pid))
            time.sleep(INTERVAL)
        seconds = time.perf_counter() - begin
    if child.returncode:
        raise SystemExit(f"the job {' '.join(job)} failed")
    return peak - start, seconds


def run_job(kind: str, *arguments: str) -> None:
    """In the child: what is measured."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    sys.stdin.readline()
    if kind == "convert":
        source, destination, shard_bytes = arguments
        convert(source, destination, max_shard_bytes=int(shard_bytes), quiet=True)
    else:
        source, dtype = arguments
        checkpoint = Checkpoint(source)
        with torch.device("meta"):
            model = QwenVL(checkpoint.config)
        target, cpu = getattr(torch, dtype), torch.device("cpu")
        laid_out = columns_first(model, target, cpu)
        load_into(model, checkpoint, dtype=target, device=cpu, columns_first=laid_out, quiet=True)


def main() -> int:
    """Measure, print a table and a last line of JSON; 1 if a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint in bfloat16")
    parser.add_argument("--folder", help="where to write about three times that size (default: the system's)")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        run_job(*given.job)
        return 0

    config = make_config(given.gigabytes)
    size, shard = total_bytes(config), min(2_000_000_000, total_bytes(config) // 3)
    results = []
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        work = Path(temporary)
        source, ours, back = work / "source", work / "ours", work / "back"

        def record(what: str, limit: int, *job: str) -> None:
            peak, seconds = measure(*job)
            row = {"what": what, "peak_bytes": peak, "limit_bytes": limit, "seconds": round(seconds, 2)}
            results.append({**row, "within": peak <= limit})
            print(f"{what:38} {peak / 1e9:7.3f} GB of {limit / 1e9:7.3f} allowed, {seconds:6.1f} s", flush=True)

        print(
            f"checkpoint of {size / 1e9:.3f} GB in bfloat16, shards of {shard / 1e9:.3f} GB, torch {torch.__version__}"
        )
        for kind in ("safetensors", "bin"):
            make_checkpoint(source, config, kind, shard)
            record(f"convert {kind} to ours", shard + ALLOWANCE, "convert", str(source), str(ours), str(shard))
            record(f"load {kind}, bfloat16", size + ALLOWANCE, "load", str(source), "bfloat16")
            record(f"load {kind}, float32", 2 * size + ALLOWANCE, "load", str(source), "float32")
            if kind == "safetensors":
                remove(source)
                record(
                    "convert ours to the reference's", shard + ALLOWANCE, "convert", str(ours), str(back), str(shard)
                )
                remove(back)
                record("load ours, bfloat16", size + ALLOWANCE, "load", str(ours), "bfloat16")
                record("load ours, float32", 2 * size + ALLOWANCE, "load", str(ours), "float32")
                remove(ours)
    print(json.dumps({"bytes": size, "shard_bytes": shard, "torch": torch.__version__, "results": results}))
    return 0 if all(row["within"] for row in results) else 1


def remove(folder: Path) -> None:
    """Delete a folder of files."""
    for path in folder.iterdir():
        os.unlink(path)
    folder.rmdir()


if __name__ == "__main__":
    sys.exit(main())
