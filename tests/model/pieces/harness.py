"""Runs one fused piece, and autograd through its module, on the same random tensors.

A truth is the fp64 copy of a module on the CPU; the fused piece runs in fp32 on plain tensors.
"""

import copy

import torch

from nanofuse.bench.checks import ON_GPU
from nanofuse.kernels.common.rms_norm import RMS_NORM_EPS
from nanofuse.kernels.embedding_grad import sort_rows
from nanofuse.model.config import GPTConfig
from nanofuse.model.fp8.operands import Operands
from nanofuse.model.fp8.precision import Precision
from nanofuse.model.fp8.products import PlainGemm
from nanofuse.model.fp8.scaling import Unscaled
from nanofuse.model.fp8.weights import Weights
from nanofuse.model.pieces.stream import MicroStep, Stream

DEVICE = "cuda" if ON_GPU else "cpu"
ROWS, T = 2, 24
N = ROWS * T
PLAIN = Precision(PlainGemm(), Unscaled())


def small_config(**fields):
    """Two layers of width 32, two heads."""
    sizes = {"sequence_len": T, "vocab_size": 60, "bigram_embed_factor": 2, **fields}
    return GPTConfig.from_depth(2, 16, 16, **sizes)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE)


def module_and_truth(module, seed=1):
    """The module with random weights and zero gradients, and its copy in fp64."""
    module, generator = module.to(DEVICE), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    truth = copy.deepcopy(module).double()
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    return module, truth


def prepare(*pieces):
    """Store the weights of pieces, as FusedGPT does."""
    Operands(Weights(pieces, torch.float32), PLAIN.scaling).follow()


def micro_step(config, seed=3):
    """A MicroStep of random tokens and targets, ready for the backward pass, too."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(config.vocab_size, (2, ROWS, T), generator=generator)
    targets[0, :3] = -1
    step = MicroStep(tokens.to(DEVICE), targets.flatten().to(DEVICE), PLAIN)
    step.order = sort_rows(step.tokens, config.padded_vocab_size)
    return step


def normalised(
    x,  # (N, C)
):
    """The Stream that a mix or norm gives: x, and its norm."""
    rstd = (x.square().mean(dim=1) + RMS_NORM_EPS).rsqrt()
    return Stream(x, rstd=rstd, normed=x * rstd[:, None])


def leaf(x):
    """x in fp64 as a leaf that gathers its gradient."""
    return x.detach().double().requires_grad_()


def assert_close(name, got, exact, bound=1e-5):
    """The relative error of a tensor (norm) is at most `bound`."""
    error = (got.double() - exact).norm() / exact.norm().clamp_min(1e-30)
    assert error < bound, f"{name}: {error:.2e}"


def assert_same_gradients(module, truth):
    """Every parameter's accumulated .grad against autograd's."""
    exact = dict(truth.named_parameters())
    for name, p in module.named_parameters():
        assert_close(name, p.grad, exact[name].grad)
