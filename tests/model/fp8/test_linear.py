import pytest
import torch

from nanofuse.model.config import GPTConfig
from nanofuse.model.fp8.linear import Linear, ScaledMatmul, ScaledMatmulE4M3, fp8_eligible, set_fp8
from nanofuse.model.gpt import GPT


def make(n_in, n_out, device="cpu"):
    linear = Linear(n_in, n_out).to(device)
    torch.nn.init.normal_(linear.weight, std=n_in**-0.5)
    return linear


@pytest.mark.parametrize(
    ("shape", "eligible"),
    [((128, 128), True), ((4096, 1024), True), ((127, 128), False), ((136, 128), False)],
)
def test_eligibility(shape, eligible):
    assert fp8_eligible(torch.empty(shape)) == eligible


def test_weight_is_cast_to_the_input():
    linear = make(16, 8)
    x = torch.randn(3, 16)
    torch.testing.assert_close(linear(x), x @ linear.weight.T)
    assert linear(x.bfloat16()).dtype == torch.bfloat16
    assert linear(x.double()).dtype == torch.float64


def test_rows_reach_the_product_and_come_back_in_their_shape():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            assert x.shape == (6, 16)
            return x @ weight.T

    linear, x = make(16, 8), torch.randn(2, 3, 16)
    expected = linear(x)
    linear.fp8 = Product
    torch.testing.assert_close(linear(x), expected)


def test_set_fp8_takes_everything_but_the_gates():
    model = GPT(GPTConfig.from_depth(4), device="meta")
    assert set_fp8(model, ScaledMatmul) == 4 * 6 + 1
    assert not model.smear_gate.fp8 and not model.transformer.h[3].attn.ve_gate.fp8
    assert set_fp8(model, None) == 0
    assert not any(m.fp8 for m in model.modules() if isinstance(m, Linear))


@pytest.mark.cuda
def test_fp8_product_and_gradients_are_as_close_as_quantisation_allows():
    x = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    linear = make(512, 384, "cuda")
    linear.fp8 = ScaledMatmul
    upstream = torch.randn(256, 384, device="cuda", dtype=torch.bfloat16)
    y = linear(x)
    y.backward(upstream)
    exact = x.detach().float() @ linear.weight.detach().T
    pairs = {
        "y": (y, exact, 0.06),
        "grad x": (x.grad, upstream.float() @ linear.weight.detach(), 0.09),
        "grad w": (linear.weight.grad, upstream.float().T @ x.detach().float(), 0.09),
    }
    for name, (got, want, bound) in pairs.items():
        error = ((got.float() - want).norm() / want.norm()).item()
        print(f"{name}: relative error {error:.4f}")
        assert 1e-3 < error < bound  # larger than bf16's error: FP8 really ran
    assert linear.weight.grad.dtype == torch.float32


@pytest.mark.cuda
def test_evaluation_runs_in_bf16():
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    linear = make(256, 256, "cuda")
    plain = linear(x)
    linear.fp8 = ScaledMatmul
    assert not torch.equal(linear(x), plain)
    assert torch.equal(linear.eval()(x), plain)


@pytest.mark.cuda
def test_compiled_function_equals_eager():
    x = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(384, 512, device="cuda") * 0.05
    eager = ScaledMatmul.apply(x, weight)
    compiled = torch.compile(ScaledMatmul.apply, fullgraph=True)(x, weight)
    assert (eager.float() - compiled.float()).norm() <= 0.01 * eager.float().norm()


def test_gradients_in_e4m3_are_more_precise_but_for_lm_heads():
    """On a CPU, too: 3 bits of mantissa in place of 2 halve the error of rounding."""
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(64, n, generator=generator).bfloat16() for n in (128, 160))
    weight = torch.randn(160, 128, generator=generator).bfloat16()
    exact = upstream.float() @ weight.float(), upstream.float().T @ x.float()
    errors = []
    for product in (ScaledMatmul, ScaledMatmulE4M3):
        operands = x.clone().requires_grad_(), weight.clone().requires_grad_()
        product.apply(*operands).backward(upstream)
        pairs = zip(operands, exact, strict=True)
        errors.append([((p.grad.float() - want).norm() / want.norm()).item() for p, want in pairs])
    for coarse, fine in zip(*errors, strict=True):
        print(f"e5m2 {coarse:.4f}, e4m3 {fine:.4f}")
        assert 0.02 < fine < 0.75 * coarse
    model = GPT(GPTConfig.from_depth(4), device="meta")
    set_fp8(model, ScaledMatmulE4M3)
    assert model.lm_head.fp8 is ScaledMatmul
    assert model.transformer.h[0].attn.c_q.fp8 is ScaledMatmulE4M3
