"""What ranks that share a model have to say, for tests of tensor parallelism: a script that runs under torchrun.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/parallel_ranks.py FOLDER

FOLDER holds checkpoints by name. Every rank loads each, shared and whole, and compares; `FOLDER/ranks.json` then has
what each rank found.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from packed_layers import golden_layer
from support import small_config
from torch import Tensor

import qwenvl
from qwenvl import loading
from qwenvl.adapt.packed import PackedLinear
from qwenvl.adapt.parallel import Columns, Rows
from qwenvl.adapt.ranks import join, of_first
from qwenvl.config import QuantizationConfig
from qwenvl.errors import QwenVLError
from qwenvl.generation import room
from qwenvl.model.cache import KVCache
from qwenvl.model.qwenvl import Output
from qwenvl.pipeline import Pipeline

HERE = Path(__file__).parent
QUESTIONS = ("What can you see?", "And what is left of it?")


def far(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one.float() - other.float()).abs().max())


def both(folder: Path | str, dtype: str = "float32") -> tuple[Pipeline, Pipeline]:
    """A checkpoint shared by the ranks, and whole."""
    shared = qwenvl.load(folder, "cpu", dtype, parallel="tensor", quiet=True)
    return shared, qwenvl.load(folder, "cpu", dtype, quiet=True)


def prompt(vl: Pipeline) -> dict[str, Tensor]:
    """Two rows, one with a picture, the other padded."""
    vision = vl.config.visual
    generator = torch.Generator().manual_seed(0)
    span = [vision.image_start_id, *[vision.image_pad_id] * vision.n_queries, vision.image_end_id]
    text = torch.randint(3, vision.image_start_id, (2, 12), generator=generator)
    first = torch.tensor([*span, *text[0].tolist()])
    ids = torch.stack((first, torch.nn.functional.pad(text[1], (len(span), 0))))
    mask = torch.ones_like(ids)
    mask[1, : len(span)] = 0
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator)
    return {"input_ids": ids, "pixels": pixels, "attention_mask": mask}


def outputs(vl: Pipeline, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that a forward gives, at once and in cached chunks."""
    given = vl.model(**inputs, return_hidden=True, return_attentions=True)
    assert isinstance(given, Output)
    assert given.hidden_states is not None
    assert given.attentions is not None
    cache = room.allocate(vl.model, 2, inputs["input_ids"].shape[1] + 8)
    chunks = [vl.model(**inputs, cache=cache)[:, -1:]]
    for new in (torch.tensor([[5], [7]]), torch.tensor([[9], [4]]), torch.tensor([[3, 8, 6], [11, 2, 5]])):
        chunks.append(vl.model(new, cache=cache))
    stepped = vl.model.decoder.step(torch.tensor([6, 12]), cache)
    return {
        "logits": given.logits,
        "hidden": torch.stack(given.hidden_states),
        "maps": torch.stack(given.attentions),
        "cached": torch.cat([*chunks, stepped[:, None]], dim=1),
    }


@torch.no_grad()
def compared(folder: Path) -> dict[str, Any]:
    """How far a shared model is from the whole one, and what this rank holds."""
    shared, whole = both(folder)
    inputs = prompt(whole)
    mine, expected = outputs(shared, inputs), outputs(whole, inputs)
    held, all_ = ([t.numel() * t.element_size() for t in vl.model.state_dict().values()] for vl in (shared, whole))
    caches = [room.allocate(vl.model, 1, 64).keys.numel() for vl in (shared, whole)]
    greedy, beams = {"max_new_tokens": 8, "stop_ids": ()}, {"max_new_tokens": 6, "stop_ids": (), "beams": 3}
    sampled = {"max_new_tokens": 8, "stop_ids": (), "do_sample": True, "seed": 3}
    return {
        "far": {name: far(mine[name], expected[name]) for name in expected},
        "same on all": all(torch.equal(mine[name], of_first(mine[name])) for name in ("logits", "cached")),
        "bytes": sum(held) / sum(all_),
        "decoder bytes": block_bytes(shared) / block_bytes(whole),
        "cache": caches[0] / caches[1],
        "arranged": sum(isinstance(m, PackedLinear) and m._table is not None for m in shared.model.modules()),
        "ids": [
            shared.generate_ids(**inputs, **options) == whole.generate_ids(**inputs, **options)
            for options in (greedy, sampled, beams)
        ],
        "engine": answers(shared, whole),
        "fresh": shared.generate_ids(**inputs, **sampled | {"seed": None}),
        "fresh again": shared.generate_ids(**inputs, **sampled | {"seed": None}),
    }


def answers(shared: Pipeline, whole: Pipeline) -> dict[str, Any]:
    """Three requests on an engine of two rows: greedy, with a seed, without; and what the whole model says to them."""
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5], [5, 6, 7, 8]]
    options: list[dict[str, Any]] = [{}, {"do_sample": True, "seed": 3}, {"do_sample": True}]
    engine = shared.start_engine(rows=2, max_length=64)
    requests = [
        engine.submit(ids, max_new_tokens=8, stop_ids=(), **chosen)
        for ids, chosen in zip(prompts, options, strict=True)
    ]
    said = [request.result() for request in requests]
    shared.engine = None
    expected = [
        whole.generate_ids(torch.tensor([ids]), max_new_tokens=8, stop_ids=(), **chosen)[0]
        for ids, chosen in zip(prompts, options, strict=True)
    ]
    return {"as whole": said[:2] == expected[:2], "fresh": said[2]}


def block_bytes(vl: Pipeline) -> int:
    """Of the linears of one block."""
    block = vl.model.decoder.blocks[0]
    return sum(t.numel() * t.element_size() for name, t in block.state_dict().items() if ".ln_" not in f".{name}")


def talk(vl: Pipeline) -> list[Any]:
    """Two rounds about a picture, its boxes, and scores: what a user asks for."""
    picture, history, said = HERE.parent / "docs" / "patches.png", None, []
    for number, question in enumerate(QUESTIONS):
        query = [*([{"image": str(picture)}] if number == 0 else []), {"text": question}]
        reply, history = vl.chat(query, history, do_sample=False, max_new_tokens=24)
        said.append(reply)
    said.append([(box.x1, box.y1, box.x2, box.y2) for box in vl.ground(str(picture), "the blue square")])
    said.append([round(score, 3) for score in vl.score("A blue", [" square"])[0]])
    return said


def golden_products() -> dict[str, float]:
    """Golden packed layers, shared each way, against the reference's products; also from a CPU's tables."""
    mesh = join(torch.device("cpu"))
    rank, ranks, found = dist.get_rank(), dist.get_world_size(), {}
    for case in ("B", "C", "D"):
        quantization = QuantizationConfig(group_size=128, desc_act=case == "D")
        config = replace(small_config(), quantization_config=quantization)
        for way in ("columns", "rows"):
            layer, tensors = golden_layer(HERE / "goldens", case)
            style = Columns(mesh, gather=True, unit=8) if way == "columns" else Rows(mesh, layer.in_features, config)
            style._apply(layer, mesh)
            x = tensors["x"].float()
            x = x if way == "columns" else x.chunk(ranks, -1)[rank]
            found[f"{case} {way}"] = far(layer(x), tensors["y"])
            layer.arrange()
            assert layer._table is not None
            found[f"{case} {way}, arranged"] = far(layer(x), tensors["y"])
    return found


def told(attempt: Callable[[], object]) -> str:
    """The error that it ends in."""
    try:
        attempt()
    except QwenVLError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def disagreements(folder: Path) -> dict[str, str]:
    """What all ranks make of memory that the last rank alone has not."""
    last = dist.get_rank() == dist.get_world_size() - 1
    free, loading.free_memory = loading.free_memory, lambda: 1 if last else None
    vl = qwenvl.load(folder, "cpu", parallel="tensor", quiet=True)
    loading.free_memory = free
    allocate = KVCache.allocate

    def none_left(*_: object) -> KVCache:
        raise torch.OutOfMemoryError("CUDA out of memory")

    KVCache.allocate = none_left if last else allocate  # type: ignore[method-assign, assignment]
    error = told(lambda: vl.generate_ids(torch.tensor([[5, 6]]), max_new_tokens=2))
    KVCache.allocate = allocate  # type: ignore[method-assign]
    adapter = told(lambda: qwenvl.load(folder, "cpu", parallel="tensor", adapter=folder, quiet=True))
    other = told(lambda: qwenvl.load(folder, "cuda:1", parallel="tensor", quiet=True))
    many = told(lambda: qwenvl.load(folder, "cuda", parallel="tensor", quiet=True))
    gradient = told(lambda: vl.model(None, embeddings=torch.randn(1, 3, vl.config.hidden_size, requires_grad=True)))
    found = {"dtype": str(vl.dtype), "memory": error, "adapter": adapter, "device": other, "GPUs": many}
    return {**found, "gradient": gradient}


def main(folder: Path) -> None:
    """Compare everything in the folder, and the embedded model."""
    torch.set_num_threads(1)
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    found: dict[str, Any] = {name: compared(folder / name) for name in names}
    shared, whole = both("tiny")
    found["tiny"] = {"shared": talk(shared), "whole": talk(whole), "vision": shared.model.visual.blocks[0].attn.heads}
    half, _ = both("tiny", "bfloat16")
    found["bfloat16"] = half.generate_ids(torch.tensor([[5, 6, 7]]), max_new_tokens=8, stop_ids=())
    if names:
        found["goldens"] = golden_products()
        found["disagreements"] = disagreements(folder / names[0])
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    time.sleep(dist.get_rank())  # ranks end at different times, and wait for one another to leave
    if dist.get_rank() == 0:
        (folder / "ranks.json").write_text(json.dumps(ranks))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
