"""Qwen-VL as a small, readable, fast PyTorch library.

import qwenvl
vl = qwenvl.load("tiny")
reply, history = vl.chat([{"image": "demo.jpeg"}, {"text": "What is this?"}])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import GenerationConfig, QwenVLConfig, SamplingOptions
    from .errors import QwenVLError
    from .generation.engine import Engine
    from .image import preprocess
    from .loading import load
    from .model.cache import KVCache
    from .model.qwenvl import QwenVL
    from .pipeline import Pipeline
    from .text.boxes import Box
    from .text.parts import Turn, parse_tagged
    from .text.tokenizer import Tokenizer

__version__ = "0.1.0"

# Where each public name lives. They are imported when first used, so that `import qwenvl` and `qwenvl --help` do not
# pay for torch.
_HOMES = {
    "Box": ".text.boxes",
    "Engine": ".generation.engine",
    "GenerationConfig": ".config",
    "KVCache": ".model.cache",
    "Pipeline": ".pipeline",
    "QwenVL": ".model.qwenvl",
    "QwenVLConfig": ".config",
    "QwenVLError": ".errors",
    "SamplingOptions": ".config",
    "Tokenizer": ".text.tokenizer",
    "Turn": ".text.parts",
    "load": ".loading",
    "parse_tagged": ".text.parts",
    "preprocess": ".image",
}

__all__ = [
    "Box",
    "Engine",
    "GenerationConfig",
    "KVCache",
    "Pipeline",
    "QwenVL",
    "QwenVLConfig",
    "QwenVLError",
    "SamplingOptions",
    "Tokenizer",
    "Turn",
    "load",
    "parse_tagged",
    "preprocess",
]


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public object
    if name not in _HOMES:
        raise AttributeError(f"module 'qwenvl' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
