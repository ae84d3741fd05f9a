"""What a benchmark says: numbers with their units and limits, and what could not be measured.

Figure    one number
Missing   one that there is none of, and why
Facts     about the device
to_line, from_line    any of these as one line of JSON, from one process to another
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

RATES = ("tok/s", "TB/s", "GB/s", "TFLOP/s")  # more is better; of any other unit, less is


@dataclass(frozen=True)
class Figure:
    """One measured number.

    part: one of PARTS, or "device". subject: what it was measured on, such as "bfloat16" or "int4". limit: what the
    device could do at best, in the same unit; 0 if that is not known, or the figure has none. limited_by: "memory" or
    "matmul". warm_up: seconds of what went before and is not counted: first calls, captured graphs. note: for people.
    details: what else the run says, names with their units. whole: false where the run was cut to the time that there
    was; no bar is passed or missed then.
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

    def as_dict(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Facts:
    """About the machine: `device`, `memory_bytes`, `torch`, ... and `dtype`, what "auto" means there."""

    about: dict[str, str | int]


Event = Figure | Missing | Facts
_KINDS = {"figure": Figure, "missing": Missing, "facts": Facts}


def to_line(event: Event) -> str:
    """One line of JSON."""
    (kind,) = (name for name, known in _KINDS.items() if type(event) is known)
    return json.dumps({"event": kind, **asdict(event)})


def from_line(line: str) -> Event | None:
    """The event in a line; None if it is not one (libraries print, too)."""
    if not line.startswith('{"event": '):
        return None
    data = json.loads(line)
    event: Event = _KINDS[data.pop("event")](**data)
    return event
