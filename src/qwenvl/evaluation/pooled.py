"""Figures that the paper gives for two benchmarks together: ChartQA's halves, SEED-Bench's pictures and videos.

with_pooled   reports, and those of what can be put together
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .report import compared
from .runs import NUMBER, key_of, numbered
from .scoring import figure

BASE, CHAT = "Qwen/Qwen-VL", "Qwen/Qwen-VL-Chat"


@dataclass(frozen=True)
class Pooled:
    """Benchmarks whose items are counted together, and what the paper has for them."""

    title: str
    table: int
    parts: tuple[str, ...]
    published: Mapping[str, float]


POOLED = {
    "chartqa": Pooled("ChartQA", 5, ("chartqa_test_human", "chartqa_test_augmented"), {BASE: 65.7, CHAT: 66.3}),
    "seed": Pooled("SEED-Bench, all", 7, ("seed_image", "seed_video"), {BASE: 56.3, CHAT: 58.2}),
}


def with_pooled(reports: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The reports, numbered, and one more for each pool of which a run has all parts."""
    found = numbered(reports)
    alone = tuple(found)
    for name, pool in POOLED.items():
        runs: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
        for one in alone:
            key = (*key_of(one["settings"]), one[NUMBER])
            if one["benchmark"] in pool.parts and one["figures"]:
                runs.setdefault(key, {})[one["benchmark"]] = one
        found += [_joined(name, pool, parts) for parts in runs.values() if len(parts) == len(pool.parts)]
    return found


def _joined(name: str, pool: Pooled, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    first = parts[pool.parts[0]]
    answers = [
        {**row, "id": f"{part} {row['id']}"} for part in pool.parts for row in parts[part]["answers"] if "score" in row
    ]
    together = figure(first["figures"][0]["name"], [[row["score"] for row in answers]])
    questions = " ".join(parts[part]["settings"]["questions"] for part in pool.parts)
    return {
        **first,
        "benchmark": name,
        "title": pool.title,
        "table": pool.table,
        "settings": {**first["settings"], "questions": questions},
        "figures": [compared(together, pool.published)],
        "groups": {},
        "answers": answers,
        "whole": all(parts[part]["whole"] for part in pool.parts),
    }
