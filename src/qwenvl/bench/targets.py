"""What the figures are held against: the published ones, and the bars that this project set itself.

The published figures are the README's of Qwen-VL: A100-SXM4-80G, PyTorch 2.0.1, `transformers`. The bars and aims are
meant for an H100 of 80 GB with a copy bandwidth of about 3.0 TB/s, and only there does a figure pass or not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config import QwenVLConfig
from ..training.memory import QWEN_VL
from .figures import RATES, Figure

PUBLISHED_ON, BARS_ON = "A100", "H100"


@dataclass(frozen=True)
class Target:
    """In the figure's unit; 0 where there is none. A bar is the least that must be shown, an aim what we hope for."""

    published: float = 0.0
    bar: float = 0.0
    aim: float = 0.0

    def passed(self, figure: Figure) -> bool:
        """Whether the figure reaches the bar."""
        return figure.value >= self.bar if figure.unit in RATES else figure.value <= self.bar


ENCODE, PREFILL, START = Target(bar=9), Target(bar=55), Target(bar=15)
TARGETS = {
    ("bfloat16", "encode 1 image"): ENCODE,
    ("bfloat16", "prefill 2048 with an image"): PREFILL,
    ("bfloat16", "decode 1792"): Target(28.87, 128, 170),
    ("bfloat16", "decode 7934"): Target(24.32, 110, 150),
    ("bfloat16", "peak memory, prefill 2048"): Target(22.60, 20.9),
    ("bfloat16", "peak memory, decode 7934"): Target(28.01, 24.2),
    ("bfloat16", "start to first token"): START,
    ("int4", "encode 1 image"): ENCODE,
    ("int4", "prefill 2048 with an image"): PREFILL,
    ("int4", "decode 1792"): Target(37.79, 190, 340),
    ("int4", "decode 7934"): Target(34.34, 150, 260),
    ("int4", "peak memory, prefill 2048"): Target(11.82, 11.4),
    ("int4", "peak memory, decode 7934"): Target(17.23, 14.7),
    ("int4", "start to first token"): START,
}


def target(figure: Figure, config: QwenVLConfig) -> Target:
    """What a figure of a model of this configuration is held against: nothing, unless it has the published sizes."""
    sizes = replace(config, quantization_config=None, note=QWEN_VL.note)
    return TARGETS.get((figure.subject, figure.name), Target()) if sizes == QWEN_VL else Target()
