"""transpose: the other layout of an FP8 operand that came from another rank."""

from nanofuse.bench.cases.case import ROWS
from nanofuse.bench.cases.stream import transpose_case
from nanofuse.bench.harness import compiled, measure_case, op_benchmark
from nanofuse.kernels.transpose import transpose_ref


@op_benchmark
def bench_transpose(benchmark, device):
    case = transpose_case(ROWS, device)
    x, out = case.args
    case.run()
    assert out.float().equal(transpose_ref(x).float())
    alternatives = {
        "eager": lambda: transpose_ref(x),
        "compile": lambda: compiled(transpose_ref)(x),
    }
    measure_case(benchmark, case, alternatives)
