"""Attention backends of libraries: on a CPU with stand-ins for them, on a GPU against fp64 SDPA."""

import sys
import types
from pathlib import Path

import pytest
import torch

from nanofuse.kernels.common.attention_sums import AttentionSums
from nanofuse.model.backends.choice import forward_and_backward, select_attention
from nanofuse.model.backends.flash import (
    CHECKED_ROWS,
    SUMS_OF,
    FlashAttention4,
    TransformerEngineAttention,
    _fa4_backward_op,
    _fa4_forward_op,
    _te_layout,
)
from nanofuse.model.backends.torch_backends import SDPAttention, window_mask
from nanofuse.model.config import GPTConfig
from nanofuse.model.providers import ATTENTION, Need, choices


def fused_inputs(
    seq_len, heads=4, kv_heads=2, head_dim=8, batch=2, device="cpu", dtype=torch.float32
):
    """q, k, v as views of one (B*T, (H + 2K) * D) buffer, and grad_y (B, T, H, D)."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(width):
        shape = (batch * seq_len, width * head_dim)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    fused, grad_y = draw(heads + 2 * kv_heads), draw(heads)
    rows = (batch, seq_len, -1, head_dim)
    q, k, v = fused.view(rows).split((heads, kv_heads, kv_heads), dim=2)
    return q, k, v, grad_y.view(rows)


def through_autograd(attend, tensors, window):
    """y, grad_q, grad_k, grad_v through autograd, on detached copies of the same strides."""
    *leaves, grad_y = (x.detach().requires_grad_() for x in tensors)
    y = attend(*leaves, window)
    return y.detach(), *torch.autograd.grad(y, leaves, grad_y)


def gradients_longhand(q, k, v, grad_y, window):
    """grad_q, grad_k, grad_v without autograd, which is off inside a custom op."""
    group, scale = q.size(2) // k.size(2), q.size(3) ** -0.5
    keys, values = (x.repeat_interleave(group, dim=2) for x in (k, v))
    positions = torch.arange(q.size(1))
    hidden = ~window_mask(positions, positions, window)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * scale
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    grad_weights = torch.einsum("bqhd,bkhd->bhqk", grad_y, values)
    grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
    grad_q = torch.einsum("bhqk,bkhd->bqhd", grad_scores, keys) * scale
    grad_k = torch.einsum("bhqk,bqhd->bkhd", grad_scores, q) * scale
    grad_v = torch.einsum("bhqk,bqhd->bkhd", weights, grad_y)
    return grad_q, *(x.unflatten(2, (-1, group)).sum(3) for x in (grad_k, grad_v))


@pytest.fixture
def fa4_calls(monkeypatch):
    """A stand-in for flash_attn.cute.interface, in plain torch; yields the calls' arguments."""
    calls = []

    def window_of(causal, window_size_left, window_size_right):
        assert causal and window_size_right == 0
        return 2**31 if window_size_left is None else window_size_left

    def _flash_attn_fwd(q, k, v, return_lse, **window):
        assert return_lse
        calls.append(("forward", window["window_size_left"]))
        y = SDPAttention()(q, k, v, window_of(**window)).contiguous()
        return y, y.new_zeros((q.size(0), q.size(2), q.size(1))), None, None, None

    def _flash_attn_bwd(q, k, v, out, dout, lse, *, deterministic, dq, dk, dv, **window):
        assert lse.shape == (q.size(0), q.size(2), q.size(1)) and out.shape == dout.shape
        calls.append(("backward", window["window_size_left"], deterministic))
        grads = gradients_longhand(q, k, v, dout, window_of(**window))
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)
        return dq, dk, dv

    module = types.ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd, module._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


@pytest.fixture
def fa4_converts(fa4_calls, monkeypatch):
    """The stand-in, which now sums grad_q, and grad_k of grouped heads, and converts the sums;
    yields what a test may change: the order of the sums."""
    module, changes = sys.modules["flash_attn.cute.interface"], types.SimpleNamespace(shift=0)
    plain = module._flash_attn_bwd

    def _flash_attn_bwd(q, k, *others, dq, dk, **options):
        if q.size(1) % 64:
            return plain(q, k, *others, dq=dq, dk=dk, **options)
        grad_q, grad_k = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k))
        plain(q, k, *others, dq=grad_q, dk=grad_k, **options)
        for grad, out, scale in ((grad_q, dq, 0.25), (grad_k, dk, 1.0)):
            sums = AttentionSums.of(grad / scale).sums.roll(changes.shift, dims=-1)
            module._bwd_postprocess_convert(sums, out, scale, None, fake_mode=False)
        return dq, dk, options["dv"]

    def _bwd_postprocess_convert(sums, output, scale, lengths, *, fake_mode):
        assert module._bwd_postprocess_convert.compile_cache == {}  # looked up under this name
        sums = sums.roll(-changes.shift, dims=-1)
        output.copy_(AttentionSums(sums, scale, output.dtype).rows())

    _bwd_postprocess_convert.compile_cache = {}
    module._flash_attn_bwd = _flash_attn_bwd
    module._bwd_postprocess_convert = changes.convert = _bwd_postprocess_convert
    monkeypatch.setattr("importlib.metadata.version", lambda name: SUMS_OF)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    return changes


def wide(**fields):
    return GPTConfig.from_depth(2, 128, 128, sequence_len=128, **fields)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_fa4_leaves_its_sums(fa4_converts, kv_heads):
    backend, device = FlashAttention4(), torch.device("cpu")
    tensors = fused_inputs(128, 2, kv_heads, 128, batch=1, dtype=torch.bfloat16)
    before = tensors[0].clone()
    y, *expected = forward_and_backward(backend, tensors, 99, torch.bfloat16)
    line = backend.leave_sums(wide(n_kv_head=kv_heads), device)
    assert line == "gradient of q: read as it sums it, checked" and backend.sums
    _, sums, *others = forward_and_backward(backend, tensors, 99, torch.bfloat16)
    assert isinstance(sums, AttentionSums) and torch.equal(sums.rows(), expected[0])
    assert all(torch.equal(a, b) for a, b in zip(others, expected[1:], strict=True))
    assert torch.equal(tensors[0], before)  # nobody wrote what stands in for grad_q
    interface = sys.modules["flash_attn.cute.interface"]
    assert interface._bwd_postprocess_convert is fa4_converts.convert
    odd = fused_inputs(63, 2, kv_heads, 128, batch=1)
    assert isinstance(forward_and_backward(backend, odd, 9, torch.float32)[1], torch.Tensor)


def test_fa4_converts_what_nothing_else_can_read(fa4_converts, monkeypatch):
    device = torch.device("cpu")

    def line(config):
        backend = FlashAttention4()
        said = backend.leave_sums(config, device)
        assert not backend.sums and said.startswith("gradient of q: converted by it (")
        return said.partition("(")[2]

    assert line(GPTConfig.from_depth(2, 64, 64)) == "heads of 64 and 2048 positions)"
    fa4_converts.shift = 1
    assert line(wide()) == "its sums lie in another order)"
    interface = sys.modules["flash_attn.cute.interface"]
    monkeypatch.setattr(interface, "_flash_attn_bwd", None)
    assert line(wide()).startswith("TypeError: ")
    assert interface._bwd_postprocess_convert is fa4_converts.convert
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (10, 0))
    assert line(wide()) == "compute capability 10.0, not 9.0)"
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.1")
    assert line(wide()) == f"4.1, not {SUMS_OF})"


def test_sums_are_checked_in_both_kinds_of_windows(fa4_calls, fa4_converts):
    """The library has a kernel for windows and one without, and a recipe's model takes both."""
    config = GPTConfig.from_depth(2, 128, 128)
    assert min(config.windows) > CHECKED_ROWS
    FlashAttention4().leave_sums(config, torch.device("cpu"))
    lefts = [left for name, left, *_ in fa4_calls if name == "backward"]
    assert None in lefts and any(left is not None for left in lefts)


def test_the_version_with_known_sums_is_the_one_to_install():
    lines = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert f'"flash-attn-4>={SUMS_OF}"' in lines


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("window", "left"), [(0, 0), (5, 5), (15, 15), (16, None), (99, None)])
def test_fa4_through_autograd_and_by_hand(fa4_calls, window, left, deterministic):
    tensors = fused_inputs(17)
    backend = FlashAttention4(deterministic)
    truth = through_autograd(SDPAttention(), tensors, window)
    by_hand = forward_and_backward(backend, tensors, window, torch.float32)
    for results in (through_autograd(backend, tensors, window), by_hand):
        for got, exact in zip(results, truth, strict=True):
            assert got.is_contiguous() and not got.requires_grad
            torch.testing.assert_close(got, exact)
    assert fa4_calls == [("forward", left), ("backward", left, deterministic)] * 2


def test_fa4_is_one_op_for_the_compiler(fa4_calls):
    tensors = fused_inputs(17)
    backend = FlashAttention4(deterministic=True)
    compiled = torch.compile(
        lambda *arguments: backend(*arguments) * 2, fullgraph=True, backend="aot_eager"
    )
    for window in (5, 99):
        truth = through_autograd(lambda *x: SDPAttention()(*x) * 2, tensors, window)
        for got, exact in zip(through_autograd(compiled, tensors, window), truth, strict=True):
            torch.testing.assert_close(got, exact)
    assert ("backward", 5, True) in fa4_calls and ("backward", None, True) in fa4_calls


def test_fa4_ops_keep_their_word(fa4_calls):
    """The ops return the shapes, strides and dtypes that their fake versions tell torch.compile."""
    q, k, v, grad_y = fused_inputs(17)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(_fa4_forward_op, (*leaves, 5, False))
    y, lse = _fa4_forward_op(q, k, v, 5, False)
    torch.library.opcheck(_fa4_backward_op, (grad_y, q, k, v, y, lse, 5, False))


def test_te_reads_in_place_only_what_it_recognises():
    q, k, v, _ = fused_inputs(16, heads=4, kv_heads=4)
    assert all(a is b for a, b in zip(_te_layout(q, k, v), (q, k, v), strict=True))
    contiguous = [x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)]
    laid_out = _te_layout(*contiguous)
    assert all(a is b for a, b in zip(laid_out, contiguous, strict=True))
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    elsewhere = [torch.cat((x, x))[2:] for x in contiguous]
    for tensors in ((q, k, v * 2), (k, q, v), fused_inputs(16)[:3], transposed, elsewhere):
        for got, x in zip(_te_layout(*tensors), tensors, strict=True):
            assert got.is_contiguous() and got.storage_offset() == 0 and torch.equal(got, x)


def test_te_is_asked_for_cudnn_and_the_window(monkeypatch):
    asked = []

    class DotProductAttention:
        def __init__(self, **options):
            asked.append(options)
            self.window = options["window_size"][0] % 2**31

        def __call__(self, q, k, v):
            return SDPAttention()(q, k, v, self.window).flatten(2)

    for name in ("transformer_engine", "transformer_engine.pytorch"):
        module = types.ModuleType(name)
        module.DotProductAttention = DotProductAttention
        monkeypatch.setitem(sys.modules, name, module)
    environment = {}
    monkeypatch.setattr("os.environ", environment)
    tensors = fused_inputs(17)
    backend = TransformerEngineAttention(deterministic=True)
    for window in (5, 99, 5):
        results = forward_and_backward(backend, tensors, window, torch.float32)
        truth = through_autograd(SDPAttention(), tensors, window)
        for got, exact in zip(results, truth, strict=True):
            torch.testing.assert_close(got, exact)
    assert [x["window_size"] for x in asked] == [(5, 0), (-1, 0)]
    assert asked[0] | {"window_size": None} == {
        "num_attention_heads": 4,
        "kv_channels": 8,
        "num_gqa_groups": 2,
        "attention_dropout": 0.0,
        "qkv_format": "bshd",
        "attn_mask_type": "causal",
        "window_size": None,
    }
    assert environment == {
        "NVTE_FLASH_ATTN": "0",
        "NVTE_FUSED_ATTN": "1",
        "NVTE_UNFUSED_ATTN": "0",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }


def need(backend):
    """What a bf16 model on this GPU asks for."""
    return Need(backend, "cuda", torch.cuda.get_device_capability(), ("bf16",))


def on_gpu(name, deterministic=False):
    """The backend named `name`; skips the test if its library is missing or does not support this
    GPU."""
    try:
        return select_attention(name, need("fused"), deterministic).made
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def fresh_compiler():
    """Resets dynamo: flex is compiled for every shape, and dynamo caches only a few per process."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


WINDOWS = pytest.mark.parametrize("window", [128, 512, 4096])
LENGTHS = pytest.mark.parametrize("seq_len", [384, 1024])
ALL = pytest.mark.parametrize("name", [name for name in choices(ATTENTION)[1:] if name != "sdpa"])


def gpu_inputs(seq_len, kv_heads):
    return fused_inputs(seq_len, 4, kv_heads, 128, device="cuda", dtype=torch.bfloat16)


def compare(label, got, tensors, window):
    """Every result's error is at most twice that of SDPA in bf16."""
    exact = forward_and_backward(SDPAttention(), tensors, window, torch.float64)
    base = forward_and_backward(SDPAttention(), tensors, window, torch.bfloat16)
    for x, reference, truth in zip(got, base, exact, strict=True):
        error, allowed = (x - truth).norm(), 2 * (reference - truth).norm()
        print(f"{label} {error / truth.norm():.5f}, twice sdpa {allowed / truth.norm():.5f}")
        assert error <= allowed


@pytest.mark.cuda
@ALL
@WINDOWS
@LENGTHS
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_error_is_at_most_twice_that_of_sdpa(fresh_compiler, name, window, seq_len, kv_heads):
    backend = on_gpu(name)
    backend.prepare(seq_len, [window], "cuda")
    tensors = gpu_inputs(seq_len, kv_heads)
    by_hand = forward_and_backward(backend, tensors, window, torch.bfloat16)
    compare(f"{name} by hand", by_hand, tensors, window)
    compare(f"{name} autograd", through_autograd(backend, tensors, window), tensors, window)


@pytest.mark.cuda
@WINDOWS
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_compiled_fa4(fresh_compiler, window, kv_heads):
    """torch.compile gives one graph, fuses neighbouring ops, and keeps the accuracy."""
    backend = on_gpu("fa4")
    tensors = gpu_inputs(1024, kv_heads)

    @torch.compile(fullgraph=True, dynamic=False)
    def attend(q, k, v, window):
        return backend(q + 0, k * 1, v, window) + 0

    compare("compiled", through_autograd(attend, tensors, window), tensors, window)


@pytest.mark.cuda
@ALL
@WINDOWS
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_deterministic_gives_the_same_bits(fresh_compiler, name, window, kv_heads):
    backend = on_gpu(name, deterministic=True)
    backend.prepare(1024, [window], "cuda")
    tensors = gpu_inputs(1024, kv_heads)
    first, *others = (
        forward_and_backward(backend, tensors, window, torch.bfloat16) for _ in range(6)
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("deterministic", [False, True])
def test_sums_of_fa4(kv_heads, deterministic):
    """Where it says that it checked them, they are as exact as its own gradients, and in
    deterministic passes have the same bits."""
    backend = on_gpu("fa4", deterministic)
    config = GPTConfig.from_depth(4, 128, 128, n_kv_head=kv_heads, sequence_len=1024)
    tensors = gpu_inputs(1024, kv_heads)
    plain = [forward_and_backward(backend, tensors, w, torch.bfloat16) for w in (128, 4096)]
    line = backend.leave_sums(config, torch.device("cuda"))
    print(line)
    if not backend.sums:
        pytest.skip(line)
    for window, expected in zip((128, 4096), plain, strict=True):
        y, sums, *others = forward_and_backward(backend, tensors, window, torch.bfloat16)
        got = [y, sums.rows(), *others]
        compare("sums", got, tensors, window)
        if deterministic:
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.cuda
def test_deterministic_sdpa_and_auto(fresh_compiler):
    tensors = gpu_inputs(1024, 2)
    chosen = select_attention("auto", need("compile"), deterministic=True)
    print(chosen.why)
    assert chosen.made.deterministic and "agrees with SDPA to 0.0" in chosen.why
    for window in (128, 4096):
        first, other = (
            forward_and_backward(SDPAttention(True), tensors, window, torch.bfloat16)
            for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
