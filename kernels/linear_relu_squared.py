"""A GEMM with squared ReLU, or the backward pass of squared ReLU, in its epilogue; FP8 or bf16.

    forward     y = max(h, 0)^2,        h = x w^T       x (M, K), w (N, K)
    backward    dh = 2 max(h, 0) g,     g = dz v        dz (M, K), v (K, N), max(h, 0) = sqrt(y)

The forward pass is the MLP's first linear layer with its activation. The backward pass is the input
gradient of the second one, z = y v^T, followed by the activation's gradient. Each writes its result
alone, y or dh: in FP8 as an operand in both layouts (kernels/common/fp8.py), since only GEMMs
consume it. The pre-activation h is never stored; backward recovers max(h, 0) as the root of y.

Accuracy. The root halves y's relative error: in bf16 that is 2^-9, half the error of an h stored in
bf16. In FP8 it is at most 3 % for normal e4m3 numbers, where rounding dh to e5m2 alone costs up to
12 %; elements whose y underflowed in e4m3 (y < 2^-10 / scale) get no gradient, and those whose y
saturated get the gradient at the saturated value.
Products accumulate in fp32 (FP8: fast accumulation, as cuBLAS's with use_fast_accum). The epilogue
rounds to bf16 and then to FP8: this double rounding moves about one e4m3 value in 30 (e5m2: one in
60), near a tie, to the other neighbour. The amax of dh is that of its bf16 values. Maxima are taken
after scaling, so amax is not finite where value times scale overflows fp32. fp32 tensors are
multiplied without tensor cores, for tests.

On Hopper an FP8 product of at most 1,664 terms, of sizes that are multiples of 128, runs on a panel
(kernels/common/panel.py), which rounds once, to FP8, and records the amax of fp32 numbers. What
follows, and the double rounding above, is of the other kernel.

The GEMM is persistent: each program computes a sequence of tiles, and the loop over tiles is
flattened with the one over K, so that the loads of the next tile are in flight during an epilogue.
The epilogue works in registers, on the accumulator. With FP8 its result goes through shared memory
to the store's register layout as bf16 and is cast there (kernels.common.fp8.cast_stored).

FLOPs: 2*M*N*K. Bytes in FP8: (M + N)*K for the operands, 2 per element of y forward, 3 per element
of dh backward (y read); an unfused GEMM and kernels/relu_squared.py move 6 and 8 per element. In
bf16: 2*(M + N)*K, 2 and 4; unfused 6 and 8.
"""

from dataclasses import dataclass

import torch

from nanofuse.kernels.common import panel
from nanofuse.kernels.common.fp8 import (
    E4M3,
    MULTIPLE,
    amax_bits,
    cast_stored,
    check_alignment,
    empty_operand,
    operand_args,
    record_amax,
)
from nanofuse.kernels.common.jit import TensorDescriptor, tl, triton
from nanofuse.kernels.common.ptx import INTERPRETED, fast_sqrt
from nanofuse.kernels.common.tuning import sm_count, tuned
from nanofuse.kernels.linear_relu_squared_panel_kernels import linear_relu_squared_panel
from nanofuse.kernels.relu_squared import relu_squared_ref

PANEL_TERMS = 1664  # at most: 1,198 us for Triton's 1,280; of 2,048 it is 2,161 for 2,081 (65,536
# rows, H200). Backward with row sums, a draft, 1,328 for 1,300 and 2,370 for 2,036


@dataclass(frozen=True)
class LinearTile:
    """Tile of the output and launch parameters of the persistent GEMM.

    Fields: rows x cols, the tile; depth, the bytes of a row of either operand that one step of the
    K loop loads (128: 128 FP8 or 64 bf16 terms); warps, and stages of the software pipeline; group,
    the tiles of one column that are computed in succession, for L2 reuse; programs per SM, so that
    one runs its epilogue while another one's tensor cores are busy; registers, the most per thread
    (None: the compiler's choice).
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
PLAIN_TILES = {  # without FP8, by the tensors' dtype
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


FOLD = tl.constexpr(16)  # columns that the running maxima fold into one: adjacent or strided ones


@triton.jit
def tile_corner(
    tile,
    M,
    N,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """First row and column of tile number `tile`; the order is grouped for L2 reuse: GROUP tiles
    of one column follow each other before the next column starts."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = tile // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inner = tile % (GROUP * tiles_n)
    return (group * GROUP + inner % height) * BM, (inner // height) * BN


@triton.jit
def linear_relu_squared_kernel(
    a_desc,  # (M, K) in blocks of BM x BK; FP8, bf16 or fp32
    b_desc,  # (N, K) in blocks of BN x BK; backward without FP8 (K, N) in blocks of BK x BN
    a_inverse_ptr,  # (1,) fp32 inverse scale of a, or None without FP8
    b_inverse_ptr,  # (1,) fp32 inverse scale of b, or None without FP8
    y_inverse_ptr,  # (1,) fp32 inverse scale of y, or None without FP8 or y
    y_ptr,  # (M, N) result of the forward pass; None in the forward pass
    data_ptr,  # (M, N) result: FP8, or a's dtype
    transposed_ptr,  # (N, M) FP8, or None without FP8
    scale_ptr,  # (1,) fp32, or None without FP8
    amax_ptr,  # (1,) int32, or None without FP8
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    factor = 1.0 if y_ptr is None else 2.0  # multiplies the accumulator
    if transposed_ptr is not None:
        scale = tl.load(scale_ptr)
        factor *= tl.load(a_inverse_ptr) * tl.load(b_inverse_ptr)
        # running maxima over the tiles, folded along columns that one lane holds: no shuffles
        if y_ptr is None:
            factor *= tl.sqrt(scale)
            peaks = tl.zeros((BM, FOLD), tl.int32)  # accumulator layout: a lane's columns are apart
        else:
            factor *= scale * tl.sqrt(tl.load(y_inverse_ptr))
            peaks = tl.zeros((BM, BN // FOLD), tl.int32)  # y's layout: they are adjacent
    first, tiles = tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN)
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    tl.assume(K > 0)  # otherwise the compiler does not flatten the loops
    for tile in tl.range(first, tiles, tl.num_programs(0), flatten=True):
        row, col = tile_corner(tile, M, N, BM, BN, GROUP)
        product = tl.zeros((BM, BN), tl.float32)
        for k in range(0, tl.cdiv(K, BK)):
            a = a_desc.load([row, k * BK])
            if transposed_ptr is None and y_ptr is not None:
                b = b_desc.load([k * BK, col])
            else:
                b = b_desc.load([col, k * BK]).T
            if INTERPRETED:  # the interpreter's tl.dot is right in fp32 only
                a, b = a.to(tl.float32), b.to(tl.float32)
            product = tl.dot(a, b, product, input_precision="ieee")
        inside = (row + m < M)[:, None] & (col + n < N)[None, :]
        corner, offsets = row.to(tl.int64) * N + col, m[:, None] * N + n[None, :]
        if y_ptr is None:
            x = tl.maximum(product, 0.0, propagate_nan=tl.PropagateNan.ALL) * factor
            x *= x
        else:
            y = tl.load(y_ptr + corner + offsets, mask=inside, other=0.0)
            x = product * fast_sqrt(y.to(tl.float32)) * factor
        if transposed_ptr is None:
            x = x.to(data_ptr.dtype.element_ty)
            tl.store(data_ptr + corner + offsets, x, mask=inside)
        else:
            narrow = x.to(tl.bfloat16)
            if y_ptr is not None:
                x = narrow.to(tl.float32)  # widened in the register layout of y and of the stores
            bits = tl.reshape(amax_bits(x), (BM, BN // FOLD, FOLD))
            peaks = tl.maximum(peaks, tl.max(bits, axis=1 if y_ptr is None else 2))
            dtype: tl.constexpr = data_ptr.dtype.element_ty
            tl.store(data_ptr + corner + offsets, cast_stored(narrow, dtype), mask=inside)
            inside = (col + n < N)[:, None] & (row + m < M)[None, :]
            lines = (col + n).to(tl.int64) * M + row
            transposed = cast_stored(tl.trans(narrow), dtype)
            tl.store(transposed_ptr + lines[:, None] + m[None, :], transposed, mask=inside)
    if transposed_ptr is not None:
        record_amax(amax_ptr, peaks.to(tl.float32, bitcast=True) / scale)


def plain_name(op, dtype):
    """Key of tuned.json for `op` on plain tensors, such as linear_relu_squared_bf16."""
    return f"{op}_{'bf16' if dtype == torch.bfloat16 else 'fp32'}"


def _launch(op, factors, y, inverse_scales, scaling):
    """Check the inputs and launch the kernel.

    Args:
        op: name of the op, for tiles and messages.
        factors: {name: matrix} of the product's left operand a (M, K) and right operand b (N, K);
            for a backward pass without FP8 b is (K, N).
        y: (M, N) forward result that the backward epilogue reads; None forward.
        inverse_scales: those of a, b and y in FP8, each (1,) fp32; else three times None.
        scaling: Scaling of the result; None for plain tensors.

    Returns:
        The result (M, N): an FP8Operand under `scaling`; without one a tensor in a's dtype.
    """
    matrices = factors if y is None else factors | {"y": y}
    a, b = factors.values()
    for name, matrix in matrices.items():
        if scaling is None and getattr(matrix, "dtype", None) not in PLAIN_TILES:
            raise ValueError(f"{op}: {name} must be a bf16 or fp32 tensor without a scaling")
        if matrix.dim() != 2 or not matrix.is_contiguous() or not matrix.numel():
            raise ValueError(f"{op}: {name} must be a contiguous matrix, and not empty")
        if scaling is None and matrix.dtype != a.dtype:
            raise ValueError(f"{op}: {name} is {matrix.dtype}, not {a.dtype} as the first factor")
    b_is_kn = scaling is None and y is not None  # b is (K, N), else (N, K)
    cols, terms = reversed(b.shape) if b_is_kn else b.shape
    rows = a.size(0)
    if a.size(1) != terms:
        raise ValueError(f"{op}: factors of {a.size(1)} and {terms} terms")
    if terms % MULTIPLE or cols % MULTIPLE:
        raise ValueError(f"{op}: {terms} terms and {cols} columns must be multiples of {MULTIPLE}")
    if y is not None and y.shape != (rows, cols):
        raise ValueError(f"{op}: y is {tuple(y.shape)}, the product {rows} x {cols}")
    check_alignment(op, **matrices)
    if scaling is None:
        config = tuned(plain_name(op, a.dtype), PLAIN_TILES[a.dtype], min(terms, cols))
        result = a.new_empty(rows, cols)
        data, transposed, scale, amax = result, None, None, None
    else:
        config = tuned(op, TILE, min(terms, cols))
        result = empty_operand(rows, cols, scaling, a.device)
        data, transposed, scale, amax = operand_args(result, scaling)
        roots = y is None or y.dtype == E4M3  # which a panel takes of e4m3 alone
        if roots and panel.takes(op, a.device, rows, cols, terms, PANEL_TERMS):
            results = data, transposed, scale, amax
            linear_relu_squared_panel(a, b, y, inverse_scales, *results)
            return result
    depth = config.depth // a.element_size()
    tiles = triton.cdiv(rows, config.rows) * triton.cdiv(cols, config.cols)
    programs = min(tiles, config.programs * sm_count(a.device))
    a_inverse, b_inverse, y_inverse = inverse_scales
    block = [depth, config.cols] if b_is_kn else [config.cols, depth]
    linear_relu_squared_kernel[(programs,)](
        a_desc=TensorDescriptor.from_tensor(a, [config.rows, depth]),
        b_desc=TensorDescriptor.from_tensor(b, block),
        a_inverse_ptr=a_inverse,
        b_inverse_ptr=b_inverse,
        y_inverse_ptr=y_inverse,
        y_ptr=y,
        data_ptr=data,
        transposed_ptr=transposed,
        scale_ptr=scale,
        amax_ptr=amax,
        M=rows,
        N=cols,
        K=terms,
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
    """y = max(x w^T, 0)^2, (M, N): with a scaling an FP8Operand, from the operands' row-major
    layouts; without one a tensor in x's dtype.

    Args:
        scaling: kernels.common.fp8.Scaling of y; None if x and w are plain tensors.

    Raises:
        ValueError: shapes disagree or are empty; K or N, or with a scaling M, is not a multiple of
            16; dtypes differ or are neither bf16 nor fp32; or a matrix is not contiguous or not
            aligned (kernels.common.fp8.check_alignment).
    """
    op, scales = "linear_relu_squared", (None, None, None)
    if scaling is not None:
        scales = x.inverse_scale, w.inverse_scale, None
        x, w = x.data, w.data
    return _launch(op, {"x": x, "w": w}, None, scales, scaling)


def linear_relu_squared_bwd(
    dz,  # FP8Operand (M, K), gradient of z = y v^T; (M, K) bf16 or fp32 without scaling
    v,  # FP8Operand (K, N); (K, N) in dz's dtype
    y,  # FP8Operand (M, N), from linear_relu_squared_fwd; (M, N) in dz's dtype
    scaling=None,
):
    """The pre-activation's gradient dh = 2 sqrt(y) (dz v), (M, N): with a scaling an FP8Operand,
    from dz.data, v.transposed and y.data; without one a tensor in dz's dtype.

    Args:
        scaling: kernels.common.fp8.Scaling of dh; None if dz, v and y are plain tensors.

    Raises:
        ValueError: as linear_relu_squared_fwd.
    """
    op = "linear_relu_squared_bwd"
    if scaling is None:
        return _launch(op, {"dz": dz, "v": v}, y, (None, None, None), None)
    scales = dz.inverse_scale, v.inverse_scale, y.inverse_scale
    return _launch(op, {"dz": dz.data, "v transposed": v.transposed}, y.data, scales, scaling)
