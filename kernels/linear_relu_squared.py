"""A linear layer and its squared ReLU, or the backward of both, in one kernel, in FP8 or bf16.

    forward     y = max(h, 0)^2,        h = x w^T       x (M, K), w (N, K)
    backward    dh = 2 max(h, 0) g,     g = dz v        dz (M, K), v (K, N), max(h, 0) = sqrt(y)

v is the weight of the layer that follows, z = y v^T. y and dh are all that is written: in FP8 as
operands in both layouts (kernels/common/fp8.py), as they feed products alone. h is not kept.
max(h, 0) is the root of y, to half of y's relative error: in bf16 2^-9, half of that of h rounded
to bf16; in FP8 3 % at most for normal e4m3 numbers, where dh is rounded to e5m2 by up to 12 %;
there y below half of the smallest e4m3 number, 2^-10 / scale, passes no gradient, and y clipped
beyond its scale that of its clipped value.
Products accumulate in fp32 (FP8: fast accumulation, as cuBLAS's with use_fast_accum). What the
epilogue makes of them is rounded to bf16 and then to FP8: one value in 30, next to the middle
between two e4m3 numbers, goes the other way (e5m2: one in 60). The amax of dh is that of the bf16
values. Maxima are taken of scaled values, so amax is not finite where value times scale leaves
fp32. fp32 tensors are multiplied without tensor cores, for tests.

FLOPs: 2*M*N*K. Bytes from and to memory: (M + N)*K of operands and 2 per element of y, 3 per
element of dh, where a product and kernels/relu_squared.py move 6 and 8; in bf16 2*(M + N)*K, 2 and
4, where they move 6 and 8.
"""

from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from nanofuse.kernels.common.fp8 import MULTIPLE, check_alignment, empty_operand, operand_args
from nanofuse.kernels.common.tuning import sm_count, tuned
from nanofuse.kernels.linear_relu_squared_kernels import linear_relu_squared_kernel
from nanofuse.kernels.relu_squared import relu_squared_ref


@dataclass(frozen=True)
class LinearTile:
    """Tile of rows x cols that advances by depth terms of one byte (64 bf16 ones for 128).

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
PLAIN_TILES = {  # by dtype of tensors
    torch.bfloat16: LinearTile(128, 256, 128, warps=8, stages=4),
    torch.float32: LinearTile(64, 64, 128, warps=4, stages=3),
}


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


def plain_name(op, dtype):
    """Name of `op` on tensors of `dtype` where tiles are kept, such as linear_relu_squared_bf16."""
    return f"{op}_{'bf16' if dtype == torch.bfloat16 else 'fp32'}"


def _launch(op, factors, y, inverse_scales, scaling):
    """The epilogue of a b^T, or of a b for a backward pass without FP8: an FP8Operand under
    `scaling`, or a tensor without one. factors is {name of a: a, name of b: b}; backward reads y;
    inverse_scales are those of a, b and y."""
    matrices = factors if y is None else factors | {"y": y}
    a, b = factors.values()
    for name, matrix in matrices.items():
        if scaling is None and getattr(matrix, "dtype", None) not in PLAIN_TILES:
            raise ValueError(f"{op}: {name} must be a bf16 or fp32 tensor without a scaling")
        if matrix.dim() != 2 or not matrix.is_contiguous() or not matrix.numel():
            raise ValueError(f"{op}: {name} must be a contiguous matrix, and not empty")
        if scaling is None and matrix.dtype != a.dtype:
            raise ValueError(f"{op}: {name} is {matrix.dtype}, not {a.dtype} as the first factor")
    by_terms = scaling is None and y is not None  # b is (K, N), else (N, K)
    cols, terms = reversed(b.shape) if by_terms else b.shape
    rows = a.size(0)
    if a.size(1) != terms:
        raise ValueError(f"{op}: factors of {a.size(1)} and {terms} terms")
    if terms % MULTIPLE or cols % MULTIPLE:
        raise ValueError(f"{op}: {terms} terms and {cols} columns must be multiples of {MULTIPLE}")
    if y is not None and y.shape != (rows, cols):
        raise ValueError(f"{op}: y is {tuple(y.shape)}, the product {rows} x {cols}")
    check_alignment(op, **matrices)
    if scaling is None:
        config = tuned(plain_name(op, a.dtype), PLAIN_TILES[a.dtype])
        result = a.new_empty(rows, cols)
        written = result, None, None, None
    else:
        config = tuned(op, TILE)
        result = empty_operand(rows, cols, scaling, a.device)
        written = operand_args(result, scaling)
    depth = config.depth // a.element_size()
    tiles = triton.cdiv(rows, config.rows) * triton.cdiv(cols, config.cols)
    programs = min(tiles, config.programs * sm_count(a.device))
    linear_relu_squared_kernel[(programs,)](
        TensorDescriptor.from_tensor(a, [config.rows, depth]),
        TensorDescriptor.from_tensor(b, [depth, config.cols] if by_terms else [config.cols, depth]),
        *inverse_scales,
        y,
        *written,
        rows,
        cols,
        terms,
        BM=config.rows,
        BN=config.cols,
        BK=depth,
        GROUP=config.group,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
    )
    return result


def linear_relu_squared_fwd(
    x,  # FP8Operand (M, K); (M, K) bf16 or fp32 without scaling
    w,  # FP8Operand (N, K); (N, K) in x's dtype
    scaling=None,
):
    """max(x w^T, 0)^2, (M, N): an FP8Operand under `scaling`, from x.data and w.data; without
    scaling a tensor in x's dtype.

    Raises:
        ValueError: shapes disagree or are empty; K, N or with a scaling M are no multiples of 16;
            tensors have different dtypes, or others than bf16 and fp32; or the data is not
            contiguous and aligned (kernels.fp8.check_alignment).
    """
    op, scales = "linear_relu_squared", (None, None, None)
    if scaling is not None:
        scales = x.inverse_scale, w.inverse_scale, None
        x, w = x.data, w.data
    return _launch(op, {"x": x, "w": w}, None, scales, scaling)


def linear_relu_squared_bwd(
    dz,  # FP8Operand (M, K), gradient of y v^T; (M, K) bf16 or fp32 without scaling
    v,  # FP8Operand (K, N); (K, N) in dz's dtype
    y,  # FP8Operand (M, N), from linear_relu_squared_fwd; (M, N) in dz's dtype
    scaling=None,
):
    """The gradient 2 sqrt(y) (dz v) of h, (M, N): an FP8Operand under `scaling`, from dz.data,
    v.transposed and y.data; without scaling a tensor in dz's dtype.

    Raises:
        ValueError: as linear_relu_squared_fwd.
    """
    op = "linear_relu_squared_bwd"
    if scaling is None:
        return _launch(op, {"dz": dz, "v": v}, y, (None, None, None), None)
    scales = dz.inverse_scale, v.inverse_scale, y.inverse_scale
    return _launch(op, {"dz": dz.data, "v transposed": v.transposed}, y.data, scales, scaling)
