"""Triton kernels for GPTQ weights as they are published: packed codes, float16 scales, zero points minus one.

    matvec        y = x W^T + b for 1 to 16 rows, straight from the packed words
    dequantize    the whole weight [out, in], for products with many rows

Both take the codes of 4 or 8 bits and zero points of any value; `matvec` wants the inputs of a group to be neighbours,
`dequantize` also takes groups in any order (act-order). The words may be some of the columns of a wider matrix, as the
halves of a fused weight are.

Neither uses atomics, so equal calls give equal bits. Nothing is tuned at run time and nothing waits for the device, so
both can be captured in a CUDA graph, each combination of sizes, dtype and alignment having run once before. Triton 3.3
or newer; it comes with torch for CUDA.

Conversions from integers are slow on the device, so a code is put into the mantissa of a float instead: with its lowest
bit at bit AT, the float is 2^(23-AT) + code. A scale has 11 significant bits, so scale * (2^(23-AT) + code) and
scale * (2^(23-AT) + zero) are exact in float32, and so is their difference, scale * (code - zero).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 16
BLOCK_N = 32  # columns to a strip: a row of it is one 128-byte line, and 4096 outputs make 128 strips
MANY = 2 * 132  # strips that give each of an H100's processors two; with fewer, a program gets more warps
EXPONENT_12, EXPONENT_16 = 0x45000000, 0x43000000  # the bits of 2^11 and 2^7


@triton.jit
def _code(packed: tl.tensor, exponent: tl.tensor, LOW: tl.constexpr, AT: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """2^(23-AT) + the code at bit LOW of every word, as float32."""
    moved = packed << (AT - LOW) if LOW < AT else packed >> (LOW - AT)
    return ((moved & (((1 << BITS) - 1) << AT)) | exponent).to(tl.float32, bitcast=True)


@triton.jit
def _scaling(
    qzeros: tl.tensor, scales: tl.tensor, start: tl.tensor, n: tl.tensor, stride: tl.tensor, words: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Scales and zeros [LANES, N], in float32, of this program's columns and of the group of each word `start`."""
    PER: tl.constexpr = 32 // BITS
    cols = tl.program_id(0) * N + tl.arange(0, N)
    zcols = tl.program_id(0) * (N // PER) + tl.arange(0, N // PER)
    group, live = (start // GROUP)[:, None], (start < words)[:, None]
    s = tl.load(scales + group * stride + cols[None, :], mask=live & (cols < n)[None, :], other=0.0).to(tl.float32)
    z = tl.load(qzeros + group * (stride // PER) + zcols[None, :], mask=live & (zcols < n // PER)[None, :], other=0)
    z = (z[:, :, None] >> (tl.arange(0, PER) * BITS)[None, None, :]) & ((1 << BITS) - 1)
    return s, tl.reshape(z, [LANES, N]).to(tl.float32) + 1.0


@triton.jit
def _fma_kernel(
    x: tl.tensor, qweight: tl.tensor, qzeros: tl.tensor, scales: tl.tensor, bias: tl.tensor, y: tl.tensor,
    n: tl.tensor, stride: tl.tensor, x_stride: tl.tensor, exponent12: tl.tensor, exponent16: tl.tensor,
    words: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr, LANES: tl.constexpr,
    N: tl.constexpr, EVEN: tl.constexpr,
) -> None:  # fmt: skip
    """One row of x and one strip of N columns; LANES runs of WORDS words at a time, each thread with sums of its own.

    The exponents are arguments, not constants, because a constant would cost the compiler a second instruction.
    """
    PER: tl.constexpr = 32 // BITS
    x += tl.program_id(1) * x_stride
    cols = tl.program_id(0) * N + tl.arange(0, N)
    acc = tl.zeros([LANES, N], tl.float32)
    for first in tl.range(0, words, LANES * WORDS, num_stages=3):
        start = first + tl.arange(0, LANES) * WORDS
        here = (start < words)[:, None] & (cols < n)[None, :]
        s, z = _scaling(qzeros, scales, start, n, stride, words, BITS, GROUP, LANES, N)
        zero12, zero16 = -s * (2048.0 + z), -s * (128.0 + z)
        for c in tl.static_range(WORDS):
            packed = tl.load(qweight + (start + c)[:, None] * stride + cols[None, :], mask=here, other=0)
            for j in tl.static_range(PER):
                if EVEN:
                    xs = tl.load(x + (start + c) * PER + j)
                else:
                    xs = tl.load(x + (start + c) * PER + j, mask=start < words, other=0.0)
                if BITS == 4 and j % 2 == 0:  # with two places for the codes, eight of them need four shifts
                    w = tl.fma(_code(packed, exponent16, j * BITS, 16, BITS), s, zero16)
                else:
                    w = tl.fma(_code(packed, exponent12, j * BITS, 12, BITS), s, zero12)
                acc = tl.fma(xs.to(tl.float32)[:, None], w, acc)
    total = tl.sum(acc, axis=0)
    if bias is not None:
        total += tl.load(bias + cols, mask=cols < n, other=0.0).to(tl.float32)
    tl.store(y + tl.program_id(1) * n + cols, total.to(y.dtype.element_ty), mask=cols < n)


@triton.jit(do_not_specialize=["rows"])  # else it is compiled again for 16
def _dot_kernel(
    x: tl.tensor, qweight: tl.tensor, qzeros: tl.tensor, scales: tl.tensor, bias: tl.tensor, y: tl.tensor,
    rows: tl.tensor, n: tl.tensor, stride: tl.tensor, x_stride: tl.tensor, exponent12: tl.tensor, exponent16: tl.tensor,
    words: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr, LANES: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr,
) -> None:  # fmt: skip
    """M rows of 16-bit x on tensor cores, where code - zero is exact; scales multiply the groups' float32 sums."""
    PER: tl.constexpr = 32 // BITS
    m, cols = tl.arange(0, M), tl.program_id(0) * N + tl.arange(0, N)
    acc = tl.zeros([LANES, M, N], tl.float32)
    for first in tl.range(0, words, LANES * WORDS, num_stages=2):
        start = first + tl.arange(0, LANES) * WORDS
        word = start[:, None] + tl.arange(0, WORDS)[None, :]
        k = start[:, None] * PER + tl.arange(0, WORDS * PER)[None, :]
        here = (start < words)[:, None, None] & (cols < n)[None, None, :]
        packed = tl.load(qweight + word[:, :, None] * stride + cols[None, None, :], mask=here, other=0)
        s, z = _scaling(qzeros, scales, start, n, stride, words, BITS, GROUP, LANES, N)
        here = (m < rows)[None, :, None] & (start < words)[:, None, None]
        xs = tl.load(x + m[None, :, None] * x_stride + k[:, None, :], mask=here, other=0.0)
        part = tl.zeros([LANES, M, N], tl.float32)
        for j in tl.static_range(PER):
            every = xs  # becomes xs[:, :, j::PER], the inputs of the words' codes j
            for level in tl.static_range(3 if BITS == 4 else 2):
                even, odd = tl.split(tl.reshape(every, [LANES, M, WORDS * (PER >> (level + 1)), 2]))
                every = odd if (j >> level) % 2 == 1 else even
            if BITS == 4 and j % 2 == 0:
                q = _code(packed, exponent16, j * BITS, 16, BITS) - (128.0 + z)[:, None, :]
            else:
                q = _code(packed, exponent12, j * BITS, 12, BITS) - (2048.0 + z)[:, None, :]
            part = tl.dot(every, q.to(xs.dtype), part)
        acc = tl.fma(part, s[:, None, :], acc)
    total = tl.sum(acc, axis=0)
    if bias is not None:
        total += tl.load(bias + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    here = (m < rows)[:, None] & (cols < n)[None, :]
    tl.store(y + m[:, None] * n + cols[None, :], total.to(y.dtype.element_ty), mask=here)


@triton.jit
def _dequantize_kernel(
    qweight: tl.tensor, qzeros: tl.tensor, scales: tl.tensor, g_idx: tl.tensor, out: tl.tensor,
    n: tl.tensor, stride: tl.tensor, words: tl.tensor, BITS: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr,
    N: tl.constexpr,
) -> None:  # fmt: skip
    """N columns by WORDS words; read along the columns, written along the rows of `out`.

    The words are all of one group of GROUP words; or, where `g_idx` is given, each of their inputs is of its own.
    """
    PER: tl.constexpr = 32 // BITS
    cols = tl.program_id(0) * N + tl.arange(0, N)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    here = (cols < n)[:, None] & (word < words)[None, :]
    packed = tl.load(qweight + word[None, :] * stride + cols[:, None], mask=here, other=0)
    shifts = (tl.arange(0, PER) * BITS)[None, None, :]
    inputs = word[:, None] * PER + tl.arange(0, PER)[None, :]
    if g_idx is None:
        group = tl.program_id(1) * WORDS // GROUP
        s = tl.load(scales + group * stride + cols, mask=cols < n, other=0.0)[:, None, None]
        z = tl.load(qzeros + group * (stride // PER) + cols // PER, mask=cols < n, other=0)[:, None, None]
    else:
        group = tl.load(g_idx + inputs, mask=(word < words)[:, None], other=0)[None, :, :]
        s = tl.load(scales + group * stride + cols[:, None, None], mask=here[:, :, None], other=0.0)
        z = tl.load(qzeros + group * (stride // PER) + (cols // PER)[:, None, None], mask=here[:, :, None], other=0)
    zero = ((z >> (cols % PER * BITS)[:, None, None]) & ((1 << BITS) - 1)) + 1
    steps = ((packed[:, :, None] >> shifts) & ((1 << BITS) - 1)) - zero
    weight = steps.to(tl.float32) * s.to(tl.float32)
    at = cols[:, None, None] * (words * PER) + inputs[None, :, :]
    tl.store(out + at, weight.to(out.dtype.element_ty), mask=here[:, :, None])


def _whole(words: int, group: int, most: int) -> int:
    """The largest power of two up to `most` that divides both: no run of so many words ends or changes group inside."""
    while words % most or group % most:
        most //= 2
    return most


def _packed(qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """The three as the kernels read them, and how many columns lie between their rows."""
    stride = qweight.stride(0)
    if qweight.stride(1) != 1 or qzeros.stride() != (stride * bits // 32, 1) or scales.stride() != (stride, 1):
        qweight, qzeros, scales = qweight.contiguous(), qzeros.contiguous(), scales.contiguous()
        stride = qweight.shape[1]
    return qweight, qzeros, scales, stride


def matvec(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None = None, *,
           group_size: int, bits: int) -> Tensor:  # fmt: skip
    """Multiply x [rows, in] by the packed weight and add `bias`, in the dtype of x; 1 to 16 rows, however far apart.

    Weights are exactly scale * (code - zero), sums are float32. One row, float32 rows and groups under 16 words are
    multiplied row by row; other rows share one pass over the weight. Either way a strip's program reads all its words.
    """
    (words, n), rows, group = qweight.shape, x.shape[0], group_size * bits // 32
    assert 1 <= rows <= MAX_ROWS, f"{rows} rows"
    assert x.shape[1] * bits == words * 32, f"{x.shape[1]} inputs for {words} words of {bits}-bit codes"
    assert group_size * bits % 32 == 0, f"a word of {bits}-bit codes is not all of one group of {group_size}"
    assert scales.dtype == torch.float16, "with more bits in a scale the products would not be exact"
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    qweight, qzeros, scales, stride = _packed(qweight, qzeros, scales, bits)
    packed, sizes = (qweight, qzeros, scales, bias, y), (n, stride, x.stride(0), EXPONENT_12, EXPONENT_16, words)
    strips = triton.cdiv(n, BLOCK_N)
    # Triton's interpreter, which runs on the CPU, multiplies bfloat16 wrongly.
    dots = x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and x.is_cuda)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call] # a kernel is started on the current device, wherever its arguments are
        if rows > 1 and dots and _whole(words, group, 16) == 16:
            warps = 8 if strips < MANY else 4
            _dot_kernel[(strips,)](x, *packed, rows, *sizes, BITS=bits, GROUP=group, WORDS=16, LANES=warps, N=BLOCK_N,
                                   M=MAX_ROWS, num_warps=warps)  # fmt: skip
        else:
            warps, run = 16 if strips * rows < MANY else 8, _whole(words, group, 4)
            _fma_kernel[(strips, rows)](x, *packed, *sizes, BITS=bits, GROUP=group, WORDS=run, LANES=4 * warps,
                                        N=BLOCK_N, EVEN=words % (4 * warps * run) == 0, num_warps=warps)  # fmt: skip
    return y


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, *, group_size: int | None, bits: int,
               dtype: torch.dtype) -> Tensor:  # fmt: skip
    """The weight [out, in] in `dtype`, each value computed exactly and rounded once; nothing else is made on the way.

    Where groups stand in order, `group_size` says so and spares reading `g_idx` [in]; else it is None.
    """
    words, n = qweight.shape
    assert scales.dtype == torch.float16, "with more bits in a scale the products would not be exact"
    ordered = group_size is not None and group_size * bits % 32 == 0
    group = group_size * bits // 32 if ordered and group_size else 16
    run = _whole(group, group, 16)
    out = torch.empty(n, words * 32 // bits, dtype=dtype, device=qweight.device)
    assert out.numel() < 2**31, f"{out.numel()} weights are more than these kernels can count"
    qweight, qzeros, scales, stride = _packed(qweight, qzeros, scales, bits)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        _dequantize_kernel[(triton.cdiv(n, 64), triton.cdiv(words, run))](
            qweight, qzeros, scales, None if ordered else g_idx, out, n, stride, words, BITS=bits, GROUP=group,
            WORDS=run, N=64, num_warps=4,
        )  # fmt: skip
    return out
