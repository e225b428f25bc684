"""One layer of the fused training pass, forward and backward by hand (model/fused.py).

Shapes: N = B*T positions, C width, H query and K key/value heads of D columns, G gate channels.
"Operand" is what the products of the precision take: a tensor (N, C), or an FP8Operand.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nanofuse.kernels.common.fp8 import Scaling
from nanofuse.kernels.embedding_grad import embedding_grad
from nanofuse.kernels.gate_logits import gate_logits_bwd, gate_logits_fwd
from nanofuse.kernels.linear_relu_squared import linear_relu_squared_bwd, linear_relu_squared_fwd
from nanofuse.kernels.quantize import quantize
from nanofuse.kernels.residual_mix import residual_mix_bwd, residual_mix_fwd
from nanofuse.kernels.rotary_qk_norm import rotary_qk_norm_bwd, rotary_qk_norm_fwd
from nanofuse.model.fp8.products import PlainGemm
from nanofuse.model.fp8.scaling import DelayedScaling, Unscaled

# FP8 tensors of a layer beside its weights: activations, and the gradients of products' results
ACTIVATIONS = ("attended", "activated")
GRADIENTS = ("grad_qkv", "grad_attn", "grad_fc", "grad_mlp")


@dataclass(frozen=True)
class Precision:
    """How products are computed: gemm (model.gemm), and the scales of their FP8 operands."""

    gemm: Any
    scaling: DelayedScaling | Unscaled
    norm_scaling: Scaling | None = None

    def weight(self, weight):
        """Operand of a LinearWeight; evaluation makes a plain one, training keeps its own."""
        return weight.operand if self is not EVALUATION else weight.plain()

    def norm(self, *mix, **lambdas):
        """residual_mix_fwd: the stream y (N, C), rstd (N,) and the norm's operand."""
        fp8 = self.norm_scaling
        y, rstd, normed, operand = residual_mix_fwd(
            *mix, **lambdas, scaling=fp8, want_normed=fp8 is None
        )
        return y, rstd, normed if fp8 is None else operand

    def operand(self, name, run):
        """Operand of a kernel with a plain and an FP8 result: run(scaling, want_plain)."""

        def one(scaling):
            plain, operand = run(scaling, scaling is None)
            return plain if scaling is None else operand

        return self.scaling.produce(name, one)

    def quantized(
        self,
        name,
        x,  # (N, C)
    ):
        """Operand of a tensor that no kernel of ours wrote."""
        return self.scaling.produce(
            name, lambda scaling: x if scaling is None else quantize(x, scaling)
        )

    def mix_backward(self, name, *gradients, resid_lambda=None, **inputs):
        """residual_mix_bwd: the gradient of y (N, C), the fp32 sum of its products with `x`
        (None without x), and the operand of the branch's gradient, `name`; None without a name."""
        if name is None:
            return *residual_mix_bwd(*gradients, **inputs)[:2], None
        return self.scaling.produce(
            name,
            lambda scaling: residual_mix_bwd(
                *gradients, resid_lambda=resid_lambda, scaling=scaling, **inputs
            ),
        )


EVALUATION = Precision(PlainGemm(), Unscaled())


@dataclass
class LayerState:
    """What a layer's backward pass needs."""

    y: torch.Tensor  # (N, C) stream that opens the block
    rstd: torch.Tensor  # (N,)
    normed: Any  # operand (N, C)
    qkv: torch.Tensor = None  # (N, (H + 2K)*D) after rotary
    qk_rstd: torch.Tensor = None  # (H + K, N)
    gate: torch.Tensor = None  # (N, K) logits, or None
    attention: Any = None  # what the attention backend saved
    attended: Any = None  # operand (N, C)
    y_mid: torch.Tensor = None  # (N, C) stream before the MLP
    rstd_mid: torch.Tensor = None  # (N,)
    normed_mid: Any = None  # operand (N, C)
    activated: Any = None  # operand (N, 4C)


class FusedLayer:
    """Layer `index` of a GPT with its LinearWeights by kind."""

    def __init__(self, model, index, weights):
        self.model, self.config, self.index, self.weights = model, model.config, index, weights
        self.window = model.config.windows[index]
        self.attention = model.attention
        self.resid_lambda = model.resid_lambdas.detach()[index : index + 1]  # (1,)
        self.x0_lambda = model.x0_lambdas.detach()[index : index + 1]
        self.bigram_table = self.bigram_lambda = None
        if model.config.bigram_embed_factor:
            self.bigram_table = model.bigram_embed.weight
            self.bigram_lambda = model.bigram_lambdas.detach()[index : index + 1]
        self.value_table = self.gate_weight = None
        if str(index) in model.value_embeds:
            self.value_table = model.value_embeds[str(index)].weight  # (V, K*D)
            self.gate_weight = model.transformer.h[index].attn.ve_gate.weight  # (K, G)

    def _name(self, tensor):
        return f"{tensor}.{self.index}"

    def forward(
        self,
        p,
        x,  # (N, C) stream
        branch,  # (N, C) what joins it, or None
        x0,  # (N, C)
        tokens,  # (B, T)
    ):
        """The stream before the MLP's output joins (N, C), that output (N, C), and the state."""
        table = (tokens, self.bigram_table) if self.bigram_table is not None else (None, None)
        lambdas = self.resid_lambda, self.x0_lambda, self.bigram_lambda
        state = LayerState(*p.norm(x, branch, x0, *table, *lambdas))
        branch = self._attention_forward(p, state, tokens)
        state.y_mid, state.rstd_mid, normed = p.norm(state.y, branch)
        weight = p.weight(self.weights["fc"])
        state.activated = p.scaling.produce(
            self._name("activated"), partial(linear_relu_squared_fwd, normed, weight)
        )
        state.normed_mid = p.gemm.keep(normed)
        branch = p.gemm.forward(state.activated, p.weight(self.weights["mlp_proj"]))
        return state.y_mid, branch, state

    def _attention_forward(
        self,
        p,
        state,
        tokens,  # (B, T)
    ):
        """QKV product, rotary, attention and output product, (N, C)."""
        qkv = p.gemm.forward(state.normed, p.weight(self.weights["qkv"]))
        state.normed = p.gemm.keep(state.normed)
        values = None, None, None
        if self.value_table is not None:
            state.gate = gate_logits_fwd(state.y, state.rstd, self.gate_weight)
            values = tokens.view(-1), self.value_table, state.gate
        state.qk_rstd = rotary_qk_norm_fwd(
            qkv, *values, self.model.cos, self.model.sin, tokens.size(1), self.config.n_head
        )
        state.qkv = qkv
        sizes = [self.config.n_head, self.config.n_kv_head, self.config.n_kv_head]
        heads = qkv.view(*tokens.shape, sum(sizes), self.config.head_dim)
        y, state.attention = self.attention.forward(*heads.split(sizes, dim=2), self.window)
        attended = p.quantized(self._name("attended"), y.reshape(len(qkv), self.config.n_embd))
        state.attended = p.gemm.keep(attended)
        return p.gemm.forward(attended, p.weight(self.weights["attn_proj"]))

    def backward(
        self,
        p,
        state,
        g,  # (N, C) gradient of what `forward` returned first, without `factor`
        factor,  # (1,), or None for 1
        operand,  # of the gradient of what it returned second
        tokens,  # (B, T)
        order,  # SortedRows of tokens
        out,  # (N, C) where the gradient of y goes
        below,  # name of the FP8 gradient of the branch that joined x, or None without one
    ):
        """Adds the layer's gradients to its parameters but the lambdas and the bigram table.

        Returns:
            sum(gradient of y * y), () fp32, and the operand of resid_lambda * out, or None.
        """
        gemm, weights = p.gemm, self.weights
        gemm.weight_grad(operand, state.activated, weights["mlp_proj"].grad)
        grad_fc = p.scaling.produce(
            self._name("grad_fc"),
            partial(linear_relu_squared_bwd, operand, weights["mlp_proj"].operand, state.activated),
        )
        state.activated = operand = None
        gemm.weight_grad(grad_fc, state.normed_mid, weights["fc"].grad)
        grad = gemm.input_grad(grad_fc, weights["fc"].operand)  # (N, C)
        state.normed_mid = grad_fc = None
        g, _, operand = p.mix_backward(
            self._name("grad_attn"), grad, state.y_mid, state.rstd_mid, g, factor
        )
        gemm.weight_grad(operand, state.attended, weights["attn_proj"].grad)
        grad = gemm.input_grad(operand, weights["attn_proj"].operand)  # (N, C)
        state.y_mid = state.attended = operand = None
        grad = self._attention_backward(p, state, grad, tokens, order)
        _, sums, operand = p.mix_backward(
            below, grad, state.y, state.rstd, g, x=state.y, out=out, resid_lambda=self.resid_lambda
        )
        return sums, operand

    def _attention_backward(
        self,
        p,
        state,
        grad,  # (N, C) gradient of the attention's output
        tokens,  # (B, T)
        order,
    ):
        """Gradient of the block's normalised input, (N, C)."""
        model, rows = self.model, len(grad)
        heads = grad.view(*tokens.shape, self.config.n_head, self.config.head_dim)
        grads = self.attention.backward(state.attention, heads)
        state.attention = None
        values = None, None, None
        if self.value_table is not None:
            values = tokens.view(-1), self.value_table, state.gate
        of_values = []

        def rotary(scaling, want_plain):
            plain, operand, *of_values[:] = rotary_qk_norm_bwd(
                *(x.reshape(rows, -1) for x in grads), state.qkv, state.qk_rstd, *values,
                model.cos, model.sin, tokens.size(1), scaling, want_plain,
            )  # fmt: skip
            return plain, operand

        operand = p.operand(self._name("grad_qkv"), rotary)
        weight = self.weights["qkv"]
        p.gemm.weight_grad(operand, state.normed, weight.grad)
        grad = p.gemm.input_grad(operand, weight.operand)  # (N, C)
        state.qkv = state.normed = None
        if self.value_table is not None:
            grad_gate, grad_values = of_values  # (N, K) fp32, (N, K*D)
            embedding_grad(grad_values, order, self.value_table.grad)
            gate_logits_bwd(
                grad_gate, state.y, state.rstd, self.gate_weight, grad, self.gate_weight.grad
            )
        return grad
