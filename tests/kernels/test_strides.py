"""Every tensor argument of every launcher as a view with gaps: right results, or a ValueError."""

import ast
import dataclasses
from pathlib import Path

import pytest
import torch

from nanofuse.kernels import adamw as adamw_module
from nanofuse.kernels import linear_relu_squared as linear
from nanofuse.kernels import linear_softcap_cross_entropy as head
from nanofuse.kernels.bigram_rows import bigram_rows
from nanofuse.kernels.common.fp8 import E4M3, E5M2, FP8Operand, Scaling
from nanofuse.kernels.embed_smear import embed_smear_bwd, embed_smear_fwd
from nanofuse.kernels.embedding_grad import embedding_grad, sort_rows
from nanofuse.kernels.gate_logits import gate_logits_bwd, gate_logits_fwd
from nanofuse.kernels.muon_momentum import muon_momentum
from nanofuse.kernels.muon_update import WeightCopies, muon_apply, muon_factors, muon_update
from nanofuse.kernels.newton_schulz import (
    initial_scale,
    newton_schulz,
    orthogonalize,
    rescale,
    unit_rows,
)
from nanofuse.kernels.quantize import quantize
from nanofuse.kernels.relu_squared import relu_squared_bwd, relu_squared_fwd
from nanofuse.kernels.resid_lambda_grad import resid_lambda_grad
from nanofuse.kernels.residual_gradients import residual_gradients
from nanofuse.kernels.residual_mix import residual_mix_bwd, residual_mix_fwd
from nanofuse.kernels.rotary_qk_norm import rotary_qk_norm_bwd, rotary_qk_norm_fwd
from nanofuse.kernels.softcap_cross_entropy import (
    softcap_cross_entropy_bwd,
    softcap_cross_entropy_fwd,
)
from nanofuse.kernels.symmetric_matmul import batched_matmul, symmetric_matmul
from nanofuse.kernels.transpose import transpose

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="what launchers check is the same everywhere, and the fp32 products here have no tile",
)
KERNELS = Path(__file__).parents[2] / "kernels"
N, T, C = 32, 16, 32  # positions, positions of a sequence, width


def rand(*shape):
    return torch.rand(shape) + 0.5


def ids(*shape, high=8):
    return torch.randint(high, shape)


def scaling(dtype=E4M3, shape=(1,)):
    return Scaling(dtype, rand(*shape), rand(*shape), torch.zeros(shape))


def operand(rows, cols):
    data = rand(rows, cols).to(E4M3)
    return FP8Operand(data, data.t().contiguous(), torch.ones(1))


def copies(shape):
    fp8 = scaling(shape=shape[:1])
    return WeightCopies.empty(shape, "cpu", bf16=True, scaling=fp8)


def adamw(params, grads, exp_avgs, exp_avg_sqs, schedule):
    hypers = [adamw_module.AdamWHyper(0.1, 0.9, 0.95, 1e-8, 0.1)]
    tensors = adamw_module.AdamWTensors([params], [grads], [exp_avgs], [exp_avg_sqs], hypers)
    adamw_module.adamw(tensors, schedule)


def lookups(lambdas):
    """Of two tables of eight rows, with a number of lambdas each."""
    return tuple((ids(N).int(), rand(8, C), rand(lambdas)) for _ in range(2))


def mix():
    return {
        "x": rand(N, C), "branch": rand(N, C), "x0": rand(N, C), "lookups": lookups(1),
        "resid_lambda": rand(1), "x0_lambda": rand(1), "scaling": scaling(),
    }  # fmt: skip


def mix_bwd():
    names = ("grad_normed", "y", "grad_stream", "x", "out")
    return {
        **{name: rand(N, C) for name in names}, "rstd": rand(N), "stream_scale": rand(1),
        "resid_lambda": rand(1), "scaling": scaling(E5M2),
    }  # fmt: skip


def rotary(backward=False):
    heads, kv, d = 2, 2, 32
    case = {
        "qkv": rand(N, (heads + 2 * kv) * d), "tokens": ids(N), "table": rand(8, kv * d),
        "gate": rand(N, kv), "cos": rand(T, d), "sin": rand(T, d), "seq_len": T,
    }  # fmt: skip
    if not backward:
        return {**case, "num_heads": heads}
    case |= {name: rand(N, 2 * d) for name in ("g_q", "g_k", "g_v")}
    return {**case, "rstd": rand(heads + kv, N), "scaling": scaling(E5M2)}


def loss(**more):
    return {"logits": rand(N, 32), "targets": ids(N), "vocab_size": 30, **more}


def logits_grad(u):
    return head.LogitsGrad(u, rand(N), -rand(N), rand(1) + 1, ids(N), 30)


def muon():
    shape = (2, 32, 16)
    return {
        "param": rand(*shape), "grad": rand(*shape), "momentum_buffer": rand(*shape),
        "second_moment": rand(2, 32, 1), "hyper": rand(3), "weights": copies(shape),
    }  # fmt: skip


SMEAR = {"table": (8, C), "gate_weight": (1, 12), "smear_lambda": (1,)}
CASES = {
    "adamw": (adamw, lambda: {
        **{n: rand(5, 8) for n in ("params", "grads", "exp_avgs", "exp_avg_sqs")},
        "schedule": torch.tensor([0.5, 3.0]),
    }),
    "bigram_rows": (bigram_rows, lambda: {"tokens": ids(2, T), "num_rows": 8}),
    "embed_smear_fwd": (embed_smear_fwd, lambda: {
        "tokens": ids(2, T), **{n: rand(*s) for n, s in SMEAR.items()},
    }),
    "embed_smear_bwd": (embed_smear_bwd, lambda: {
        "tokens": ids(2, T), **{n: rand(*s) for n, s in SMEAR.items()},
        "grad": rand(N, C), "gate": rand(N),
    }),
    "embedding_grad": (embedding_grad, lambda: {
        "grad_rows": rand(N, C), "sorted_rows": sort_rows(ids(N), 8), "table_grad": rand(8, C),
    }),
    "sort_rows": (sort_rows, lambda: {"indices": ids(2, T), "num_rows": 8}),
    "gate_logits_fwd": (gate_logits_fwd, lambda: {
        "y": rand(N, C), "rstd": rand(N), "weight": rand(2, 12),
    }),
    "gate_logits_bwd": (gate_logits_bwd, lambda: {
        "grad_logits": rand(N, 2), "y": rand(N, C), "rstd": rand(N), "weight": rand(2, 12),
        "grad_normed": rand(N, C), "grad_weight": rand(2, 12),
    }),
    "linear_relu_squared_fwd": (linear.linear_relu_squared_fwd, lambda: {
        "x": rand(N, 16), "w": rand(C, 16),
    }),
    "linear_relu_squared_fwd fp8": (linear.linear_relu_squared_fwd, lambda: {
        "x": operand(N, 16), "w": operand(C, 16), "scaling": scaling(),
    }),
    "linear_relu_squared_bwd": (linear.linear_relu_squared_bwd, lambda: {
        "dz": rand(N, 16), "v": rand(16, C), "y": rand(N, C),
    }),
    "linear_relu_squared_bwd fp8": (linear.linear_relu_squared_bwd, lambda: {
        "dz": operand(N, 16), "v": operand(16, C), "y": operand(N, C), "scaling": scaling(E5M2),
    }),
    "linear_softcap_cross_entropy": (head.linear_softcap_cross_entropy, lambda: {
        "x": rand(N, 16), "weight": rand(32, 16), "targets": ids(N), "vocab_size": 30,
        "chunk_rows": 8,
    }),
    "linear_softcap_cross_entropy_fwd": (head.linear_softcap_cross_entropy_fwd, lambda: {
        "x": rand(N, 16), "w": rand(32, 16), "targets": ids(N), "vocab_size": 30,
    }),
    "linear_softcap_cross_entropy_fwd fp8": (head.linear_softcap_cross_entropy_fwd, lambda: {
        "x": operand(N, 16), "w": operand(32, 16), "targets": ids(N), "vocab_size": 30,
    }),
    "weighted_rows": (head.weighted_rows, lambda: {
        "x": rand(N, 16), "grad": logits_grad(rand(N, C)), "scale": rand(1),
    }),
    "weighted_rows fp8": (head.weighted_rows, lambda: {
        "x": operand(N, 16), "grad": logits_grad(operand(N, C)), "scale": rand(1),
    }),
    "linear_softcap_cross_entropy_dx": (head.linear_softcap_cross_entropy_dx, lambda: {
        "product": rand(N, 16), "w": operand(C, 16), "grad": logits_grad(operand(N, C)),
        "scale": rand(1),
    }),
    "linear_softcap_cross_entropy_dw": (head.linear_softcap_cross_entropy_dw, lambda: {
        "x": operand(N, 16), "grad": logits_grad(operand(N, C)), "scale": rand(1),
        "out": rand(C, 16),
    }),
    "muon_momentum": (muon_momentum, lambda: {
        "grad": rand(2, 8, 16), "momentum_buffer": rand(2, 8, 16), "hyper": rand(3),
        "dtype": torch.float32,
    }),
    "muon_factors": (muon_factors, lambda: {
        "squares": rand(2, 8), "second_moment": rand(2, 8, 1), "shape": (2, 8, 4), "beta2": 0.9,
        "muon_plus": True,
    }),
    "muon_apply": (muon_apply, lambda: {
        "param": rand(2, 32, 16), "x": rand(2, 32, 16), "factors": rand(2, 32), "hyper": rand(3),
        "weights": copies((2, 32, 16)),
    }),
    "muon_update": (muon_update, muon),
    "unit_rows": (unit_rows, lambda: {"x": rand(2, 8, 16)}),
    "initial_scale": (initial_scale, lambda: {"z": rand(2, 8, 16), "norms": rand(2, 8)}),
    "rescale": (rescale, lambda: {"x": rand(2, 8, 16), "sumsq": rand(2, 8)}),
    "orthogonalize": (orthogonalize, lambda: {"z": rand(2, 16, 16), "sigma": rand(2) / 100}),
    "newton_schulz": (newton_schulz, lambda: {"x": rand(2, 16, 16)}),
    "quantize": (quantize, lambda: {
        "x": rand(N, C), "scaling": scaling(), "out": operand(N, C),
    }),
    "relu_squared_fwd": (relu_squared_fwd, lambda: {"x": rand(N, C), "scaling": scaling()}),
    "relu_squared_bwd": (relu_squared_bwd, lambda: {
        "dy": rand(N, C), "x": rand(N, C), "scaling": scaling(),
    }),
    "transpose": (transpose, lambda: {
        "x": rand(N, C).to(E4M3), "out": rand(C, N).to(E4M3),
    }),
    "resid_lambda_grad": (resid_lambda_grad, lambda: {
        "g": rand(N, C), "x": rand(N, C), "a": rand(N, 16), "w": rand(C, 16),
        "resid_lambda": rand(1) / 100, "shares": torch.zeros(3),
    }),
    "resid_lambda_grad fp8": (resid_lambda_grad, lambda: {
        "g": rand(N, C), "x": rand(N, C), "a": operand(N, 16), "w": operand(C, 16),
        "resid_lambda": rand(1) / 100, "shares": torch.zeros(3),
    }),
    "residual_gradients": (residual_gradients, lambda: {
        "grads": rand(3, N, C), "x0": rand(N, C), "x0_lambdas": rand(3), "lookups": lookups(3),
    }),
    "residual_mix_fwd": (residual_mix_fwd, mix),
    "residual_mix_bwd": (residual_mix_bwd, mix_bwd),
    "rotary_qk_norm_fwd": (rotary_qk_norm_fwd, rotary),
    "rotary_qk_norm_bwd": (rotary_qk_norm_bwd, lambda: rotary(backward=True)),
    "softcap_cross_entropy_fwd": (softcap_cross_entropy_fwd, loss),
    "softcap_cross_entropy_bwd": (softcap_cross_entropy_bwd, lambda: loss(
        lse=rand(N), grad_scale=rand(N), scaling=scaling(E5M2)
    )),
    "symmetric_matmul": (symmetric_matmul, lambda: {
        "left": rand(2, 16, 16), "scale": rand(2), "addend": rand(2, 16, 16), "beta": 0.5,
    }),
    "batched_matmul": (batched_matmul, lambda: {
        "left": rand(2, 16, 16), "right": rand(2, 16, 16), "scale": rand(2), "sums": "row",
    }),
}  # fmt: skip


def leaves(value, path=()):
    """(path, tensor) of every tensor in a case's arguments or results, dataclasses' fields too."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), (*path, field.name))
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, (*path, name))


def replaced(value, path, tensor):
    """The arguments with the tensor at `path` replaced."""
    if not path:
        return tensor
    name, *rest = path
    if isinstance(value, dict):
        return {**value, name: replaced(value[name], rest, tensor)}
    if isinstance(value, tuple):
        return (*value[:name], replaced(value[name], rest, tensor), *value[name + 1 :])
    return dataclasses.replace(value, **{name: replaced(getattr(value, name), rest, tensor)})


def with_gaps(x, kind):
    """A view of x's values in a larger buffer, and the buffer's other elements."""
    if kind == "elements":
        buffer = torch.full((*x.shape, 2), 3).to(x.dtype)
        view, gaps = buffer[..., 0], buffer[..., 1]
    elif kind == "rows":
        buffer = torch.full((*x.shape[:-1], 2 * x.size(-1)), 3).to(x.dtype)
        view, gaps = buffer[..., : x.size(-1)], buffer[..., x.size(-1) :]
    else:
        buffer = torch.full((2 * x.size(0), *x.shape[1:]), 3).to(x.dtype)
        view, gaps = buffer[::2], buffer[1::2]
    view.copy_(x)
    return view, gaps


def numbers(x):
    return x.float() if x.is_floating_point() else x


def results(function, arguments):
    """Everything that a call returns, and its arguments after it."""
    returned = function(**arguments)
    return [numbers(x).clone() for _, x in [*leaves(returned), *leaves(arguments)]]


@pytest.mark.parametrize("name", CASES)
def test_a_view_is_read_as_what_it_is(name):
    function, make = CASES[name]

    def arguments():
        torch.manual_seed(0)
        return make()

    expected = results(function, arguments())
    refused, taken = [], []
    for path, tensor in leaves(arguments()):
        for kind in ("elements", "rows", "first"):
            view, gaps = with_gaps(tensor, kind)
            if view.is_contiguous():
                continue
            before = numbers(gaps).clone()
            try:
                got = results(function, replaced(arguments(), path, view))
            except ValueError as error:
                assert "\n" not in str(error) and str(error)
                refused.append((path, kind))
                continue
            taken.append((path, kind))
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, equal_nan=True, msg=f"{path} by {kind}")
            assert torch.equal(numbers(gaps), before), (path, kind)
    print(f"refused: {refused}\ntaken: {taken}")


def test_every_launcher_is_here():
    launchers = set()
    for path in KERNELS.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript):
                    if getattr(call.func.value, "id", "").endswith("kernel"):
                        launchers.add(node.name)
    assert len(launchers) > 20
    panels = {"linear_relu_squared_panel", "product_panel", "linear_rotary_qk_norm_panel",
              "linear_residual_norm_panel"}  # fmt: skip
    by_tma = {"residual_norm_fwd_tma", "residual_mix_bwd_tma"}
    inner = panels | by_tma | {"_launch"}  # their callers check
    assert launchers - inner <= {name.split()[0] for name in CASES}
