"""The residual stream: adds, mixes and the norm after them."""

from torch import Tensor

from nanofuse.ops.backend import Backend, runs_kernel


def add_rms_norm(
    x: Tensor,  # (B, T, C) bf16 or fp32
    branch: Tensor,  # (B, T, C)
    *,
    backend: Backend = "kernel",
) -> tuple[Tensor, Tensor]:
    """y = x + branch and its RMSNorm y / sqrt(mean(y^2) + 2^-23); differentiable.

    Both results are (B, T, C) in x's dtype. The norm has no weight; its mean is over C, in fp32.

    Source: Zhang and Sennrich, https://arxiv.org/abs/1910.07467.

    Raises:
        RuntimeError, ValueError: see `nanofuse.ops`.
        ValueError: x and branch have different shapes.

    >>> import torch
    >>> from nanofuse import ops
    >>> y, normed = ops.add_rms_norm(torch.ones(1, 2, 8), torch.ones(1, 2, 8), backend="eager")
    >>> y[0, 0, 0].item(), round(normed[0, 0, 0].item(), 4)
    (2.0, 1.0)
    """
    if branch.shape != x.shape:
        raise ValueError(f"add_rms_norm: x is {tuple(x.shape)}, branch {tuple(branch.shape)}")
    kernel = runs_kernel("add_rms_norm", backend, {"x": x, "branch": branch})
    from nanofuse.kernels import residual_mix as op
    from nanofuse.kernels.common.rms_norm import rms_norm_ref

    if not kernel:
        y = x + branch
        return y, rms_norm_ref(y)
    from nanofuse.ops.launch import launch

    return launch(op.residual_mix, x, branch)


def residual_mix(
    x: Tensor,  # (B, T, C) bf16 or fp32, the stream
    x0: Tensor,  # (B, T, C), the stream at the first block
    resid_lambda: Tensor,  # (1,) or ()
    x0_lambda: Tensor,  # (1,) or ()
    *,
    branch: Tensor | None = None,  # (B, T, C), output of the branch that joins the stream
    tokens: Tensor | None = None,  # (B, T) integer
    table: Tensor | None = None,  # (R, C) embeddings of bigrams
    bigram_lambda: Tensor | None = None,  # (1,) or ()
    backend: Backend = "kernel",
) -> tuple[Tensor, Tensor]:
    """What opens a block, and its RMSNorm; differentiable.

        y = resid_lambda * (x + branch) + x0_lambda * x0 + bigram_lambda * table[row]

    row is what `bigram_rows` gives for `tokens`; branch and the bigram term may be left out. Both
    results are (B, T, C) in x's dtype. nanochat's backout is x0 = the stream at mid-depth and
    x0_lambda = -backout_lambda.

    Source: https://github.com/karpathy/nanochat/pull/747.

    Raises:
        RuntimeError, ValueError: see `nanofuse.ops`.
        ValueError: shapes that do not fit; some of tokens, table and bigram_lambda without the
            others; a table of fewer than two rows.

    >>> import torch
    >>> from nanofuse import ops
    >>> x, x0 = torch.ones(1, 2, 8), torch.ones(1, 2, 8)
    >>> resid, skip = torch.tensor(0.5), torch.tensor(0.25)
    >>> y, normed = ops.residual_mix(x, x0, resid, skip, branch=x, backend="eager")
    >>> y[0, 0, 0].item(), round(normed[0, 0, 0].item(), 4)
    (1.25, 1.0)
    """
    if x0.shape != x.shape or (branch is not None and branch.shape != x.shape):
        raise ValueError(f"residual_mix: x0 and branch must be {tuple(x.shape)} as x")
    if len({t is None for t in (tokens, table, bigram_lambda)}) > 1:
        raise ValueError("residual_mix: tokens, table and bigram_lambda go together")
    if tokens is not None and tokens.shape != x.shape[:2]:
        raise ValueError(f"residual_mix: tokens must be {tuple(x.shape[:2])} as x's positions")
    lambdas = {"resid_lambda": resid_lambda.reshape(()), "x0_lambda": x0_lambda.reshape(())}
    tensors = {"branch": branch, "x0": x0, **lambdas}
    bigram = {"tokens": tokens, "table": table, "bigram_lambda": bigram_lambda}
    kernel = runs_kernel("residual_mix", backend, {"x": x, **tensors, **bigram})
    from nanofuse.kernels import residual_mix as op
    from nanofuse.kernels.bigram_rows import bigram_embedding_ref
    from nanofuse.kernels.bigram_rows import bigram_rows as rows_of
    from nanofuse.kernels.common.rms_norm import rms_norm_ref

    if not kernel:
        looked_up: list[tuple[Tensor, Tensor]] = []
        if tokens is not None and table is not None and bigram_lambda is not None:
            looked_up = [(bigram_embedding_ref(tokens, table), bigram_lambda.reshape(()))]
        stream = x if branch is None else x + branch
        y = op.residual_mix_ref(stream, x0, **lambdas, looked_up=looked_up)
        return y, rms_norm_ref(y)
    from nanofuse.ops.launch import launch

    def mix(
        x: Tensor,  # (B, T, C)
        tokens: Tensor | None,  # (B, T)
        table: Tensor | None,  # (R, C)
        bigram_lambda: Tensor | None,  # (1,) or ()
        **tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        lookups = []
        if tokens is not None and table is not None and bigram_lambda is not None:
            lookups = [(rows_of(tokens, table.size(0)), table, bigram_lambda.reshape(()))]
        return op.residual_mix(x, lookups=lookups, **tensors)

    return launch(mix, x, **bigram, **tensors)
