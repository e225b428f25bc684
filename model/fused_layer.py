"""One layer of the fused training pass (model/fused.py): hand-written forward and backward pass.

Shapes: N = B*T positions, C width, H query and K key/value heads of D columns, G gate channels.
An "operand" is what the GEMMs of the chosen precision take: a plain tensor, or an FP8Operand.
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
from nanofuse.kernels.resid_lambda_grad import resid_lambda_grad
from nanofuse.kernels.residual_mix import residual_mix_bwd, residual_mix_fwd
from nanofuse.kernels.rotary_qk_norm import rotary_qk_norm_bwd, rotary_qk_norm_fwd
from nanofuse.model.fp8.products import PlainGemm
from nanofuse.model.fp8.scaling import DelayedScaling, Unscaled

# names of a layer's FP8 tensors beside its weights: GEMM inputs, and gradients of GEMM outputs
ACTIVATIONS = ("attended", "activated")
GRADIENTS = ("grad_qkv", "grad_attn", "grad_fc", "grad_mlp")


@dataclass(frozen=True)
class Precision:
    """How matrix products are computed.

    Fields: gemm, a provider of model.fp8.products; scaling, the scales of its FP8 operands;
    norm_scaling, the static Scaling of normalised activations, None without FP8.
    """

    gemm: Any
    scaling: DelayedScaling | Unscaled
    norm_scaling: Scaling | None = None

    def weight(self, weight):
        """Operand of a LinearWeight: in training the stored one, in evaluation the plain weight."""
        return weight.operand if self is not EVALUATION else weight.plain()

    def norm(self, *mix, **lambdas):
        """residual_mix_fwd with its normalised result as this precision's operand.

        Returns:
            The stream y (N, C), rstd (N,), and the operand of y normalised, (N, C).
        """
        fp8 = self.norm_scaling
        y, rstd, normed, operand = residual_mix_fwd(
            *mix, **lambdas, scaling=fp8, want_normed=fp8 is None
        )
        return y, rstd, normed if fp8 is None else operand

    def operand(self, name, run):
        """The result of a kernel as this precision's operand.

        Args:
            name: of the tensor, under which its scale is kept.
            run: run(scaling, want_plain) launches the kernel; returns (tensor or None, FP8Operand
                or None).
        """

        def one(scaling):
            plain, operand = run(scaling, scaling is None)
            return plain if scaling is None else operand

        return self.scaling.produce(name, one)

    def quantized(
        self,
        name,
        x,  # (N, C)
    ):
        """Operand of an existing tensor: the tensor itself, or quantised under the scale `name`."""
        return self.scaling.produce(
            name, lambda scaling: x if scaling is None else quantize(x, scaling)
        )

    def mix_backward(self, name, *gradients, resid_lambda=None, **inputs):
        """residual_mix_bwd with the branch's gradient as this precision's operand.

        Args:
            name: of the branch's gradient, under which its scale is kept; None if not needed.

        Returns:
            grad_y (N, C); sum(grad_y * x), () fp32, None without x; and the operand of the branch's
            gradient, resid_lambda * grad_y, (N, C), None without a name.
        """
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
    """What a layer's forward pass saves for its backward pass."""

    y: torch.Tensor  # (N, C) stream after the residual mix
    rstd: torch.Tensor  # (N,) inverse root mean squares of y
    normed: Any  # operand (N, C): y normalised, the input of the QKV GEMM
    qkv: torch.Tensor = None  # (N, (H + 2K)*D) after rotary_qk_norm
    qk_rstd: torch.Tensor = None  # (H + K, N) inverse root mean squares of q and k heads
    gate: torch.Tensor = None  # (N, K) logits of the value embedding's gate, or None
    attention: Any = None  # what the attention backend saved
    attended: Any = None  # operand (N, C): attention output
    y_mid: torch.Tensor = None  # (N, C) stream after attention, before the MLP
    rstd_mid: torch.Tensor = None  # (N,) inverse root mean squares of y_mid
    normed_mid: Any = None  # operand (N, C): y_mid normalised, the input of the MLP
    activated: Any = None  # operand (N, 4C): squared ReLU


class FusedLayer:
    """Layer `index` of a GPT, with its LinearWeights {kind: LinearWeight}."""

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
        precision,
        x,  # (N, C) stream
        branch,  # (N, C) MLP output of the layer below, not yet added to x; None if it is
        x0,  # (N, C) stream after smear
        tokens,  # (B, T)
        rows,  # (N,) int32: rows of the bigram table; None in a dense model
    ):
        """Forward pass of the layer.

        Returns:
            The stream before the MLP's residual add (N, C); the MLP's output (N, C), which the next
            layer's residual mix adds; and the LayerState.
        """
        lookups = () if rows is None else ((rows, self.bigram_table, self.bigram_lambda),)
        lambdas = self.resid_lambda, self.x0_lambda
        state = LayerState(*precision.norm(x, branch, x0, lookups, *lambdas))
        branch = self._attention_forward(precision, state, tokens)
        state.y_mid, state.rstd_mid, normed = precision.norm(state.y, branch)
        weight = precision.weight(self.weights["fc"])
        state.activated = precision.scaling.produce(
            self._name("activated"), partial(linear_relu_squared_fwd, normed, weight)
        )
        state.normed_mid = precision.gemm.keep(normed)
        branch = precision.gemm.forward(state.activated, precision.weight(self.weights["mlp_proj"]))
        return state.y_mid, branch, state

    def _attention_forward(
        self,
        precision,
        state,
        tokens,  # (B, T)
    ):
        """QKV GEMM, rotary_qk_norm, attention and output GEMM: the attention branch, (N, C)."""
        qkv = precision.gemm.forward(state.normed, precision.weight(self.weights["qkv"]))
        state.normed = precision.gemm.keep(state.normed)
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
        attended = precision.quantized(
            self._name("attended"), y.reshape(len(qkv), self.config.n_embd)
        )
        state.attended = precision.gemm.keep(attended)
        return precision.gemm.forward(attended, precision.weight(self.weights["attn_proj"]))

    def backward(
        self,
        precision,
        state,
        g,  # (N, C) upstream gradient of the stream that `forward` returned, lacking `factor`
        factor,  # (1,) that multiplies g, or None for 1
        operand,  # upstream gradient of the MLP's output that `forward` returned, as an operand
        tokens,  # (B, T)
        order,  # SortedRows of tokens
        out,  # (N, C) to write the gradient of y, the residual mix's output, to
        below,  # name of the FP8 gradient of `branch`, the MLP output below; None if not needed
        shares,  # (programs,) fp32 zeros for kernels.resid_lambda_grad, or None without factor
    ):
        """Backward pass of the layer down to the output y of its residual mix. Accumulates the
        gradients of the layer's matrices, of its gate and of its value embedding table; those of
        the lambdas and the bigram table are computed for all layers together (model/fused.py), but
        for `factor`, the resid_lambda of the layer above: if small, its gradient goes to `shares`.

        Returns:
            sum(out * y), () fp32; and the gradient of `branch`, resid_lambda * out, as an operand,
            or None.
        """
        gemm, weights = precision.gemm, self.weights
        if factor is not None:
            resid_lambda_grad(
                g, state.y_mid, state.activated, weights["mlp_proj"].operand, factor, shares
            )
        gemm.weight_grad(operand, state.activated, weights["mlp_proj"].grad)
        grad_fc = precision.scaling.produce(
            self._name("grad_fc"),
            partial(linear_relu_squared_bwd, operand, weights["mlp_proj"].operand, state.activated),
        )
        state.activated = operand = None
        gemm.weight_grad(grad_fc, state.normed_mid, weights["fc"].grad)
        grad = gemm.input_grad(grad_fc, weights["fc"].operand)  # (N, C)
        state.normed_mid = grad_fc = None
        g, _, operand = precision.mix_backward(
            self._name("grad_attn"), grad, state.y_mid, state.rstd_mid, g, factor
        )
        gemm.weight_grad(operand, state.attended, weights["attn_proj"].grad)
        grad = gemm.input_grad(operand, weights["attn_proj"].operand)  # (N, C)
        state.y_mid = state.attended = operand = None
        grad = self._attention_backward(precision, state, grad, tokens, order)
        _, sums, operand = precision.mix_backward(
            below, grad, state.y, state.rstd, g, x=state.y, out=out, resid_lambda=self.resid_lambda
        )
        return sums, operand

    def _attention_backward(
        self,
        precision,
        state,
        grad,  # (N, C) gradient of the attention's output
        tokens,  # (B, T)
        order,  # SortedRows of tokens
    ):
        """Backward pass of `_attention_forward`: accumulates the gradients of its parameters and
        returns that of the QKV GEMM's normalised input, (N, C)."""
        model, rows = self.model, len(grad)
        heads = grad.view(*tokens.shape, self.config.n_head, self.config.head_dim)
        grads = self.attention.backward(state.attention, heads)
        state.attention = None
        values = None, None, None
        if self.value_table is not None:
            values = tokens.view(-1), self.value_table, state.gate
        gate_and_value_grads = []

        def rotary(scaling, want_plain):
            plain, operand, *gate_and_value_grads[:] = rotary_qk_norm_bwd(
                *(x.reshape(rows, -1) for x in grads), state.qkv, state.qk_rstd, *values,
                model.cos, model.sin, tokens.size(1), scaling, want_plain,
            )  # fmt: skip
            return plain, operand

        operand = precision.operand(self._name("grad_qkv"), rotary)
        weight = self.weights["qkv"]
        precision.gemm.weight_grad(operand, state.normed, weight.grad)
        grad = precision.gemm.input_grad(operand, weight.operand)  # (N, C)
        state.qkv = state.normed = None
        if self.value_table is not None:
            grad_gate, grad_values = gate_and_value_grads  # (N, K) fp32, (N, K*D)
            embedding_grad(grad_values, order, self.value_table.grad)
            gate_logits_bwd(
                grad_gate, state.y, state.rstd, self.gate_weight, grad, self.gate_weight.grad
            )
        return grad
