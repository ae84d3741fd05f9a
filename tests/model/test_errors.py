"""What cannot be computed is refused in one line with the numbers in it, and nothing is written before."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import one_line_error, random_model, small_config
from torch import Tensor

from qwenvl.config import QwenVLConfig
from qwenvl.errors import CacheError, PromptError, QwenVLError
from qwenvl.model.cache import KVCache
from qwenvl.model.qwenvl import QwenVL

START, END, PAD = 60, 61, 62
SPAN = [START, PAD, PAD, PAD, PAD, END]


@pytest.fixture(scope="module")
def config() -> QwenVLConfig:
    """Spans of 4 ids, pictures of 28 pixels, 512 positions."""
    return small_config()


@pytest.fixture(scope="module")
def model(config: QwenVLConfig) -> QwenVL:
    """Random weights."""
    return random_model(config).requires_grad_(False)


def images(count: int) -> Tensor:
    """Pixels of so many pictures."""
    return torch.zeros(count, 3, 28, 28)


@pytest.mark.parametrize(("spans", "given"), [(1, 0), (2, 1), (1, 2), (0, 1), (3, 2)])
@pytest.mark.parametrize("kind", ["pixels", "features"])
def test_images_and_spans_must_agree(model: QwenVL, spans: int, given: int, kind: str) -> None:
    """Too few and too many images, with both counts; a span is never left unfilled, no image unused."""
    ids = torch.tensor([[5, *SPAN * spans, 6]])
    tensors = {"pixels": images(given)} if kind == "pixels" else {"image_features": torch.zeros(given, 4, 128)}
    with one_line_error(PromptError, f"{spans} image spans", f"{given} images"):
        model(ids, **(tensors if given else {}))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([5, START, PAD, PAD, PAD, END, 6, 7, 8], "3 ids wide"),
        ([5, START, PAD, PAD, PAD, PAD, PAD, END, 6], "5 ids wide"),
        ([5, START, END, 6, 7, 8, 9, 10, 11], "0 ids wide"),
        ([5, START, PAD, PAD, PAD, PAD, 6, 7, 8], "not closed"),
        ([5, 6, 7, 8, START, PAD, PAD, PAD, PAD], "not closed"),
        ([5, 6, 7, 8, 9, 10, 11, 12, START], "not closed"),
    ],
)
def test_spans_have_one_width(model: QwenVL, row: list[int], says: str) -> None:
    """A span that is too short, too long or not closed is refused with its place and width, before any image is."""
    ids = torch.tensor([[5] * 9, row])
    place = f"row 1, column {row.index(START)}"
    with one_line_error(PromptError, place, says, START, END, "4 ids"):
        model(ids, images(1))
    with one_line_error(PromptError, place, says):
        model.embed(ids, images(1))


def test_a_span_does_not_reach_into_the_next_row(model: QwenVL) -> None:
    """Rows end where they end, whatever the next one begins with."""
    ids = torch.tensor([[5, 6, 7, START, PAD, PAD], [PAD, PAD, END, 5, 6, 7]])
    with one_line_error(PromptError, "row 0, column 3", "not closed"):
        model(ids, images(1))


@pytest.mark.parametrize("shape", [(1, 3, 28, 27), (1, 1, 28, 28), (1, 28, 28, 3), (3, 28, 28), (1, 3, 14, 14)])
def test_pixels_have_one_shape(model: QwenVL, shape: tuple[int, ...]) -> None:
    """Pixels of another size, channels last or without the batch are refused with the shape that is right."""
    with one_line_error(PromptError, "[N,3,28,28]", list(shape)):
        model.encode_images(torch.zeros(shape))
    with one_line_error(PromptError):
        model(torch.tensor([[5, *SPAN]]), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 4, 64), (1, 5, 128), (1, 128, 4), (1, 128)])
def test_features_have_one_shape(model: QwenVL, shape: tuple[int, ...]) -> None:
    """Precomputed features are [N,Q,C] of this model."""
    with one_line_error(PromptError, "[N,4,128]", list(shape)):
        model(torch.tensor([[5, *SPAN]]), image_features=torch.zeros(shape))


def too_long(model: QwenVL) -> Any:
    """513 tokens where there are 512 positions."""
    return model(torch.ones(1, 513, dtype=torch.long))


def too_long_in_steps(model: QwenVL) -> Any:
    """One token more than the positions, in a cache that has room."""
    cache = KVCache.allocate(model.config, 2, 600)
    ids = torch.ones(2, 512, dtype=torch.long)
    mask = torch.ones(2, 512, dtype=torch.bool)
    mask[1, :400] = False
    model(ids, attention_mask=mask, cache=cache)
    return model(ids[:, :1], cache=cache)


IDS = torch.tensor([[5, 6, 7]])
MISTAKES: list[tuple[Callable[[QwenVL], Any], type[QwenVLError], list[str]]] = [
    (lambda m: m(None), PromptError, ["input_ids or embeddings"]),
    (lambda m: m(torch.zeros(1, 0, dtype=torch.long)), PromptError, ["[1, 0]"]),
    (lambda m: m(torch.zeros(0, 3, dtype=torch.long)), PromptError, ["[0, 3]"]),
    (lambda m: m(IDS[0]), PromptError, ["[3]"]),
    (lambda m: m(None, embeddings=torch.zeros(1, 0, 128)), PromptError, ["[1, 0, 128]"]),
    (lambda m: m(None, embeddings=torch.zeros(0, 3, 128)), PromptError, ["[0, 3, 128]"]),
    (lambda m: m(None, embeddings=torch.zeros(3, 128)), PromptError, ["[3, 128]"]),
    (lambda m: m(None, embeddings=torch.zeros(1, 3, 64)), PromptError, ["[1, 3, 64]"]),
    (lambda m: m(IDS, embeddings=torch.zeros(1, 4, 128)), PromptError, ["[1, 4, 128]", "[1, 3]"]),
    (lambda m: m(None, images(1), embeddings=torch.zeros(1, 3, 128)), PromptError, ["0 image spans", "1 images"]),
    (
        lambda m: m(torch.tensor([SPAN]), images(1), image_features=torch.zeros(1, 4, 128)),
        PromptError,
        ["pixels or image_features"],
    ),
    (lambda m: m(IDS, attention_mask=torch.ones(1, 4)), PromptError, ["[1, 4]", "[1, 3]"]),
    (lambda m: m(IDS, attention_mask=torch.ones(1, 2)), PromptError, ["[1, 2]", "[1, 3]"]),
    (lambda m: m(IDS, attention_mask=torch.ones(2, 3)), PromptError, ["[2, 3]", "[1, 3]"]),
    (lambda m: m(IDS, attention_mask=torch.ones(3)), PromptError, ["[3]", "[1, 3]"]),
    (lambda m: m(IDS, attention_mask=torch.ones(1, 1)), PromptError, ["[1, 1]", "[1, 3]"]),
    (lambda m: m.embed(IDS, attention_mask=torch.ones(1, 4)), PromptError, ["[1, 4]", "[1, 3]"]),
    (lambda m: m(torch.tensor([[5, 64]])), PromptError, ["0 to 63"]),
    (lambda m: m(torch.tensor([[5, -1]])), PromptError, ["0 to 63"]),
    (lambda m: m(IDS, ntk_alpha=0.5), PromptError, ["from 1 up", "0.5"]),
    (lambda m: m(IDS, ntk_alpha=float("nan")), PromptError, ["from 1 up", "nan"]),
    (lambda m: m(IDS, ntk_alpha=float("inf")), PromptError, ["from 1 up", "inf"]),
    (lambda m: m(IDS, ntk_alpha=[1.0, 3.0]), PromptError, ["1 rows", "[1.0, 3.0]"]),
    (lambda m: m(IDS, ntk_alpha=[]), PromptError, ["1 rows"]),
    (lambda m: m(IDS, ntk_alpha=3, cache=KVCache.allocate(m.config, 1, 3)), PromptError, ["ntk_alpha", "cache"]),
    (lambda m: m(IDS, logits_to_keep=-1), PromptError, ["logits_to_keep", "-1"]),
    (lambda m: m(IDS, cache=KVCache.allocate(m.config, 2, 3)), CacheError, ["2 rows", "1"]),
    (lambda m: m(IDS, cache=KVCache.allocate(m.config, 1, 2)), CacheError, ["2 slots", "3"]),
    (
        lambda m: m(IDS, cache=KVCache.allocate(m.config, 1, 3, torch.bfloat16)),
        CacheError,
        ["bfloat16", "float32"],
    ),
    (too_long, PromptError, ["513", "512"]),
    (too_long_in_steps, PromptError, ["513", "512"]),
]


@pytest.mark.parametrize(("mistake", "kind", "says"), MISTAKES, ids=[", ".join(says) for *_, says in MISTAKES])
def test_mistakes_are_one_line(
    model: QwenVL, mistake: Callable[[QwenVL], Any], kind: type[QwenVLError], says: list[str]
) -> None:
    """Every wrong argument of `forward` is named with what was given and what would be right."""
    with one_line_error(kind, *says):
        mistake(model)


def test_no_images_for_no_spans_is_no_mistake(model: QwenVL) -> None:
    """A batch that happens to have no picture may pass an empty tensor."""
    assert torch.equal(model(IDS, images(0)), model(IDS))


def test_nothing_is_lost_by_a_refused_call(model: QwenVL, config: QwenVLConfig) -> None:
    """After any refusal the cache goes on as if the call had not been made."""
    cache = KVCache.allocate(config, 1, 20)
    first = torch.tensor([[5, *SPAN, 6]])
    model(first, images(1), cache=cache)
    keys, lengths, alphas = cache.keys.clone(), cache.lengths.clone(), cache.alphas.clone()
    for mistake in (
        lambda: model(torch.ones(1, 13, dtype=torch.long), cache=cache),
        lambda: model(torch.ones(2, 1, dtype=torch.long), cache=cache),
        lambda: model(torch.ones(1, 2, dtype=torch.long), images(1), cache=cache),
        lambda: model(torch.ones(1, 2, dtype=torch.long), attention_mask=torch.ones(1, 9), cache=cache),
        lambda: model(torch.ones(1, 2, dtype=torch.long), ntk_alpha=1, cache=cache),
    ):
        with pytest.raises(QwenVLError):
            mistake()
    assert torch.equal(cache.keys, keys)
    assert torch.equal(cache.lengths, lengths)
    assert torch.equal(cache.alphas, alphas)
    fresh = KVCache.allocate(config, 1, 20)
    with pytest.raises(QwenVLError):
        model(torch.ones(1, 21, dtype=torch.long), cache=fresh)
    assert fresh.alphas.tolist() == [0]
