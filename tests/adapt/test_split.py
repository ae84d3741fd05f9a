"""Attention in parts: what torch's attention gives, and torch's own wherever parts do not fit or do not work."""

from collections.abc import Callable

import pytest
import torch
from packed_layers import Pretended
from torch import Tensor
from torch.nn import functional as F

import qwenvl
from qwenvl.adapt import split
from qwenvl.adapt.split import PART, SHORTEST, attend, in_parts, split_attention


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins with parts that were never tried."""
    monkeypatch.setattr(split.SPLIT, "failed", False)
    monkeypatch.setattr(split, "_checked", set())


def one_token(slots: int, seen: int, *, batch: int = 1, tokens: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values, the latter views of a longer cache, and the mask of `seen` slots."""
    generator = torch.Generator().manual_seed(slots + seen)
    query = torch.randn(batch, 3, tokens, 32, generator=generator)
    keys, values = torch.randn(2, batch, 3, slots + 40, 32, generator=generator)[:, :, :, :slots].unbind()
    mask = torch.zeros(1, 1, tokens, slots).masked_fill(torch.arange(slots) >= seen, -torch.inf)
    return query, keys, values, mask


@pytest.mark.parametrize(("parts", "beyond"), [(1, 0), (2, 255), (4, 100), (9, 1)])
def test_parts_are_the_whole(parts: int, beyond: int) -> None:
    """The joined parts are the attention over all slots, whatever the last part hides."""
    query, keys, values, mask = one_token(parts * PART, parts * PART - beyond)
    query *= 4  # so that few keys have most of the weight, in one part
    expected = F.scaled_dot_product_attention(query, keys, values, mask)
    torch.testing.assert_close(in_parts(query, keys, values, mask), expected, atol=1e-6, rtol=1e-5)
    half = in_parts(*(tensor.bfloat16() for tensor in (query, keys, values, mask)))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.05, rtol=0.05)


def on_a_gpu(*tensors: Tensor) -> list[Tensor]:
    return [tensor.as_subclass(Pretended) for tensor in tensors]


def counted(monkeypatch: pytest.MonkeyPatch, instead: Callable[..., Tensor]) -> list[int]:
    """One more entry for each call of `in_parts`, which is `instead` from now on."""
    calls: list[int] = []
    monkeypatch.setattr(split, "in_parts", lambda *parts: (calls.append(1), instead(*parts))[1])
    return calls


def on_the_host(*parts: Tensor) -> Tensor:
    return in_parts(*(part.as_subclass(Tensor) for part in parts))


@torch.no_grad()
def test_where_parts_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one token of one row behind many whole parts, on a GPU alone; all else is torch's attention."""
    calls = counted(monkeypatch, on_the_host)
    query, keys, values, mask = one_token(SHORTEST, SHORTEST - 3)
    expected = F.scaled_dot_product_attention(query, keys, values, mask)
    for _ in range(2):  # held against torch's at first, then not
        found = attend(*on_a_gpu(query, keys, values, mask))
        torch.testing.assert_close(found.as_subclass(Tensor), expected, atol=1e-6, rtol=1e-5)
    assert len(calls) == 2
    assert len(split._checked) == 1
    attend(query, keys, values, mask)  # on a CPU
    attend(*on_a_gpu(query, keys, values), None)
    attend(*on_a_gpu(query, keys, values, mask > -1))  # bool
    for other in (
        one_token(SHORTEST - PART, SHORTEST - PART),
        one_token(SHORTEST + 8, SHORTEST),
        one_token(SHORTEST, SHORTEST, batch=2),
        one_token(SHORTEST, SHORTEST, tokens=2),
    ):
        attend(*on_a_gpu(*other))
    with torch.enable_grad():
        attend(*on_a_gpu(query, keys, values, mask))
    assert len(calls) == 2


@torch.no_grad()
@pytest.mark.parametrize("wrong", [lambda *parts: 1.1 * on_the_host(*parts), lambda *_: torch.full((), torch.nan)])
def test_other_numbers_are_not_used(
    wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Should torch's kernel come to mean something else, its own attention is used, which is told once."""
    calls = counted(monkeypatch, wrong)
    parts = one_token(SHORTEST, SHORTEST)
    expected = F.scaled_dot_product_attention(*parts)
    for _ in range(3):
        assert torch.equal(attend(*on_a_gpu(*parts)).as_subclass(Tensor), expected)
    assert len(calls) == 1
    assert capsys.readouterr().err.count("\n") == 1


@torch.no_grad()
def test_a_kernel_that_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Torch's own attention takes over, which is told once."""

    def fails(*_: Tensor) -> Tensor:
        raise RuntimeError("no such operator")

    counted(monkeypatch, fails)
    parts = one_token(SHORTEST, SHORTEST)
    for _ in range(2):
        assert torch.equal(attend(*on_a_gpu(*parts)).as_subclass(Tensor), F.scaled_dot_product_attention(*parts))
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """The device's kernel gives the sums that the parts are joined by."""
    parts = [tensor.to("cuda", dtype) for tensor in one_token(9 * PART, 9 * PART - 30)]
    expected = F.scaled_dot_product_attention(*(part.double() for part in parts))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(in_parts(*parts).double(), expected, atol=tolerance, rtol=tolerance)
    attend(*parts)
    assert split._checked


def test_a_model_is_told() -> None:
    """All layers of the decoder; on a CPU they go on as before."""
    vl = qwenvl.load("tiny", "cpu", quiet=True)
    before = vl.generate_ids(torch.arange(20)[None], max_new_tokens=4)
    split_attention(vl.model)
    assert all(block.attn.attend is attend for block in vl.model.decoder.blocks)
    assert vl.generate_ids(torch.arange(20)[None], max_new_tokens=4) == before
