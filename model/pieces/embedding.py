"""Token embedding, its norm and smear: the stream x0 that the first mix reads.

Shapes: B rows, T tokens, N = B*T positions, C width, V vocabulary, G gate channels.
"""

import torch
from torch import nn

from nanofuse.kernels.common.rms_norm import rms_norm_ref
from nanofuse.kernels.embed_smear import embed_smear_bwd, embed_smear_fwd, smear_ref
from nanofuse.kernels.embedding_grad import embedding_grad
from nanofuse.model.config import SMEAR_GATE_CHANNELS
from nanofuse.model.fp8.linear import Linear
from nanofuse.model.pieces.stream import Stream


class Embedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.smear_gate = Linear(SMEAR_GATE_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))

    def init_weights(self, generator):
        nn.init.normal_(self.wte.weight, std=0.8, generator=generator)
        nn.init.zeros_(self.smear_lambda)

    def init_gate(self, generator):
        nn.init.uniform_(self.smear_gate.weight, 0.0, 0.02, generator=generator)

    def forward(
        self,
        tokens,  # (B, T) integer
        prev_embedding=None,  # (B, C) `embedding` of the tokens before, or None
    ):
        """x0 (B, T, C), and the embedding (B, T, C) before smear."""
        embedding = rms_norm_ref(self.wte(tokens))
        gate = self.smear_gate(embedding[..., :SMEAR_GATE_CHANNELS])  # (B, T, 1)
        return smear_ref(embedding, gate, self.smear_lambda, prev_embedding), embedding


class FusedEmbedding:
    ops = ("embed_smear", "embedding_grad")
    weights, matrices, fp8 = (), (), {}

    def __init__(self, module):
        self.table, self.gate = module.wte.weight, module.smear_gate.weight  # (V, C), (1, G)
        self.smear_lambda = module.smear_lambda  # (1,)

    def forward(self, step, stream):
        """The stream x0, which the mixes find in `step` too; saves sigmoid of the smear gate."""
        step.x0, gate = embed_smear_fwd(step.tokens, self.table, self.gate, self.smear_lambda)
        return Stream(step.x0), gate

    def backward(
        self,
        step,
        gate,  # (N,) fp32
        grad,
    ):
        grad_rows, grad_gate, grad_lambda = embed_smear_bwd(
            grad.g, step.tokens, self.table, self.gate, self.smear_lambda, gate
        )
        embedding_grad(grad_rows, step.order, self.table.grad)
        self.gate.grad += grad_gate
        self.smear_lambda.grad += grad_lambda
