"""A linear layer and its squared ReLU in one kernel, on FP8 operands, forward and backward.

    forward    h = x w^T,              y = max(h, 0)^2     x (M, K), w (N, K)
    backward   dh = 2 max(h, 0) (g v)                      g (M, K), v (K, N): the next layer's

y and dh are written as FP8 operands in both layouts (kernels/fp8.py) and nothing else: they feed
products alone. Both products accumulate in fp32 (fast accumulation, as cuBLAS's with
use_fast_accum) and are rounded to bf16 before the nonlinearity, so that the results are those of a
product followed by kernels/relu_squared.py, and y is that of the h that the backward pass reads.

FLOPs: 2*M*N*K. Bytes from and to memory: (M + N)*K of operands; per element of h 4 forward (h and
y twice) and 4 backward (h read, dh twice), against 6 and 8 in two kernels, which also read h and
write and read the product g v. A tile of the product goes through memory in bf16 all the same, for
the reason in kernels/linear_relu_squared_kernels.py: to h, or to a buffer of one tile per program
(9 MB) that stays in the L2 cache, and back. In fp32 the buffer would move 8 instead of 4 bytes per
element through the L2, which the operands of the product already keep busy: a tile of 128 x 256
reads 3.2 GB at M = 65536, K = 1024, N = 4096.
"""

from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.fp8 import check_alignment, empty_operand, operand_args
from kernels.linear_relu_squared_kernels import linear_relu_squared_kernel
from kernels.relu_squared import relu_squared_ref
from kernels.tuning import tuned


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


def linear_relu_squared_bwd_ref(
    g,  # (M, K)
    w,  # (K, N)
    h,  # (M, N)
):
    """The gradient of h: 2 * max(h, 0) * (g w) in h's dtype."""
    return 2 * torch.relu(h) * (g @ w).to(h.dtype)


def _check_matrices(op, **matrices):
    for name, matrix in matrices.items():
        if matrix.dim() != 2 or not matrix.is_contiguous() or not matrix.numel():
            raise ValueError(f"{op}: {name} must be a contiguous matrix, and not empty")
    check_alignment(op, **matrices)


def _launch(op, a, b, a_inverse, b_inverse, h, scaling):
    """The operand of the epilogue on a b^T; h is written with the op "linear_relu_squared"."""
    rows, cols = h.shape
    config = tuned(op, TILE)
    operand = empty_operand(rows, cols, scaling, h.device)
    cuda = h.device.type == "cuda"
    sms = torch.cuda.get_device_properties(h.device).multi_processor_count if cuda else 2
    tiles = triton.cdiv(rows, config.rows) * triton.cdiv(cols, config.cols)
    programs = min(tiles, config.programs * sms)
    scratch = None
    if op == "linear_relu_squared_bwd":
        scratch = torch.empty(programs, config.rows, config.cols, dtype=h.dtype, device=h.device)
    linear_relu_squared_kernel[(programs,)](
        TensorDescriptor.from_tensor(a, [config.rows, config.depth]),
        TensorDescriptor.from_tensor(b, [config.cols, config.depth]),
        a_inverse,
        b_inverse,
        h,
        scratch,
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
    return operand


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
    op = "linear_relu_squared"
    if x.data.size(1) != w.data.size(1):
        raise ValueError(f"{op}: x is {tuple(x.data.shape)}, w {tuple(w.data.shape)}")
    _check_matrices(op, x=x.data, w=w.data)
    shape = x.data.size(0), w.data.size(0)
    h = torch.empty(shape, dtype=torch.bfloat16, device=x.data.device)
    return h, _launch(op, x.data, w.data, x.inverse_scale, w.inverse_scale, h, scaling)


def linear_relu_squared_bwd(
    g,  # FP8Operand (M, K): gradient of the next layer's output
    w,  # FP8Operand (K, N): the next layer's weight
    h,  # (M, N) bf16
    scaling,
):
    """2 * max(h, 0) * (g w), the gradient of h (M, N), as an FP8Operand under `scaling`.

    Reads g.data and w.transposed.

    Raises:
        ValueError: as for linear_relu_squared_fwd, or h is not bf16.
    """
    op = "linear_relu_squared_bwd"
    a, b = g.data, w.transposed
    if a.size(1) != b.size(1) or h.shape != (a.size(0), b.size(0)):
        found = f"g is {tuple(a.shape)}, w {tuple(b.t().shape)}, h {tuple(h.shape)}"
        raise ValueError(f"{op}: {found}")
    if h.dtype != torch.bfloat16:
        raise ValueError(f"{op}: h must be in bf16, not {h.dtype}")
    _check_matrices(op, g=a, w=b, h=h)
    return _launch(op, a, b, g.inverse_scale, w.inverse_scale, h, scaling)
