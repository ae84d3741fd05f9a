"""What an engine is asked for, and when: lengths, pictures, arrivals."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace

import pytest
import torch
from support import small_config

from qwenvl.bench.subject import picture_ids
from qwenvl.bench.workload import Workload, arrivals, spread
from qwenvl.image import image_hash
from qwenvl.training.memory import QWEN_VL

CONFIG = small_config()
# The published shape, whose pictures have as many ids but hardly any pixels.
LIKE_QWEN_VL = replace(QWEN_VL, visual=replace(QWEN_VL.visual, image_size=28))


@pytest.mark.parametrize("count", [8, 32])
def test_requests_have_the_mean_that_is_promised(count: int) -> None:
    """A mean context of 512 and 128 new ids, though pictures take 0, 258 or 516 of it and lengths differ."""
    asks = Workload(LIKE_QWEN_VL, 1).mixed(count, 512, 128)
    assert statistics.mean(ask.context for ask in asks) == pytest.approx(512, abs=2)
    assert sum(ask.new for ask in asks) == 128 * count
    assert len({ask.new for ask in asks}) == len({len(ask.ids) for ask in asks}) == count
    assert max(len(ask.ids) + ask.new for ask in asks) > 1.3 * 512


def test_pictures_are_mixed_and_some_are_shown_twice() -> None:
    """None, one and two; spans and pixels match; fewer pictures than are shown, and no request shows one twice."""
    asks = Workload(CONFIG, 1).mixed(32, 64, 16)
    assert {len(ask.pictures) for ask in asks} == {0, 1, 2}
    for ask in asks:
        assert ask.ids.count(CONFIG.visual.image_start_id) == len(ask.pictures)
        assert ask.ids[: len(picture_ids(CONFIG)) * len(ask.pictures)] == picture_ids(CONFIG) * len(ask.pictures)
        hashes = [image_hash(picture) for picture in ask.pictures]
        assert len(set(hashes)) == len(hashes)
    shown = [image_hash(picture) for ask in asks for picture in ask.pictures]
    assert len(set(shown)) == 12 < len(shown) == 20


def test_rounds_differ_in_contents_alone() -> None:
    """The same lengths, so that a warm-up meets what is timed; nothing in common that a cache could hold."""
    first, again, other = (Workload(CONFIG, seed).mixed(8, 64, 16) for seed in (1, 1, 2))
    assert [ask.ids for ask in first] == [ask.ids for ask in again]
    assert [(len(ask.ids), ask.new) for ask in first] == [(len(ask.ids), ask.new) for ask in other]
    texts = [{tuple(ask.ids[-8:]) for ask in asks} for asks in (first, other)]
    assert not texts[0] & texts[1]
    pictures = [{image_hash(picture) for ask in asks for picture in ask.pictures} for asks in (first, other)]
    assert not pictures[0] & pictures[1]


def test_text_has_no_pictures_of_its_own() -> None:
    """Random ids never open a span: a prompt would be refused for a picture that was not given."""
    assert max(Workload(CONFIG, 0).text(10_000)) < CONFIG.visual.image_start_id


def test_a_spread_has_its_mean() -> None:
    """From half to one and a half times, evenly, whatever the order."""
    found = spread(100, 50, random.Random(3))
    assert (min(found), max(found), statistics.mean(found)) == (51, 149, pytest.approx(100))
    assert found != sorted(found)
    assert min(spread(1, 3, random.Random(0))) == 1  # never nothing


def test_arrivals_are_a_poisson_process() -> None:
    """Seeded; the gaps have the mean 1 / rate, and their spread is as large, as of an exponential distribution."""
    times = list(arrivals(4.0, 20_000, seed=0))
    assert times == sorted(times) == list(arrivals(4.0, 20_000, seed=0))
    gaps = torch.tensor(times, dtype=torch.float64).diff()
    assert float(gaps.mean()) == pytest.approx(0.25, rel=0.03)
    assert float(gaps.std()) == pytest.approx(0.25, rel=0.03)
    assert float((gaps > 0.25).double().mean()) == pytest.approx(0.3679, abs=0.02)  # 1 / e
