"""The GPT's training pass on Triton kernels: forward and backward by hand.

FusedGPT computes what GPT.forward (model/gpt.py) defines, and its gradients, without autograd:
autograd passes tensors only, and here gradients travel from a norm to the matrix product before it
as FP8 operands in two layouts, the gradients of x0, bigram rows and lambdas of all layers are
summed in one pass, and weight gradients accumulate inside the products. tests/model/test_fused.py
holds the two together: the loss and the gradient of every parameter.

One micro-step of N = B*T positions:

    embed_smear -> [ residual_mix -> QKV product -> rotary_qk_norm -> attention -> product
                     -> residual add and norm -> linear_relu_squared -> product ] per layer
    -> backout and norm -> lm_head product -> softcap_cross_entropy

The gradient g of the stream comes with the factor that it still lacks (the resid_lambda of the mix
that it went through), so that no pass over memory is spent on it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nanofuse.kernels.common.fp8 import E4M3, E5M2, MULTIPLE, Scaling
from nanofuse.kernels.common.ptx import INTERPRETED
from nanofuse.kernels.embed_smear import embed_smear_bwd, embed_smear_fwd
from nanofuse.kernels.embedding_grad import bigram_table_grad, embedding_grad, sort_rows
from nanofuse.kernels.residual_gradients import residual_gradients
from nanofuse.kernels.softcap_cross_entropy import (
    IGNORE_INDEX,
    mean_grad_scale,
    softcap_cross_entropy_bwd,
    softcap_cross_entropy_fwd,
)
from nanofuse.model.fp8.scaling import CALIBRATED_STEPS, DelayedScaling, Unscaled
from nanofuse.model.fp8.weights import Weights
from nanofuse.model.fused_layer import ACTIVATIONS, EVALUATION, GRADIENTS, FusedLayer, Precision
from nanofuse.model.graphs import GraphedPass

EVALUATION_ROWS = 8192  # whose logits exist at once


def kernels_are_interpreted():
    """Whether the kernels run without a GPU, in Triton's interpreter (for tests: it is slow)."""
    return INTERPRETED.value


def fp8_fits(config, tokens):
    """Whether the FP8 kernels take a GPTConfig's sizes with `tokens` positions a micro-step."""
    sizes = (tokens, config.n_embd, config.kv_dim)
    head = config.head_dim
    return not any(size % MULTIPLE for size in sizes) and head >= 32 and head & (head - 1) == 0


@dataclass
class StepState:
    """What the backward pass of a micro-step needs."""

    tokens: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (N,)
    x0: torch.Tensor = None  # (N, C)
    smear_gate: torch.Tensor = None  # (N,)
    layers: list = field(default_factory=list)  # LayerStates
    x_mid: torch.Tensor = None  # (N, C)
    y: torch.Tensor = None  # (N, C) stream after backout
    rstd: torch.Tensor = None  # (N,)
    normed: Any = None  # operand (N, C)
    logits: torch.Tensor = None  # (N, V)
    lse: torch.Tensor = None  # (N,)


class _Loss(torch.autograd.Function):
    """Hangs the backward pass into autograd, so that loss.backward() works as for any model. The
    gradients go straight into the parameters' .grad; `anchor` only makes the loss require one."""

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

    Called like the GPT: fused(tokens, targets, reduction). In training mode with gradients on, the
    mean loss comes back, and its backward() adds every parameter's gradient to .grad, tensors that
    are made here: clear them in place. Else the losses come from plain products. `refresh` must
    follow every later change of the weights.

    Args:
        model: GPT; its matrices become views of the stacks of model.weights.
        gemm: products of model.gemm.
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
        self.ran = False  # a whole pass, in this process
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
            # none of C normalised values is beyond sqrt(C)
            norm_scaling = Scaling.from_bound(config.n_embd**0.5, E4M3, device)
        self.precision = Precision(gemm, scaling, norm_scaling)
        self.layers = [FusedLayer(model, i, w) for i, w in enumerate(self.weights.layers)]
        self.updates = 0
        self.refresh()

    def describe(self):
        """One line: which kernels run, and which do not and why."""
        fp8 = self.precision.gemm.fp8
        ops = ["embed_smear", "residual_mix", "rotary_qk_norm", "softcap_cross_entropy"]
        ops += ["linear_relu_squared", "residual_gradients", "embedding_grad"]
        ops += ["quantize"] if fp8 else []
        off = [] if fp8 else ["quantize (no FP8)"]
        ops += ["gate_logits"] if self.model.value_embeds else []
        if not self.model.config.bigram_embed_factor:
            off.append("bigram lookup (dense model)")
        return f"on: {', '.join(ops)}; off: {', '.join(off) or 'none'}"

    @torch.no_grad()
    def refresh(self):
        """Take over changed weights: update the FP8 scales, then make the products' operands."""
        if self.updates:
            self.precision.scaling.update()
        self._make_operands()
        self.updates += 1

    def _make_operands(self):
        scaling = self.precision.scaling
        # for the weights here, and for the micro-step that follows
        scaling.calibrate(self.updates < CALIBRATED_STEPS)
        self.weights.refresh(scaling)

    def fp8_clipped(self):
        """How often a tensor went beyond its FP8 scale and was clipped, tensors x steps in this
        process; None without FP8. Waits for the device."""
        clipped = self.precision.scaling.clipped
        return None if clipped is None else clipped.item()

    def scaling_state(self):
        """The FP8 scales for a checkpoint, {name: tensor}; empty without FP8."""
        tensors = self.precision.scaling.state_dict()
        return tensors and {**tensors, "updates": torch.tensor(self.updates)}

    @torch.no_grad()
    def load_scaling_state(
        self,
        tensors,
    ):
        """Continue with the scales that `scaling_state` gave, and with the loaded weights; without
        any, or where products are not FP8, start anew."""
        if not tensors or not self.precision.gemm.fp8:
            self.updates = 0
            return self.refresh()
        self.precision.scaling.load_state_dict(tensors)
        self.updates = int(tensors["updates"]) - 1
        self._make_operands()
        self.updates += 1

    def forward(
        self,
        tokens,  # (B, T) integer
        targets,  # (B, T) int64, -1 is ignored
        reduction="mean",
    ):
        """Loss in nats, (), or with reduction "none" the losses (B*T,).

        Raises:
            ValueError: another reduction; losses with gradients are means.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"unknown reduction {reduction!r}; choose from mean, none")
        if self.training and torch.is_grad_enabled():
            if reduction == "none":
                raise ValueError("the fused training pass gives the mean loss only")
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
        """Whether to record CUDA graphs now: every kernel has run in this process, and no pass will
        calibrate any more, outside of the graphs and with activations of its own."""
        settled = not self.precision.gemm.fp8 or self.updates > CALIBRATED_STEPS
        return self.graphs and self.ran and settled

    @torch.no_grad()
    def loss(
        self,
        tokens,  # (B, T)
        targets,  # (B, T)
    ):
        """Mean loss () and the StepState for `backward`."""
        losses, state = self._losses(self.precision, tokens.contiguous(), targets.reshape(-1))
        return losses.sum() / (state.targets != IGNORE_INDEX).sum(), state

    @torch.no_grad()
    def _losses(
        self,
        p,
        tokens,  # (B, T)
        targets,  # (N,)
    ):
        """Losses (N,) and the StepState; in evaluation nothing that only backward needs is kept."""
        model, keep = self.model, p is not EVALUATION
        state = StepState(tokens, targets)
        x, state.smear_gate = embed_smear_fwd(
            tokens, model.transformer.wte.weight, model.smear_gate.weight, model.smear_lambda
        )
        state.x0, branch = x, None
        for layer in self.layers:
            x, branch, layer_state = layer.forward(p, x, branch, state.x0, tokens)
            if keep:
                state.layers.append(layer_state)
            if layer.index == model.config.n_layer // 2:
                x, branch = x + branch, None
                state.x_mid = x
        state.y, state.rstd, normed = p.norm(
            x, branch, state.x_mid, x0_lambda=-model.backout_lambda
        )
        head, vocab_size = p.weight(self.weights.lm_head), model.config.vocab_size
        if keep:
            state.normed, state.logits = p.gemm.keep(normed), p.gemm.forward(normed, head)
            losses, state.lse = softcap_cross_entropy_fwd(state.logits, targets, vocab_size)
        else:  # a part of the logits at a time
            parts = zip(normed.split(EVALUATION_ROWS), targets.split(EVALUATION_ROWS), strict=True)
            losses = torch.cat(
                [
                    softcap_cross_entropy_fwd(p.gemm.forward(x, head), part, vocab_size)[0]
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
        """Add the gradients of grad_loss * loss to every parameter's .grad; empties `state`."""
        model, middle = self.model, self.model.config.n_layer // 2
        order = sort_rows(state.tokens, model.config.padded_vocab_size)
        layers = len(self.layers)
        grads, operand = self._head_backward(state, grad_loss)
        sums = torch.empty(layers, device=grads.device)
        g, factor = grads[layers], None
        for layer in reversed(self.layers):
            i = layer.index
            if i == middle:
                g = self._middle_backward(state, grads)
                factor, operand = None, self.precision.quantized(f"grad_mlp.{i}", g)
            below = None if i in (0, middle + 1) else f"grad_mlp.{i - 1}"
            sums[i], operand = layer.backward(
                self.precision, state.layers.pop(), g, factor, operand, state.tokens, order,
                grads[i], below,
            )  # fmt: skip
            g, factor = grads[i], layer.resid_lambda
        self._mix_backward(state, grads[:layers], sums, order)
        self.precision.scaling.calibrate(False)
        self.ran = True

    def _head_backward(
        self,
        state,
        grad_loss,  # ()
    ):
        """The gradients of the mixes, (L + 1, N, C), of which the last is made here, that of the
        stream after backout; and the last MLP's operand of it."""
        p, head = self.precision, self.weights.lm_head
        scale = mean_grad_scale(state.targets) * grad_loss
        grad_logits = p.operand(
            "grad_logits",
            lambda scaling, want_plain: softcap_cross_entropy_bwd(
                state.logits, state.targets, state.lse, scale, self.model.config.vocab_size,
                scaling, want_plain, inplace=want_plain,
            ),
        )  # fmt: skip
        state.logits = None
        p.gemm.weight_grad(grad_logits, state.normed, head.grad)
        grad = p.gemm.input_grad(grad_logits, head.operand)  # (N, C)
        del grad_logits  # the largest tensor of all makes room
        grads = grad.new_empty(len(self.layers) + 1, *grad.shape)
        last = len(self.layers) - 1
        name = f"grad_mlp.{last}" if last != self.model.config.n_layer // 2 else None
        _, _, operand = p.mix_backward(name, grad, state.y, state.rstd, out=grads[-1])
        state.y = state.normed = None
        return grads, operand

    def _middle_backward(
        self,
        state,
        grads,  # (L + 1, N, C) gradients of the mixes, and last of the stream after backout
    ):
        """Gradient of the stream after the middle layer, which backout reads too, (N, C)."""
        model, above, last = self.model, self.model.config.n_layer // 2 + 1, len(self.layers)
        backout = model.backout_lambda
        if above == last:
            used, factors = grads[last:], 1 - backout
        else:
            used = grads[above :: last - above]  # of the mix above, and after backout
            factors = torch.cat([model.resid_lambdas[above : above + 1], -backout])
        g, of_factors, _, _ = residual_gradients(used, state.x_mid, factors)
        backout.grad -= of_factors[-1:]
        state.x_mid = None
        return g

    def _mix_backward(
        self,
        state,
        grads,  # (L, N, C) gradient of each layer's mix y
        sums,  # (L,) sum(grads * y)
        order,
    ):
        """Gradients of the lambdas, the bigram table and what makes x0.

        y = resid*x + x0_lambda*x0 + bigram_lambda*e, so sum(g*x) follows from sum(g*y) and the
        sums with x0 and e. x of the first layer is x0.
        """
        model, bigram = self.model, hasattr(self.model, "bigram_embed")
        resid, coefficients = model.resid_lambdas, model.x0_lambdas.clone()
        coefficients[0] += resid[0]
        lookup = ()
        if bigram:
            lookup = state.tokens, model.bigram_embed.weight, model.bigram_lambdas
        grad_x0, of_x0, grad_e, of_e = residual_gradients(grads, state.x0, coefficients, *lookup)
        rest = sums - model.x0_lambdas * of_x0
        if bigram:
            rest -= model.bigram_lambdas * of_e
            model.bigram_lambdas.grad += of_e
            bigram_table_grad(state.tokens, grad_e, model.bigram_embed.weight.grad)
        resid.grad += rest / resid
        model.x0_lambdas.grad += of_x0
        wte = model.transformer.wte.weight
        grad_rows, of_gate, of_lambda = embed_smear_bwd(
            grad_x0, state.tokens, wte, model.smear_gate.weight, model.smear_lambda,
            state.smear_gate,
        )  # fmt: skip
        embedding_grad(grad_rows, order, wte.grad)
        model.smear_gate.weight.grad += of_gate
        model.smear_lambda.grad += of_lambda
