"""Small checkpoints in the reference's layout: the golden model, packed or not, as every kind of file."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenvl.config import QuantizationConfig, QwenVLConfig
from qwenvl.weights.keymap import entries

Tensors = dict[str, torch.Tensor]
SIDE_FILES = {
    "generation_config.json": b'{"chat_format": "chatml", "top_p": 0.3}\r\n',
    "tokenizer_config.json": b"{}",
    "quantize_config.json": b'{"bits": 4}',
    "qwen.tiktoken": b"IQ== 0\r\nIg== 1\r\n",
    "SimSun.ttf": bytes(range(256)),
}


@pytest.fixture
def tiny(goldens: Path) -> Tensors:
    """The golden model's tensors under the reference's names, bfloat16."""
    return load_file(goldens / "tiny-112" / "model.safetensors")


@pytest.fixture
def tiny_config(goldens: Path) -> QwenVLConfig:
    """The golden model's configuration."""
    return QwenVLConfig.load(goldens / "tiny-112")


@pytest.fixture
def int4_config(tiny_config: QwenVLConfig) -> QwenVLConfig:
    """The same model with packed decoder linears."""
    return replace(tiny_config, quantization_config=QuantizationConfig())


@pytest.fixture
def int4(int4_config: QwenVLConfig) -> Tensors:
    """Random tensors of a packed checkpoint: every int32 bit pattern, float16 elsewhere."""
    generator = torch.Generator().manual_seed(0)

    def make(name: str, shape: tuple[int, ...], *, packed: bool) -> torch.Tensor:
        if name.endswith("g_idx"):
            return torch.arange(shape[0], dtype=torch.int32) // 128
        if packed:
            return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
        return torch.randn(shape, generator=generator).half()

    return {e.reference: make(e.reference, e.reference_shape, packed=e.kind == "packed") for e in entries(int4_config)}


Writer = Callable[..., Path]


@pytest.fixture
def write_reference(tmp_path: Path) -> Writer:
    """A function that writes tensors as a folder in the reference's layout and returns it.

    `kind` is "safetensors", "bin" or "old bin" (the format before torch 1.6); more than one shard gets an index.
    """

    def write(
        tensors: Tensors, config: QwenVLConfig, *, kind: str = "safetensors", shards: int = 1, name: str = "reference"
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n\n")
        for side_file, content in SIDE_FILES.items():
            (folder / side_file).write_bytes(content)
        stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
        names = sorted(tensors)
        placed = {}
        for number in range(shards):
            file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{number + 1:05}-of-{shards:05}.{suffix}"
            part = {tensor: tensors[tensor] for tensor in names[number::shards]}
            placed |= dict.fromkeys(part, file)
            if kind == "safetensors":
                save_file(part, folder / file, {"format": "pt"})
            else:
                torch.save(part, folder / file, _use_new_zipfile_serialization=kind == "bin")
        if shards > 1:
            (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
        return folder

    return write
