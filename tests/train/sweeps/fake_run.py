"""In place of train.run in a sweep's tests: leaves a log and a checkpoint, or fails, or waits.

FAKE, JSON in the environment, says by variant what happens: {"v": "fail"}, "wait" (for a signal,
upon which step 5 is saved); else the run finishes, with a BPB of 1 + seed / 100 + its matrix rate.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from nanofuse.train.settings import build_parser, resolve
from tests.train.logs import add_checkpoint, metrics


def main():
    given = vars(build_parser().parse_args(sys.argv[1:]))
    run, seed = given.pop("run"), given["seed"]
    resumed = given.pop("resume", False)
    settings = resolve(given, "cpu")
    folder, length = Path("runs") / run, settings.horizon.num_iterations
    with open("started.txt", "a") as file:
        file.write(f"{run} {'resumed' if resumed else 'new'} {os.environ.get('PLACE', '-')}\n")
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


main()
