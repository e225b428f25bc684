"""Whole training steps of the compiled baseline: forward, backward, optimiser.

On a GPU: d16 (or --depth), 524,288 tokens a step in micro-steps of 32 x 2048, torch.compile,
flex attention and FP8 through torch._scaled_mm; dense and with the bigram residual. On a CPU the
same code runs a tiny eager model, so that the benchmark never breaks. Tokens are drawn from a
Zipf law, as frequent words collide in the embedding gradients of real text too.
"""

import gc
import math
import time
from dataclasses import dataclass

import pytest
import torch

from bench.harness import zipf_tokens
from model.attention import select_attention
from model.config import GPTConfig
from model.gpt import GPT
from model.linear import set_fp8
from train.device import bf16_peak, device_name
from train.loop import settle_garbage
from train.optim import MuonAdamW, OptimConfig

WARMUP_ROUNDS = 2


@dataclass(frozen=True)
class Workload:
    """One step: config, rows per micro-step, micro-steps, and how it runs."""

    config: GPTConfig
    rows: int
    micro_steps: int
    compiled: bool
    fp8: str
    dtype: torch.dtype

    @property
    def tokens(self):
        return self.rows * self.micro_steps * self.config.sequence_len


def workload(depth, bigram_factor, device):
    """The GPU's d16-style workload, or a tiny one for a CPU."""
    if device.type == "cuda":
        config = GPTConfig.from_depth(depth or 16, bigram_embed_factor=bigram_factor)
        return Workload(config, 32, 8, True, "torch", torch.bfloat16)
    config = GPTConfig.from_depth(
        depth or 2, 32, 32, sequence_len=128, vocab_size=512, bigram_embed_factor=bigram_factor
    )
    return Workload(config, 2, 2, False, "off", torch.float32)


def make_step(w, device):
    """A function that takes one training step and returns its first micro-step's loss."""
    torch.set_float32_matmul_precision("high")
    torch._dynamo.reset()
    attention, _ = select_attention("auto", device.type)
    attention.prepare(w.config.sequence_len, w.config.windows, device)
    model = GPT(w.config, w.dtype, attention, device)
    model.init_weights()
    set_fp8(model, w.fp8)
    optimizer = MuonAdamW(
        model.param_roles(),
        OptimConfig(),
        w.config.n_embd,
        compile=w.compiled,
        newton_schulz_dtype=w.dtype,
    )
    call = torch.compile(model, dynamic=False) if w.compiled else model
    shape = (w.micro_steps, w.rows, w.config.sequence_len + 1)
    batches = zipf_tokens(shape, w.config.vocab_size, device)

    def step():
        losses = []
        for rows in batches:  # (B, T+1)
            loss = call(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
            (loss / w.micro_steps).backward()
            losses.append(loss.detach())
        optimizer.step(1.0, 0.95, 0.1)
        optimizer.zero_grad()
        return losses[0].item()

    return step


def pytest_generate_tests(metafunc):
    depths = [int(d) for d in metafunc.config.getoption("--depth").split(",") if d] or [0]
    if "depth" in metafunc.fixturenames:
        metafunc.parametrize("depth", depths, ids=lambda d: f"d{d}" if d else "default")


@pytest.mark.parametrize("bigram_factor", [0, 5], ids=["dense", "bigram"])
def bench_step(benchmark, device, rounds, depth, bigram_factor):
    w = workload(depth, bigram_factor, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    step = make_step(w, device)
    first_loss = step()
    first_step_seconds = time.perf_counter() - started
    assert abs(first_loss - math.log(w.config.vocab_size)) < 0.05  # logits are ~0 at the start
    settle_garbage()
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=WARMUP_ROUNDS)
    gc.unfreeze()
    assert step() < first_loss - 0.1  # it trains
    seconds = benchmark.stats.stats.median
    info = {
        "depth": w.config.n_layer,
        "backend": "compile" if w.compiled else "eager",
        "fp8": w.fp8,
        "ms_per_step": 1e3 * seconds,
        "tok_per_s": w.tokens / seconds,
        "time_to_first_step_s": first_step_seconds,
    }
    peak = bf16_peak(device_name(device))
    if peak:
        info["mfu_bf16"] = info["tok_per_s"] * w.config.flops_per_token / peak
    if device.type == "cuda":
        info["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    benchmark.extra_info.update(info)
    shown = "  ".join(f"{k} {v:.4g}" for k, v in info.items() if isinstance(v, float))
    print(f"\n{w.config.n_layer} layers, bigram factor {bigram_factor}: {shown}")
