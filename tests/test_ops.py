"""nanofuse.ops: every name has an example that runs, types, and a kernel that agrees with eager."""

import doctest
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanofuse import ops
from nanofuse.kernels.adamw import adamw_ref
from nanofuse.kernels.bigram_rows import bigram_embedding_ref, bigram_rows_ref
from nanofuse.kernels.common.rms_norm import rms_norm_ref
from nanofuse.kernels.embed_smear import embed_smear_ref
from nanofuse.kernels.embedding_grad import embedding_grad_ref
from nanofuse.kernels.linear_softcap_cross_entropy import linear_softcap_cross_entropy_ref
from nanofuse.kernels.muon_update import muon_update_ref
from nanofuse.kernels.newton_schulz import newton_schulz_ref
from nanofuse.kernels.quantize import quantize_by_scaling_ref
from nanofuse.kernels.relu_squared import relu_squared_ref
from nanofuse.kernels.relu_squared_mlp import relu_squared_mlp_ref
from nanofuse.kernels.residual_mix import residual_mix_ref
from nanofuse.kernels.rotary_qk_norm import rotary_qk_norm_ref, value_gate_ref
from nanofuse.kernels.softcap_cross_entropy import softcap_cross_entropy_ref
from nanofuse.kernels.symmetric_matmul import symmetric_matmul_ref

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
B, T, C, V, R = 2, 5, 32, 11, 13  # sequences, positions, channels, tokens, rows of a table
H, K, D = 2, 1, 8  # query heads, key heads, channels of a head
HELPERS = {"adamw_tensors", "fp8_scaling", "rotary_table"}  # they have no kernel
WITH_KERNEL = sorted(set(ops.__all__) - HELPERS)


def randn(*size, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(size, generator=generator).to(DEVICE)


TOKENS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1)).to(DEVICE)
TARGETS = TOKENS.flatten().clone()
TARGETS[3] = -1


def add_ref(x, branch):
    y = x + branch
    return y, rms_norm_ref(y)


def mix_ref(x, x0, resid, skip, branch, table, bigram):
    e = bigram_embedding_ref(TOKENS, table)
    y = residual_mix_ref(x + branch, x0, resid, skip, [(e, bigram)])
    return y, rms_norm_ref(y)


def rotary_ref(qkv, table, gate):
    q, k, v = qkv.view(B, T, -1, D).split([H, K, K], dim=2)
    values = table[TOKENS].view(B, T, K, D)
    return *rotary_qk_norm_ref(q, k, *ROTARY), value_gate_ref(v, gate, values)


ROTARY = ops.rotary_table(T, D, device=DEVICE)
# name: leaves, op(*leaves, backend=...), reference(*leaves)
DIFFERENTIABLE = {
    "add_rms_norm": (
        [randn(B, T, C), randn(B, T, C, seed=1)],
        ops.add_rms_norm,
        add_ref,
    ),
    "residual_mix": (
        [randn(B, T, C), randn(B, T, C, seed=1), *torch.tensor([1.1, 0.3], device=DEVICE)]
        + [randn(B, T, C, seed=2), randn(R, C), torch.tensor(0.4, device=DEVICE)],
        lambda x, x0, resid, skip, branch, table, bigram, backend: ops.residual_mix(
            x, x0, resid, skip, branch=branch, tokens=TOKENS, table=table, bigram_lambda=bigram,
            backend=backend,
        ),
        mix_ref,
    ),
    "embed_smear": (
        [randn(V, C), randn(1, 24), torch.tensor([0.5], device=DEVICE)],
        lambda *leaves, backend: ops.embed_smear(TOKENS, *leaves, backend=backend),
        lambda *leaves: embed_smear_ref(TOKENS, *leaves),
    ),
    "rotary_qk_norm": (
        [randn(B, T, (H + 2 * K) * D), randn(V, K * D), randn(B, T, K)],
        lambda qkv, table, gate, backend: ops.rotary_qk_norm(
            qkv, *ROTARY, H, tokens=TOKENS, table=table, gate=gate, backend=backend
        ),
        rotary_ref,
    ),
    "relu_squared": ([randn(B, T, C)], ops.relu_squared, relu_squared_ref),
    "relu_squared_mlp": (
        [randn(B, T, C), randn(48, C), randn(16, 48)],
        ops.relu_squared_mlp,
        relu_squared_mlp_ref,
    ),
    "softcap_cross_entropy": (
        [randn(B * T, 16)],
        lambda x, backend: ops.softcap_cross_entropy(x, TARGETS, V, backend=backend),
        lambda x: softcap_cross_entropy_ref(x, TARGETS, V),
    ),
    "linear_softcap_cross_entropy": (
        [randn(B * T, C), randn(16, C)],
        lambda x, w, backend: ops.linear_softcap_cross_entropy(
            x, w, TARGETS, V, chunk_rows=4, backend=backend
        ),
        lambda x, w: linear_softcap_cross_entropy_ref(x, w, TARGETS, V),
    ),
}  # fmt: skip


def quantized(quantize):
    def run(x):
        scaling = ops.fp8_scaling(5.0, device=DEVICE)
        operand = quantize(x, scaling)
        return operand.data.float(), operand.transposed.float(), scaling.amax

    return run


def adamw_once(update):
    def run(p, g):
        p, g, m, v = p.clone(), g.clone(), torch.zeros_like(p), torch.zeros_like(p)
        update(p, g, m, v)
        return p, g, m, v

    return run


def adamw_op(backend):
    def update(p, g, m, v):
        state = ops.adamw_tensors([p], [g], [m], [v], lr=0.1, betas=(0.8, 0.9), weight_decay=0.1)
        for step in (1, 2):
            ops.adamw(state, step, lr_mult=0.5, backend=backend)

    return update


def adamw_twice_ref(p, g, m, v):
    for step in (1, 2):
        adamw_ref(p, g, m, v, 0.05, 0.8, 0.9, 1e-8, 0.1, step)


def muon_once(update):
    def run(p, g, m, s):
        update(p, g, m, s)
        return p, g, m, s

    return run


def muon_op(backend):
    def update(*tensors):
        numbers = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}
        ops.muon_update(*tensors, **numbers, backend=backend)

    return update


STACK = [randn(2, 16, 32), randn(2, 16, 32, seed=1), randn(2, 16, 32, seed=2)]
# name: inputs, op by backend, reference
PLAIN = {
    "adamw": (
        [randn(7, 9), randn(7, 9, seed=1)],
        lambda backend: adamw_once(adamw_op(backend)),
        adamw_once(adamw_twice_ref),
    ),
    "muon_update": (
        [*STACK, torch.rand(2, 1, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)],
        lambda backend: muon_once(muon_op(backend)),
        muon_once(lambda *tensors: muon_update_ref(*tensors, 0.1, 0.9, 0.2)),
    ),
    "newton_schulz": (
        STACK[:1],
        lambda backend: lambda x: (ops.newton_schulz(x, backend=backend),),
        lambda x: (newton_schulz_ref(x),),
    ),
    "symmetric_matmul": (
        [STACK[0].half() if DEVICE.type == "cuda" else STACK[0]],
        lambda backend: lambda x: (ops.symmetric_matmul(x, factor=2.0, backend=backend),),
        lambda x: (symmetric_matmul_ref(x, factor=2.0),),
    ),
    "bigram_rows": (
        [TOKENS],
        lambda backend: lambda tokens: (ops.bigram_rows(tokens, R, backend=backend),),
        lambda tokens: (bigram_rows_ref(tokens, R).int(),),
    ),
    "embedding_grad": (
        [randn(B * T, C), TOKENS, randn(V, C)],
        lambda backend: lambda g, i, t: (ops.embedding_grad(g, i, t, backend=backend), t),
        lambda g, i, t: (embedding_grad_ref(g, i, t),) * 2,
    ),
    "quantize": (
        [randn(16, 48)],
        lambda backend: quantized(lambda x, s: ops.quantize(x, s, backend=backend)),
        quantized(quantize_by_scaling_ref),
    ),
}


def strided(x):
    """x, every second element of its memory."""
    return torch.stack([x, x], dim=-1)[..., 0]


def results_and_gradients(op, leaves):
    """Results of op(*leaves), and gradients for random ones of the results."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = op(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    upstream = [randn(*y.shape, seed=7 + i) for i, y in enumerate(out)]
    torch.autograd.backward(out, upstream)
    return [y.detach() for y in out], [x.grad for x in leaves]


def close(got, expected, tolerance=2e-5):
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        scale = theirs.float().abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(scale, 1e-3))


def test_every_op_is_tested():
    assert len(set(ops.__all__)) == len(ops.__all__)
    assert sorted([*DIFFERENTIABLE, *PLAIN]) == WITH_KERNEL


@pytest.mark.parametrize("name", ops.__all__)
def test_examples_run(name):
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(ops, name), name)
    result = doctest.DocTestRunner().run(example)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("name", ops.__all__)
def test_signatures_are_typed_and_docstrings_complete(name):
    function = getattr(ops, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter
    assert "Source" in function.__doc__
    if name in WITH_KERNEL:
        assert signature.parameters["backend"].default == "kernel"
        assert "Raises:" in function.__doc__


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_eager_is_the_reference_and_the_kernel_agrees(name):
    leaves, op, reference = DIFFERENTIABLE[name]
    expected = results_and_gradients(reference, leaves)
    eager = results_and_gradients(lambda *x: op(*x, backend="eager"), leaves)
    for ours, theirs in zip(eager, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for inputs in (leaves, [strided(x) for x in leaves]):
        kernel = results_and_gradients(lambda *x: op(*x, backend="kernel"), inputs)
        for ours, theirs in zip(kernel, expected, strict=True):
            close(ours, theirs)


@pytest.mark.parametrize("name", PLAIN)
def test_eager_is_the_reference_and_the_kernel_agrees_in_place(name):
    inputs, op, reference = PLAIN[name]
    expected = reference(*(x.clone() for x in inputs))
    for ours, theirs in zip(op("eager")(*(x.clone() for x in inputs)), expected, strict=True):
        assert torch.equal(ours, theirs)
    loose = 2e-2 if DEVICE.type == "cuda" else 1e-4  # matrices are fp16 there
    for change in (torch.clone, strided):
        got = op("kernel")(*(change(x) for x in inputs))
        matrices = name in ("muon_update", "newton_schulz", "symmetric_matmul")
        close(got, expected, loose if matrices else 2e-5)


@pytest.mark.parametrize("backend", ["kernel", "eager"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_leaves_share_no_memory(name, backend):
    leaves, op, _ = DIFFERENTIABLE[name]
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    once = []
    for _ in range(2):
        out = op(*leaves, backend=backend)
        out = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(out, [randn(*y.shape, seed=3) for y in out])
        once = once or [x.grad.clone() for x in leaves]
    assert len({x.grad.untyped_storage().data_ptr() for x in leaves}) == len(leaves)
    close([x.grad for x in leaves], [2 * grad for grad in once], 1e-6)


def test_gradients_are_cleared_where_asked():
    for backend in ("kernel", "eager"):
        p, g, m = (x.clone() for x in STACK)
        ops.muon_update(p, g, m, torch.zeros(2, 1, 32, device=DEVICE), lr=0.1, clear_grad=True,
                        backend=backend)  # fmt: skip
        q, h, m, v = (randn(5, seed=i) for i in range(4))
        state = ops.adamw_tensors([q], [h], [m], [v.abs()], lr=[0.1], weight_decay=[0.0])
        ops.adamw(state, 1, clear_grad=True, backend=backend)
        assert not g.any() and not h.any()


def test_rotary_in_place_gives_views_of_qkv_and_refuses_a_leaf():
    qkv = randn(B, T, (H + 2 * K) * D)
    expected = ops.rotary_qk_norm(qkv, *ROTARY, H)
    got = ops.rotary_qk_norm(qkv, *ROTARY, H, in_place=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert got[0].data_ptr() == qkv.data_ptr() != expected[0].data_ptr()
    with pytest.raises(ValueError, match="leaf"):
        ops.rotary_qk_norm(qkv.requires_grad_(), *ROTARY, H, in_place=True)


def test_what_does_not_fit_is_refused():
    x = randn(B, T, C)
    for match, call in (
        ("unknown backend 'auto'", lambda: ops.relu_squared(x, backend="auto")),
        ("takes bfloat16 or float32, and x is", lambda: ops.relu_squared(x.double())),
        ("branch is on meta", lambda: ops.add_rms_norm(x, x.to("meta"))),
        ("x is .* branch", lambda: ops.add_rms_norm(x, x[:1])),
        ("go together", lambda: ops.residual_mix(x, x, x[0, 0, 0], x[0, 0, 0], tokens=TOKENS)),
        ("do not fit", lambda: ops.relu_squared_mlp(x, x[0], x[0])),
        ("do not hold", lambda: ops.rotary_qk_norm(x[..., :7], *ROTARY, H)),
        ("one per parameter", lambda: ops.adamw_tensors([x], [x], [x], [x], lr=[0.1, 0.2])),
        ("multiples of 16", lambda: ops.quantize(x[0], ops.fp8_scaling(1.0, device=DEVICE))),
    ):
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_eager_compiles_without_a_graph_break(compiler):
    leaves = DIFFERENTIABLE["add_rms_norm"][0]

    def block(x, branch):
        y, normed = ops.add_rms_norm(x.sin(), branch, backend="eager")
        return y, ops.relu_squared(normed, backend="eager")

    compiled = torch.compile(block, backend=compiler, fullgraph=True)
    for ours, theirs in zip(
        results_and_gradients(compiled, leaves), results_and_gradients(block, leaves), strict=True
    ):
        close(ours, theirs, 1e-6)


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.cuda)]
)
def test_kernels_run_between_compiled_graphs(compiler):
    leaves = DIFFERENTIABLE["add_rms_norm"][0]

    def block(x, branch):
        y, normed = ops.add_rms_norm(x.sin(), branch)
        return y.cos(), normed * 2

    compiled = torch.compile(block, backend=compiler)
    for ours, theirs in zip(
        results_and_gradients(compiled, leaves), results_and_gradients(block, leaves), strict=True
    ):
        close(ours, theirs, 1e-5)


def without_a_gpu(code):
    """Output of python -c `code` where no kernel can run."""
    surroundings = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    surroundings.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=surroundings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_gpu_every_op_says_what_is_missing():
    out = without_a_gpu("from tests.test_ops import print_errors; print_errors()")
    lines = out.splitlines()
    assert len(lines) == len(WITH_KERNEL)
    for name, line in zip([*DIFFERENTIABLE, *PLAIN], lines, strict=True):
        assert line.startswith(f"{name}: its kernel needs a CUDA GPU"), line
        assert 'backend="eager"' in line


def print_errors():
    """One line for every op that refuses to run its kernel."""
    for leaves, op, _ in DIFFERENTIABLE.values():
        try:
            op(*leaves, backend="kernel")
        except RuntimeError as error:
            print(error)
    for inputs, op, _ in PLAIN.values():
        try:
            op("kernel")(*inputs)
        except RuntimeError as error:
            print(error)


def test_an_import_loads_no_kernel_and_no_compiler():
    loaded = without_a_gpu("import sys; from nanofuse import ops; print(*sys.modules)").split()
    assert "triton" not in loaded and "torch._dynamo" not in loaded
