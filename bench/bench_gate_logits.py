"""gate_logits at depth 16, forward and backward: products too thin for tensor cores."""

import pytest

from nanofuse.bench.cases.case import ROWS
from nanofuse.bench.cases.stream import gate_logits_bwd_case, gate_logits_case
from nanofuse.bench.checks import relative_error
from nanofuse.bench.harness import compiled, measure_case, op_benchmark
from nanofuse.kernels.gate_logits import gate_logits_bwd, gate_logits_ref


def backward_ref(grad_logits, y, rstd, weight, grad_normed, grad_weight):
    """gate_logits_bwd in plain torch: accumulates in place."""
    channels = weight.size(1)
    normed = y[:, :channels].float() * rstd[:, None]
    grad_weight.addmm_(grad_logits.t(), normed)
    grad_normed[:, :channels] += (grad_logits @ weight).to(grad_normed.dtype)


@op_benchmark
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def bench_gate_logits(benchmark, device, backward):
    case = (gate_logits_bwd_case if backward else gate_logits_case)(ROWS, device)
    reference = backward_ref if backward else gate_logits_ref
    args = case.args
    if backward:
        totals = [[x.clone() for x in args[4:]] for _ in range(2)]
        gate_logits_bwd(*args[:4], *totals[0])
        backward_ref(*args[:4], *totals[1])
        for got, expected in zip(*totals, strict=True):
            assert relative_error(got, expected) < 0.01
    else:
        assert relative_error(case.run(), gate_logits_ref(*args)) < 1e-5
    alternatives = {
        "eager": lambda: reference(*args),
        "compile": lambda: compiled(reference)(*args),
    }
    measure_case(benchmark, case, alternatives)
