"""What a GPU reaches: seconds of a call by CUDA events, and the rates of copies and products.

A large fill before each launch flushes the L2 cache and hides the launch overhead.
"""

import functools
import statistics
import subprocess

import torch

FLUSH_BYTES = 1 << 30  # many times the L2 cache; filling it also hides 0.2 ms of launch overhead
SIZE = 8192  # of the products' matrices
ROUNDS = 20


@functools.cache
def _flush_buffer():
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def gpu_seconds(function):
    """Seconds that a call keeps the GPU busy, with a cold L2 cache."""
    _flush_buffer().zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _median_seconds(function):
    for _ in range(2):
        function()
    return statistics.median(gpu_seconds(function) for _ in range(ROUNDS))


@functools.cache
def copy_ceiling():
    """Measured copy bandwidth of this GPU in bytes/s, read + written; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / _median_seconds(lambda: target.copy_(source))


@functools.cache
def matmul_ceiling():
    """Measured FLOP/s of an 8192^3 bf16 product by cuBLAS; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    a, b = (torch.randn(SIZE, SIZE, device="cuda").bfloat16() for _ in range(2))
    return 2 * SIZE**3 / _median_seconds(lambda: a @ b)


@functools.cache
def fp8_matmul_ceiling():
    """Measured FLOP/s of an 8192^3 FP8 product by cuBLAS with fast accumulation; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    a, b = (torch.randn(SIZE, SIZE, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")

    def product():
        torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * SIZE**3 / _median_seconds(product)


def nvidia_smi(*fields):
    """Fields of nvidia-smi's --query-gpu for the first GPU, as one line; None without it."""
    query = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
