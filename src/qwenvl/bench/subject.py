"""A model that is measured, and how its figures are made.

Subject       a model, where it is, and what the device can do
Part          what can be measured of it
picture_ids   a picture's span in a prompt
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..config import QwenVLConfig
from ..model.qwenvl import QwenVL
from .decoding import Stretch
from .device import Device, Timing
from .figures import Event, Figure
from .roofline import Limits, Work, stepping

Measurement: TypeAlias = Callable[[float], Iterator[Event]]  # what is measured in so many seconds
Part: TypeAlias = tuple[str, str, float, Measurement]  # its part of the plan, its name, its weight in time, and how


@dataclass(frozen=True)
class Subject:
    """What is measured. name: "int4" where the decoder's weights are packed, else the dtype."""

    model: QwenVL
    device: Device
    limits: Limits
    name: str

    @property
    def config(self) -> QwenVLConfig:
        """The model's."""
        return self.model.config

    @property
    def width(self) -> int:
        """Bytes of an activation, and of a weight that is not packed."""
        return self.model.decoder.wte.weight.dtype.itemsize

    @property
    def span(self) -> int:
        """Ids of one picture with its tags."""
        return self.config.visual.n_queries + 2

    def text(self, rows: int, tokens: int) -> Tensor:
        """Random ids [B,T] without a picture."""
        ordinary = min(self.config.visual.image_start_id, self.config.vocab_size)
        return torch.randint(0, ordinary, (rows, tokens), device=self.device.torch)

    def prompt(self, tokens: int) -> Tensor:
        """Ids [1,T] of a picture and random text behind it."""
        picture = torch.tensor([picture_ids(self.config)], device=self.device.torch)
        return torch.cat((picture, self.text(1, tokens - self.span)), dim=1)

    def pixels(self, device: torch.device | str) -> Tensor:
        """One picture [1,3,S,S] as `preprocess` gives it, on the host or already on the device."""
        size = self.config.visual.image_size
        return torch.randn(1, 3, size, size, device="cpu").to(device)

    def milliseconds(self, part: str, name: str, timing: Timing, *steps: Work) -> Figure:
        """What repeats took, beside the least that they could."""
        taken, first = round(1e3 * timing.median, 3), round(timing.first, 4)
        figure = Figure(part, self.name, name, taken, "ms", warm_up=first, details={"runs": timing.runs})
        return self.limits.hold(figure, *steps)

    def rate(self, part: str, name: str, rows: int, first: Stretch, run: Stretch, note: str = "") -> Figure:
        """Tokens a second of all rows, captures and first steps apart, beside the most that it could be."""
        work = stepping(self.config, self.width, rows, run.context)
        whole = run.steps == run.wanted
        captures = first.capture_seconds + run.capture_seconds
        on_gpu = self.device.torch.type == "cuda"
        eager = "steps were not captured as CUDA graphs" if on_gpu and not run.captured else ""
        shortened = f"{run.steps} of {run.wanted} steps, from {run.begin} tokens on"
        figure = Figure(
            part,
            self.name,
            name,
            round(rows / run.step_seconds, 2),
            "tok/s",
            warm_up=round(first.seconds + captures, 3),
            note="; ".join(filter(None, (note, "" if whole else shortened, eager))),
            details={
                "steps": run.steps,
                "steps_wanted": run.wanted,
                "context_from": run.begin,
                "bytes_per_step": round(work.bytes),
                "step_ms": round(1e3 * run.step_seconds, 4),
                "graphs": first.graphs + run.graphs,
                "capture_s": round(captures, 3),
            },
            whole=whole,
        )
        return self.limits.hold(figure, work, rows=rows)

    def peak(self, part: str, name: str) -> Iterator[Figure]:
        """The most memory that was allocated since the device's last `release`, where that is counted."""
        if (peak := self.device.peak()) is not None:
            allocated, reserved = (round(count / 1e9, 3) for count in peak)
            yield Figure(part, self.name, f"peak memory, {name}", allocated, "GB", details={"reserved_GB": reserved})


def picture_ids(config: QwenVLConfig) -> list[int]:
    """A picture's span, tags included."""
    vision = config.visual
    return [vision.image_start_id, *[vision.image_pad_id] * vision.n_queries, vision.image_end_id]
