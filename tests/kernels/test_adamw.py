import pytest
import torch

from kernels.adamw import adamw_ref


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.8, 0.96), (0.8, 0.995), (0.96, 0.95)])
def test_ten_steps_equal_torch_adamw(betas, weight_decay):
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(7, 5, dtype=torch.float64, generator=generator)
    twin = torch.nn.Parameter(p.clone())
    theirs = torch.optim.AdamW([twin], lr=0.01, betas=betas, eps=1e-10, weight_decay=weight_decay)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(1, 11):
        g = torch.randn(7, 5, dtype=torch.float64, generator=generator)
        twin.grad = g.clone()
        theirs.step()
        adamw_ref(p, g, m, v, 0.01, *betas, 1e-10, weight_decay, step)
        torch.testing.assert_close(p, twin.detach(), rtol=1e-12, atol=1e-12)


def test_bf16_storage_rounds_once():
    """Arithmetic is fp32: the result is the fp32 step of the stored values, rounded."""
    p, g, m = (torch.randn(64).bfloat16() for _ in range(3))
    v = torch.rand(64).bfloat16()
    wide = [x.float() for x in (p, g, m, v)]
    adamw_ref(*wide, 0.01, 0.8, 0.995, 1e-10, 0.01, 3)
    adamw_ref(p, g, m, v, 0.01, 0.8, 0.995, 1e-10, 0.01, 3)
    for stored, exact in ((p, wide[0]), (m, wide[2]), (v, wide[3])):
        assert torch.equal(stored, exact.bfloat16())


def test_zero_gradients_leave_a_fresh_parameter_alone():
    p = torch.randn(5)
    before = p.clone()
    adamw_ref(p, torch.zeros(5), torch.zeros(5), torch.zeros(5), 0.1, 0.8, 0.95, 1e-10, 0.0, 1)
    assert torch.equal(p, before)
