"""A weight to 4 or 8 bits: to the nearest steps, or by GPTQ (arXiv 2210.17323), which lets later inputs make up for it.

    Packed              a quantised weight, as checkpoints store it
    round_to_nearest    every value to the step that is nearest
    curvature           what GPTQ has to know of a linear's inputs
    gptq                column by column, what each was rounded by is passed on to those still to come
    energy              how large outputs are; of a difference of weights, how far apart

A group of inputs shares a scale and a zero point, chosen by its smallest and largest value. Scales are rounded to
float16, as they are stored, before anything is divided by them: what is packed is exactly what was chosen. All is
computed in float32 whatever the model's dtype, and row by row, so that outputs know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..config import QuantizationConfig
from ..errors import ConfigError
from ..weights.gptq import dequantize, pack_columns, pack_rows

DAMPING = 0.01  # of the Hessian's mean diagonal, as in the paper
STRETCH = 128  # columns whose errors reach the others in one product, as in the paper
SMALLEST_SCALE = 2.0**-24  # the least that float16 tells from zero


@dataclass(frozen=True)
class Packed:
    """The tensors of one linear as `weights/gptq.py` describes them, but for the bias."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def weight(self) -> Tensor:
        """What they stand for: [out,in] float32, exactly."""
        return dequantize(self.qweight, self.qzeros, self.scales.float(), self.g_idx)

    def to(self, device: torch.device | str) -> Packed:
        """The same on another device."""
        return Packed(**{part.name: getattr(self, part.name).to(device) for part in fields(self)})

    @classmethod
    def join(cls, parts: Sequence[Packed]) -> Packed:
        """Outputs that were quantised by themselves, as one linear."""
        words, zeros, scales = (torch.cat([getattr(p, n) for p in parts], 1) for n in ("qweight", "qzeros", "scales"))
        return cls(words, zeros, scales, parts[0].g_idx)


@dataclass(frozen=True)
class Curvature:
    """How the squared error of a linear's outputs grows with changes of its weight.

    order [in]: columns in the order in which they are quantised. factor [in,in] float32: the upper triangular U with
    U^T U = (H + damping)^-1, its rows and columns in that order; H = 2 X^T X over the calibration inputs X [tokens,in].
    """

    order: Tensor
    factor: Tensor


def curvature(hessian: Tensor, *, desc_act: bool = False) -> Curvature:
    """Damp and factorise a Hessian [in,in]. desc_act: largest diagonal first (act-order), else as the columns are.

    Dead inputs, which calibration never saw other than zero, are cut off from all others: they are rounded to the
    nearest step, and not set to zero as in the authors' code, since other texts may use them. Where the factorisation
    fails numerically, damping grows tenfold until it does not. Raises ConfigError if the Hessian is not finite.
    """
    # In float64, since the matrix may be close to singular; Metal has none.
    exact = (hessian.cpu() if hessian.is_mps else hessian).to(torch.float64, copy=True)
    if not exact.sum().isfinite():
        raise ConfigError("calibration made activations that are no numbers: the weights or this dtype cannot be used")
    diagonal = exact.diagonal()
    order = (
        diagonal.argsort(descending=True, stable=True) if desc_act else torch.arange(len(exact), device=exact.device)
    )
    live = diagonal != 0
    mean = diagonal[live].mean() if live.any() else torch.ones_like(diagonal[0])
    diagonal[~live] = mean
    if desc_act:
        exact = exact[order][:, order]
    undamped, damping = exact.diagonal().clone(), DAMPING
    while True:
        exact.diagonal().copy_(undamped + damping * mean)
        # From the last column to the first, it is R R^T with R upper triangular; the U that is sought is R^-1.
        lower, failed = torch.linalg.cholesky_ex(exact.flip(0, 1))
        if not failed:
            break
        damping *= 10
    upper = lower.flip(0, 1)
    del diagonal, exact, lower  # a gigabyte each, for the widest linear of the published model
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    factor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return Curvature(order.to(hessian.device), factor.float().to(hessian.device))


def round_to_nearest(weight: Tensor, quantization: QuantizationConfig) -> Packed:
    """Quantise a weight [out,in] value by value. Raises ConfigError if it holds what no float16 scale can reach."""
    codes, grids = [], []
    for group in torch.split(weight.float(), _group_size(weight, quantization), dim=1):
        scale, zero = _grid(group, quantization)
        codes.append(_nearest(group, scale[:, None], zero[:, None], quantization))
        grids.append((scale, zero))
    return _pack(torch.cat(codes, dim=1), grids, _groups(weight, quantization), quantization)


def gptq(weight: Tensor, quantization: QuantizationConfig, curved: Curvature) -> Packed:
    """Quantise a weight [out,in] so that the outputs for the calibration inputs stay close.

    Raises ConfigError as `round_to_nearest` does.
    """
    codes, grids = _propagate(weight.float()[:, curved.order], curved.factor, quantization)
    back = curved.order.argsort()
    return _pack(codes[:, back], grids, _groups(weight, quantization)[back], quantization)


def energy(weight: Tensor, hessian: Tensor | None) -> float:
    """The summed squares of x W^T over the inputs x behind a Hessian, times two; without one, of the weight itself."""
    weighted = weight if hessian is None else weight @ hessian
    return float((weighted * weight).sum())


def _group_size(weight: Tensor, quantization: QuantizationConfig) -> int:
    """Inputs of a group, the last one excepted."""
    return weight.shape[1] if quantization.group_size == -1 else quantization.group_size


def _groups(weight: Tensor, quantization: QuantizationConfig) -> Tensor:
    """The group of each column [in], in the order of quantisation."""
    return torch.arange(weight.shape[1], device=weight.device) // _group_size(weight, quantization)


def _grid(group: Tensor, quantization: QuantizationConfig) -> tuple[Tensor, Tensor]:
    """Scale (float32, with a float16's value) and zero point [out] for a group's values [out,columns]."""
    top = 2**quantization.bits - 1
    if quantization.sym:
        scale = 2 * group.abs().amax(dim=1) / top
    else:
        # Zero points are stored minus one, so 0 cannot be: the range goes a step below zero in any case.
        high = group.amax(dim=1).clamp(min=0)
        low = group.amin(dim=1).minimum(-high / (top - 1))
        scale = (high - low) / top
    scale = scale.clamp(min=SMALLEST_SCALE).half().float()
    if not scale.isfinite().all():
        raise ConfigError("a weight is not a number, or too large for scales in float16")
    if quantization.sym:
        return scale, torch.full_like(scale, (top + 1) // 2)
    return scale, (-low / scale).round().clamp(1, top)


def _nearest(values: Tensor, scale: Tensor, zero: Tensor, quantization: QuantizationConfig) -> Tensor:
    """The codes, from 0, of values whose weight they stand for is scale * (code - zero); as float32."""
    return (values / scale).round_().add_(zero).clamp_(0, 2**quantization.bits - 1)


def _stretches(columns: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Begin and end of runs of up to 128 columns, such that a group begins with a run or lies within one.

    So all that is passed on to a group has reached it when its scale is chosen.
    """
    step = group_size if group_size >= STRETCH else STRETCH // group_size * group_size
    for start in range(0, columns, step):
        end = min(start + step, columns)
        for begin in range(start, end, STRETCH):
            yield begin, min(begin + STRETCH, end)


def _propagate(
    weight: Tensor, factor: Tensor, quantization: QuantizationConfig
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """GPTQ's loop over the columns of a weight [out,in], which is used up: codes [out,in] and the groups' grids.

    A column's error divided by its diagonal element, times the rest of its row of the factor, is what makes the least
    of the error in the outputs (paper, section 3.3). Within a stretch it is passed on at once, beyond it at the end.
    """
    codes, grids = torch.empty_like(weight), []
    columns, size = weight.shape[1], _group_size(weight, quantization)
    for begin, end in _stretches(columns, size):
        errors = torch.empty_like(weight[:, begin:end])
        for column in range(begin, end):
            if column % size == 0:
                grids.append(_grid(weight[:, column : column + size], quantization))
            scale, zero = grids[-1]
            codes[:, column] = _nearest(weight[:, column], scale, zero, quantization)
            error = (weight[:, column] - scale * (codes[:, column] - zero)) / factor[column, column]
            weight[:, column + 1 : end].addr_(error, factor[column, column + 1 : end], alpha=-1)
            errors[:, column - begin] = error
        weight[:, end:].addmm_(errors, factor[begin:end, end:], alpha=-1)
    return codes, grids


def _pack(
    codes: Tensor, grids: Sequence[tuple[Tensor, Tensor]], groups: Tensor, quantization: QuantizationConfig
) -> Packed:
    """Codes [out,in], scale and zero point [out] of each group, and the group of each column, as they are stored."""
    scales, zeros = (torch.stack(parts) for parts in zip(*grids, strict=True))  # [groups,out]
    return Packed(
        pack_rows(codes.T, quantization.bits),
        pack_columns(zeros - 1, quantization.bits),
        scales.half(),
        groups.to(torch.int32),
    )
