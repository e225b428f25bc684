"""Comparisons of kernels with references, for tests and benchmarks."""

import torch

FLOOR = 1e-6  # relative error below which fp32 results are not told apart

ON_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16]


def relative_error(x, truth):
    """||x - truth|| / ||truth|| in fp64; NaN where x has NaN."""
    x, truth = x.detach().double(), truth.detach().double()
    return ((x - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def assert_accurate(name, got, same_dtype, truth, floor=FLOOR):
    """Error of a kernel at most twice that of PyTorch in the same dtype; prints both.

    `truth` is the reference in fp64. An error below `floor` always passes.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(truth.shape)}"
    ours, theirs = relative_error(got, truth), relative_error(same_dtype, truth)
    print(f"{name}: kernel {ours:.2e}, torch {theirs:.2e}")
    assert ours <= max(2 * theirs, floor), f"{name}: kernel {ours:.2e}, torch {theirs:.2e}"


def fp8_steps(a, b):
    """Distance of two FP8 tensors of one dtype in representable values; NaN equals NaN."""

    def ordinal(x):
        bits = x.view(torch.uint8).int()
        magnitude = bits & 0x7F
        return torch.where(bits >= 0x80, -magnitude, magnitude)

    return (ordinal(a) - ordinal(b)).abs()


def assert_fp8(name, operand, exact, scaling, through=torch.float32):
    """An FP8Operand against the exactly rounded `exact`, (M, K) fp32 or wider.

    At most 0.5 % of the values may be one step off: the fp32 arithmetic before the cast may land
    on the other side of a tie. The layouts must agree bit for bit, and amax must be the maximum.
    A kernel may round `through` another dtype first, and take amax of that.
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
    """Call `run` twice; every tensor that it returns must agree bit for bit. Returns the first."""
    first, second = ([x for x in run() if x is not None] for _ in range(2))
    for a, b in zip(first, second, strict=True):
        a, b = (x.contiguous().view(-1).view(torch.uint8) for x in (a, b))
        assert torch.equal(a, b), "two runs differ"
    return first
