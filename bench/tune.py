"""Time every candidate launch configuration of the ops; winners go to tuned.json.

    python -m bench.tune [op ...] [--widths 256,512,768,1024,…] [--out FILE]

An op whose configuration depends on a model's width is timed at each; the others at that of d16.
A process for each core first compiles the candidates, on small inputs; then one process times
them, the closest ones in turns, and writes FILE after each op.
"""

import json
import multiprocessing
import re
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from nanofuse.bench.cases.case import D16, ROWS, of_width
from nanofuse.bench.cases.tiles import CASES, TUNED, WARM_ROWS
from nanofuse.bench.harness import CLOCK
from nanofuse.kernels.common import tuning
from nanofuse.train.command import CommandParser, run_command
from nanofuse.train.data.encode import num_cores
from nanofuse.train.errors import UserError
from nanofuse.train.files import write_text_atomically

DEVICE = torch.device("cuda")
JOBS = min(32, num_cores())  # that compile; one takes 2 GB
WIDTHS = "256,512,768,1024,1280,1536,1664"
GLANCE, ROUNDS_IN_TURNS = 5, 16  # rounds
CLOSE, FINALISTS = 1.06, 4  # times the fastest's seconds; at most so many


def parse_widths(text):
    """[256, 512] of "256,512".

    Raises:
        UserError: one that no model of the recipe has.
    """
    for part in text.split(","):
        if not re.fullmatch(r"[1-9]\d{0,5}", part) or int(part) % D16.head_dim:
            raise UserError(f"--widths {part}: give multiples of {D16.head_dim} such as {WIDTHS}")
    return sorted({int(part) for part in text.split(",")})


def warm(job):
    """Compile one candidate (op, index, width) into Triton's on-disk cache, by running it on few
    rows. Returns what the op asked for, and what went wrong, or None."""
    op, index, width = job
    make, candidates = CASES[op]
    with tuning.forced(op, candidates[index]) as asked, of_width(width):
        try:
            make(WARM_ROWS, DEVICE).run()
            torch.cuda.synchronize()
        except Exception as error:  # a candidate that does not fit this GPU is no winner
            return asked, f"{op} {candidates[index]} at {width}: {str(error).splitlines()[0]}"
    return asked, None


def rounds_of(op, config, case, count):
    """Seconds of each of so many calls of a case by this configuration, after another, and what the
    op asked for."""
    with tuning.forced(op, config) as asked:
        case.run()
        return [CLOCK.timed(case.run) for _ in range(count)], asked


def in_turns(op, finalists):
    """Median seconds of each of [(configuration, case)], which take turns: clocks drift by more
    than they differ."""
    times = [[] for _ in finalists]
    turns = list(zip(finalists, times, strict=True))
    for _ in range(ROUNDS_IN_TURNS):
        for (config, case), taken in turns:
            taken += rounds_of(op, config, case, 1)[0]
        turns.reverse()
    return [statistics.median(taken) for taken in times]


def tune(op, width):
    """Measure the candidates of `op` in a model of this width, shortly, and those that come close
    in turns; returns tuned.json's entry for the fastest, or None if another kernel does the op
    here."""
    make, candidates = CASES[op]

    def case_of(config):
        with tuning.forced(op, config):  # AdamWTensors reads the configuration
            return make(ROWS, DEVICE)

    found = []
    for config in candidates:
        case = case_of(config)
        try:
            taken, asked = rounds_of(op, config, case, GLANCE)
        except Exception:  # said by `warm`
            continue
        if not asked:
            print(f"{op}, {width}: by another kernel", flush=True)
            return None
        seconds = min(taken)  # a launch that was late is no reason to drop it
        print(f"{config} {1e6 * seconds:.1f} us {100 * case.share(seconds):.0f} %", flush=True)
        found.append((seconds, config, asked[0]))
        del case
    if not found:
        raise SystemExit(f"no candidate of {op} runs")
    found.sort(key=lambda each: each[0])
    close = [each for each in found if each[0] < CLOSE * found[0][0]][:FINALISTS]
    finalists = [(config, case_of(config)) for _, config, _ in close]
    times = in_turns(op, finalists)
    (config, case), seconds = min(zip(finalists, times, strict=True), key=lambda each: each[1])
    cols, share = found[0][2], case.share(seconds)
    print(f"{op}, {width}: {config} {1e6 * seconds:.1f} us {100 * share:.0f} %", flush=True)
    return {
        "config": asdict(config),
        "us": round(1e6 * seconds, 1),
        "share": round(share, 3),
        "rows": ROWS,
        "width": width,
        "cols": cols,
    }


def merged(old, new):
    """Entries of an op: the new ones, and the old ones of other widths; the narrowest first. An
    entry without columns is of all widths, and stands alone."""
    widths, flat = {entry["width"] for entry in new}, new[0]["cols"] is None
    kept = [e for e in old if e["cols"] is not None and e["width"] not in widths and not flat]
    return sorted([*kept, *new], key=lambda entry: entry["width"])


def read_table(path):
    """What the file at `path` holds, as tuned.json; {} without one.

    Raises:
        UserError: it is no JSON, or another table.
    """
    try:
        table = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"--out {path} is no JSON ({error}); move it away") from error
    try:
        for entries in [entries for ops in table.values() for entries in ops.values()]:
            merged(entries, entries)
    except (AttributeError, LookupError, TypeError):
        raise UserError(f"--out {path} is no table of bench.tune; move it away") from None
    return table


def compile_candidates(ops, widths):
    """Compile all candidates, those of d16's width first. Returns op -> whether its configuration
    depends on the width."""
    grows = {}
    with ProcessPoolExecutor(JOBS, multiprocessing.get_context("spawn")) as pool:
        for width in (D16.width, *(w for w in widths if w != D16.width)):
            asking = [op for op in ops if grows.get(op, True)]
            jobs = [(op, index, width) for op in asking for index in range(len(TUNED[op]))]
            for (op, *_), (asked, message) in zip(jobs, pool.map(warm, jobs), strict=True):
                grows[op] = not asked or asked[0] is not None
                if message:
                    print(message)
    return grows


def time_candidates(ops, widths, grows, table, path):
    """Add the winners to `table`, and write it to `path` after each op, so that what ends this
    takes one op with it."""
    entries = table.setdefault(tuning.gpu_name(), {})
    for op in ops:
        found = []
        for width in widths if grows[op] else [D16.width]:
            with of_width(width):
                found.append(tune(op, width))
        found = [entry for entry in found if entry]
        if found:
            entries[op] = merged(entries.get(op, []), found)
            write_text_atomically(path, json.dumps(table, indent=1, sort_keys=True) + "\n")


def main():
    parser = CommandParser(
        prog="python -m bench.tune", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("ops", nargs="*", default=[], help=f"of {', '.join(TUNED)}; default all")
    parser.add_argument("--widths", default=WIDTHS, help=f"multiples of 128; default {WIDTHS}")
    parser.add_argument("--out", type=Path, default=tuning.TUNED)
    args = parser.parse_args()
    unknown = sorted(set(args.ops) - set(TUNED))
    if unknown or not torch.cuda.is_available():
        parser.error(f"unknown op {unknown[0]!r}" if unknown else "tuning needs a CUDA GPU")
    widths = parse_widths(args.widths)
    ops = args.ops or list(TUNED)
    table = read_table(args.out)
    time_candidates(ops, widths, compile_candidates(ops, widths), table, args.out)


if __name__ == "__main__":
    run_command(main)
