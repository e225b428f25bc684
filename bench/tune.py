"""Time every candidate configuration of the ops at d16 and write the winners to kernels/tuned.json.

    python -m bench.tune [op ...] [--out FILE]

Candidates are compiled by several processes first, on small inputs, then timed by one.
"""

import itertools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from bench import cases
from bench.bench_bigram_residual import N as ROWS
from bench.harness import median_seconds
from kernels import tuning
from kernels.adamw import AdamWConfig
from kernels.bigram_residual import RowTile
from kernels.linear_relu_squared import LinearTile
from kernels.residual_gradients import Config
from kernels.rotary_qk_norm import HeadTile
from kernels.softcap_cross_entropy import LossTile
from kernels.symmetric_matmul import MatmulTile
from kernels.tuning import Tile
from model.errors import UserError
from train.command import CommandParser, run_command
from train.files import write_text_atomically

WARM_ROWS = 256
JOBS = 12


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
    RowTile(32, 512, 16),
    RowTile(64, 64, 4),
    RowTile(64, 64, 8),
    RowTile(64, 128, 8),
    RowTile(16, 256, 4),
]
NORMS_FORWARD = [*NORMS, RowTile(64, 64, 4, 2), RowTile(64, 128, 8, 2)]
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
    *(LinearTile(128, 128, 128, 4, 3, group, programs=2) for group in (4, 8)),
    *(LinearTile(128, 128, 128, 8, 3, group, programs=2, registers=128) for group in (4, 8)),
    *(LinearTile(128, 256, 128, 8, stages) for stages in (3, 4)),
    LinearTile(256, 128, 128, 8, 3),
]
LINEAR_BF16 = [
    *(LinearTile(128, 128, 128, 4, 3, group, programs=2) for group in (4, 8, 16)),
    LinearTile(128, 128, 128, 8, 2, programs=2, registers=128),
    *(LinearTile(*shape, 128, 8, n) for shape in ((128, 256), (256, 128)) for n in (3, 4)),
    *(LinearTile(128, 256, 128, 8, 4, group) for group in (4, 16)),
]
HEAD_TILES = [
    HeadTile(rows, heads, 4, stages)
    for rows, heads, stages in itertools.product((16, 32), (4, 8), (1, 2, 3))
]
CASES = {
    "quantize": (cases.quantize_case, ELEMENTWISE),
    "bigram_residual_fwd": (cases.bigram_residual_fwd_case, NORMS_FORWARD),
    "residual_norm_fwd": (cases.residual_norm_fwd_case, NORMS_FORWARD),
    "bigram_residual_bwd": (partial(cases.norm_backward_case, opening=True), NORMS_BACKWARD),
    "residual_norm_bwd": (partial(cases.norm_backward_case, opening=False), NORMS_BACKWARD),
    "residual_gradients": (
        cases.residual_gradients_case,
        [
            Config(positions, 16, registers)
            for positions in (4, 8, 16, 32)
            for registers in (None, 168, 128)
        ],
    ),
    "embed_smear": (cases.embed_smear_case, tiles((1, 2, 4), (0,), (2, 4))),
    "relu_squared": (cases.relu_squared_case, ELEMENTWISE),
    "relu_squared_bwd": (cases.relu_squared_bwd_case, ELEMENTWISE),
    "linear_relu_squared": (cases.linear_relu_squared_case, LINEAR),
    "linear_relu_squared_bwd": (cases.linear_relu_squared_bwd_case, LINEAR),
    "linear_relu_squared_bf16": (cases.linear_relu_squared_bf16_case, LINEAR_BF16),
    "linear_relu_squared_bwd_bf16": (cases.linear_relu_squared_bwd_bf16_case, LINEAR_BF16),
    "rotary_qk_norm": (cases.rotary_qk_norm_case, HEAD_TILES),
    "rotary_qk_norm_bwd": (
        cases.rotary_qk_norm_bwd_case,
        HEAD_TILES[6:] + [HeadTile(64, heads, 8, stages) for heads in (4, 8) for stages in (1, 2)],
    ),
    "softcap_cross_entropy_fwd": (
        cases.softcap_cross_entropy_fwd_case,
        tiles((1,), (2048, 4096, 8192), (4, 8)) + tiles((1,), (16384,), (16,)),
    ),
    "softcap_cross_entropy_bwd": (
        cases.softcap_cross_entropy_bwd_case,
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
        cases.embedding_grad_case,
        tiles((16, 32, 64), (256,), (1,)) + tiles((16, 32), (512,), (2,)),
    ),
    "adamw": (
        cases.adamw_case,
        [
            AdamWConfig(block, warps)
            for block, warps in ((4096, 4), (8192, 4), (8192, 8), (16384, 8))
        ],
    ),
    "muon_momentum": (cases.muon_momentum_case, tiles((1024,), (4096,), (4, 8, 16))),
    "muon_apply": (cases.muon_apply_case, ELEMENTWISE),
    "symmetric_matmul": (cases.symmetric_matmul_case, MATMUL),
    "symmetric_matmul_transposed": (cases.symmetric_matmul_transposed_case, MATMUL),
    "batched_matmul": (cases.batched_matmul_case, MATMUL + [MatmulTile(256, 128, 64, 8, 4)]),
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


def _read(path):
    """What the file at `path` holds; {} without one.

    Raises:
        UserError: it is no JSON.
    """
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"--out {path} is no JSON ({error}); move it away") from error


def main():
    parser = CommandParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", default=[], help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--out", type=Path, default=tuning.TUNED)
    args = parser.parse_args()
    unknown = sorted(set(args.ops) - set(CASES))
    if unknown or not torch.cuda.is_available():
        parser.error(f"unknown op {unknown[0]!r}" if unknown else "tuning needs a CUDA GPU")
    ops = args.ops or list(CASES)
    table = _read(args.out)
    jobs = [(op, index) for op in ops for index in range(len(CASES[op][1]))]
    with ProcessPoolExecutor(JOBS, multiprocessing.get_context("spawn")) as pool:
        for message in filter(None, pool.map(warm, jobs)):
            print(message)
    entries = table.setdefault(tuning.gpu_name(), {})
    for op in ops:
        entries[op] = tune(op)
    write_text_atomically(args.out, json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    run_command(main)
