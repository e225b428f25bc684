"""Gradient of an embedding table from the gradients of its looked-up rows.

    table_grad[r] += sum of factors[n] * grad_rows[n] over all positions n with indices[n] == r

`sort_rows` sorts the positions by table row, once per micro-step: all tables that are indexed by
the same tokens share the order. Equal rows then form segments of the sorted positions. A program
of the first kernel walks over a block of L consecutive sorted positions. It accumulates a segment
that lies inside its block straight into the table. A segment that spans blocks gets one partial sum
per block, kept in a buffer; the second kernel adds these up, in one program per block, for the
segment that starts there and runs on. No atomics: the order of every sum is fixed. Table rows that
are not looked up are neither read nor written.

Bytes for N positions of width C at s bytes and D distinct rows at t bytes: N*C*s read, and D*C*t
read and written; partial sums add at most 16*N*C/L. FLOPs: N*C. PyTorch's counterpart is
torch.embedding_dense_backward, which writes a dense gradient that autograd must then add.
"""

from dataclasses import dataclass

import torch

from nanofuse.kernels.common.checks import check_tensor
from nanofuse.kernels.common.jit import tl, triton
from nanofuse.kernels.common.tuning import Tile, tuned

TILE = Tile(rows=64, cols=256, warps=1)  # rows: L; cols: one 16-byte bf16 load per lane and row
SPAN_TILE = Tile(rows=64, cols=128, warps=4)  # rows: partial sums loaded and added at once


@dataclass(frozen=True)
class SortedRows:
    """Positions sorted by the table row that they look up (stable: equal rows keep their order)."""

    rows: torch.Tensor  # (N,) int32, ascending
    order: torch.Tensor  # (N,) int32: the position that looks up rows[i]
    num_rows: int  # rows of the table, R


def embedding_grad_ref(
    grad_rows,  # (N, C)
    indices,  # (N,) or (B, T) integer
    table_grad,  # (R, C); not written
    factors=None,  # (N,) that multiply the rows; 1 if None
):
    """table_grad plus the rows of grad_rows, each at its index; new (R, C), table_grad's dtype."""
    if factors is not None:
        grad_rows = factors[:, None] * grad_rows
    return table_grad.index_add(0, indices.flatten(), grad_rows.to(table_grad.dtype))


@triton.jit
def _load_position(
    i,  # index into the sorted positions
    stop,  # end of the block
    previous,  # table row of the last position before the block, -1 without one
    following,  # table row of the first position after the block, -1 without one
    rows_ptr,  # (N,) int32
    order_ptr,  # (N,) int32
    grad_ptr,  # (N, C), rows grad_stride apart
    factors_ptr,  # (N,) fp32, or None
    table_ptr,  # (R, C), rows table_stride apart
    R,
    grad_stride,
    table_stride,
    C,
    col,  # (BC,)
):
    """Load what `_fold` needs of sorted position i.

    Returns its gradient row (BC,); of the table row that it looks up the old values (BC,) and
    pointers (BC,); the width to store there: C if its segment ends here and is whole, else 0;
    whether the segment ends here; whether its sum is a partial one, for the buffer; and whether it
    started in this block.
    """
    valid = i < stop
    row = tl.load(rows_ptr + i, mask=valid, other=-1)
    after = tl.load(rows_ptr + i + 1, mask=i + 1 < stop, other=-1)
    source = tl.load(order_ptr + i, mask=valid, other=0).to(tl.int64)
    ends = valid & (row != after)
    spans = ends & ((row == previous) | ((i == stop - 1) & (row == following)))
    flush = ends & (spans == 0) & (row >= 0) & (row < R)
    x_width, width = tl.where(valid, C, 0), tl.where(flush, C, 0)
    x = tl.load(grad_ptr + source * grad_stride + col, mask=col < x_width, other=0.0)
    if factors_ptr is not None:
        x = x.to(tl.float32) * tl.load(factors_ptr + source)
    target = table_ptr + row.to(tl.int64) * table_stride + col
    old = tl.load(target, mask=col < width, other=0.0)
    return x, old, target, width, ends, spans, row != previous


@triton.jit
def _fold(
    acc,  # (BC,) fp32 sum of the segment so far
    x,  # (BC,) gradient row
    old,  # (BC,) the table's values
    target,  # (BC,) pointers into the table
    width,  # C if the segment ends here and is whole, so that its sum goes to the table, else 0
    ends,  # the segment ends here, or the block does
    spans,  # it ends here and its sum is partial: it goes to the buffer
    slot,  # of the buffer; 0: the segment began in an earlier block, 1: in this one
    partial_ptr,  # (2, C) fp32 of this block
    C,
    col,  # (BC,)
):
    """Accumulate one gradient row; where its segment ends, store the sum. Returns acc (BC,), reset
    to 0 at the end of a segment."""
    acc += x.to(tl.float32)
    total = old.to(tl.float32) + acc
    tl.store(target, total.to(target.dtype.element_ty), mask=col < width)
    if spans:
        tl.store(partial_ptr + slot.to(tl.int32) * C + col, acc, mask=col < C)
    return tl.where(ends, 0.0, acc)


@triton.jit
def _embedding_grad_kernel(
    grad_ptr,  # (N, C), rows grad_stride apart
    rows_ptr,  # (N,) int32
    order_ptr,  # (N,) int32
    factors_ptr,  # (N,) fp32, or None
    table_ptr,  # (R, C), rows table_stride apart
    partial_ptr,  # (blocks, 2, C) fp32
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
    acc = tl.zeros((BC,), tl.float32)
    for i in range(start, stop, 4):  # loads of four gradient and four table rows in flight
        x0, old0, to0, width0, ends0, spans0, slot0 = _load_position(
            i, stop, previous, following, rows_ptr, order_ptr, grad_ptr, factors_ptr,
            table_ptr, R, grad_stride, table_stride, C, col,
        )  # fmt: skip
        x1, old1, to1, width1, ends1, spans1, slot1 = _load_position(
            i + 1, stop, previous, following, rows_ptr, order_ptr, grad_ptr, factors_ptr,
            table_ptr, R, grad_stride, table_stride, C, col,
        )  # fmt: skip
        x2, old2, to2, width2, ends2, spans2, slot2 = _load_position(
            i + 2, stop, previous, following, rows_ptr, order_ptr, grad_ptr, factors_ptr,
            table_ptr, R, grad_stride, table_stride, C, col,
        )  # fmt: skip
        x3, old3, to3, width3, ends3, spans3, slot3 = _load_position(
            i + 3, stop, previous, following, rows_ptr, order_ptr, grad_ptr, factors_ptr,
            table_ptr, R, grad_stride, table_stride, C, col,
        )  # fmt: skip
        acc = _fold(acc, x0, old0, to0, width0, ends0, spans0, slot0, partial_ptr, C, col)
        acc = _fold(acc, x1, old1, to1, width1, ends1, spans1, slot1, partial_ptr, C, col)
        acc = _fold(acc, x2, old2, to2, width2, ends2, spans2, slot2, partial_ptr, C, col)
        acc = _fold(acc, x3, old3, to3, width3, ends3, spans3, slot3, partial_ptr, C, col)


@triton.jit
def _spanning_segments_kernel(
    rows_ptr,  # (N,) int32
    table_ptr,  # (R, C), rows table_stride apart
    partial_ptr,  # (blocks, 2, C) fp32
    R,
    C,
    table_stride,
    blocks,
    L: tl.constexpr,
    BB: tl.constexpr,
    BC: tl.constexpr,
):
    """If a segment starts inside block program_id(0) and runs on into the next, add up its partial
    sums and accumulate them into its table row; BC columns a program."""
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
        target = table_ptr + row.to(tl.int64) * table_stride + col
        total += tl.load(target, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, total.to(target.dtype.element_ty), mask=inside)


def sort_rows(
    indices,  # (N,) or (B, T) integer: the table row of each position
    num_rows,
):
    """SortedRows of a batch of look-ups into a table of `num_rows` rows.

    Raises:
        ValueError: indices are not integers, or num_rows or the number of indices exceeds int32.
    """
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"table rows must be integers, not {indices.dtype}")
    if not 0 < num_rows < 2**31 or indices.numel() >= 2**31:
        raise ValueError("a table and its look-ups may have 1 to 2^31 - 1 rows")
    rows = indices.flatten().clamp(-1, num_rows)  # before int32 wraps an index onto a real row
    rows, order = rows.to(torch.int32).sort(stable=True)
    return SortedRows(rows, order.to(torch.int32), num_rows)


def embedding_grad(
    grad_rows,  # (N, C) bf16, fp32 or FP8, stride 1 along the rows
    sorted_rows,  # SortedRows of the N positions
    table_grad,  # (R, C) bf16 or fp32, stride 1 along the rows; accumulated into
    factors=None,  # (N,) fp32 that multiply the rows; 1 if None
):
    """Accumulate the gradient row of every look-up into `table_grad`, in place; returns table_grad.

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
    for name, x in (("rows", sorted_rows.rows), ("order", sorted_rows.order)):
        check_tensor("embedding_grad", name, x, (positions,), torch.int32)
    check_tensor("embedding_grad", "factors", factors, (positions,), torch.float32)
    if grad_rows.numel() == 0:
        return table_grad
    cols = grad_rows.size(1)
    tile = tuned("embedding_grad", TILE, cols)
    span_tile = tuned("embedding_grad_spans", SPAN_TILE, cols)
    blocks = triton.cdiv(positions, tile.rows)
    shape = (blocks, 2, cols)
    partial = torch.empty(shape, dtype=torch.float32, device=grad_rows.device)
    _embedding_grad_kernel[(blocks, triton.cdiv(cols, tile.cols))](
        grad_ptr=grad_rows,
        rows_ptr=sorted_rows.rows,
        order_ptr=sorted_rows.order,
        factors_ptr=factors,
        table_ptr=table_grad,
        partial_ptr=partial,
        N=positions,
        R=rows,
        C=cols,
        grad_stride=grad_rows.stride(0),
        table_stride=table_grad.stride(0),
        L=tile.rows,
        BC=tile.cols,
        num_warps=tile.warps,
    )
    if blocks > 1:
        _spanning_segments_kernel[(blocks - 1, triton.cdiv(cols, span_tile.cols))](
            rows_ptr=sorted_rows.rows,
            table_ptr=table_grad,
            partial_ptr=partial,
            R=rows,
            C=cols,
            table_stride=table_grad.stride(0),
            blocks=blocks,
            L=tile.rows,
            BB=span_tile.rows,
            BC=span_tile.cols,
            num_warps=span_tile.warps,
        )
    return table_grad
