"""The kernels as a library: ops for a model or an optimiser of one's own.

    from nanofuse import ops
    y, normed = ops.add_rms_norm(x, branch)

Every op that has a kernel takes a `backend`:

- "kernel" (the default) runs the Triton kernels. It wants tensors on a CUDA GPU, in bf16 or fp32;
  elsewhere it raises a RuntimeError of one line. With TRITON_INTERPRET=1 in the environment before
  the first import, kernels run slowly on the CPU.
- "eager" runs the reference in plain PyTorch, on any device and without Triton, which exists on
  Linux only. It must be asked for: no op falls back to it.

Tensors that are not contiguous, or do not start at a multiple of 16 bytes, are copied for a
kernel; what an op writes in place is copied back. Gradients of two inputs never share memory.
Losses are in nats.

Under torch.compile an op with backend="kernel" breaks the graph and runs as it is; what stands
around it is compiled. With backend="eager" it is traced and compiled with the rest:

    step = torch.compile(lambda x, branch: ops.add_rms_norm(x.relu(), branch)[1].sum())

Letters: B sequences, T positions of a sequence, N = B*T positions or a number of matrices, C
channels, D channels of a head, H query heads, K key and value heads, V tokens of the vocabulary.
"""

from nanofuse.ops.attention import rotary_qk_norm, rotary_table
from nanofuse.ops.fp8 import fp8_scaling, quantize
from nanofuse.ops.loss import linear_softcap_cross_entropy, softcap_cross_entropy
from nanofuse.ops.matrices import newton_schulz, symmetric_matmul
from nanofuse.ops.mlp import relu_squared, relu_squared_mlp
from nanofuse.ops.optim import adamw, adamw_tensors, muon_update
from nanofuse.ops.stream import add_rms_norm, residual_mix
from nanofuse.ops.tables import bigram_rows, embed_smear, embedding_grad

__all__ = [
    "adamw",
    "adamw_tensors",
    "add_rms_norm",
    "bigram_rows",
    "embed_smear",
    "embedding_grad",
    "fp8_scaling",
    "linear_softcap_cross_entropy",
    "muon_update",
    "newton_schulz",
    "quantize",
    "relu_squared",
    "relu_squared_mlp",
    "residual_mix",
    "rotary_qk_norm",
    "rotary_table",
    "softcap_cross_entropy",
    "symmetric_matmul",
]
