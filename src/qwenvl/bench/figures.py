"""What a benchmark says, and what its numbers are held against.

Figure    one number
Missing   one that there is none of, and why
Facts     about the device
Target    the published number, the bar and the aim of a figure

The published figures are the README's of Qwen-VL: A100-SXM4-80G, PyTorch 2.0.1, `transformers`. The bars and aims are
this project's, for an H100 of 80 GB with a copy bandwidth of about 3.0 TB/s; only there does a figure pass or not. Two
of an engine's are for a CPU, a small or a mid-size model, and float32.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..config import QwenVLConfig
from ..training.memory import QWEN_VL

RATES = ("tok/s", "GB/s", "TFLOP/s", "x")  # more is better; of any other unit, less is
BARS_ON, CPU = "H100", "cpu"


@dataclass(frozen=True)
class Figure:
    """One measured number.

    part: one of PARTS, "device" or "weights". subject: what it was measured on, such as "bfloat16" or "int4". limit:
    what the device could do at best, in the same unit; 0 if that is not known, or the figure has none. limited_by:
    "memory" or "matmul". warm_up: seconds of what went before and is not counted: first calls, captured graphs. note:
    for people. details: what else the run says. whole: false where the run was cut to the time that there was; no bar
    is passed or missed then.
    """

    part: str
    subject: str
    name: str
    value: float
    unit: str
    limit: float = 0.0
    limited_by: str = ""
    warm_up: float = 0.0
    note: str = ""
    details: dict[str, float | str] = field(default_factory=dict)
    whole: bool = True

    @property
    def fraction(self) -> float:
        """How much of the limit was reached, 0 to about 1; 0 without a limit."""
        if not (self.limit and self.value):
            return 0.0
        return self.value / self.limit if self.unit in RATES else self.limit / self.value

    def as_dict(self) -> dict[str, Any]:
        """A JSON object; what there is none of has no key."""
        facts = {key: value for key, value in asdict(self).items() if value not in (0.0, "", {})}
        facts |= {"value": self.value, "whole": self.whole}
        return {**facts, "fraction": round(self.fraction, 4)} if self.fraction else facts


@dataclass(frozen=True)
class Missing:
    """What has no figure, and why: it `failed` (there was no memory, or there is a bug), or it was left out."""

    part: str
    subject: str
    reason: str
    failed: bool


@dataclass(frozen=True)
class Facts:
    """About the machine: `device`, `memory_bytes`, `torch`, `dtype`, ..."""

    about: dict[str, str | int]


Event = Figure | Missing | Facts | str  # a str says what is being measured


@dataclass(frozen=True)
class Target:
    """In the figure's unit; 0 where there is none. A bar is the least that must be shown, an aim what we hope for.

    on: where it is to be shown.
    """

    published: float = 0.0
    bar: float = 0.0
    aim: float = 0.0
    on: str = BARS_ON

    def passed(self, figure: Figure) -> bool:
        """Whether the figure reaches the bar."""
        return figure.value >= self.bar if figure.unit in RATES else figure.value <= self.bar


ENCODE, PREFILL, START, DELAY = Target(bar=9), Target(bar=55), Target(bar=15), Target(bar=60)
TARGETS = {
    ("bfloat16", "encode one image"): ENCODE,
    ("bfloat16", "prefill 2048 with an image"): PREFILL,
    ("bfloat16", "decode 1792"): Target(28.87, 128, 170),
    ("bfloat16", "decode 7934"): Target(24.32, 110, 150),
    ("bfloat16", "peak memory, prefill 2048"): Target(22.60, 20.9),
    ("bfloat16", "peak memory, decode 1792"): Target(bar=20.9),
    ("bfloat16", "peak memory, decode 7934"): Target(28.01, 24.2),
    ("bfloat16", "start to first token"): START,
    ("int4", "encode one image"): ENCODE,
    ("int4", "prefill 2048 with an image"): PREFILL,
    ("int4", "decode 1792"): Target(37.79, 190, 340),
    ("int4", "decode 7934"): Target(34.34, 150, 260),
    ("int4", "peak memory, prefill 2048"): Target(11.82, 11.4),
    ("int4", "peak memory, decode 1792"): Target(bar=11.4),
    ("int4", "peak memory, decode 7934"): Target(17.23, 14.7),
    ("int4", "start to first token"): START,
    ("bfloat16", "32 rows decoding"): Target(bar=2000, aim=2900),
    ("bfloat16", "delay by a long prompt"): DELAY,
    ("int4", "delay by a long prompt"): DELAY,
}
ON_A_CPU = {
    "8 at once to one at a time": Target(bar=3, on=CPU),
    "second round, how much sooner": Target(bar=4, on=CPU),
}


def target(figure: Figure, config: QwenVLConfig) -> Target:
    """What a figure of a model of this configuration is held against: nothing, unless it has the published sizes, or
    the bar is one for any in float32.
    """
    if figure.name in ON_A_CPU and figure.subject == "float32":
        return ON_A_CPU[figure.name]
    sizes = replace(config, quantization_config=None, note=QWEN_VL.note)
    return TARGETS.get((figure.subject, figure.name), Target()) if sizes == QWEN_VL else Target()
