"""The seam between the pieces of the fused pass: what one hands to the next, in both directions.

A piece is not closed in itself. The branch that it computes joins the stream inside the next
piece's kernel, which reads the stream anyway; and the gradient of the stream travels without the
resid_lambda that it lacks, as a factor that the next kernel applies. Stream and StreamGrad say what
is owed. A fused piece is a class with

    forward(step, stream) -> (stream, saved)      saved: what backward reads, of any type
    backward(step, saved, grad) -> grad           runs once; adds to the parameters' .grad

    weights     LinearWeights of its products (model/fp8/weights.py)
    matrices    linear layers beside them that Muon updates
    fp8         {name: dtype} of its other FP8 tensors: inputs of products, gradients of outputs
    ops         names of the kernels that it runs, for the log

and model/fused.py runs a list of them. N = B*T positions, C width. An "operand" is what a product
takes: a plain tensor, or an FP8Operand.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from nanofuse.kernels.embedding_grad import SortedRows
from nanofuse.model.fp8.precision import Precision


@dataclass
class Stream:
    """The residual stream, whose value is x + branch.

    A piece that ends in a product leaves its result as `branch`, with the name under which the
    gradient of that result is scaled. The mix or norm after it adds the branch, and gives x with
    its norm: then branch is None, and `normed` is the operand of x * rstd. The piece that reads the
    norm takes it out, so that nothing keeps it alive. A product may do all of that itself: then x
    has its norm, and the name of the branch's gradient stays for the norm's backward pass.
    """

    x: torch.Tensor  # (N, C)
    branch: torch.Tensor | None = None  # (N, C), yet to be added to x
    # of the branch's gradient as an operand; None where there is no branch, nor was one added
    grad_name: str | None = None
    rstd: torch.Tensor | None = None  # (N,) inverse root mean squares of x; None before the norm
    normed: Any = None  # operand (N, C): x normalised; None before the norm

    def take_normed(self):
        """The operand `normed`, which the stream then no longer has."""
        normed, self.normed = self.normed, None
        return normed


@dataclass
class StreamGrad:
    """The gradient of a Stream: of its x, factor * g and what comes through the norm of x.

    Of a stream with a branch, `branch` is the branch's whole gradient, with the factor in it, as
    the operand of the products that made the branch; `normed` is None. Of a stream with its norm,
    `normed` is the gradient of that norm, and g that of the other uses of x.
    """

    g: torch.Tensor | None = None  # (N, C), lacking the factor; None if x has no other use
    factor: torch.Tensor | None = None  # (1,), the resid_lambda of the mix above; None: 1
    # (programs,) fp32: the factor's own gradient sum(g * (x + branch)) in parts. While the factor
    # is small, the piece that can make its branch again writes them (kernels/resid_lambda_grad.py).
    shares: torch.Tensor | None = None
    branch: Any = None  # operand (N, C)
    normed: torch.Tensor | None = None  # (N, C)

    def take_branch(self):
        """The operand `branch`, which the gradient then no longer has."""
        branch, self.branch = self.branch, None
        return branch


@dataclass
class MicroStep:
    """One forward and backward pass: its batch, and what several pieces share."""

    tokens: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (N,)
    precision: Precision
    saved: list = field(default_factory=list)  # what each piece saved, in order
    x0: torch.Tensor | None = None  # (N, C) stream after the embedding
    x_mid: torch.Tensor | None = None  # (N, C) stream after the middle layer
    rows: list = field(default_factory=list)  # (N,) int32 of each table that the mixes look up
    mixes: Any = None  # what the mixes collect backward (model/pieces/mix.py)
    order: SortedRows | None = None  # of tokens, in the backward pass
