"""Attention of one token: the Triton kernel itself where Triton is; and everywhere when it is taken, and trusted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import triton_runs
from packed_layers import Pretended
from support import random_model, small_config
from torch import Tensor
from torch.nn import functional as F

import qwenvl
from qwenvl.adapt import attend as module
from qwenvl.adapt.attend import attend, attend_faster

KERNEL = "qwenvl.adapt.attend_triton"


@pytest.mark.parametrize("where", triton_runs.WHERE)
def test_the_kernel_itself(where: str) -> None:
    """It gives what torch's attention gives, for rows of any lengths, layouts, masks and dtypes."""
    triton_runs.run("interpreted_attend.py", where)


class StandIn(ModuleType):
    """In the place of the kernel: `instead`, counted."""

    def __init__(self, instead: Callable[..., Tensor] = F.scaled_dot_product_attention) -> None:
        super().__init__(KERNEL)
        self.calls, self.instead = 0, instead

    def attend(self, *parts: Tensor) -> Tensor:
        self.calls += 1
        return self.instead(*(part.as_subclass(Tensor) for part in parts))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A kernel that works and was never tried."""
    kernel = StandIn()
    monkeypatch.setitem(sys.modules, KERNEL, kernel)
    for known in (module.TRITON, module.ONE_TOKEN):
        monkeypatch.setattr(known, "failed", False)
    monkeypatch.setattr(module, "_checked", set())
    return kernel


def inputs(*, rows: int = 1, tokens: int = 1, size: int = 32, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys, values and an added mask of 40 slots, that say they are on a GPU."""
    generator = torch.Generator().manual_seed(rows)
    query = torch.randn(rows, 3, tokens, size, generator=generator)
    keys, values = torch.randn(2, rows, 3, 40, size, generator=generator).unbind()
    lengths = torch.arange(rows)[:, None, None, None] + 20
    mask = torch.zeros(rows, 1, tokens, 40).masked_fill(torch.arange(40) >= lengths, -torch.inf)
    return [tensor.to(dtype).as_subclass(Pretended) for tensor in (query, keys, values, mask)]


def torchs(*parts: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(part.as_subclass(Tensor) for part in parts))


@torch.no_grad()
def test_checked_once_then_trusted(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first result of each dtype, head size, of one row and of several, is held against torch's; later ones, as
    while a graph is captured, where nothing may be compared, are the kernel's alone.
    """
    kinds = [{}, {"rows": 4}, {"dtype": torch.bfloat16}, {"rows": 4, "dtype": torch.bfloat16}, {"size": 64}]
    for kind in kinds:
        parts = inputs(**kind)
        torch.testing.assert_close(attend(*parts).as_subclass(Tensor), torchs(*parts))
    assert stand_in.calls == len(module._checked) == len(kinds)
    expected = {str(kind): torchs(*inputs(**kind)) for kind in kinds}
    stand_in.instead = lambda *parts: torch.full_like(parts[0], 7.0)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("torch's attention ran"))
    for kind in kinds:
        found = attend(*inputs(**kind))
        assert found.shape == expected[str(kind)].shape
        assert (found == 7).all()


@torch.no_grad()
def test_what_is_not_for_the_kernel(stand_in: StandIn) -> None:
    """A CPU, several tokens, no mask, a boolean one, odd sizes and dtypes, and wherever gradients are wanted."""
    parts = inputs()
    others = [
        [part.as_subclass(Tensor) for part in parts],
        inputs(tokens=2),
        inputs(size=8),
        inputs(size=48),
        inputs(size=512),
        inputs(dtype=torch.float64),
        parts[:3],
        [*parts[:3], parts[3] == 0],
    ]
    for other in others:
        assert torch.equal(attend(*other).as_subclass(Tensor), torchs(*other))
    with torch.enable_grad():
        attend(*parts)
    attend(*(part[:, :, -1:] for part in parts[:3]), is_causal=True)
    assert stand_in.calls == 0
    attend(*parts)
    assert stand_in.calls == 1


@torch.no_grad()
def test_not_while_compiling(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` cannot follow the check, and has attention of its own."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    attend(*inputs())
    assert stand_in.calls == 0


WRONG = [lambda *parts: 1.1 * torchs(*parts), lambda *parts: torch.full_like(parts[0], torch.nan)]


@torch.no_grad()
@pytest.mark.parametrize("wrong", WRONG, ids=["other numbers", "NaN"])
def test_other_numbers_are_not_used(
    stand_in: StandIn, capsys: pytest.CaptureFixture[str], wrong: Callable[..., Tensor]
) -> None:
    """Should a device or a Triton to come make something else of the kernel: torch's attention, which is told once."""
    stand_in.instead = wrong
    for rows in (1, 4, 1, 4):
        parts = inputs(rows=rows)
        assert torch.equal(attend(*parts).as_subclass(Tensor), torchs(*parts))
    assert stand_in.calls == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("the Triton kernel for attention of one token cannot be used here (it does not give")


@torch.no_grad()
def test_several_rows_are_checked_by_themselves(stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    """A kernel that is right for one row is not believed for four."""
    attend(*inputs())
    stand_in.instead = lambda *parts: torchs(*parts).roll(1, 0)
    parts = inputs(rows=4)
    assert torch.equal(attend(*parts).as_subclass(Tensor), torchs(*parts))
    assert capsys.readouterr().err.count("\n") == 1


@torch.no_grad()
def test_a_kernel_that_fails(stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    """No compiler, an odd device: torch's own attention takes over, which is told once."""

    def fails(*_: Tensor) -> Tensor:
        raise RuntimeError("no compiler")

    stand_in.instead = fails
    for _ in range(2):
        assert torch.equal(attend(*inputs()).as_subclass(Tensor), torchs(*inputs()))
    assert stand_in.calls == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert "(no compiler)" in told


@torch.no_grad()
@pytest.mark.usefixtures("stand_in")
def test_without_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Torch's own attention, and one line for all that would be Triton's."""
    monkeypatch.setitem(sys.modules, KERNEL, None)
    for _ in range(2):
        assert torch.equal(attend(*inputs()).as_subclass(Tensor), torchs(*inputs()))
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("Triton cannot be used here (")


@torch.no_grad()
def test_steps_are_for_the_kernel(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `Decoder.step` asks for is what the kernel takes, of several rows too: a boolean mask would not be."""

    def on_a_gpu(*parts: Tensor, is_causal: bool) -> Tensor:
        return attend(*(part.as_subclass(Pretended) for part in parts), is_causal=is_causal)

    model = random_model(small_config())
    for block in model.decoder.blocks:
        monkeypatch.setattr(block.attn, "attend", on_a_gpu)
    for rows in (1, 3):
        model.decoder.step(torch.arange(rows), qwenvl.KVCache.allocate(model.config, rows, 64))
    assert stand_in.calls == 2 * len(model.decoder.blocks)


def test_a_model_is_told() -> None:
    """All layers of the decoder; on a CPU they go on as before."""
    vl = qwenvl.load("tiny", "cpu", quiet=True)
    before = vl.generate_ids(torch.arange(20)[None], max_new_tokens=4)
    attend_faster(vl.model)
    assert all(block.attn.attend is attend for block in vl.model.decoder.blocks)
    assert vl.generate_ids(torch.arange(20)[None], max_new_tokens=4) == before
