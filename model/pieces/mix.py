"""The residual mix that opens a layer, the tables that it looks up, backout, and the norms.

Shapes: L layers, B rows, T tokens, N = B*T positions, C width, R rows of a table.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from nanofuse.kernels.backout import backout_ref
from nanofuse.kernels.bigram_rows import bigram_rows, bigram_rows_ref
from nanofuse.kernels.common.tuning import sm_count
from nanofuse.kernels.embedding_grad import embedding_grad, sort_rows
from nanofuse.kernels.resid_lambda_grad import SMALL_LAMBDA
from nanofuse.kernels.residual_gradients import residual_gradients
from nanofuse.kernels.residual_mix import residual_mix_bwd, residual_mix_fwd, residual_mix_ref
from nanofuse.model.pieces.stream import Stream, StreamGrad

# how each table of GPTConfig.table_rows is looked up: its rows of the tokens (B, T), as the module
# takes them and as the fused pass does
ROWS = {"bigram": (bigram_rows_ref, bigram_rows)}
LOOKBACK = 1  # how many tokens before its own a row may depend on, the most of all tables


class Tables(nn.Module):
    """The tables of config.table_rows: `<name>_embed`, and `<name>_lambdas`, one per layer."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        for name, rows in config.table_rows.items():
            self.add_module(f"{name}_embed", nn.Embedding(rows, config.n_embd))
            lambdas = nn.Parameter(torch.empty(config.n_layer))
            self.register_parameter(f"{name}_lambdas", lambdas)

    def all(self):
        """[(name, table (R, C), lambdas (L,))]."""
        return [
            (name, getattr(self, f"{name}_embed").weight, getattr(self, f"{name}_lambdas"))
            for name in self.config.table_rows
        ]

    def lookups(
        self,
        tokens,  # (B, T) integer
    ):
        """[(the rows that the tokens look up, (B, T) int64, [the table])]."""
        return [(ROWS[name][0](tokens, len(table)), [table]) for name, table, _ in self.all()]

    def init_weights(self):
        for name, table, lambdas in self.all():
            nn.init.zeros_(table)
            nn.init.constant_(lambdas, getattr(self.config, f"{name}_lambda_init"))

    def forward(
        self,
        tokens,  # (B, T) integer
        before=None,  # (B, P) integer: the P tokens before tokens[:, 0], LOOKBACK or all, or None
    ):
        """[(embeddings (B, T, C), lambdas (L,))] of each table."""
        whole = tokens if before is None else torch.cat([before, tokens], dim=1)
        own = slice(whole.size(1) - tokens.size(1), None)
        return [
            (F.embedding(ROWS[name][0](whole, table.size(0))[:, own], table), lambdas)
            for name, table, lambdas in self.all()
        ]


class Mix(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))

    @torch.no_grad()
    def init_weights(self):
        layers = self.resid_lambdas.numel()
        depth_fraction = torch.arange(layers) / max(layers - 1, 1)
        self.resid_lambdas.copy_(1.15 - 0.10 * depth_fraction)
        self.x0_lambdas.copy_(0.20 - 0.15 * depth_fraction)

    def forward(
        self,
        layer,
        x,  # (B, T, C)
        x0,  # (B, T, C)
        looked_up,  # [(embeddings (B, T, C), lambdas (L,))] of Tables
    ):
        terms = [(e, lambdas[layer]) for e, lambdas in looked_up]
        return residual_mix_ref(x, x0, self.resid_lambdas[layer], self.x0_lambdas[layer], terms)


class Backout(nn.Module):
    def __init__(self):
        super().__init__()
        self.backout_lambda = nn.Parameter(torch.empty(1))

    def init_weights(self):
        nn.init.constant_(self.backout_lambda, 0.2)

    def forward(
        self,
        x,  # (B, T, C)
        x_mid,  # (B, T, C)
    ):
        return backout_ref(x, x_mid, self.backout_lambda)


@dataclass
class Saved:
    """What the forward pass of a mix or norm saves."""

    x: torch.Tensor  # (N, C) result
    rstd: torch.Tensor  # (N,) its inverse root mean squares
    grad_name: str | None  # of the branch that was added


@dataclass
class Mixes:
    """What the mixes collect in a backward pass, to be summed over all layers at its end."""

    grads: torch.Tensor  # (L + 1, N, C) gradient of the result of each layer's mix, and of backout
    sums: torch.Tensor  # (L,) fp32: sum(gradient * result)
    shares: torch.Tensor  # (L, programs) fp32: StreamGrad.shares of each layer's resid_lambda


class FusedNorm:
    """The residual add and the norm after it."""

    ops = ("residual_mix",)
    weights, matrices, fp8 = (), (), {}

    def forward(self, step, stream):
        if stream.normed is None:
            return self._forward(step, stream)
        saved = Saved(stream.x, stream.rstd, stream.grad_name)  # the product before has done it
        return Stream(stream.x, rstd=stream.rstd, normed=stream.take_normed()), saved

    def _forward(self, step, stream, *mix, **lambdas):
        """Add the branch, mix in what residual_mix_fwd takes as `mix` and `lambdas`, normalise."""
        x, rstd, normed = residual_mix_fwd(
            stream.x, stream.branch, *mix, **lambdas, scaling=step.precision.norm_scaling
        )
        return Stream(x, rstd=rstd, normed=normed), Saved(x, rstd, stream.grad_name)

    def backward(self, step, saved, grad):
        g, _, branch = self._backward(step, saved, grad)
        return StreamGrad(g, branch=branch)

    def _backward(self, step, saved, grad, resid_lambda=None, **more):
        """residual_mix_bwd: the gradient of x (N, C), its sum(gradient * x) if asked for, and the
        operand of the gradient of the branch, None without a branch."""
        run = partial(
            residual_mix_bwd, grad.normed, saved.x, saved.rstd, grad.g, grad.factor, **more
        )
        if saved.grad_name is None:
            return *run()[:2], None
        return step.precision.scaling.produce(
            saved.grad_name, lambda scaling: run(resid_lambda=resid_lambda, scaling=scaling)
        )


class FusedMix(FusedNorm):
    """The mix that opens a layer. The first one makes the rows of the tables, and closes the sums
    over all layers in the backward pass."""

    ops = ("residual_mix", "residual_gradients", "embedding_grad")

    def __init__(self, mix, tables, layer):
        self.layer, self.tables = layer, tables.all()
        self.resid_lambdas, self.x0_lambdas = mix.resid_lambdas, mix.x0_lambdas
        self.ops += tuple(f"{name}_rows" for name, _, _ in self.tables)

    def _one(
        self,
        lambdas,  # (L,)
    ):
        return lambdas.detach()[self.layer : self.layer + 1]  # (1,)

    def forward(self, step, stream):
        if self.layer == 0:
            step.rows = [
                ROWS[name][1](step.tokens, table.size(0)).view(-1) for name, table, _ in self.tables
            ]
        lookups = [
            (rows, table, self._one(lambdas))
            for rows, (_, table, lambdas) in zip(step.rows, self.tables, strict=True)
        ]
        lambdas = self._one(self.resid_lambdas), self._one(self.x0_lambdas)
        return self._forward(step, stream, step.x0, lookups, *lambdas)

    def backward(self, step, saved, grad):
        mixes, i, resid = step.mixes, self.layer, self._one(self.resid_lambdas)
        g, _, branch = self._backward(
            step, saved, grad, resid, x=saved.x, out=mixes.grads[i], sum_out=mixes.sums[i]
        )
        if i == 0:
            return StreamGrad(self._close(step))
        return StreamGrad(g, resid, mixes.shares[i], branch)

    def _close(self, step):
        """Accumulate the gradients of all mixes' lambdas and of the tables; returns that of x0.

        As y = resid*x + x0_lambda*x0 + sum of lambda*e, the gradient sum(g*x) of resid follows from
        sum(g*y), sum(g*x0) and sum(g*e) without reading x; a small resid, which would magnify their
        errors, takes the shares (kernels/resid_lambda_grad.py). The first layer's x is x0.
        """
        mixes, resid, coefficients = step.mixes, self.resid_lambdas, self.x0_lambdas.clone()
        coefficients[0] += resid[0]
        lookups = [
            (rows, table, lambdas)
            for rows, (_, table, lambdas) in zip(step.rows, self.tables, strict=True)
        ]
        grad_x0, grad_x0_lambdas, of_tables = residual_gradients(
            mixes.grads[:-1], step.x0, coefficients, lookups
        )
        rest = mixes.sums - self.x0_lambdas * grad_x0_lambdas
        for (rows, table, lambdas), (grad_e, grad_lambdas) in zip(lookups, of_tables, strict=True):
            rest -= lambdas * grad_lambdas
            lambdas.grad += grad_lambdas
            embedding_grad(grad_e, sort_rows(rows, table.size(0)), table.grad)
        exact = mixes.shares.sum(dim=1)
        exact[0] = grad_x0_lambdas[0]
        resid.grad += torch.where(resid.abs() < SMALL_LAMBDA, exact, rest / resid)
        self.x0_lambdas.grad += grad_x0_lambdas
        return grad_x0


class FusedMiddle:
    """The end of the middle layer: the stream is kept for backout."""

    ops = ("residual_gradients", "quantize")
    weights, matrices, fp8 = (), (), {}

    def __init__(self, mix, backout, layer):
        self.above = layer + 1
        self.resid_lambdas, self.backout_lambda = mix.resid_lambdas, backout.backout_lambda

    def forward(self, step, stream):
        step.x_mid = stream.x + stream.branch
        return Stream(step.x_mid), stream.grad_name

    def backward(self, step, grad_name, grad):
        """The gradient is summed over two uses: the next layer's mix, or none, and backout."""
        mixes, above, last = step.mixes, self.above, len(step.mixes.sums)
        if above == last:
            used, factors = mixes.grads[last:], 1 - self.backout_lambda
        else:
            used = mixes.grads[above :: last - above]
            factors = torch.cat([self.resid_lambdas[above : above + 1], -self.backout_lambda])
        g, grad_factors, _ = residual_gradients(used, step.x_mid, factors)
        if above < last:
            mixes.shares[above, 0] = grad_factors[0]
        self.backout_lambda.grad -= grad_factors[-1:]
        step.x_mid = None
        return StreamGrad(g, branch=step.precision.operand(grad_name, g))


class FusedBackout(FusedNorm):
    """Backout and the last norm: a mix with x_mid for x0."""

    def __init__(self, backout, config):
        self.backout_lambda, self.layers = backout.backout_lambda, config.n_layer

    def forward(self, step, stream):
        return self._forward(step, stream, step.x_mid, x0_lambda=-self.backout_lambda)

    def backward(self, step, saved, grad):
        layers, device = self.layers, saved.x.device
        step.mixes = Mixes(
            grad.normed.new_empty(layers + 1, *saved.x.shape),
            torch.empty(layers, device=device),
            torch.zeros(layers, sm_count(device), device=device),
        )
        g, _, branch = self._backward(step, saved, grad, out=step.mixes.grads[-1])
        return StreamGrad(g, branch=branch)
