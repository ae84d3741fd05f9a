"""One weight to few bits: against GPTQ written out column by column, and what is stored against what was chosen."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import one_line_error
from torch import Tensor
from torch.nn import functional as F

from qwenvl.adapt.packed import PackedLinear
from qwenvl.adapt.quantize import Curvature, Packed, curvature, energy, gptq, round_to_nearest
from qwenvl.config import QuantizationConfig
from qwenvl.errors import ConfigError
from qwenvl.weights.gptq import pack_columns, pack_rows, unpack_columns, unpack_rows, zero_points

INPUTS, OUTPUTS = 304, 16  # two stretches of 128 columns and a part of one
LAYOUTS = [
    QuantizationConfig(bits, group_size, sym, desc_act)
    for bits, group_size, sym, desc_act in itertools.product(
        (4, 8), (32, 48, 128, 144, -1), (True, False), (False, True)
    )
]


def correlated(tokens: int, seed: int = 0, inputs: int = INPUTS) -> Tensor:
    """Inputs [tokens,in] that a few directions explain for the most part, as activations are."""
    mixing = torch.randn(inputs // 8, inputs, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, inputs // 8, generator=generator)
    return hidden @ mixing + 0.3 * torch.randn(tokens, inputs, generator=generator)


def some_weight(seed: int = 1, outputs: int = OUTPUTS, inputs: int = INPUTS) -> Tensor:
    """A weight [out,in]."""
    return 0.05 * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def hessian_of(inputs: Tensor) -> Tensor:
    return 2 * inputs.T @ inputs


def off_by(packed: Packed, weight: Tensor, inputs: Tensor) -> float:
    """Relative error of the outputs."""
    return float((inputs @ (packed.weight() - weight).T).norm() / (inputs @ weight.T).norm())


def grid(values: Tensor, quantization: QuantizationConfig) -> tuple[Tensor, Tensor]:
    """Scale and zero point for each row of values, by the definition, in float64."""
    top = 2**quantization.bits - 1
    if quantization.sym:
        scale = (2 * values.abs().amax(1) / top).half().double()
        return scale, torch.full_like(scale, 2 ** (quantization.bits - 1))
    high = torch.clamp(values.amax(1), min=0)
    low = torch.minimum(values.amin(1), -high / (top - 1))
    scale = ((high - low) / top).half().double()
    return scale, torch.clamp(torch.round(-low / scale), 1, top)


def naive_gptq(weight: Tensor, hessian: Tensor, quantization: QuantizationConfig) -> tuple[Tensor, Tensor]:
    """The paper's equations 2 and 3 as they stand, in float64: codes [out,in] and the group of each column.

    After each column the inverse Hessian loses it by elimination; no Cholesky factor, no stretches.
    """
    remaining, inputs = weight.double().clone(), weight.shape[1]
    diagonal = hessian.diagonal().double()
    inverse = torch.linalg.inv(hessian.double() + 0.01 * diagonal.mean() * torch.eye(inputs, dtype=torch.float64))
    order = diagonal.argsort(descending=True, stable=True) if quantization.desc_act else torch.arange(inputs)
    size = inputs if quantization.group_size == -1 else quantization.group_size
    codes, groups = torch.zeros_like(remaining), torch.zeros(inputs, dtype=torch.int32)
    for number, column in enumerate(order.tolist()):
        if number % size == 0:
            scale, zero = grid(remaining[:, order[number : number + size]], quantization)
        groups[column] = number // size
        wanted = remaining[:, column].clone()
        codes[:, column] = torch.clamp(torch.round(wanted / scale) + zero, 0, 2**quantization.bits - 1)
        error = (wanted - scale * (codes[:, column] - zero)) / inverse[column, column]
        remaining -= error[:, None] * inverse[column][None]
        inverse -= inverse[:, column, None] * inverse[None, column] / inverse[column, column]
    return codes, groups


@pytest.mark.parametrize("quantization", LAYOUTS, ids=str)
def test_gptq_is_the_papers(quantization: QuantizationConfig) -> None:
    """Every code and every group is that of the method written out naively: stretches and factors change nothing.

    But for a value so close to half a step that float32 and float64 round it differently, and then the rest of its row.
    """
    weight, hessian = some_weight(), hessian_of(correlated(700))
    packed = gptq(weight, quantization, curvature(hessian, desc_act=quantization.desc_act))
    codes, groups = naive_gptq(weight, hessian, quantization)
    rows = (codes != unpack_rows(packed.qweight, quantization.bits).T).any(dim=1)
    assert rows.sum() <= quantization.bits // 4  # 0 of 16, or 1 of 16 in two of the cases in 8 bits, when written
    assert torch.equal(packed.g_idx, groups)


@pytest.mark.parametrize("quantization", LAYOUTS, ids=str)
def test_what_is_packed_is_what_was_chosen(quantization: QuantizationConfig) -> None:
    """Packed, unpacked, packed again is the same; a `PackedLinear` has exactly the weight that errors are told of."""
    weight, inputs = some_weight(), correlated(300)
    for packed in (
        round_to_nearest(weight, quantization),
        gptq(weight, quantization, curvature(hessian_of(inputs), desc_act=quantization.desc_act)),
    ):
        bits = quantization.bits
        assert torch.equal(pack_rows(unpack_rows(packed.qweight, bits), bits), packed.qweight)
        assert torch.equal(pack_columns(unpack_columns(packed.qzeros, bits), bits), packed.qzeros)
        zeros = zero_points(packed.qzeros, bits)
        assert zeros.min() >= 1
        assert zeros.max() < 2**bits
        assert not quantization.sym or (zeros == 2 ** (bits - 1)).all()
        layer = PackedLinear(INPUTS, OUTPUTS, quantization)
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in layer.state_dict().items() if name != "bias"}
        assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in vars(packed).items()}
        layer.load_state_dict({**vars(packed), "bias": torch.ones(OUTPUTS)})
        assert torch.equal(layer.weight_in(torch.float32), packed.weight())
        assert torch.equal(layer(inputs), F.linear(inputs, packed.weight(), torch.ones(OUTPUTS)))


@pytest.mark.parametrize("quantization", LAYOUTS, ids=str)
def test_later_inputs_make_up_for_errors(quantization: QuantizationConfig) -> None:
    """With correlated inputs GPTQ's outputs are far closer than rounding's, on inputs that it has not seen, too."""
    weight, seen, unseen = some_weight(), correlated(700), correlated(200, seed=5)
    ours = gptq(weight, quantization, curvature(hessian_of(seen), desc_act=quantization.desc_act))
    nearest = round_to_nearest(weight, quantization)
    assert off_by(ours, weight, seen) < 0.5 * off_by(nearest, weight, seen)
    assert off_by(ours, weight, unseen) < 0.6 * off_by(nearest, weight, unseen)


def test_energy_is_the_outputs_own() -> None:
    """The error that is read off a Hessian is that of the outputs, and off none that of the weight."""
    weight, inputs = some_weight(), correlated(300)
    assert energy(weight, hessian_of(inputs)) == pytest.approx(2 * float((inputs @ weight.T).square().sum()), rel=1e-4)
    assert energy(weight, None) == pytest.approx(float(weight.square().sum()), rel=1e-6)


def test_uncorrelated_inputs_leave_nothing_to_make_up() -> None:
    """Where inputs have nothing to do with each other, GPTQ rounds to nearest."""
    weight, quantization = some_weight(), QuantizationConfig(group_size=32)
    ours = gptq(weight, quantization, curvature(torch.eye(INPUTS)))
    nearest = round_to_nearest(weight, quantization)
    assert all(torch.equal(tensor, vars(nearest)[name]) for name, tensor in vars(ours).items())


@settings(deadline=None, max_examples=50)
@given(st.booleans(), st.sampled_from([4, 8]), st.integers(0, 2**32), st.floats(-6, 3), st.floats(-2, 2))
def test_rounding_stays_within_a_step(sym: bool, bits: int, seed: int, magnitude: float, shift: float) -> None:
    """No weight is off by more than a step, whatever its size and wherever its values lie; zeros stay zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(8, 40, generator=generator) + shift) * 10**magnitude
    weight[0], weight[1], weight[2, :16] = 0, weight[1].abs(), 0
    quantization = QuantizationConfig(bits=bits, group_size=16, sym=sym)
    packed = round_to_nearest(weight, quantization)
    steps = packed.scales.float()[packed.g_idx.long()].T
    # Half a step; another half at the ends, where a symmetric range lacks its last code; and the scale's own rounding,
    # which below float16's normal numbers is absolute.
    assert ((packed.weight() - weight).abs() <= 1.1 * steps + 2.0 ** (bits - 25)).all()
    assert (packed.weight()[0] == 0).all()
    assert (packed.weight()[2, :16] == 0).all()


def test_act_order_takes_the_largest_inputs_first() -> None:
    """Groups hold inputs by their share of the Hessian's diagonal, wherever they are, and a scale for each."""
    hessian = hessian_of(correlated(300) * torch.linspace(0.1, 2, INPUTS)[torch.randperm(INPUTS)])
    quantization = QuantizationConfig(group_size=64, desc_act=True)
    packed = gptq(some_weight(), quantization, curvature(hessian, desc_act=True))
    assert packed.g_idx.bincount().tolist() == [64, 64, 64, 64, 48]
    sizes = [hessian.diagonal()[packed.g_idx == group] for group in range(5)]
    assert all(first.min() >= second.max() for first, second in itertools.pairwise(sizes))


@pytest.mark.parametrize("desc_act", [False, True])
def test_dead_inputs_are_rounded_and_disturb_nobody(desc_act: bool) -> None:
    """Inputs that calibration never saw keep the nearest value, for texts that use them; the others do not notice."""
    inputs, quantization = correlated(300), QuantizationConfig(group_size=-1, desc_act=desc_act)
    inputs[:, 40:72] = 0
    weight = some_weight()
    weight[:, 0] = 1  # gives every row its scale, whatever is passed on
    packed = gptq(weight, quantization, curvature(hessian_of(inputs), desc_act=desc_act))
    nearest = round_to_nearest(weight, quantization)
    assert torch.equal(packed.weight()[:, 40:72], nearest.weight()[:, 40:72])
    alive = [*range(40), *range(72, INPUTS)]
    without = gptq(weight[:, alive], quantization, curvature(hessian_of(inputs[:, alive]), desc_act=desc_act))
    assert torch.equal(packed.weight()[:, alive], without.weight())
    nothing = gptq(weight, quantization, curvature(torch.zeros(INPUTS, INPUTS), desc_act=desc_act))
    assert torch.equal(nothing.weight(), nearest.weight())


def test_factorisation_that_fails_is_damped_more() -> None:
    """A matrix that rounding has made indefinite gets more damping until it can be factorised."""
    hessian = torch.ones(INPUTS, INPUTS) - 0.5 * torch.eye(INPUTS)
    hessian[0, 1] = hessian[1, 0] = 2
    assert torch.linalg.eigvalsh(hessian)[0] < -0.01
    curved = curvature(hessian)
    assert curved.factor.isfinite().all()
    assert gptq(some_weight(), QuantizationConfig(), curved).weight().isfinite().all()


def test_factor_is_the_inverses() -> None:
    """U^T U times the damped Hessian is the identity, with U upper triangular, in the order of the columns."""
    hessian = hessian_of(correlated(300))
    curved: Curvature = curvature(hessian, desc_act=True)
    exact = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(INPUTS, dtype=torch.float64)
    upper = curved.factor.double()
    assert torch.equal(upper, upper.triu())
    product = upper.T @ upper @ exact[curved.order][:, curved.order]
    torch.testing.assert_close(product, torch.eye(INPUTS, dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(value: float) -> None:
    """Weights, activations and scales beyond float16 are one line, never a folder of NaN."""
    hessian, weight = hessian_of(correlated(50)), some_weight()
    hessian[3, 5] = value
    with one_line_error(ConfigError, "activations that are no numbers"):
        curvature(hessian)
    for wrong in (value, 1e7):
        weight[2, 7] = wrong
        with one_line_error(ConfigError, "not a number, or too large"):
            round_to_nearest(weight, QuantizationConfig())


def test_layout_is_autogptqs(goldens: Path) -> None:
    """For a linear of a golden's size, tensors have AutoGPTQ's names, dtypes and shapes, and its zeros and groups."""
    golden = load_file(goldens / "gptq" / "cases.safetensors")
    outputs, inputs = golden["A.dequant_weight"].shape
    inputs_seen = correlated(300, inputs=inputs)
    packed = gptq(some_weight(1, outputs, inputs), QuantizationConfig(), curvature(hessian_of(inputs_seen)))
    for name, tensor in vars(packed).items():
        assert (tensor.dtype, tensor.shape) == (golden[f"A.{name}"].dtype, golden[f"A.{name}"].shape), name
    assert torch.equal(packed.qzeros, golden["A.qzeros"])
    assert torch.equal(packed.g_idx, golden["A.g_idx"])


def test_rounding_gives_the_goldens_back(goldens: Path) -> None:
    """The weight of a golden in which every group reaches its ends is packed as AutoGPTQ packed it, bit for bit."""
    golden = load_file(goldens / "gptq" / "cases.safetensors")
    quantization = QuantizationConfig(group_size=128, sym=False)
    qweight, qzeros, scales, g_idx = (golden[f"C.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx"))
    codes, zeros = unpack_rows(qweight), zero_points(qzeros, 4)
    packed = round_to_nearest(golden["C.dequant_weight"], quantization)
    groups = codes.view(len(scales), -1, codes.shape[1])
    whole = (groups.amin(1) == 0) & (groups.amax(1) == 15) & (zeros > 0)  # [groups,out]
    assert whole.float().mean() > 0.5
    same = (unpack_rows(packed.qweight) == codes).view(groups.shape).all(1)
    assert same[whole].all()
    assert torch.equal(packed.scales[whole], scales[whole])
    assert torch.equal(zero_points(packed.qzeros, 4)[whole], zeros[whole])
    assert torch.equal(packed.g_idx, g_idx)
