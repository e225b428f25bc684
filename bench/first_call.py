"""Seconds that the first call of each op takes with an empty compile cache.

python -m bench.first_call
"""

import os
import tempfile
import time

import torch

from nanofuse.bench.harness import ON_GPU
from nanofuse.train.command import CommandParser, run_command
from nanofuse.train.errors import UserError


def main(argv=None):
    parser = CommandParser(
        prog="python -m bench.first_call", description=(__doc__ or "").partition("\n")[0]
    )
    parser.parse_args(argv)
    if not ON_GPU:
        raise UserError("bench.first_call needs a CUDA GPU")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # read by Triton when it compiles
        from nanofuse.bench.cases.tiles import CASES, WARM_ROWS

        for op, (make, _) in CASES.items():
            start = time.perf_counter()
            run = make(WARM_ROWS, torch.device("cuda")).run
            torch.cuda.synchronize()
            made = time.perf_counter()
            run()
            torch.cuda.synchronize()
            end = time.perf_counter()
            print(f"{op:30} {end - made:5.2f} s (its inputs {made - start:.2f} s)")


if __name__ == "__main__":
    run_command(main)
