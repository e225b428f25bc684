"""A training step on request: what bench.against runs in each of two trees.

Builds the recipe's model with the flags given, takes its first steps, and prints a line of JSON
that says what runs. Then every line on stdin asks for one step and is answered by its milliseconds
and its loss.
"""

import argparse
import json
import sys

from nanofuse.bench.harness import ON_GPU
from nanofuse.bench.training import PhaseClock, gpu_workload, tiny_workload, train_step
from nanofuse.model.fp8.scaling import CALIBRATED_STEPS
from nanofuse.train.assemble import assemble
from nanofuse.train.device import select_device, select_fp8, select_machine
from nanofuse.train.optim.config import OptimConfig


def make_step(args):
    """A function that takes one optimiser step and returns its milliseconds and its loss, and facts
    to print."""
    sizes = args.depth, args.bigram_factor
    workload = gpu_workload(*sizes, args.rows) if ON_GPU else tiny_workload(*sizes)
    machine = select_machine(select_device("auto").type, args.backend)
    fp8 = select_fp8(args.fp8, machine, workload.config, workload.rows)
    built = assemble(workload.config, machine, OptimConfig(), fp8, rows=workload.rows)
    batches = workload.batches(machine.device)

    def step():
        clock = PhaseClock()
        loss = train_step(built, batches, clock)
        return 1e3 * sum(clock.seconds().values()), loss.item()

    return step, [machine.name, f"{workload.tokens:,} tokens a step", *built.facts]


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.step_worker", description=__doc__)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--fp8", required=True)
    parser.add_argument("--bigram-factor", type=int, default=5)
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints is no answer
    step, facts = make_step(parser.parse_args())
    for _ in range(CALIBRATED_STEPS + 1 if ON_GPU else 1):
        step()
    print(json.dumps(facts), file=answers, flush=True)
    for _ in sys.stdin:
        print(*step(), file=answers, flush=True)


if __name__ == "__main__":
    main()
