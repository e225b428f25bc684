import math

import pytest
import torch

from model.attention import BACKENDS, SDPAttention, select_attention
from model.errors import UserError


def longhand(q, k, v, window):
    """Attention one query at a time in fp64; queries are the last of the key positions."""
    y = torch.zeros_like(q, dtype=torch.float64)
    offset, group = k.size(1) - q.size(1), q.size(2) // k.size(2)
    for t in range(q.size(1)):
        low = max(0, t + offset - window)
        for h in range(q.size(2)):
            keys = k[:, low : t + offset + 1, h // group].double()  # (B, n, D)
            values = v[:, low : t + offset + 1, h // group].double()
            scores = torch.einsum("bd,bnd->bn", q[:, t, h].double(), keys)
            weights = (scores / math.sqrt(q.size(-1))).softmax(dim=-1)
            y[:, t, h] = torch.einsum("bn,bnd->bd", weights, values)
    return y


def inputs(t_q, t_k, heads=4, kv_heads=2, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, t_q, heads, 8), (2, t_k, kv_heads, 8), (2, t_k, kv_heads, 8))
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


@pytest.mark.parametrize("window", [0, 1, 5, 16, 1000])
@pytest.mark.parametrize(("t_q", "t_k"), [(1, 1), (17, 17), (1, 17), (4, 17)])
def test_sdpa_equals_longhand(window, t_q, t_k):
    q, k, v = inputs(t_q, t_k)
    got = SDPAttention()(q, k, v, window)
    torch.testing.assert_close(got.double(), longhand(q, k, v, window), rtol=1e-5, atol=1e-5)


def test_selection_says_why():
    backend, why = select_attention("auto", "cpu")
    assert backend.name == "sdpa" and why == "auto on cpu"
    assert select_attention("auto", "cuda")[0].name == "flex"
    assert select_attention("sdpa", "cuda")[0].name == "sdpa"


@pytest.mark.parametrize("name", ["flex", "nonsense"])
def test_what_cannot_run_is_refused(name):
    with pytest.raises(UserError, match="--attention"):
        select_attention(name, "cpu")


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("window", "kv_heads"), [(128, 4), (512, 4), (255, 2), (2048, 4)]
)  # in one process on purpose: a recompile must not keep an earlier window
def test_flex_equals_sdpa_with_gradients(window, kv_heads):
    """Flex's bf16 error, forward and backward, at most twice SDPA's."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(heads):
        return torch.randn(2, 2048, heads, 128, device="cuda", generator=generator)

    q, k, v, upstream = draw(4), draw(kv_heads), draw(kv_heads), draw(4)

    def run(name, dtype):
        backend = BACKENDS[name]()
        backend.prepare(2048, [window], "cuda")
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        y = backend(*leaves, window)
        y.backward(upstream.to(dtype))
        return [y.detach().float()] + [x.grad.float() for x in leaves]

    truth = run("sdpa", torch.float32)
    for got, base, exact in zip(
        run("flex", torch.bfloat16), run("sdpa", torch.bfloat16), truth, strict=True
    ):
        error, allowed = (got - exact).norm(), 2 * (base - exact).norm()
        print(f"flex {error / exact.norm():.5f}, twice sdpa {allowed / exact.norm():.5f}")
        assert error <= allowed
