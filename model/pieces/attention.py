"""Attention with rotary embedding, normalised q and k and gated value embeddings: a branch.

Shapes: B rows, T tokens, N = B*T positions, C width, H query and K key/value heads of D columns,
V vocabulary, G gate channels.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nanofuse.kernels.common.fp8 import E4M3, E5M2
from nanofuse.kernels.embedding_grad import embedding_grad
from nanofuse.kernels.gate_logits import gate_logits_bwd, gate_logits_fwd
from nanofuse.kernels.linear_residual_norm import linear_residual_norm_fwd
from nanofuse.kernels.linear_residual_norm import takes as takes_norm
from nanofuse.kernels.linear_rotary_qk_norm import linear_rotary_qk_norm_fwd, pack_angles, takes
from nanofuse.kernels.rotary_qk_norm import (
    rotary_qk_norm_bwd,
    rotary_qk_norm_fwd,
    rotary_qk_norm_ref,
    value_gate_ref,
)
from nanofuse.model.config import VALUE_GATE_CHANNELS
from nanofuse.model.fp8.linear import Linear
from nanofuse.model.fp8.weights import LinearWeight
from nanofuse.model.pieces.stream import Stream, StreamGrad


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.window = layer, config.windows[layer]
        self.head_dim = config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, config.kv_dim)
        self.c_v = Linear(config.n_embd, config.kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.ve_gate = None
        if layer in config.value_embed_layers:
            self.ve_gate = Linear(VALUE_GATE_CHANNELS, config.n_kv_head)

    def init_weights(self, generator):
        bound = math.sqrt(3 / self.c_q.weight.size(1))
        for linear in (self.c_q, self.c_k, self.c_v):
            nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.c_proj.weight)

    def init_gate(self, generator):
        if self.ve_gate is not None:
            nn.init.uniform_(self.ve_gate.weight, 0.0, 0.02, generator=generator)

    def forward(
        self,
        x,  # (B, T, C) normalised
        value_embedding,  # (B, T, K*D) or None
        rotary,  # cos, sin: (T, D) each
        attend,
        cache=None,
    ):
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (linear(x).view(heads) for linear in (self.c_q, self.c_k, self.c_v))
        if value_embedding is not None:
            gate = self.ve_gate(x[..., :VALUE_GATE_CHANNELS])  # (B, T, K)
            v = value_gate_ref(v, gate, value_embedding.view(heads))
        q, k = rotary_qk_norm_ref(q, k, *rotary)
        if cache is not None:
            k, v = cache.insert(self.layer, k, v)
        y = attend(q, k, v, self.window)  # (B, T, H, D)
        return self.c_proj(y.reshape(x.shape))


@dataclass
class Saved:
    """What the forward pass saves."""

    x: torch.Tensor  # (N, C) stream
    rstd: torch.Tensor  # (N,)
    normed: Any  # operand (N, C), of which the weight gradient's part
    qkv: torch.Tensor  # (N, (H + 2K)*D) after rotary_qk_norm
    qk_rstd: torch.Tensor  # (H + K, N) inverse root mean squares of q and k heads
    gate: torch.Tensor | None  # (N, K) logits of the value embedding's gate
    attention: Any  # what the backend saved
    attended: Any  # operand (N, C), of which the weight gradient's part


class FusedAttention:
    """Args: module; value_table, the weight (V, K*D) of the layer's value embedding, or None;
    rotary, cos and sin (>= T, D); attention, a backend of model.backends; config, GPTConfig.
    """

    def __init__(self, module, value_table, rotary, attention, config):
        layer, self.config = module.layer, config
        self.window, self.rotary, self.attention = module.window, rotary, attention
        self.value_table, self.gate_weight, self.angles = value_table, None, None
        self.matrices, self.ops = (), ("rotary_qk_norm", "quantize")
        if value_table is not None:
            self.gate_weight, self.matrices = module.ve_gate.weight, (module.ve_gate,)  # (K, G)
            self.ops += ("gate_logits", "embedding_grad")
        self.attended, self.grad_qkv = f"attended.{layer}", f"grad_qkv.{layer}"
        self.grad_name = f"grad_attn.{layer}"
        self.qkv = LinearWeight(f"qkv.{layer}", [module.c_q, module.c_k, module.c_v])
        self.proj = LinearWeight(f"attn_proj.{layer}", [module.c_proj])
        self.weights = (self.qkv, self.proj)
        self.fp8 = {self.attended: E4M3, self.grad_qkv: E5M2, self.grad_name: E5M2}

    def _values(
        self,
        tokens,  # (B, T)
        gate,  # (N, K) or None
    ):
        """The kernels' arguments of the value embedding: three, None without one."""
        if self.value_table is None:
            return None, None, None
        return tokens.view(-1), self.value_table, gate

    def _packed_angles(self):
        """(sequence_len, D / 2) int32 of pack_angles, made once: CUDA graphs hold the address."""
        if self.angles is None:
            self.angles = pack_angles(*(x[: self.config.sequence_len] for x in self.rotary))
        return self.angles

    def forward(self, step, stream):
        precision, gate, normed = step.precision, None, stream.take_normed()
        if self.value_table is not None:
            gate = gate_logits_fwd(stream.x, stream.rstd, self.gate_weight)
        values, weight = self._values(step.tokens, gate), precision.weight(self.qkv)
        heads, kv_heads, length = self.config.n_head, self.config.n_kv_head, step.tokens.size(1)
        if length <= self.config.sequence_len and takes(normed, weight, self.config.head_dim):
            angles = self._packed_angles()[:length]
            qkv, qk_rstd = linear_rotary_qk_norm_fwd(normed, weight, *values, angles, heads)
        else:
            qkv = precision.gemm.forward(normed, weight)
            qk_rstd = rotary_qk_norm_fwd(qkv, *values, *self.rotary, length, heads)
        normed = precision.gemm.keep(normed)
        sizes = [heads, kv_heads, kv_heads]
        split = qkv.view(*step.tokens.shape, sum(sizes), -1).split(sizes, dim=2)
        y, attention = self.attention.forward(*split, self.window)
        attended = precision.operand(self.attended, y.reshape(stream.x.shape))
        weight = precision.weight(self.proj)
        if takes_norm(attended, weight, stream.x):
            x, rstd, norm = linear_residual_norm_fwd(
                attended, weight, stream.x, precision.norm_scaling
            )
            out = Stream(x, grad_name=self.grad_name, rstd=rstd, normed=norm)
        else:
            out = Stream(stream.x, precision.gemm.forward(attended, weight), self.grad_name)
        saved = Saved(
            stream.x, stream.rstd, normed, qkv, qk_rstd, gate, attention,
            precision.gemm.keep(attended),
        )  # fmt: skip
        return out, saved

    def backward(self, step, saved, grad):
        gemm, operand = step.precision.gemm, grad.take_branch()
        gemm.weight_grad(operand, saved.attended, self.proj.grad)
        grad_y = gemm.input_grad(operand, self.proj.operand)  # (N, C)
        saved.attended = operand = None
        rows, heads = len(grad_y), (*step.tokens.shape, self.config.n_head, -1)
        grads = self.attention.backward(saved.attention, grad_y.view(heads))
        grads = [x.reshape(rows, -1) if isinstance(x, torch.Tensor) else x for x in grads]
        values, of_values = self._values(step.tokens, saved.gate), []

        def rotary(scaling):
            operand, *of_values[:] = rotary_qk_norm_bwd(
                *grads, saved.qkv, saved.qk_rstd, *values, *self.rotary, step.tokens.size(1),
                scaling,
            )  # fmt: skip
            return operand

        operand = step.precision.scaling.produce(self.grad_qkv, rotary)
        grads = grad_y = None
        gemm.weight_grad(operand, saved.normed, self.qkv.grad)
        grad_normed = gemm.input_grad(operand, self.qkv.operand)  # (N, C)
        saved.qkv = saved.normed = None
        if self.value_table is not None:
            grad_gate, grad_values = of_values  # (N, K) fp32, (N, K*D)
            embedding_grad(grad_values, step.order, self.value_table.grad)
            gate_logits_bwd(
                grad_gate, saved.x, saved.rstd, self.gate_weight, grad_normed, self.gate_weight.grad
            )
        return StreamGrad(grad.g, normed=grad_normed)
