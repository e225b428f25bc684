import math
import re
import sys
import types
import weakref
from dataclasses import replace

import pytest
import torch

from nanofuse.model.backends import choice as attention
from nanofuse.model.backends.choice import select_attention
from nanofuse.model.backends.flash import FlashAttention4
from nanofuse.model.backends.torch_backends import FlexAttention, SDPAttention
from nanofuse.model.config import GPTConfig
from nanofuse.model.providers import Need


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


@pytest.mark.parametrize("window", [0, 3, 16, 1000])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_pair_of_functions_equals_autograd(window, kv_heads):
    q, k, v = inputs(17, 17, kv_heads=kv_heads)
    grad_y = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    truth = SDPAttention()(*leaves, window)
    truth.backward(grad_y)

    backend = SDPAttention()
    y, saved = backend.forward(*leaves, window)
    grads = backend.backward(saved, grad_y)
    assert torch.equal(y, truth) and not any(x.requires_grad for x in (y, *grads))
    for got, leaf in zip(grads, leaves, strict=True):
        torch.testing.assert_close(got, leaf.grad, rtol=1e-5, atol=1e-6)


def test_the_pair_keeps_nothing_and_runs_once():
    q, k, v = inputs(17, 17)
    backend = SDPAttention()
    with torch.no_grad():
        y, saved = backend.forward(q, k, v, 5)
        held = [weakref.ref(x) for x in saved]
        backend.backward(saved, y)
    assert saved == [] and all(x() is None for x in held)
    with pytest.raises(RuntimeError, match="has had its backward pass"):
        backend.backward(saved, y)


def longhand_flash(q, k, v, causal, window_size, deterministic):
    """A stand-in for flash_attn_interface.flash_attn_func; -1 on the left: no window."""
    assert causal and window_size[1] == 0
    return SDPAttention()(q, k, v, window_size[0] % 2**31), None


CPU = Need("eager", "cpu", (0, 0), ("fp32",))
HOPPER = Need("fused", "cuda", (9, 0), ("bf16",))
COMPILED = replace(HOPPER, backend="compile")


@pytest.fixture
def hopper(monkeypatch):
    """Runs the self-check on the CPU and hides all attention libraries; hopper(f) installs f as
    flash_attn_interface.flash_attn_func."""
    check = attention.self_check
    monkeypatch.setattr(
        attention, "self_check", lambda backend, device, config: check(backend, "cpu", config)
    )
    parts = ("flash_attn_interface", "flash_attn", "transformer_engine")
    for name in {n for n in sys.modules if n.split(".")[0] in parts} | set(parts):
        monkeypatch.setitem(sys.modules, name, None)

    def no_compiler(self, deterministic):
        raise OSError("gone\nand more")

    monkeypatch.setattr(FlexAttention, "__init__", no_compiler)

    def install_flash_3(function):
        module = types.ModuleType("flash_attn_interface")
        module.flash_attn_func = function
        monkeypatch.setitem(sys.modules, "flash_attn_interface", module)

    return install_flash_3


def test_auto_on_a_cpu_is_sdpa():
    chosen = select_attention("auto", CPU)
    assert chosen.name == "sdpa" and chosen.why == "auto on cpu"
    chosen = select_attention("sdpa", HOPPER)
    assert chosen.name == "sdpa" and chosen.why == "asked for"
    assert isinstance(chosen.made, SDPAttention) and not chosen.made.deterministic
    assert select_attention("auto", CPU, deterministic=True).made.deterministic


def test_auto_takes_what_agrees_and_tells_what_does_not_run(hopper):
    hopper(longhand_flash)
    chosen = select_attention("auto", HOPPER)
    assert chosen.name == "fa3" and re.fullmatch(
        r"auto on cuda: fa3 agrees with SDPA to 0\.00\d", chosen.why
    )
    chosen = select_attention("auto", COMPILED)
    assert chosen.name == "sdpa" and chosen.why.startswith(
        "auto on cuda: fa3 serves eager and fused, not compile; fa4 is not installed: pip install "
        "flash-attn-4; te serves eager and fused, not compile; flex: gone; sdpa agrees with SDPA "
        "to 0.00"
    )


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda y, q: y * 1.02, "y of window 512 is off by 0.02"),
        (lambda y, q: y + 0.05 * (q - q.detach()), "grad_q of window 512 is off by "),
        (lambda y, q: y * math.nan, "y of window 512 is off by nan"),
    ],
)
def test_auto_refuses_wrong_values_and_says_where(hopper, break_it, reason):
    hopper(lambda q, *rest, **options: break_it(longhand_flash(q, *rest, **options)[0], q))
    chosen = select_attention("auto", HOPPER)
    assert chosen.name == "sdpa" and f"fa3: {reason}" in chosen.why
    assert "te is not installed" in chosen.why


def test_auto_refuses_a_wrong_window_and_another_gpu(hopper):
    def one_key_less(*tensors, window_size, **options):
        return longhand_flash(*tensors, window_size=(window_size[0] - 1, 0), **options)

    hopper(one_key_less)
    assert "fa3: y of window 512 is off by 0.0" in select_attention("auto", HOPPER).why
    hopper(longhand_flash)
    blackwell = replace(HOPPER, capability=(10, 0))
    why = select_attention("auto", blackwell).why
    assert "fa3 needs compute capability 9.0, this GPU has 10.0; fa4 is not" in why
    with pytest.raises(ValueError, match="fa3 needs compute capability 9.0"):
        select_attention("fa3", blackwell)


def test_auto_tries_the_sizes_of_the_model(hopper):
    """A library that has no kernels for them is passed over before the first step."""
    seen = []

    def narrow(q, k, v, window_size, **options):
        seen.append((q.size(2) // k.size(2), q.size(3), window_size[0]))
        if q.size(3) > 64:
            raise RuntimeError("head_dim > 64")
        return longhand_flash(q, k, v, window_size=window_size, **options)

    hopper(narrow)
    sizes = {"n_kv_head": 1, "sequence_len": 512}
    small = GPTConfig.from_depth(4, aspect_ratio=32, head_dim=64, **sizes)
    assert select_attention("auto", HOPPER, config=small).name == "fa3"
    assert seen == [(2, 64, 128), (2, 64, -1)]
    large = GPTConfig.from_depth(4, aspect_ratio=32, head_dim=128, **sizes)
    chosen = select_attention("auto", HOPPER, config=large)
    assert chosen.name == "sdpa" and "fa3: head_dim > 64" in chosen.why


def test_deterministic_reaches_the_library(hopper):
    asked = []

    def record(*tensors, deterministic, **options):
        asked.append(deterministic)
        return longhand_flash(*tensors, deterministic=deterministic, **options)

    hopper(record)
    for deterministic in (False, True):
        backend = select_attention("fa3", HOPPER, deterministic).made
        y, saved = backend.forward(*inputs(17, 17), 4)
        backend.backward(saved, y)
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("fa3", "FlashAttention 3: build hopper/"),
        ("fa4", "FlashAttention 4: pip install flash-attn-4"),
        ("te", "Transformer Engine: pip install"),
    ],
)
def test_a_missing_library_is_named_with_its_hint(hopper, name, hint):
    with pytest.raises(ValueError, match=f"{name} needs {hint}"):
        select_attention(name, HOPPER)
    with pytest.raises(ValueError, match=f"{name} needs a CUDA GPU"):
        select_attention(name, CPU)


def test_a_damaged_library_is_told_in_one_line(hopper, monkeypatch):
    def damaged(self, deterministic):
        raise OSError("undefined symbol\nand a page of text")

    monkeypatch.setattr(FlashAttention4, "__init__", damaged)
    with pytest.raises(ValueError) as caught:
        select_attention("fa4", HOPPER)
    assert "(undefined symbol)" in str(caught.value) and "\n" not in str(caught.value)
    assert "fa4: undefined symbol; te" in select_attention("auto", HOPPER).why


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_flex_is_told_of_grouped_heads_and_the_window(kv_heads):
    def kernel(q, k, v, block_mask, enable_gqa):
        assert block_mask == "mask of 5" and enable_gqa == (kv_heads < 4)
        assert q.shape == (2, 4, 17, 8) and k.shape == v.shape == (2, kv_heads, 17, 8)
        return q

    backend = object.__new__(FlexAttention)  # nothing is compiled
    backend.kernel, backend.block_masks = kernel, {5: "mask of 5"}
    q, k, v = inputs(17, 17, kv_heads=kv_heads)
    assert torch.equal(backend(q, k, v, 5), q)


@pytest.mark.parametrize("name", ["fa3", "te"])
def test_what_the_compiler_cannot_take_in_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} serves eager and fused, not compile"):
        select_attention(name, COMPILED)
    with pytest.raises(ValueError, match=f"{name} takes bf16, not fp32"):
        select_attention(name, replace(HOPPER, dtypes=("fp32",)))


@pytest.mark.parametrize("name", ["flex", "nonsense"])
def test_what_cannot_run_is_refused(name):
    with pytest.raises(ValueError, match="flex needs a CUDA GPU|nonsense is unknown"):
        select_attention(name, CPU)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("window", "kv_heads"), [(128, 4), (512, 4), (255, 2), (2048, 4)]
)  # in one process on purpose: code compiled for one window must not serve another
def test_flex_equals_sdpa_with_gradients(window, kv_heads):
    """Flex's bf16 error, forward and backward, at most twice SDPA's."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(heads):
        return torch.randn(2, 2048, heads, 128, device="cuda", generator=generator)

    q, k, v, upstream = draw(4), draw(kv_heads), draw(kv_heads), draw(4)

    def run(name, dtype):
        backend = {"flex": FlexAttention, "sdpa": SDPAttention}[name]()
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
