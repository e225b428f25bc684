"""Gradient of an embedding table from the gradients of its looked-up rows.

    table_grad[r] += scale * sum of grad_rows[n] over all n with indices[n] == r

`sort_rows` orders the positions by row once per micro-step: every table that is indexed by the
same tokens shares the order. Equal rows are then segments of the sorted positions. A program sums
L consecutive ones: a segment wholly inside goes straight into the table; the sums of a segment
that enters from the block before or leaves into the next are partial, and go to a buffer, from
which the block where the segment starts collects them in a second kernel. No atomics: the order of
every sum is fixed. Rows that do not occur are neither read nor written.

Bytes for N positions of width C at s bytes and D distinct rows at t bytes: N*C*s read, and D*C*t
read and written; partial sums add at most 16*N*C/L. FLOPs: N*C. The serial counterpart is
torch.embedding_dense_backward, which writes a dense gradient that must still be added.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nanofuse.kernels.bigram_rows import bigram_rows
from nanofuse.kernels.common.tuning import Tile, tuned

TILE = Tile(rows=64, cols=256, warps=1)  # one 16-byte bf16 load per lane and row
SPAN_TILE = Tile(rows=64, cols=128, warps=4)  # partial sums added at once


@dataclass(frozen=True)
class SortedRows:
    """Positions ordered by the table row that they look up; equal rows keep their order."""

    rows: torch.Tensor  # (N,) int32, ascending
    order: torch.Tensor  # (N,) int32: the position that rows[i] comes from
    num_rows: int  # rows of the table


def embedding_grad_ref(
    grad_rows,  # (N, C)
    indices,  # (N,) or (B, T) integer
    table_grad,  # (R, C); not written
    scale=None,  # number, or one-element tensor
):
    """New (R, C) gradient of the table: table_grad plus the scaled rows, in table_grad's dtype."""
    rows = grad_rows.to(table_grad.dtype)
    if scale is not None:
        rows = rows * scale
    return table_grad.index_add(0, indices.flatten(), rows)


@triton.jit
def _load_position(
    i,  # sorted position
    stop,  # end of the block
    previous,  # row before the block, -1 at the start
    following,  # row after the block, -1 at the end
    rows_ptr,  # (N,) int32
    order_ptr,  # (N,) int32
    grad_ptr,  # (N, C), rows grad_stride apart
    table_ptr,  # (R, C), rows table_stride apart
    R,
    grad_stride,
    table_stride,
    C,
    col,  # (BC,)
):
    """Gradient row of position i, where its segment goes if it ends here, and what is there."""
    valid = i < stop
    row = tl.load(rows_ptr + i, mask=valid, other=-1)
    after = tl.load(rows_ptr + i + 1, mask=i + 1 < stop, other=-1)
    source = tl.load(order_ptr + i, mask=valid, other=0).to(tl.int64)
    ends = valid & (row != after)
    spans = ends & ((row == previous) | ((i == stop - 1) & (row == following)))
    flush = ends & (spans == 0) & (row >= 0) & (row < R)
    x_width, width = tl.where(valid, C, 0), tl.where(flush, C, 0)
    x = tl.load(grad_ptr + source * grad_stride + col, mask=col < x_width, other=0.0)
    target = table_ptr + row.to(tl.int64) * table_stride + col
    old = tl.load(target, mask=col < width, other=0.0)
    return x, old, target, width, ends, spans, row != previous


@triton.jit
def _fold(
    acc,  # (BC,) fp32 sum of the segment so far
    x,  # (BC,)
    old,  # (BC,)
    target,  # (BC,) pointers into the table
    width,  # C if the segment ends here and goes to the table, else 0
    ends,
    spans,  # the segment ends here and goes to the partial sums
    slot,  # 0: it began in an earlier block; 1: it begins in this one
    partial_ptr,  # (2, C) fp32 of this block
    scale,
    C,
    col,  # (BC,)
):
    """Add one row to the running sum; store the sum where a segment ends, and start anew."""
    acc += x.to(tl.float32)
    total = old.to(tl.float32) + scale * acc
    tl.store(target, total.to(target.dtype.element_ty), mask=col < width)
    if spans:
        tl.store(partial_ptr + slot.to(tl.int32) * C + col, acc, mask=col < C)
    return tl.where(ends, 0.0, acc)


@triton.jit
def _embedding_grad_kernel(
    grad_ptr,  # (N, C), rows grad_stride apart
    rows_ptr,  # (N,) int32
    order_ptr,  # (N,) int32
    table_ptr,  # (R, C), rows table_stride apart
    partial_ptr,  # (blocks, 2, C) fp32
    scale_ptr,  # (1,) fp32, or None
    N,
    R,
    C,
    grad_stride,
    table_stride,
    L: tl.constexpr,
    BC: tl.constexpr,
):
    block = tl.program_id(0)
    col = tl.program_id(1) * BC + tl.arange(0, BC)
    start = block * L
    stop = tl.minimum(start + L, N)
    previous = tl.load(rows_ptr + start - 1, mask=start > 0, other=-1)
    following = tl.load(rows_ptr + stop, mask=stop < N, other=-1)
    partial_ptr += 2 * block.to(tl.int64) * C
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    acc = tl.zeros((BC,), tl.float32)
    for i in range(start, stop, 4):  # four rows of the gradient and of the table in flight
        x0, old0, to0, width0, ends0, spans0, slot0 = _load_position(
            i, stop, previous, following, rows_ptr, order_ptr, grad_ptr, table_ptr,
            R, grad_stride, table_stride, C, col,
        )  # fmt: skip
        x1, old1, to1, width1, ends1, spans1, slot1 = _load_position(
            i + 1, stop, previous, following, rows_ptr, order_ptr, grad_ptr, table_ptr,
            R, grad_stride, table_stride, C, col,
        )  # fmt: skip
        x2, old2, to2, width2, ends2, spans2, slot2 = _load_position(
            i + 2, stop, previous, following, rows_ptr, order_ptr, grad_ptr, table_ptr,
            R, grad_stride, table_stride, C, col,
        )  # fmt: skip
        x3, old3, to3, width3, ends3, spans3, slot3 = _load_position(
            i + 3, stop, previous, following, rows_ptr, order_ptr, grad_ptr, table_ptr,
            R, grad_stride, table_stride, C, col,
        )  # fmt: skip
        acc = _fold(acc, x0, old0, to0, width0, ends0, spans0, slot0, partial_ptr, scale, C, col)
        acc = _fold(acc, x1, old1, to1, width1, ends1, spans1, slot1, partial_ptr, scale, C, col)
        acc = _fold(acc, x2, old2, to2, width2, ends2, spans2, slot2, partial_ptr, scale, C, col)
        acc = _fold(acc, x3, old3, to3, width3, ends3, spans3, slot3, partial_ptr, scale, C, col)


@triton.jit
def _spanning_segments_kernel(
    rows_ptr,  # (N,) int32
    table_ptr,  # (R, C), rows table_stride apart
    partial_ptr,  # (blocks, 2, C) fp32
    scale_ptr,  # (1,) fp32, or None
    R,
    C,
    table_stride,
    blocks,
    L: tl.constexpr,
    BB: tl.constexpr,
    BC: tl.constexpr,
):
    """The segment that starts inside block program_id(0) and leaves it, if there is one."""
    block = tl.program_id(0)
    row = tl.load(rows_ptr + block * L + L - 1)
    following = tl.load(rows_ptr + block * L + L)
    previous = tl.load(rows_ptr + block * L - 1, mask=block > 0, other=-1)
    if (row == following) & (row != previous) & (row >= 0) & (row < R):
        col = tl.program_id(1) * BC + tl.arange(0, BC)
        inside = col < C
        acc = tl.zeros((BB, BC), tl.float32)
        k = block + 1
        while k < blocks:
            part = k + tl.arange(0, BB)
            begin = tl.load(rows_ptr + part * L, mask=part < blocks, other=-1)
            same = begin == row
            address = partial_ptr + (2 * part.to(tl.int64) * C)[:, None] + col[None, :]
            acc += tl.load(address, mask=same[:, None] & inside[None, :], other=0.0)
            k = tl.where(tl.sum(same.to(tl.int32)) == BB, k + BB, blocks)
        first = partial_ptr + (2 * block.to(tl.int64) + 1) * C + col
        total = tl.load(first, mask=inside, other=0.0) + tl.sum(acc, axis=0)
        if scale_ptr is not None:
            total *= tl.load(scale_ptr)
        target = table_ptr + row.to(tl.int64) * table_stride + col
        total += tl.load(target, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, total.to(target.dtype.element_ty), mask=inside)


def sort_rows(
    indices,  # (N,) or (B, T) integer: the table row of each position
    num_rows,
):
    """SortedRows of a batch of look-ups into a table of `num_rows` rows.

    Raises:
        ValueError: indices are not integers, or num_rows or their number is beyond int32.
    """
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"table rows must be integers, not {indices.dtype}")
    if not 0 < num_rows < 2**31 or indices.numel() >= 2**31:
        raise ValueError("a table and its look-ups may have 1 to 2^31 - 1 rows")
    rows = indices.flatten().clamp(-1, num_rows)  # before int32 folds an index onto a real row
    rows, order = rows.to(torch.int32).sort(stable=True)
    return SortedRows(rows, order.to(torch.int32), num_rows)


def embedding_grad(
    grad_rows,  # (N, C) bf16 or fp32, stride 1 along the rows
    sorted_rows,
    table_grad,  # (R, C) bf16 or fp32, stride 1 along the rows; accumulated into
    scale=None,  # (1,) or () fp32 tensor, or None for 1
):
    """Add the gradient rows of every look-up to `table_grad` in place; returns table_grad.

    Sums are in fp32 and rounded once, at the store. Look-ups outside of [0, R) are skipped.

    Raises:
        ValueError: shapes that do not fit together, or rows that are not contiguous.
    """
    positions, rows = sorted_rows.rows.numel(), sorted_rows.num_rows
    for name, x, expected in (
        ("grad_rows", grad_rows, positions),
        ("table_grad", table_grad, rows),
    ):
        if x.dim() != 2 or x.size(0) != expected or x.size(1) != grad_rows.size(-1):
            size = (expected, grad_rows.size(-1))
            raise ValueError(f"{name} must have shape {size}, not {tuple(x.shape)}")
        if x.size(1) > 1 and x.stride(1) != 1:
            raise ValueError(f"{name} must have contiguous rows; call .contiguous() on it")
    if scale is not None and (scale.numel() != 1 or scale.dtype != torch.float32):
        raise ValueError("scale must be one fp32 value in a tensor")
    if grad_rows.numel() == 0:
        return table_grad
    cols = grad_rows.size(1)
    tile, span_tile = tuned("embedding_grad", TILE), tuned("embedding_grad_spans", SPAN_TILE)
    blocks = triton.cdiv(positions, tile.rows)
    shape = (blocks, 2, cols)
    partial = torch.empty(shape, dtype=torch.float32, device=grad_rows.device)
    _embedding_grad_kernel[(blocks, triton.cdiv(cols, tile.cols))](
        grad_rows,
        sorted_rows.rows,
        sorted_rows.order,
        table_grad,
        partial,
        scale,
        positions,
        rows,
        cols,
        grad_rows.stride(0),
        table_grad.stride(0),
        L=tile.rows,
        BC=tile.cols,
        num_warps=tile.warps,
    )
    if blocks > 1:
        _spanning_segments_kernel[(blocks - 1, triton.cdiv(cols, span_tile.cols))](
            sorted_rows.rows,
            table_grad,
            partial,
            scale,
            rows,
            cols,
            table_grad.stride(0),
            blocks,
            L=tile.rows,
            BB=span_tile.rows,
            BC=span_tile.cols,
            num_warps=span_tile.warps,
        )
    return table_grad


def bigram_table_grad(
    tokens,  # (B, T) integer, contiguous
    grad_rows,  # (B*T, C) bf16 or fp32, stride 1 along the rows
    table_grad,  # (R, C) bf16 or fp32; accumulated into
    scale=None,  # (1,) or () fp32 tensor, or None for 1
):
    """Add the gradient of the bigram embeddings of `tokens` to `table_grad`; returns table_grad.

    Raises:
        ValueError: as `embedding_grad`; tokens are not contiguous; a table has fewer than 2 rows.
    """
    rows = table_grad.size(0)
    sorted_rows = sort_rows(bigram_rows(tokens, rows), rows)
    return embedding_grad(grad_rows, sorted_rows, table_grad, scale)
