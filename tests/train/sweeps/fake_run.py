"""In place of train.run in a sweep's tests: leaves a log and a checkpoint, or fails, or waits.

FAKE, JSON in the environment, says by variant what happens: {"v": "fail"}, "wait" (for a signal,
upon which step 5 is saved); else the run finishes, with a BPB of 1 + seed / 100 + its matrix rate.
Asked for rows, in place of train.sweeps.rows, it finds 2, or fails.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from nanofuse.train.settings import build_parser, resolve
from tests.train.logs import add_checkpoint, metrics


def find_rows(out, processes, *flags):
    """In place of train.sweeps.rows."""
    run = build_parser().parse_args(flags).run
    with open("started.txt", "a") as file:
        file.write(f"rows of {run} for {processes} -\n")
    if json.loads(os.environ.get("FAKE", "{}")).get("rows") == "fail":
        sys.exit("error: not one row fits")
    Path(out).write_text("2\n")


def main():
    given = vars(build_parser().parse_args(sys.argv[2:]))
    run, seed = given.pop("run"), given["seed"]
    resumed = given.pop("resume", False)
    settings = resolve(given, "cpu")
    folder, length = Path("runs") / run, settings.horizon.num_iterations
    with open("started.txt", "a") as file:
        place = os.environ.get("CUDA_VISIBLE_DEVICES", "-")
        file.write(f"{run} {'resumed' if resumed else 'new'} {place}\n")
    what = json.loads(os.environ.get("FAKE", "{}")).get(run.split(".")[1])
    if what == "fail":
        print("a line\nerror: --matrix-lr does not suit me", file=sys.stderr)
        sys.exit(2)
    flags = settings.flat() | {"run": run}
    folder.mkdir(parents=True, exist_ok=True)
    if what == "wait":

        def end(number, frame):
            add_checkpoint(folder, 5, length, **flags)
            with open("signalled.txt", "a") as file:
                file.write(f"{run}\n")
            sys.exit(128 + number)

        signal.signal(signal.SIGTERM, end)
        (folder / "ready").touch()
        time.sleep(30)
    bpb = 1 + seed / 100 + settings.optim.matrix_lr
    (folder / "metrics.jsonl").write_text(metrics({0: 3.0, length: bpb}))
    add_checkpoint(folder, length, length, bpb=bpb, **flags)


if sys.argv[1].endswith(".rows"):
    find_rows(*sys.argv[2:])
else:
    main()
