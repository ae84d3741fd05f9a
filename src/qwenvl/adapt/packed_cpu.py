"""A few rows times a packed weight on a CPU: torch's kernel for sums of embeddings (FBGEMM), exact in float32.

    Table          a weight in the order in which the kernel reads it, a byte for each
    arrange        make one
    multiply       rows of activations times the weight
    steps          take it apart
    table_bytes    its size

A bag of embeddings is the sum of some rows of a table, each times a factor: with activations for factors it is a
product with a matrix. A weight is read as one byte, where a product in float32 reads four, and where reading is all
that takes time. A row of the table holds what BLOCK outputs have of one input, so that their sums stay in registers
and memory is read from the front to the back; a bag is one group of inputs, whose scales come after.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 96  # outputs in a row of the table: more do not fit the registers, fewer read more beside each weight
AT_ONCE = 8  # blocks that are arranged at a time, for which some ten bytes a weight are needed on the way
MIDDLE = {4: 16, 8: 128}  # the byte of a weight that is zero; 4-bit values less their zero point are -16 to 15


@dataclass(frozen=True)
class Table:
    """A weight [in, out] without its scales, in blocks of BLOCK outputs; the last block may have some that are unused.

    rows [blocks * in, BLOCK + 8] uint8: bytes, then the factor and the addend that the kernel wants with each row, as
    float32: 1 and minus the middle. indices [blocks * in] int32 and starts [blocks * groups] int32: the rows of each
    bag. inputs: the order of the inputs in a bag, None if it is their own. scales [blocks, groups, BLOCK] float32.
    middle: the byte of a weight that is zero.
    """

    rows: Tensor
    indices: Tensor
    starts: Tensor
    inputs: Tensor | None
    scales: Tensor
    out_features: int
    middle: int


def arrange(steps_of: Callable[[slice], Tensor], scales: Tensor, g_idx: Tensor, bits: int) -> Table | None:
    """The table for scales [groups, out], groups g_idx [in] and the steps (values less their zero points) of some
    outputs at a time, `steps_of(columns)` [in, columns].

    None if a step does not fit into a byte: 8 bits whose zero point is not in the middle.
    """
    middle, inputs, (groups, outputs) = MIDDLE[bits], len(g_idx), scales.shape
    blocks = -(-outputs // BLOCK)
    rows = torch.empty(blocks, inputs, BLOCK + 8, dtype=torch.uint8, device="cpu")
    rows[:, :, BLOCK:] = torch.tensor([1.0, -float(middle)], device="cpu").view(torch.uint8)
    for first in range(0, blocks, AT_ONCE):
        part = rows[first : first + AT_ONCE, :, :BLOCK]
        shifted = steps_of(slice(first * BLOCK, min((first + AT_ONCE) * BLOCK, outputs))).to(torch.int16) + middle
        if bits == 8 and (int(shifted.min()) < 0 or int(shifted.max()) > 255):
            return None
        part.copy_(_in_blocks(shifted.to(torch.uint8), len(part)))
    order = g_idx.argsort(stable=True)
    plain = bool((g_idx[1:] >= g_idx[:-1]).all())
    sizes, firsts = torch.bincount(g_idx, minlength=groups), torch.arange(blocks, device="cpu") * inputs
    return Table(
        rows=rows.view(-1, BLOCK + 8),
        indices=_all_rows(blocks, inputs) if plain else _all_rows(blocks, inputs).view(blocks, -1)[:, order].flatten(),
        starts=(firsts[:, None] + (sizes.cumsum(0) - sizes)).flatten().int(),
        inputs=None if plain else order,
        scales=_in_blocks(scales.float(), blocks).contiguous(),
        out_features=outputs,
        middle=middle,
    )


def table_bytes(inputs: int, outputs: int, groups: int) -> int:
    """What the table of a weight [in, out] takes, its scales included; its indices are small and mostly shared."""
    return -(-outputs // BLOCK) * (inputs * (BLOCK + 8) + groups * BLOCK * 4)


def multiply(rows: Tensor, table: Table) -> Tensor:
    """Activations [rows, in] float32 to [rows, out]. The weights are exact; each row reads them anew."""
    products = [_multiply_one(row, table) for row in rows.unbind()]
    return products[0][None] if len(products) == 1 else torch.stack(products)


def _multiply_one(x: Tensor, table: Table) -> Tensor:
    """[in] to [out]."""
    ordered = x if table.inputs is None else x[table.inputs]
    blocks, groups, _ = table.scales.shape
    factors = ordered.expand(blocks, -1).reshape(-1)  # `repeat` takes twice as long
    sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
        table.rows, table.indices, table.starts, False, 0, False, factors
    )
    sums = sums.view(blocks, groups, BLOCK).mul_(table.scales)
    y: Tensor = (sums if groups == 1 else sums.sum(dim=1)).view(-1)
    return y[: table.out_features]


def steps(table: Table, columns: slice | None = None) -> Tensor:
    """The steps [in, out] int16 that the table was made of, or some columns of them."""
    wanted = columns or slice(0, table.out_features)
    first, last = wanted.start // BLOCK, -(-wanted.stop // BLOCK)
    blocks = table.rows.view(len(table.scales), -1, BLOCK + 8)[first:last, :, :BLOCK]
    joined = blocks.transpose(0, 1).reshape(blocks.shape[1], -1)
    return joined[:, wanted.start - first * BLOCK : wanted.stop - first * BLOCK].to(torch.int16) - table.middle


def _in_blocks(columns: Tensor, blocks: int) -> Tensor:
    """[rows, out] to [blocks, rows, BLOCK], with zeros behind the last."""
    padded = torch.nn.functional.pad(columns, (0, blocks * BLOCK - columns.shape[1]))
    return padded.view(-1, blocks, BLOCK).transpose(0, 1)


@functools.cache
def _all_rows(blocks: int, inputs: int) -> Tensor:
    """One for all layers of a shape: a few hundredths of the table's size."""
    return torch.arange(blocks * inputs, dtype=torch.int32, device="cpu")
