"""A linear layer and its squared ReLU, or the backward of both, in one kernel on FP8 operands.

    forward     y = max(h, 0)^2,        h = x w^T       x (M, K), w (N, K)
    backward    dh = 2 max(h, 0) g,     g = dz v        dz (M, K), v (K, N), max(h, 0) = sqrt(y)

v is the weight of the layer that follows, z = y v^T. y and dh are written as FP8 operands in both
layouts (kernels/fp8.py) and nothing else: they feed products alone. h is not kept. max(h, 0) is
the root of y, to half of y's relative error: 3 % at most for normal e4m3 numbers, where dh is
rounded to e5m2 by up to 12 %; y below half of the smallest e4m3 number, 2^-10 / scale, passes no
gradient, and y clipped beyond its scale that of its clipped value.
Products accumulate in fp32 (fast accumulation, as cuBLAS's with use_fast_accum). What the epilogue
makes of them is rounded to bf16 and then to FP8: one value in 30, next to the middle between two
e4m3 numbers, goes the other way (e5m2: one in 60). The amax of dh is that of the bf16 values.
Maxima are taken of scaled values, so amax is not finite where value times scale leaves fp32.

FLOPs: 2*M*N*K. Bytes from and to memory: (M + N)*K of operands and 2 per element of y, 3 per
element of dh, where a product and kernels/relu_squared.py move 6 and 8.
"""

from dataclasses import dataclass

import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.fp8 import check_alignment, empty_operand, operand_args
from kernels.linear_relu_squared_kernels import linear_relu_squared_kernel
from kernels.relu_squared import relu_squared_ref
from kernels.tuning import sm_count, tuned


@dataclass(frozen=True)
class LinearTile:
    """Tile of rows x cols that advances by depth terms.

    `group` tiles of a column follow each other; `programs` share an SM, one in its epilogue while
    another multiplies; `registers` caps a thread's.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    programs: int = 1
    registers: int | None = None


TILE = LinearTile(128, 128, 128, warps=8, stages=3, programs=2, registers=128)


def linear_relu_squared_ref(
    x,  # (M, K)
    w,  # (N, K)
):
    """max(x w^T, 0)^2, (M, N)."""
    return relu_squared_ref(x @ w.t())


def linear_relu_squared_bwd_ref(
    dz,  # (M, K)
    v,  # (K, N)
    y,  # (M, N)
):
    """2 sqrt(y) (dz v), (M, N)."""
    return 2 * y.sqrt() * (dz @ v)


def _launch(op, factors, inverse_scales, scaling, y=None):
    """FP8Operand of the epilogue of a b^T; factors is {name of a: a, name of b: b}, and y the
    FP8Operand that backward reads."""
    matrices = factors if y is None else factors | {"y": y.data}
    for name, matrix in matrices.items():
        if matrix.dim() != 2 or not matrix.is_contiguous() or not matrix.numel():
            raise ValueError(f"{op}: {name} must be a contiguous matrix, and not empty")
    a, b = factors.values()
    if a.size(1) != b.size(1):
        raise ValueError(f"{op}: factors of {a.size(1)} and {b.size(1)} terms")
    rows, cols = a.size(0), b.size(0)
    if y is not None and y.data.shape != (rows, cols):
        raise ValueError(f"{op}: y is {tuple(y.data.shape)}, the product {rows} x {cols}")
    check_alignment(op, **matrices)
    operand = empty_operand(rows, cols, scaling, a.device)
    config = tuned(op, TILE)
    tiles = triton.cdiv(rows, config.rows) * triton.cdiv(cols, config.cols)
    programs = min(tiles, config.programs * sm_count(a.device))
    linear_relu_squared_kernel[(programs,)](
        TensorDescriptor.from_tensor(a, [config.rows, config.depth]),
        TensorDescriptor.from_tensor(b, [config.cols, config.depth]),
        *inverse_scales,
        None if y is None else y.data,
        None if y is None else y.inverse_scale,
        *operand_args(operand, scaling),
        rows,
        cols,
        a.size(1),
        BM=config.rows,
        BN=config.cols,
        BK=config.depth,
        GROUP=config.group,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
    )
    return operand


def linear_relu_squared_fwd(
    x,  # FP8Operand (M, K)
    w,  # FP8Operand (N, K)
    scaling,
):
    """max(x w^T, 0)^2 as an FP8Operand (M, N) under `scaling`; reads x.data and w.data.

    Raises:
        ValueError: shapes disagree, are empty or no multiples of 16, or the data is not contiguous
            and aligned (kernels.fp8.check_alignment).
    """
    op = "linear_relu_squared"
    return _launch(op, {"x": x.data, "w": w.data}, (x.inverse_scale, w.inverse_scale), scaling)


def linear_relu_squared_bwd(
    dz,  # FP8Operand (M, K), gradient of y v^T
    v,  # FP8Operand (K, N)
    y,  # FP8Operand (M, N), from linear_relu_squared_fwd
    scaling,
):
    """The gradient 2 sqrt(y) (dz v) of h as an FP8Operand (M, N) under `scaling`; reads dz.data,
    v.transposed and y.data.

    Raises:
        ValueError: as linear_relu_squared_fwd.
    """
    op = "linear_relu_squared_bwd"
    factors = {"dz": dz.data, "v transposed": v.transposed}
    return _launch(op, factors, (dz.inverse_scale, v.inverse_scale), scaling, y)
