"""Time every candidate configuration of the ops at d16 and write the winners to kernels/tuned.json.

    python -m bench.tune [op ...] [--out FILE]

Candidates are compiled by several processes first, on small inputs, then timed by one.
"""

import argparse
import itertools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from bench.bench_bigram_residual import WIDTH, Inputs
from bench.bench_bigram_residual import N as ROWS
from bench.bench_muon_update import NUMBERS, fp8_copies, squares_of, state
from bench.harness import copy_ceiling, matmul_ceiling, median_seconds, zipf_tokens
from kernels import tuning
from kernels.adamw import AdamWConfig, AdamWHyper, AdamWTensors, adamw, adamw_schedule
from kernels.bigram_residual import RowTile, bigram_residual_bwd, bigram_residual_fwd
from kernels.embedding_grad import embedding_grad, sort_rows
from kernels.fp8 import E5M2, Scaling
from kernels.linear_relu_squared import (
    LinearTile,
    linear_relu_squared_bwd,
    linear_relu_squared_fwd,
)
from kernels.muon_momentum import muon_momentum
from kernels.muon_update import muon_apply, muon_factors, muon_hyper
from kernels.quantize import quantize
from kernels.relu_squared import relu_squared_bwd, relu_squared_fwd
from kernels.residual_gradients import Config, residual_gradients
from kernels.rotary_qk_norm import (
    HeadTile,
    rotary_qk_norm_bwd,
    rotary_qk_norm_fwd,
    rotary_table,
)
from kernels.smear import embed_smear_bwd, embed_smear_fwd
from kernels.softcap_cross_entropy import (
    LossTile,
    softcap_cross_entropy_bwd,
    softcap_cross_entropy_fwd,
)
from kernels.symmetric_matmul import MatmulTile, batched_matmul, symmetric_matmul
from kernels.tuning import Tile

LAYERS, HEADS, HEAD_DIM, VOCAB = 16, 8, 128, 32768
WARM_ROWS = 256
JOBS = 12


@dataclass(frozen=True)
class Case:
    """What is timed, and the bytes that it must move or the FLOPs that it must do."""

    run: object
    bytes_moved: float = 0.0
    flops: float = 0.0

    def share(self, seconds):
        """Share of the measured copy bandwidth, or of cuBLAS's rate."""
        if self.flops:
            return self.flops / seconds / matmul_ceiling()
        return self.bytes_moved / seconds / copy_ceiling()


def randn(*shape):
    return torch.randn(*shape, device="cuda").bfloat16()


def quantize_case(rows):
    x, scaling = randn(rows, WIDTH), Scaling.from_bound(6.0)
    return Case(lambda: quantize(x, scaling), 4 * x.numel())


def bigram_residual_fwd_case(rows):
    inputs = Inputs(torch.device("cuda"), max(rows // 2048, 1), min(rows, 2048))
    return Case(inputs.opening, 10 * inputs.x.numel() + inputs.row_bytes)


def residual_norm_fwd_case(rows):
    x, branch, scaling = randn(rows, WIDTH), randn(rows, WIDTH), Scaling.from_bound(32.0)

    def run():
        return bigram_residual_fwd(x, branch, scaling=scaling, want_normed=False)

    return Case(run, 8 * x.numel())


def norm_backward_case(rows, opening):
    h, y, stream = (randn(rows, WIDTH) for _ in range(3))
    rstd, one = torch.ones(rows, device="cuda"), torch.ones(1, device="cuda")
    scaling = Scaling.from_bound(40.0, E5M2)
    options = {"x": y, "resid_lambda": one} if opening else {}

    def run():
        return bigram_residual_bwd(h, y, rstd, stream, one, scaling=scaling, **options)

    return Case(run, 10 * y.numel())


def residual_gradients_case(rows):
    inputs = Inputs(torch.device("cuda"), max(rows // 2048, 1), min(rows, 2048))
    grads, lambdas = randn(LAYERS, rows, WIDTH), torch.rand(LAYERS, device="cuda")

    def run():
        return residual_gradients(grads, inputs.x0, lambdas, inputs.tokens, inputs.table, lambdas)

    return Case(run, (LAYERS + 3) * 2 * rows * WIDTH + inputs.row_bytes)


def embed_smear_case(rows):
    tokens = zipf_tokens((max(rows // 2048, 1), min(rows, 2048)), VOCAB, "cuda")
    table, gate = randn(VOCAB, WIDTH), torch.rand(1, 24, device="cuda")
    grad, sigmoid = randn(rows, WIDTH), torch.rand(rows, device="cuda")
    args = tokens, table, gate, torch.ones(1, device="cuda")

    def run():
        embed_smear_fwd(*args)
        return embed_smear_bwd(grad, *args, sigmoid)

    return Case(run, 6 * grad.numel() + 4 * tokens.unique().numel() * WIDTH)


def relu_squared_case(rows):
    x, scaling = randn(rows, 4 * WIDTH), Scaling.from_bound(30.0)
    return Case(lambda: relu_squared_fwd(x, scaling, want_plain=False), 4 * x.numel())


def relu_squared_bwd_case(rows):
    x, dy, scaling = randn(rows, 4 * WIDTH), randn(rows, 4 * WIDTH), Scaling.from_bound(30.0, E5M2)
    return Case(lambda: relu_squared_bwd(dy, x, scaling, want_plain=False), 6 * x.numel())


def linear_relu_squared_case(rows):
    x, w = quantize(randn(rows, WIDTH), Scaling.from_bound(6.0)), randn(4 * WIDTH, WIDTH)
    w, scaling = quantize(w / WIDTH**0.5, Scaling.from_bound(0.2)), Scaling.from_bound(30.0)
    return Case(lambda: linear_relu_squared_fwd(x, w, scaling), flops=8 * rows * WIDTH**2)


def linear_relu_squared_bwd_case(rows):
    dz, v = quantize(randn(rows, WIDTH), Scaling.from_bound(6.0, E5M2)), randn(WIDTH, 4 * WIDTH)
    v, y = quantize(v / WIDTH**0.5, Scaling.from_bound(0.2)), randn(rows, 4 * WIDTH).abs()
    y, scaling = quantize(y, Scaling.from_bound(6.0)), Scaling.from_bound(30.0, E5M2)
    return Case(lambda: linear_relu_squared_bwd(dz, v, y, scaling), flops=8 * rows * WIDTH**2)


def rotary_inputs(rows):
    width, t = HEADS * HEAD_DIM, min(rows, 2048)
    tokens = zipf_tokens((rows,), VOCAB, "cuda")
    angles = rotary_table(t, HEAD_DIM, 1e5, "cuda")
    gate = torch.randn(rows, HEADS, device="cuda").bfloat16()
    args = tokens, randn(VOCAB, width), gate, *angles, t
    return randn(rows, 3 * width), args, 2 * tokens.unique().numel() * width


def rotary_qk_norm_case(rows):
    qkv, args, table_bytes = rotary_inputs(rows)
    return Case(lambda: rotary_qk_norm_fwd(qkv, *args, HEADS), 4 * qkv.numel() + table_bytes)


def rotary_qk_norm_bwd_case(rows):
    qkv, args, table_bytes = rotary_inputs(rows)
    rstd = rotary_qk_norm_fwd(qkv, *args, HEADS)
    grads = [randn(rows, HEADS * HEAD_DIM) for _ in range(3)]
    scaling = Scaling.from_bound(10.0, E5M2)

    def run():
        return rotary_qk_norm_bwd(*grads, qkv, rstd, *args, scaling=scaling, want_plain=False)

    # three gradients, q and k in; FP8 twice and the value gradients out: nine units of 2 bytes
    return Case(run, 9 * 2 * rows * HEADS * HEAD_DIM + table_bytes)


def logits_inputs(rows):
    return randn(rows, VOCAB), zipf_tokens((rows,), VOCAB, "cuda")


def softcap_cross_entropy_fwd_case(rows):
    logits, targets = logits_inputs(rows)
    return Case(lambda: softcap_cross_entropy_fwd(logits, targets, VOCAB), 2 * logits.numel())


def softcap_cross_entropy_bwd_case(rows):
    logits, targets = logits_inputs(rows)
    _, lse = softcap_cross_entropy_fwd(logits, targets, VOCAB)
    scale, scaling = torch.ones(1, device="cuda"), Scaling.from_bound(2.0, E5M2)

    def run():
        return softcap_cross_entropy_bwd(logits, targets, lse, scale, VOCAB, scaling, False)

    return Case(run, 4 * logits.numel())


def embedding_grad_case(rows):
    tokens = zipf_tokens((rows,), VOCAB, "cuda")
    grad, table_grad, order = randn(rows, WIDTH), randn(VOCAB, WIDTH), sort_rows(tokens, VOCAB)
    rows_moved = rows + 2 * tokens.unique().numel()
    return Case(lambda: embedding_grad(grad, order, table_grad), 2 * WIDTH * rows_moved)


def adamw_case(rows):
    lists = [[randn(rows, WIDTH) for _ in range(8)] for _ in range(4)]
    tensors = AdamWTensors(*lists, [AdamWHyper(0.1, 0.8, 0.99, 1e-10, 0.0)] * 8)
    schedule = adamw_schedule(1.0, 1, "cuda")
    return Case(lambda: adamw(tensors, schedule, clear_grad=True), 16 * 8 * rows * WIDTH)


def muon_case(rows):
    shape = (max(rows // 4096, 1), 4096, 1024)
    hyper = muon_hyper(*NUMBERS, "cuda")
    return shape, state(shape, "cuda"), hyper, shape[0] * shape[1] * shape[2]


def muon_momentum_case(rows):
    _, (_, grad, momentum, _), hyper, numel = muon_case(rows)

    def run():
        return muon_momentum(grad, momentum, hyper, torch.float16, clear_grad=True)

    return Case(run, (4 + 8 + 2 + 4) * numel)


def muon_apply_case(rows):
    shape, (param, grad, momentum, second), hyper, numel = muon_case(rows)
    factors = muon_factors(squares_of(grad, momentum, hyper), second, shape, 0.9, True)
    weights, x = fp8_copies(shape, "cuda"), grad.bfloat16()
    return Case(lambda: muon_apply(param, x, factors, hyper, weights), (2 + 8 + 2) * numel)


def matrices(rows, *shape):
    count = max(rows // 1024, 1)
    return (torch.randn(count, *shape, device="cuda") / 32).half(), count


def symmetric_matmul_case(rows):
    x, count = matrices(rows, 1024, 1024)
    gram = symmetric_matmul(x)

    def run():
        return symmetric_matmul(gram, factor=2.0, addend=gram, beta=-2.0, diagonal=4.0)

    return Case(run, flops=count * 1024**3)


def symmetric_matmul_transposed_case(rows):
    x, count = matrices(rows // 4, 4096, 1024)
    scale = torch.ones(count, device="cuda")
    return Case(lambda: symmetric_matmul(x, transpose=True, scale=scale), flops=4 * count * 1024**3)


def batched_matmul_case(rows):
    x, count = matrices(rows, 1024, 1024)
    scale = torch.ones(count, device="cuda")

    def run():  # the last product of the iteration
        return batched_matmul(x, x, scale=scale, sums="row", out_dtype=torch.bfloat16)

    return Case(run, flops=2 * count * 1024**3)


def tiles(rows, cols, warps, stages=(2,)):
    """Every combination as a Tile."""
    return [Tile(*fields) for fields in itertools.product(rows, cols, warps, stages)]


ELEMENTWISE = tiles((32, 64), (128, 256), (4, 8)) + tiles((128,), (64, 128), (8,))
NORMS = [
    *(RowTile(32, 128, 4, stages) for stages in (1, 2, 3)),
    *(RowTile(32, 256, 8, stages) for stages in (1, 2, 3)),
    RowTile(32, 128, 8),
    RowTile(32, 256, 4),
    RowTile(32, 512, 8),
    RowTile(64, 64, 4),
    RowTile(64, 64, 8),
    RowTile(64, 128, 8),
    RowTile(16, 256, 4),
]
NORMS_FORWARD = [*NORMS, RowTile(32, 512, 16), RowTile(64, 64, 4, 2), RowTile(64, 128, 8, 2)]
NORMS_BACKWARD = [
    *NORMS,
    RowTile(32, 128, 4, 1, 96),
    RowTile(32, 128, 4, 1, 80),
    RowTile(32, 128, 8, 1, 64),
    RowTile(32, 256, 8, 1, 128),
    RowTile(32, 256, 8, 1, 96),
    RowTile(64, 64, 4, 1, 128),
    RowTile(64, 128, 8, 1, 128),
    RowTile(64, 128, 8, 1, 96),
]
MATMUL = [
    MatmulTile(128, 128, 64, 4, 3),
    MatmulTile(128, 128, 64, 8, 3),
    MatmulTile(128, 128, 64, 8, 4),
    MatmulTile(128, 256, 64, 8, 3),
    MatmulTile(128, 256, 64, 8, 4),
    MatmulTile(128, 128, 64, 8, 3, 1),
    MatmulTile(128, 256, 64, 8, 3, 1),
]
LINEAR = [
    LinearTile(),
    LinearTile(part=64),
    LinearTile(group=16),
    LinearTile(depth=64, stages=5),
    LinearTile(128, 128, 128, 8, 4, part=64),
    LinearTile(128, 128, 64, 8, 6, part=64),
    LinearTile(256, 128, 128, 8, 3, part=64),
    LinearTile(128, 128, 128, 4, 4, part=64),
    LinearTile(128, 128, 64, 4, 4, part=64, programs=2),
    LinearTile(128, 128, 64, 4, 4, part=32, programs=2),
    LinearTile(128, 128, 128, 4, 3, part=64, programs=2),
    LinearTile(128, 128, 128, 4, 3, part=32, programs=2),
    LinearTile(64, 256, 64, 4, 4, part=32, programs=2),
    LinearTile(64, 256, 128, 4, 2, part=32, programs=2),
    LinearTile(128, 128, 64, 8, 4, part=32, programs=2, registers=128),
    LinearTile(128, 128, 64, 8, 4, part=64, programs=2, registers=128),
    LinearTile(128, 128, 128, 8, 2, part=32, programs=2, registers=128),
    LinearTile(128, 128, 128, 8, 2, part=64, programs=2, registers=128),
    LinearTile(128, 128, 64, 4, 4, part=32, programs=3, registers=168),
]
HEAD_TILES = [
    HeadTile(rows, heads, 4, stages)
    for rows, heads, stages in itertools.product((16, 32), (4, 8), (1, 2, 3))
]
CASES = {
    "quantize": (quantize_case, ELEMENTWISE),
    "bigram_residual_fwd": (bigram_residual_fwd_case, NORMS_FORWARD),
    "residual_norm_fwd": (residual_norm_fwd_case, NORMS_FORWARD),
    "bigram_residual_bwd": (partial(norm_backward_case, opening=True), NORMS_BACKWARD),
    "residual_norm_bwd": (partial(norm_backward_case, opening=False), NORMS_BACKWARD),
    "residual_gradients": (
        residual_gradients_case,
        [
            Config(positions, 16, registers)
            for positions in (4, 8, 16, 32)
            for registers in (None, 168, 128)
        ],
    ),
    "embed_smear": (embed_smear_case, tiles((1, 2, 4), (0,), (2, 4))),
    "relu_squared": (relu_squared_case, ELEMENTWISE),
    "relu_squared_bwd": (relu_squared_bwd_case, ELEMENTWISE),
    "linear_relu_squared": (linear_relu_squared_case, LINEAR),
    "linear_relu_squared_bwd": (linear_relu_squared_bwd_case, LINEAR),
    "rotary_qk_norm": (rotary_qk_norm_case, HEAD_TILES),
    "rotary_qk_norm_bwd": (
        rotary_qk_norm_bwd_case,
        HEAD_TILES[6:] + [HeadTile(64, heads, 8, stages) for heads in (4, 8) for stages in (1, 2)],
    ),
    "softcap_cross_entropy_fwd": (
        softcap_cross_entropy_fwd_case,
        tiles((1,), (2048, 4096, 8192), (4, 8)) + tiles((1,), (16384,), (16,)),
    ),
    "softcap_cross_entropy_bwd": (
        softcap_cross_entropy_bwd_case,
        [
            LossTile(rows, cols, blocks, 256, warps, registers)
            for rows, cols, blocks, warps, registers in (
                (32, 128, 8, 8, None),
                (32, 128, 8, 8, 80),
                (32, 128, 32, 8, None),
                (32, 128, 2, 8, None),
                (32, 128, 8, 4, None),
                (32, 256, 8, 8, None),
                (64, 64, 8, 8, None),
                (64, 128, 8, 8, None),
            )
        ],
    ),
    "embedding_grad": (
        embedding_grad_case,
        tiles((16, 32, 64), (256,), (1,)) + tiles((16, 32), (512,), (2,)),
    ),
    "adamw": (
        adamw_case,
        [
            AdamWConfig(block, warps)
            for block, warps in ((4096, 4), (8192, 4), (8192, 8), (16384, 8))
        ],
    ),
    "muon_momentum": (muon_momentum_case, tiles((1024,), (4096,), (4, 8, 16))),
    "muon_apply": (muon_apply_case, ELEMENTWISE),
    "symmetric_matmul": (symmetric_matmul_case, MATMUL),
    "symmetric_matmul_transposed": (symmetric_matmul_transposed_case, MATMUL),
    "batched_matmul": (batched_matmul_case, MATMUL + [MatmulTile(256, 128, 64, 8, 4)]),
}


def warm(job):
    """Compile one candidate (op, index) into Triton's cache, on few rows."""
    op, index = job
    make, candidates = CASES[op]
    with tuning.forced(op, candidates[index]):
        try:
            make(WARM_ROWS).run()
            torch.cuda.synchronize()
        except Exception as error:  # a candidate that does not fit this GPU is no winner
            return f"{op} {candidates[index]}: {str(error).splitlines()[0]}"
    return None


def tune(op):
    """Measure the candidates of `op`; returns tuned.json's entry for the fastest."""
    make, candidates = CASES[op]
    case = make(ROWS)
    best = None
    for config in candidates:
        with tuning.forced(op, config):
            try:
                seconds = median_seconds(case.run, rounds=12)
            except Exception:  # said by `warm`
                continue
        print(f"{config} {1e6 * seconds:.1f} us {100 * case.share(seconds):.0f} %", flush=True)
        if best is None or seconds < best[0]:
            best = seconds, config, case.share(seconds)
    if best is None:
        raise SystemExit(f"no candidate of {op} runs")
    seconds, config, share = best
    print(f"{op}: {config} {1e6 * seconds:.1f} us {100 * share:.0f} %", flush=True)
    return {"config": asdict(config), "us": round(1e6 * seconds, 1), "rows": ROWS}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", default=[], help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--out", type=Path, default=tuning.TUNED)
    args = parser.parse_args()
    unknown = sorted(set(args.ops) - set(CASES))
    if unknown or not torch.cuda.is_available():
        parser.error(f"unknown op {unknown[0]!r}" if unknown else "tuning needs a CUDA GPU")
    ops = args.ops or list(CASES)
    jobs = [(op, index) for op in ops for index in range(len(CASES[op][1]))]
    with ProcessPoolExecutor(JOBS, multiprocessing.get_context("spawn")) as pool:
        for message in filter(None, pool.map(warm, jobs)):
            print(message)
    table = json.loads(args.out.read_text()) if args.out.exists() else {}
    entries = table.setdefault(tuning.gpu_name(), {})
    for op in ops:
        entries[op] = tune(op)
    args.out.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
