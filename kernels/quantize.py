"""Tensorwise dynamic quantisation to FP8 (formats: https://arxiv.org/abs/2209.05433).

    scale = fp8_max / max|x|,   q = fp8(clamp(x * scale)),   x ~ q / scale

Bytes: x read twice (amax, then cast), q written. FLOPs: 3 per element.
"""

import torch

AMAX_FLOOR = 1e-12  # an all-zero tensor keeps a finite scale


def quantize_ref(
    x,  # any shape, bf16 or fp32
    dtype,
):
    """FP8 copy of `x` in its shape, and the fp32 inverse scale () that undoes it.

    Args:
        dtype: torch.float8_e4m3fn (forward operands) or torch.float8_e5m2 (gradients).
    """
    fp8_max = torch.finfo(dtype).max
    amax = x.abs().amax().float().clamp_min(AMAX_FLOOR)
    scaled = x.float() * (fp8_max / amax)
    return scaled.clamp(-fp8_max, fp8_max).to(dtype), amax / fp8_max
