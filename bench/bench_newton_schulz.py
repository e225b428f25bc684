"""newton_schulz: the stacks of a depth-16 model, one by one and together."""

import pytest

from nanofuse.bench.cases.optim import newton_schulz_case
from nanofuse.bench.checks import assert_accurate
from nanofuse.bench.harness import ON_GPU, compiled, measure_case, op_benchmark
from nanofuse.kernels.newton_schulz import POLAR_EXPRESS, newton_schulz, newton_schulz_ref

D16 = [(64, 1024, 1024), (16, 4096, 1024), (16, 1024, 4096)]
TINY = [(2, 16, 16), (1, 32, 8), (1, 8, 32)]
SETS = [[shape] for shape in D16] + [D16] if ON_GPU else [[shape] for shape in TINY]


def library():
    """{name: function} of the gram-newton-schulz package; {} where it or quack is missing."""
    try:
        from gram_newton_schulz import GramNewtonSchulz

        function = GramNewtonSchulz(ns_coefficients=POLAR_EXPRESS)  # imports quack
    except ImportError:
        return {}
    return {"gram_newton_schulz": function}


@op_benchmark
@pytest.mark.parametrize("shapes", SETS, ids=str)
def bench_newton_schulz(benchmark, device, shapes):
    case = newton_schulz_case(device, shapes)
    (stacks,) = case.args
    for x in (stack[:2] for stack in stacks):
        truth = newton_schulz_ref(x.double())
        assert_accurate("newton_schulz", newton_schulz(x), newton_schulz_ref(x), truth)

    def run(function):
        return lambda: [function(x) for x in stacks]

    functions = {"eager": newton_schulz_ref, "compile": compiled(newton_schulz_ref), **library()}
    measure_case(benchmark, case, {name: run(function) for name, function in functions.items()})
