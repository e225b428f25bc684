"""The kernels of a training run, found without a GPU: a step on tensors without memory."""

import torch

from nanofuse.kernels.common.ahead import recorded
from nanofuse.kernels.common.attention_sums import TILE_COLS, AttentionSums
from nanofuse.kernels.common.fp8 import FP8Operand
from nanofuse.kernels.common.tuning import aimed_at
from nanofuse.model.backends.base import AttentionBackend, take
from nanofuse.model.fp8.products import Gemm, TorchGemm
from nanofuse.model.fused import FusedGPT
from nanofuse.model.gpt import GPT
from nanofuse.train.assemble import follow, fused_optimizer, gathered, peers_of
from nanofuse.train.device import FORMATS
from nanofuse.train.ranks import Alone, Pending

MICRO_STEPS = 2


class _Products(Gemm):
    """Results of a provider of products, without values; `linear` as of a provider of the fused
    pass."""

    linear = None

    def __init__(self, fp8, gradients):
        self.fp8, self.gradients = fp8, gradients

    @staticmethod
    def _matrix(x):
        return x.data if isinstance(x, FP8Operand) else x

    def _empty(self, rows, columns):
        return torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")

    def forward(
        self,
        x,  # FP8Operand or bf16 (M, K)
        w,  # FP8Operand or bf16 (N, K)
    ):
        return self._empty(self._matrix(x).size(0), self._matrix(w).size(0))

    def input_grad(
        self,
        g,  # FP8Operand or bf16 (M, N)
        w,  # FP8Operand or bf16 (N, K)
    ):
        return self._empty(self._matrix(g).size(0), self._matrix(w).size(1))

    def weight_grad(
        self,
        g,  # FP8Operand or bf16 (M, N)
        x,  # as returned by `keep`
        out,  # (N, K) fp32
    ):
        """Added in place: nothing to return."""

    def keep(
        self,
        x,  # FP8Operand or bf16 (M, K)
    ):
        return TorchGemm.keep(self, x) if self.fp8 else x


class _Attention(AttentionBackend):
    """Results of attention, without values; `sums`: gradients of q as AttentionSums."""

    def __init__(self, sums):
        super().__init__()
        self.sums = sums

    def forward(
        self,
        q,  # (B, T, H, D)
        k,  # (B, T, K, D)
        v,  # (B, T, K, D)
        window,
    ):
        return q.new_empty(q.shape), [q, k, v]

    def backward(
        self,
        saved,
        grad_y,  # (B, T, H, D)
    ):
        q, *others = (x.new_empty(x.shape) for x in take(saved))
        if self.sums:
            batch, seq_len, heads, _ = q.shape
            sums = q.new_empty(batch, heads, seq_len * TILE_COLS, dtype=torch.float32)
            q = AttentionSums(sums, 1.0, q.dtype)
        return q, *others


class _FirstOf(Alone):
    """Rank 0 of several, to which nothing comes."""

    def __init__(self, world):
        self.world = world

    def swap(self, sends, receives):
        return Pending()

    def gather(
        self,
        x,  # any shape
    ):
        return x.new_empty(self.world, *x.shape)


def rehearse(config, optim, rows, fp8, gpu, world=1, sums=False, gradients="e5m2"):
    """The Launches (kernels.common.ahead) of a run by the kernels, of Triton alone.

    Args:
        config: GPTConfig.
        optim: OptimConfig.
        rows: of a micro-step, in training and evaluation.
        fp8: whether the products are in FP8.
        gpu: kernels.common.tuning.Gpu.
        world: number of ranks, of which the kernels are rank 0's.
        sums: whether attention gives gradients of q as AttentionSums.
        gradients: FP8 format of the layers' gradients (train.device.FORMATS).
    """
    ranks = _FirstOf(world)
    with recorded(gpu.capability) as launches, aimed_at(gpu):
        model = GPT(config, torch.bfloat16, _Attention(sums), "meta")
        fused = FusedGPT(model, _Products(fp8, FORMATS[gradients]), False, peers_of(ranks))
        optimizer = fused_optimizer(fused, optim, ranks=ranks)
        tokens = torch.empty(rows, config.sequence_len, dtype=torch.int64, device="meta")
        for _ in range(MICRO_STEPS):
            fused(tokens, tokens).backward()
        optimizer.step(1.0, 0.9, 0.1)
        optimizer.zero_grad()
        follow(fused)
        fused.eval()
        with torch.no_grad(), gathered(fused):
            fused(tokens, tokens, "none")
    return launches
