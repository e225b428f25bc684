"""Time every candidate launch configuration of the ops at depth 16; winners go to tuned.json.

    python -m bench.tune [op ...] [--out FILE]

Several processes first compile the candidates, on small inputs; then one process times them.
"""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from nanofuse.bench.cases.case import ROWS, sizes
from nanofuse.bench.cases.tiles import CASES, TUNED, WARM_ROWS
from nanofuse.bench.harness import median_seconds
from nanofuse.kernels.common import tuning
from nanofuse.train.command import CommandParser, run_command
from nanofuse.train.errors import UserError
from nanofuse.train.files import write_text_atomically

DEVICE = torch.device("cuda")
JOBS = 12


def warm(job):
    """Compile one candidate (op, index) into Triton's on-disk cache, by running it on few rows."""
    op, index = job
    make, candidates = CASES[op]
    with tuning.forced(op, candidates[index]):
        try:
            make(WARM_ROWS, DEVICE).run()
            torch.cuda.synchronize()
        except Exception as error:  # a candidate that does not fit this GPU is no winner
            return f"{op} {candidates[index]}: {str(error).splitlines()[0]}"
    return None


def tune(op):
    """Measure the candidates of `op`; returns tuned.json's entry for the fastest."""
    make, candidates = CASES[op]
    best = None
    for config in candidates:
        with tuning.forced(op, config):
            case = make(ROWS, DEVICE)  # AdamWTensors reads the configuration
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
    return {
        "config": asdict(config),
        "us": round(1e6 * seconds, 1),
        "share": round(share, 3),
        "rows": ROWS,
        "width": sizes(DEVICE).width,
    }


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
    parser = CommandParser(
        prog="python -m bench.tune", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("ops", nargs="*", default=[], help=f"of {', '.join(TUNED)}; default all")
    parser.add_argument("--out", type=Path, default=tuning.TUNED)
    args = parser.parse_args()
    unknown = sorted(set(args.ops) - set(TUNED))
    if unknown or not torch.cuda.is_available():
        parser.error(f"unknown op {unknown[0]!r}" if unknown else "tuning needs a CUDA GPU")
    ops = args.ops or list(TUNED)
    table = _read(args.out)
    jobs = [(op, index) for op in ops for index in range(len(TUNED[op]))]
    with ProcessPoolExecutor(JOBS, multiprocessing.get_context("spawn")) as pool:
        for message in filter(None, pool.map(warm, jobs)):
            print(message)
    entries = table.setdefault(tuning.gpu_name(), {})
    for op in ops:
        entries[op] = tune(op)
    write_text_atomically(args.out, json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    run_command(main)
