"""The GPT's training pass on Triton kernels, with a hand-written forward and backward pass.

FusedGPT computes what GPT.forward (model/gpt.py) defines, and its gradients, without autograd.
Autograd passes plain tensors between functions; here a norm's backward kernel hands the gradient to
the GEMMs before it as an FP8 operand in two layouts, the gradients of x0, the bigram rows and the
lambdas are summed over all layers in one pass, and weight gradients accumulate inside the GEMMs.
tests/model/test_fused.py compares the loss and the gradient of every parameter with the GPT's.

One micro-step of N = B*T positions:

    embed_smear -> [ residual_mix -> QKV GEMM -> rotary_qk_norm -> attention -> output GEMM
                     -> residual add and norm -> linear_relu_squared -> output GEMM ] per layer
    -> backout and norm -> lm_head GEMM -> softcap_cross_entropy

In the backward pass the gradient g of the residual stream is passed on together with a scalar that
must still multiply it (the resid_lambda of the mix above). The next kernel that reads g applies it,
so that scaling costs no pass over memory.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nanofuse.kernels.bigram_rows import bigram_rows
from nanofuse.kernels.common.fp8 import E4M3, E5M2, MULTIPLE, Scaling
from nanofuse.kernels.common.ptx import INTERPRETED
from nanofuse.kernels.common.tuning import sm_count
from nanofuse.kernels.embed_smear import embed_smear_bwd, embed_smear_fwd
from nanofuse.kernels.embedding_grad import embedding_grad, sort_rows
from nanofuse.kernels.resid_lambda_grad import SMALL_LAMBDA
from nanofuse.kernels.residual_gradients import residual_gradients
from nanofuse.kernels.softcap_cross_entropy import (
    IGNORE_INDEX,
    mean_grad_scale,
    softcap_cross_entropy_bwd,
    softcap_cross_entropy_fwd,
)
from nanofuse.model.fp8.operands import Operands
from nanofuse.model.fp8.scaling import DelayedScaling, Unscaled
from nanofuse.model.fp8.weights import Weights
from nanofuse.model.fused_layer import ACTIVATIONS, EVALUATION, GRADIENTS, FusedLayer, Precision
from nanofuse.model.graphs import GraphedPass

EVALUATION_ROWS = 8192  # positions whose logits exist at once in evaluation


def kernels_are_interpreted():
    """Whether the kernels run in Triton's interpreter, on a CPU: slow, for tests."""
    return INTERPRETED.value


def fp8_fits(config, tokens):
    """Whether the FP8 kernels support the sizes of a GPTConfig with `tokens` positions per
    micro-step."""
    sizes = (tokens, config.n_embd, config.kv_dim)
    head = config.head_dim
    return not any(size % MULTIPLE for size in sizes) and head >= 32 and head & (head - 1) == 0


@dataclass
class StepState:
    """What the forward pass of a micro-step saves for its backward pass."""

    tokens: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (N,)
    rows: torch.Tensor = None  # (N,) int32 rows of the bigram table; None in a dense model
    x0: torch.Tensor = None  # (N, C) stream after smear
    smear_gate: torch.Tensor = None  # (N,) sigmoid of the smear gate's logits
    layers: list = field(default_factory=list)  # a LayerState per layer
    x_mid: torch.Tensor = None  # (N, C) stream after the middle layer
    y: torch.Tensor = None  # (N, C) stream after backout
    rstd: torch.Tensor = None  # (N,) inverse root mean squares of y
    normed: Any = None  # operand (N, C): y normalised, the input of lm_head
    logits: torch.Tensor = None  # (N, V) before the softcap
    lse: torch.Tensor = None  # (N,) logsumexp of the softcapped logits


class _Loss(torch.autograd.Function):
    """Connects the hand-written backward pass to autograd, so that loss.backward() works as for any
    model. The pass accumulates into the parameters' .grad itself; `anchor`, any parameter, only
    makes autograd call it."""

    @staticmethod
    def forward(ctx, anchor, forward, backward, tokens, targets):
        loss, ctx.state = forward(tokens, targets)
        ctx.run = backward
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        state, ctx.state = ctx.state, None
        if state is None:
            raise RuntimeError("the fused loss can be differentiated once; compute it again")
        ctx.run(state, grad_loss)
        return None, None, None, None, None


class FusedGPT(nn.Module):
    """A GPT whose training pass runs on the kernels.

    Called like the GPT: fused(tokens, targets, reduction). In training mode with gradients enabled
    it returns the mean loss, whose backward() accumulates every parameter's gradient into .grad.
    These .grad tensors are allocated here once; clear them in place. Otherwise it evaluates, with
    plain products in the activations' dtype. Between passes the weights may change in place, which
    torch counts; a kernel that writes them reports it by torch.autograd.graph.increment_version.

    Args:
        model: GPT; its matrices become views of the stacks of model.fp8.weights.Weights.
        gemm: a provider of model.fp8.products.
        graphs: record CUDA graphs of the training pass once the FP8 scales are known.

    Raises:
        ValueError: a width that the MLP's kernel does not take.
    """

    def __init__(self, model, gemm, graphs=False):
        super().__init__()
        if model.config.n_embd % MULTIPLE:
            raise ValueError(
                f"the fused pass needs a width that is a multiple of {MULTIPLE}, "
                f"not {model.config.n_embd}; change head_dim"
            )
        self.graphs, self.graphed = graphs, None
        self.ran = False  # whether a whole training pass has run in this process
        self.model, self.weights = model, Weights(model)
        for p in model.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        config, device = model.config, model.lm_head.weight.device
        scaling, norm_scaling = Unscaled(), None
        if gemm.fp8:
            names = self.weights.fp8_names() | {"grad_logits": E5M2}
            for layer in range(config.n_layer):
                names |= {f"{name}.{layer}": E4M3 for name in ACTIVATIONS}
                names |= {f"{name}.{layer}": E5M2 for name in GRADIENTS}
            scaling = DelayedScaling(names, device)
            # no element of C normalised ones exceeds sqrt(C): a static scale
            norm_scaling = Scaling.from_bound(config.n_embd**0.5, E4M3, device)
        self.precision = Precision(gemm, scaling, norm_scaling)
        self.layers = [FusedLayer(model, i, w) for i, w in enumerate(self.weights.layers)]
        self.operands = Operands(self.weights, scaling)
        self.operands.follow()

    def describe(self):
        """One line for the log: which kernels run, and which do not and why."""
        fp8 = self.precision.gemm.fp8
        ops = ["embed_smear", "residual_mix", "rotary_qk_norm", "softcap_cross_entropy"]
        ops += ["linear_relu_squared", "residual_gradients", "embedding_grad"]
        ops += ["quantize"] if fp8 else []
        off = [] if fp8 else ["quantize (no FP8)"]
        ops += ["gate_logits"] if self.model.value_embeds else []
        if not self.model.config.bigram_embed_factor:
            off.append("bigram lookup (dense model)")
        return f"on: {', '.join(ops)}; off: {', '.join(off) or 'none'}"

    def fp8_clipped(self):
        """How many times a tensor exceeded its FP8 range in an optimiser step and was clipped, over
        all tensors and the steps of this process; None without FP8. Synchronises with the GPU."""
        self.operands.follow()  # counts those of the latest step
        clipped = self.precision.scaling.clipped
        return None if clipped is None else clipped.item()

    def forward(
        self,
        tokens,  # (B, T) integer
        targets,  # (B, T) int64 in [0, vocab_size), or -1: ignored
        reduction="mean",
    ):
        """Mean loss in nats, (), or with reduction "none" the losses of all positions, (B*T,).

        Another target, and a token outside of the embedding table, give NaN: loss and gradients.

        Raises:
            ValueError: another reduction, or "none" in training, which needs the mean.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"unknown reduction {reduction!r}; choose from mean, none")
        self.operands.follow()
        if self.training and torch.is_grad_enabled():
            if reduction == "none":
                raise ValueError("the fused training pass gives the mean loss only")
            self.operands.recorded = True
            if self.graphed is None and self._may_record():
                self.graphed = GraphedPass(self, tokens, targets)
            one_pass = self if self.graphed is None else self.graphed
            pair = one_pass.loss, one_pass.backward
            return _Loss.apply(self.model.backout_lambda, *pair, tokens, targets)
        losses, _ = self._losses(EVALUATION, tokens.contiguous(), targets.reshape(-1))
        if reduction == "none":
            return losses
        return losses.sum() / (targets != IGNORE_INDEX).sum()

    def _may_record(self):
        """Whether to record CUDA graphs now: every kernel has run (so that it is compiled) in this
        process, and FP8 calibration, which runs kernels twice, is over."""
        return self.graphs and self.ran and self.operands.settled

    @torch.no_grad()
    def loss(
        self,
        tokens,  # (B, T)
        targets,  # (B, T)
    ):
        """Forward pass of training: the mean loss () and the StepState for `backward`."""
        losses, state = self._losses(self.precision, tokens.contiguous(), targets.reshape(-1))
        return losses.sum() / (state.targets != IGNORE_INDEX).sum(), state

    @torch.no_grad()
    def _losses(
        self,
        precision,
        tokens,  # (B, T)
        targets,  # (N,)
    ):
        """Forward pass: the losses (N,) and the StepState, which in evaluation (precision is
        EVALUATION) lacks what only the backward pass needs."""
        model, keep = self.model, precision is not EVALUATION
        state = StepState(tokens, targets)
        x, state.smear_gate = embed_smear_fwd(
            tokens, model.transformer.wte.weight, model.smear_gate.weight, model.smear_lambda
        )
        state.x0, branch = x, None
        if model.config.bigram_embed_factor:
            state.rows = bigram_rows(tokens, model.config.bigram_rows).view(-1)
        for layer in self.layers:
            x, branch, layer_state = layer.forward(
                precision, x, branch, state.x0, tokens, state.rows
            )
            if keep:
                state.layers.append(layer_state)
            if layer.index == model.config.n_layer // 2:
                x, branch = x + branch, None
                state.x_mid = x
        state.y, state.rstd, normed = precision.norm(
            x, branch, state.x_mid, x0_lambda=-model.backout_lambda
        )
        head, vocab_size = precision.weight(self.weights.lm_head), model.config.vocab_size
        if keep:
            state.normed, state.logits = (
                precision.gemm.keep(normed),
                precision.gemm.forward(normed, head),
            )
            losses, state.lse = softcap_cross_entropy_fwd(state.logits, targets, vocab_size)
        else:  # logits of EVALUATION_ROWS positions at a time
            parts = zip(normed.split(EVALUATION_ROWS), targets.split(EVALUATION_ROWS), strict=True)
            losses = torch.cat(
                [
                    softcap_cross_entropy_fwd(precision.gemm.forward(x, head), part, vocab_size)[0]
                    for x, part in parts
                ]
            )
        return losses, state

    @torch.no_grad()
    def backward(
        self,
        state,
        grad_loss,  # ()
    ):
        """Backward pass: accumulate the gradient of grad_loss * loss into every parameter's .grad.

        Frees the tensors of `state` as it goes, so it runs once per state.
        """
        model, middle = self.model, self.model.config.n_layer // 2
        order = sort_rows(state.tokens, model.config.padded_vocab_size)
        layers = len(self.layers)
        grads, operand = self._head_backward(state, grad_loss)
        sums = torch.empty(layers, device=grads.device)
        # shares of sum(g * x) of each layer's residual mix, as far as x is at hand
        shares = torch.zeros(layers, sm_count(grads.device), device=grads.device)
        g, factor = grads[layers], None
        for layer in reversed(self.layers):
            i = layer.index
            if i == middle:
                g = self._middle_backward(state, grads, shares)
                factor, operand = None, self.precision.quantized(f"grad_mlp.{i}", g)
            below = None if i in (0, middle + 1) else f"grad_mlp.{i - 1}"
            sums[i], operand = layer.backward(
                self.precision, state.layers.pop(), g, factor, operand, state.tokens, order,
                grads[i], below, None if factor is None else shares[i + 1],
            )  # fmt: skip
            g, factor = grads[i], layer.resid_lambda
        self._mix_backward(state, grads[:layers], sums, shares.sum(dim=1), order)
        self.precision.scaling.calibrate(False)
        self.ran = True

    def _head_backward(
        self,
        state,
        grad_loss,  # ()
    ):
        """Backward pass of loss, lm_head, final norm and backout's output y.

        Returns:
            A buffer (L + 1, N, C) for gradients of the residual stream: slot i, filled later, for
            the output of layer i's residual mix; the last slot, filled here, for the stream after
            backout. And the last slot's gradient as the operand that the last layer's MLP takes;
            None if the last layer is the middle one, whose gradient `_middle_backward` computes.
        """
        precision, head = self.precision, self.weights.lm_head
        scale = mean_grad_scale(state.targets) * grad_loss
        grad_logits = precision.operand(
            "grad_logits",
            lambda scaling, want_plain: softcap_cross_entropy_bwd(
                state.logits, state.targets, state.lse, scale, self.model.config.vocab_size,
                scaling, want_plain, inplace=want_plain,
            ),
        )  # fmt: skip
        state.logits = None
        precision.gemm.weight_grad(grad_logits, state.normed, head.grad)
        grad = precision.gemm.input_grad(grad_logits, head.operand)  # (N, C)
        del grad_logits  # the largest tensor of the pass; `grads` may reuse its memory
        grads = grad.new_empty(len(self.layers) + 1, *grad.shape)
        last = len(self.layers) - 1
        name = f"grad_mlp.{last}" if last != self.model.config.n_layer // 2 else None
        _, _, operand = precision.mix_backward(name, grad, state.y, state.rstd, out=grads[-1])
        state.y = state.normed = None
        return grads, operand

    def _middle_backward(
        self,
        state,
        grads,  # (L + 1, N, C) of `_head_backward`; the slots above the middle layer are filled
        shares,  # (L, programs) fp32; that of the next layer's sum(g * x) is written
    ):
        """Gradient of the stream after the middle layer, (N, C), summed over its two uses: the next
        layer's residual mix and backout. Also accumulates backout_lambda's gradient."""
        model, above, last = self.model, self.model.config.n_layer // 2 + 1, len(self.layers)
        backout = model.backout_lambda
        if above == last:
            used, factors = grads[last:], 1 - backout
        else:
            used = grads[above :: last - above]  # gradients of the next mix, and after backout
            factors = torch.cat([model.resid_lambdas[above : above + 1], -backout])
        g, grad_factors, _ = residual_gradients(used, state.x_mid, factors)
        if above < last:
            shares[above, 0] = grad_factors[0]
        backout.grad -= grad_factors[-1:]
        state.x_mid = None
        return g

    def _mix_backward(
        self,
        state,
        grads,  # (L, N, C) gradient g of the output y of each layer's residual mix
        sums,  # (L,) fp32: sum(g * y) of each layer
        exact,  # (L,) fp32: sum(g * x) of each layer whose resid_lambda is small, but the first
        order,  # SortedRows of the tokens
    ):
        """Accumulate the gradients of the mixes' lambdas, of the bigram table, and of the token
        embedding and smear, which compute x0.

        As y = resid*x + x0_lambda*x0 + bigram_lambda*e, the gradient sum(g*x) of resid follows from
        sum(g*y), sum(g*x0) and sum(g*e) without reading x; a small resid, which would magnify their
        errors, takes `exact` (kernels/resid_lambda_grad.py). The first layer's x is x0.
        """
        model, bigram = self.model, hasattr(self.model, "bigram_embed")
        resid, coefficients = model.resid_lambdas, model.x0_lambdas.clone()
        coefficients[0] += resid[0]
        lookups = ()
        if bigram:
            lookups = ((state.rows, model.bigram_embed.weight, model.bigram_lambdas),)
        grad_x0, grad_x0_lambdas, of_tables = residual_gradients(
            grads, state.x0, coefficients, lookups
        )
        rest = sums - model.x0_lambdas * grad_x0_lambdas
        for grad_e, grad_bigram_lambdas in of_tables:
            rest -= model.bigram_lambdas * grad_bigram_lambdas
            model.bigram_lambdas.grad += grad_bigram_lambdas
            bigram_order = sort_rows(state.rows, model.config.bigram_rows)
            embedding_grad(grad_e, bigram_order, model.bigram_embed.weight.grad)
        exact[0] = grad_x0_lambdas[0]
        resid.grad += torch.where(resid.abs() < SMALL_LAMBDA, exact, rest / resid)
        model.x0_lambdas.grad += grad_x0_lambdas
        wte = model.transformer.wte.weight
        grad_rows, grad_gate_weight, grad_smear_lambda = embed_smear_bwd(
            grad_x0, state.tokens, wte, model.smear_gate.weight, model.smear_lambda,
            state.smear_gate,
        )  # fmt: skip
        embedding_grad(grad_rows, order, wte.grad)
        model.smear_gate.weight.grad += grad_gate_weight
        model.smear_lambda.grad += grad_smear_lambda
