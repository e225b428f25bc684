"""This tree's training step against another commit's, taking turns on one GPU.

    python -m bench.against REVISION [--depth 16] [--rounds 20] [--fp8 auto] [--json FILE]
    python -m bench.against . --theirs "--rows 64"

REVISION is a commit, which is checked out into a temporary worktree, or a folder that holds another
tree. --theirs gives that one other flags: with REVISION . it tells what they cost in a whole step.
Each tree runs its own bench/step_worker.py in a process of its own; both keep their models in
the GPU's memory and take one step each in turn, the first of a round changing from round to round.
Printed are the medians, and the median of the rounds' differences with a 95 % interval from
resampled rounds. A step whose loss is no number is refused: with such numbers a GPU draws less
power and is faster. The loss is that of a step's first micro-step, so one step more is taken at the
end; of a tree that does not say its losses nothing is known.
"""

import argparse
import json
import math
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nanofuse.train.command import CommandParser, run_command
from nanofuse.train.errors import UserError
from nanofuse.train.files import write_text_atomically
from nanofuse.train.flags import whole

ROOT = Path(__file__).parent.parent
RESAMPLES = 2000


@contextmanager
def checked_out(revision):
    """The folder of a tree: `revision` itself if it is a folder, else a temporary worktree.

    Raises:
        UserError: no such commit.
    """
    if Path(revision).is_dir():
        yield Path(revision).resolve()
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        added = subprocess.run(
            [*git, "add", "--quiet", "--detach", str(tree), revision],
            capture_output=True,
            text=True,
        )
        if added.returncode:
            raise UserError(f"{revision} is neither a folder nor a commit of this repository")
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


class Worker:
    """A tree's step_worker in a process of its own."""

    def __init__(self, tree, options):
        self.tree = tree
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.step_worker", *options],
            cwd=tree,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = json.loads(self._answer())

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the step of {self.tree} ended with an error, printed above")
        return line

    def step(self):
        """Milliseconds of one step, and its loss: None of a tree that does not say it.

        Raises:
            UserError: the step failed, or its loss is not finite.
        """
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        milliseconds, loss = (*map(float, self._answer().split()), None)[:2]
        if loss is not None and not math.isfinite(loss):
            raise UserError(f"the step of {self.tree} has a loss of {loss}; its time means nothing")
        return milliseconds, loss

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def difference(ours, theirs, seed=0):
    """Median of the rounds' relative differences ours / theirs - 1, and its 95 % interval."""
    ratios = [a / b - 1 for a, b in zip(ours, theirs, strict=True)]
    draw = random.Random(seed)
    medians = sorted(
        statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)
    )
    low, high = medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]
    return statistics.median(ratios), (low, high)


def add_flags(parser):
    """What a tree's step is made of: flags that the two trees may have apart."""
    parser.add_argument("--depth", type=whole(1, 999), default=16)
    parser.add_argument(
        "--rows", type=whole(1, 2**16), default=32, help="rows of a micro-step [32]"
    )
    parser.add_argument("--backend", default="fused", choices=["fused", "compile", "eager"])
    parser.add_argument("--fp8", default="auto", help="as train.run's; off is bf16")
    parser.add_argument(
        "--bigram-factor", type=whole(0, 1000), help="as train.run's; 0 makes a dense model [5]"
    )


def worker_options(args):
    """The flags as step_worker takes them; one that is not given is left to the tree."""
    names = ("depth", "rows", "backend", "fp8", "bigram_factor")
    given = {name.replace("_", "-"): getattr(args, name) for name in names}
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def main(argv=None):
    parser = CommandParser(
        prog="python -m bench.against", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("revision", metavar="REVISION", help="a commit, or a tree's folder")
    add_flags(parser)
    parser.add_argument("--theirs", default="", metavar="FLAGS", help="for the other tree alone")
    parser.add_argument("--rounds", type=whole(2, 10**6), default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every round's times")
    args = parser.parse_args(argv)
    other = CommandParser(prog="--theirs")
    add_flags(other)
    try:
        theirs = other.parse_args(shlex.split(args.theirs), argparse.Namespace(**vars(args)))
    except ValueError as error:  # of a quote that is not closed
        parser.error(f"--theirs {args.theirs}: {error}")
    options = {"ours": worker_options(args), "theirs": worker_options(theirs)}
    times, losses = ({"ours": [], "theirs": []} for _ in range(2))
    with checked_out(args.revision) as tree, ExitStack() as stack:
        workers = {}
        for name, folder in (("ours", ROOT), ("theirs", tree)):
            workers[name] = Worker(folder, options[name])
            stack.callback(workers[name].close)
            print(f"{name}: {'; '.join(workers[name].facts)}", flush=True)
        for index in range(args.rounds):
            for name in sorted(workers, reverse=index % 2 == 1):
                milliseconds, loss = workers[name].step()
                times[name].append(milliseconds)
                losses[name].append(loss)
        for name, worker in workers.items():  # whose loss shows what the last rounds have learned
            losses[name].append(worker.step()[1])
    middle, (low, high) = difference(times["ours"], times["theirs"])
    for name, values in times.items():
        last = losses[name][-1]
        print(
            f"{name}: {statistics.median(values):.1f} ms, {min(values):.1f} to {max(values):.1f}"
            + ("; losses unknown" if last is None else f"; last loss {last:.4f}")
        )
    against = f"{args.revision} {args.theirs}".strip()
    print(f"ours against {against}: {middle:+.2%} ({low:+.2%} to {high:+.2%})")
    if args.json:
        facts = {name: worker.facts for name, worker in workers.items()}
        result = {"against": against, "options": options, "facts": facts, "ms": times}
        result["losses"] = losses
        write_text_atomically(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
