"""Batches of matrices: symmetric products and orthogonalisation. None is differentiable."""

from typing import Literal

import torch
from torch import Tensor

from nanofuse.ops.backend import KERNEL_DTYPES, Backend, runs_kernel


@torch.no_grad()
def newton_schulz(
    x: Tensor,  # (N, R, C) bf16 or fp32
    *,
    equilibration: Literal["row", "col", "none"] = "row",
    muon_plus: bool = True,
    backend: Backend = "kernel",
) -> Tensor:
    """Orthogonalise every matrix: about U V^T of its singular value decomposition, (N, R, C) fp32.

    The kernel iterates in fp16, "eager" in x's dtype. x is not changed.

    Args:
        equilibration: rows ("row", the fast way) or columns first get one norm.
        muon_plus: rescale every result to the Frobenius norm sqrt(min(R, C)).

    Sources: Polar Express (https://arxiv.org/abs/2505.16932), MuonEq
    (https://arxiv.org/abs/2603.28254), Muon+ (https://arxiv.org/abs/2602.21545).

    Raises:
        RuntimeError, ValueError: see `nanofuse.ops`.
        ValueError: an unknown equilibration; x is no (N, R, C), for the kernel.

    >>> import torch
    >>> from nanofuse import ops
    >>> x = torch.diag(torch.tensor([1.0, 2.0, 3.0]))[None]
    >>> ops.newton_schulz(x, backend="eager")[0].round().abs()
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """
    kernel = runs_kernel("newton_schulz", backend, {"x": x})
    from nanofuse.kernels import newton_schulz as op

    if not kernel:
        return op.newton_schulz_ref(x, equilibration, muon_plus)
    from nanofuse.ops.launch import launch

    return launch(op.newton_schulz, x, equilibration, muon_plus)


@torch.no_grad()
def symmetric_matmul(
    left: Tensor,  # (N, m, k), or (N, k, m) if transpose; fp16 or bf16
    right: Tensor | None = None,  # like left
    *,
    transpose: bool = False,
    factor: float = 1.0,
    addend: Tensor | None = None,  # (N, m, m), symmetric
    beta: float = 0.0,
    diagonal: float = 0.0,
    backend: Backend = "kernel",
) -> Tensor:
    """factor * left right^T + beta * addend + diagonal * I at half the cost, if it is symmetric.

    right is left (the default), or both are symmetric and commute. With transpose the product is
    left^T right. The result is (N, m, m) in left's dtype and symmetric bit for bit. fp32 is for
    "eager" and the interpreter: on a GPU the kernel is made for 16-bit matrices.

    Source: https://github.com/Dao-AILab/gram-newton-schulz.

    Raises:
        RuntimeError, ValueError: see `nanofuse.ops`.
        ValueError: shapes that do not fit; a diagonal without an addend; rows that are no multiple
            of 16 bytes. All for the kernel.

    >>> import torch
    >>> from nanofuse import ops
    >>> ops.symmetric_matmul(torch.ones(1, 2, 4), backend="eager")
    tensor([[[4., 4.],
             [4., 4.]]])
    """
    dtypes = (torch.float16, torch.bfloat16) if left.is_cuda else KERNEL_DTYPES
    tensors = {"left": left, "right": right, "addend": addend}
    kernel = runs_kernel("symmetric_matmul", backend, tensors, dtypes=dtypes)
    from nanofuse.kernels import symmetric_matmul as op

    options = {"factor": factor, "addend": addend, "beta": beta, "diagonal": diagonal}
    if not kernel:
        return op.symmetric_matmul_ref(left, right, transpose=transpose, **options)
    from nanofuse.ops.launch import launch

    return launch(op.symmetric_matmul, left, right, transpose=transpose, **options)
