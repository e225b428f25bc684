"""Time every candidate configuration of the ops and write the winners to kernels/tuned.json.

python -m bench.tune [op ...] [--out FILE]
"""

import argparse
import itertools
import json
from dataclasses import asdict
from pathlib import Path

import torch

from bench.bench_bigram_residual import LAYERS, UNIT, WIDTH, Inputs
from bench.bench_bigram_residual import N as ROWS
from bench.harness import copy_ceiling, median_seconds
from kernels import tuning
from kernels.bigram_residual import bigram_residual_bwd
from kernels.fp8 import E5M2, Scaling
from kernels.quantize import quantize
from kernels.residual_gradients import Config, residual_gradients
from kernels.smear import embed_smear_bwd, embed_smear_fwd
from kernels.tuning import Tile


def tiles(rows, cols, warps, stages=(2,)):
    """Every combination as a Tile."""
    return [Tile(*fields) for fields in itertools.product(rows, cols, warps, stages)]


def randn(*shape):
    return torch.randn(*shape, device="cuda").bfloat16()


def quantize_case():
    x, scaling = randn(ROWS, WIDTH), Scaling.from_bound(6.0)
    return lambda: quantize(x, scaling), 2 * UNIT


def bigram_residual_fwd_case():
    inputs = Inputs(torch.device("cuda"))
    return inputs.opening, 4 * UNIT + inputs.row_bytes


def bigram_residual_bwd_case():
    h, y, stream, x = (randn(ROWS, WIDTH) for _ in range(4))
    rstd, resid = torch.ones(ROWS, device="cuda"), torch.ones(1, device="cuda")
    scaling = Scaling.from_bound(40.0, E5M2)

    def run():
        return bigram_residual_bwd(h, y, rstd, stream, x=x, resid_lambda=resid, scaling=scaling)

    return run, 6 * UNIT


def residual_gradients_case():
    inputs, grads = Inputs(torch.device("cuda")), randn(LAYERS, ROWS, WIDTH)
    lambdas = torch.rand(LAYERS, device="cuda")

    def run():
        return residual_gradients(grads, inputs.x0, lambdas, inputs.tokens, inputs.table, lambdas)

    return run, (LAYERS + 3) * UNIT + inputs.row_bytes


def embed_smear_case():
    inputs = Inputs(torch.device("cuda"))
    gate, scale = torch.rand(1, 24, device="cuda"), torch.ones(1, device="cuda")
    grad, sigmoid = randn(ROWS, WIDTH), torch.rand(ROWS, device="cuda")
    args = inputs.tokens, inputs.table[:32768], gate, scale

    def run():
        embed_smear_fwd(*args)
        return embed_smear_bwd(grad, *args, sigmoid)

    return run, 3 * UNIT + 2 * inputs.tokens.unique().numel() * WIDTH * 2


CASES = {
    "quantize": (quantize_case, tiles((32, 64, 128), (64, 128, 256), (4, 8))),
    "bigram_residual_fwd": (
        bigram_residual_fwd_case,
        tiles((16, 32, 64), (64, 128, 256), (4, 8)),
    ),
    "bigram_residual_bwd": (
        bigram_residual_bwd_case,
        tiles((16, 32, 64), (64, 128, 256), (4, 8)),
    ),
    "residual_gradients": (
        residual_gradients_case,
        [Config(positions, layers) for positions in (2, 4, 8, 16) for layers in (4, 8, 16)],
    ),
    "embed_smear": (embed_smear_case, tiles((1, 2, 4), (0,), (1, 2, 4))),
}


def tune(op):
    """Measure the candidates of `op`; returns tuned.json's entry for the fastest."""
    make, candidates = CASES[op]
    run, bytes_moved = make()
    best = None
    for config in candidates:
        with tuning.forced(op, config):
            try:
                seconds = median_seconds(run)
            except Exception as error:  # a candidate that does not fit this GPU is no winner
                print(f"{op:24} {config} failed: {str(error).splitlines()[0]}")
                continue
        share = bytes_moved / seconds / copy_ceiling()
        print(f"{op:24} {config} {1e6 * seconds:9.1f} us {100 * share:4.0f} % of copy")
        if best is None or seconds < best[0]:
            best = seconds, config
    seconds, config = best
    return {"config": asdict(config), "us": round(1e6 * seconds, 1), "shape": [ROWS, WIDTH]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", default=[], help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--out", type=Path, default=tuning.TUNED)
    args = parser.parse_args()
    unknown = sorted(set(args.ops) - set(CASES))
    if unknown or not torch.cuda.is_available():
        parser.error(f"unknown op {unknown[0]!r}" if unknown else "tuning needs a CUDA GPU")
    table = json.loads(args.out.read_text()) if args.out.exists() else {}
    entries = table.setdefault(tuning.gpu_name(), {})
    for op in args.ops or CASES:
        entries[op] = tune(op)
    args.out.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
