"""A linear layer and its squared ReLU in one kernel, on FP8 operands.

    h = x w^T,   y = max(h, 0)^2        x (M, K), w (N, K)

y is written as an FP8 operand in both layouts (kernels/fp8.py) and nothing else: it feeds products
alone. The product accumulates in fp32 (fast accumulation, as cuBLAS's with use_fast_accum), and y
is that of the h rounded to bf16, which the backward pass in kernels/relu_squared.py reads. (The
backward product with an epilogue made in the same way took 0.88 ms at 65536 x 1024 x 4096 on an
H200, 4 % more than two kernels, and was dropped: dev/LOG.md, 2026-11-22.)

FLOPs: 2*M*N*K. Bytes from and to memory: (M + N)*K of operands and 4 per element of h (h and y
twice) instead of 6 in two kernels.
"""

from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.fp8 import check_alignment, empty_operand, operand_args
from kernels.linear_relu_squared_kernels import linear_relu_squared_kernel
from kernels.relu_squared import relu_squared_ref
from kernels.tuning import sm_count, tuned


@dataclass(frozen=True)
class LinearTile:
    """Tile of rows x cols that advances by depth terms; its epilogue takes `part` rows at a time.

    `group` tiles of a column follow each other; `programs` share an SM. A part has at least 16
    elements per thread (kernels.fp8.store_scaled).
    """

    rows: int = 128
    cols: int = 256
    depth: int = 128
    warps: int = 8
    stages: int = 3
    part: int = 32
    group: int = 8
    programs: int = 1


TILE = LinearTile()


def linear_relu_squared_ref(
    x,  # (M, K)
    w,  # (N, K)
):
    """(h, max(h, 0)^2) of h = x w^T in x's dtype."""
    h = x @ w.t()
    return h, relu_squared_ref(h)


def linear_relu_squared_fwd(
    x,  # FP8Operand (M, K)
    w,  # FP8Operand (N, K)
    scaling,
):
    """h = x w^T (M, N) in bf16, and max(h, 0)^2 as an FP8Operand under `scaling`.

    Reads x.data and w.data.

    Raises:
        ValueError: shapes disagree, are empty or no multiples of 16, or the data is not contiguous
            and aligned (kernels.fp8.check_alignment).
    """
    a, b = x.data, w.data
    if a.size(1) != b.size(1):
        raise ValueError(f"linear_relu_squared: x is {tuple(a.shape)}, w {tuple(b.shape)}")
    for name, matrix in (("x", a), ("w", b)):
        if matrix.dim() != 2 or not matrix.is_contiguous() or not matrix.numel():
            raise ValueError(f"linear_relu_squared: {name} must be contiguous, and not empty")
    check_alignment("linear_relu_squared", x=a, w=b)
    rows, cols = a.size(0), b.size(0)
    operand = empty_operand(rows, cols, scaling, a.device)
    h = torch.empty(rows, cols, dtype=torch.bfloat16, device=a.device)
    config = tuned("linear_relu_squared", TILE)
    tiles = triton.cdiv(rows, config.rows) * triton.cdiv(cols, config.cols)
    linear_relu_squared_kernel[(min(tiles, config.programs * sm_count(a.device)),)](
        TensorDescriptor.from_tensor(a, [config.rows, config.depth]),
        TensorDescriptor.from_tensor(b, [config.cols, config.depth]),
        x.inverse_scale,
        w.inverse_scale,
        h,
        *operand_args(operand, scaling),
        rows,
        cols,
        a.size(1),
        BM=config.rows,
        BN=config.cols,
        BK=config.depth,
        GROUP=config.group,
        PART=config.part,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return h, operand
