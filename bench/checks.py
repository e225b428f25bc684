"""Comparisons of kernels with references, for tests and benchmarks."""

import torch

FLOOR = 1e-6  # a relative error up to this always passes: fp32 rounding

ON_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16]


def relative_error(x, truth):
    """||x - truth|| / ||truth|| in fp64; NaN where x has NaN."""
    x, truth = x.detach().double(), truth.detach().double()
    return ((x - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def assert_accurate(name, got, same_dtype, truth, floor=FLOOR):
    """Assert that a kernel's relative error is at most twice PyTorch's in the same dtype.

    Prints both. An error up to `floor` always passes.

    Args:
        got: the kernel's result.
        same_dtype: the reference's result, computed in the kernel's dtype.
        truth: the reference's result in fp64.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(truth.shape)}"
    ours, theirs = relative_error(got, truth), relative_error(same_dtype, truth)
    print(f"{name}: kernel {ours:.2e}, torch {theirs:.2e}")
    assert ours <= max(2 * theirs, floor), f"{name}: kernel {ours:.2e}, torch {theirs:.2e}"


def fp8_steps(a, b):
    """Elementwise distance of two FP8 tensors of one dtype, in representable values; that of NaN to
    NaN is 0."""

    def ordinal(x):
        bits = x.view(torch.uint8).int()
        magnitude = bits & 0x7F
        return torch.where(bits >= 0x80, -magnitude, magnitude)

    return (ordinal(a) - ordinal(b)).abs()


def assert_fp8(name, operand, exact, scaling, through=torch.float32):
    """Assert that an FP8Operand is `exact` quantised, and that its amax was recorded.

    At most 0.5 % of the values may be one representable value off, since fp32 arithmetic before the
    cast may end up on the other side of a tie. The two layouts must agree bit for bit.

    Args:
        exact: (M, K) fp32 or wider.
        through: a dtype to which the kernel rounds before it records amax and casts to FP8.
    """
    limit = torch.finfo(scaling.dtype).max
    rounded = (
        (exact.float() * scaling.scale).to(through).float().clamp(-limit, limit).to(scaling.dtype)
    )
    steps = fp8_steps(operand.data, rounded)
    off = (steps > 0).float().mean().item()
    print(f"{name}: {100 * off:.2f} % of FP8 values one step off")
    assert steps.max() <= 1, f"{name}: {steps.max()} steps off"
    assert off <= 0.005 or steps.sum() <= 1, f"{name}: {100 * off:.2f} % off"
    assert torch.equal(operand.data.t().view(torch.uint8), operand.transposed.view(torch.uint8))
    torch.testing.assert_close(
        scaling.amax[0],
        exact.abs().max().float(),
        rtol=max(1e-3, torch.finfo(through).eps / 2),
        atol=1e-6,
        equal_nan=True,
    )


def same_bits(run):
    """Call `run` twice and assert that the tensors it returns agree bit for bit; returns those of
    the first call that are not None."""
    first, second = ([x for x in run() if x is not None] for _ in range(2))
    for a, b in zip(first, second, strict=True):
        a, b = (x.contiguous().view(-1).view(torch.uint8) for x in (a, b))
        assert torch.equal(a, b), "two runs differ"
    return first
