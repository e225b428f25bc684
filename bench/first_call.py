"""Seconds that the first call of each op takes with an empty compile cache.

python -m bench.first_call
"""

import os
import tempfile
import time

import torch

from bench.harness import ON_GPU
from model.errors import UserError
from train.command import run_command


def main():
    if not ON_GPU:
        raise UserError("bench.first_call needs a CUDA GPU")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # read by Triton when it compiles
        from bench.cases.tiles import CASES
        from bench.tune import DEVICE, WARM_ROWS

        for op, (make, _) in CASES.items():
            start = time.perf_counter()
            run = make(WARM_ROWS, DEVICE).run
            torch.cuda.synchronize()
            made = time.perf_counter()
            run()
            torch.cuda.synchronize()
            end = time.perf_counter()
            print(f"{op:30} {end - made:5.2f} s (its inputs {made - start:.2f} s)")


if __name__ == "__main__":
    run_command(main)
