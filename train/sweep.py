"""Runs of many settings and seeds, compared: one run per GPU at a time, then one table.

    python -m train.sweep FILE.toml [--jobs N] [--per-gpu N] [--drop-weights] [--dry-run]
                          [flags of train.run]

FILE is a TOML file of variants, or the name of a sweep that comes along (train/sweeps/*.toml);
flags of train.run, such as --data, go to every run. Runs that have finished are skipped, broken
ones go on, a failed one does not stop the others. Ctrl-C and SIGTERM stop all of them, each saved;
the same command goes on. sweeps/NAME/ gets each run's output and the table, as Markdown, JSON and
pictures.
"""

import argparse
import json
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from nanofuse.train.command import CommandParser, not_empty, run_command
from nanofuse.train.core_bundle import core_tasks
from nanofuse.train.data.corpus import open_corpus
from nanofuse.train.errors import RunEnded, UserError
from nanofuse.train.flags import whole
from nanofuse.train.launch import gpu_name, visible_gpus
from nanofuse.train.lock import RunLock, Taken
from nanofuse.train.metrics import read_metrics
from nanofuse.train.run_folder import run_dir
from nanofuse.train.runlog import METRICS_FILE
from nanofuse.train.settings import ROWS, asks_for_rows, build_parser
from nanofuse.train.sweeps.definition import find_sweep, read_sweep
from nanofuse.train.sweeps.jobs import Pool, environments, log_path, look, read_note, settle
from nanofuse.train.sweeps.outlook import Clock, headline, in_words, listing
from nanofuse.train.sweeps.results import gather, other_data, report, unexpected, write
from nanofuse.train.sweeps.rows import settle_rows
from nanofuse.train.trackers import check_installed

SWEEPS_DIR = Path("sweeps")
MOST_JOBS = 4096
MOST_PER_GPU = 64
NAMED = 3  # failed runs in the last line
GLANCES = 20  # turns of the pool between two looks at the runs' steps
TAIL = 4096  # bytes of a log in which its last step stands


def last_step(run):
    """The step that a run's log has come to."""
    try:
        with open(run_dir(run) / METRICS_FILE, "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - TAIL, 0))
            line = file.read().split(b"\n")[-2]
        return json.loads(line)["step"]
    except (OSError, ValueError, LookupError, TypeError):
        return 0


class Screen:
    """A line for every run that has ended, and a bar with those that are on, on a terminal."""

    def __init__(self, count, pool):
        self.pool, self.turns, self.count, self.ended = pool, 0, count, 0
        self.bar = tqdm(
            total=count,
            unit="run",
            dynamic_ncols=True,
            disable=not (sys.stderr and sys.stderr.isatty()),
            bar_format="{n_fmt}/{total_fmt} runs |{bar:12}| {desc}",
        )

    def say(self, item, text):
        self.ended += 1
        self.bar.update()
        width = len(str(self.count))
        self.bar.write(f"[{self.ended:>{width}}/{self.count}] {item.run}: {text}", file=sys.stdout)
        sys.stdout.flush()

    def glance(self):
        """Bring the bar up to date."""
        self.turns += 1
        if not self.bar.disable and self.turns % GLANCES == 0:
            items = [child.item for child in self.pool.children]
            steps = (f"{i.run} {last_step(i.run):,}/{i.plan.num_iterations:,}" for i in items)
            self.bar.set_description_str(", ".join(steps))


def told(item, folder, seconds):
    """Words for a run that has finished."""
    note = read_note(folder, item.run)
    alone = " of a shared GPU" if note.shared else ""
    train, *_ = read_metrics(run_dir(item.run) / METRICS_FILE)
    times = [record.ms_per_step for record in train.values()][1:]
    rate = f", {statistics.median(times):.1f} ms/step{alone}" if times else ""
    return f"BPB {note.bpb:.6f} after {note.step:,} steps{rate}, {in_words(seconds)}"


def check_inputs(items):
    """Refuse what every run would end with: data, tasks of CORE or trackers that are not there.

    Raises:
        UserError: names the flag or the file.
    """
    for reports in {item.settings.reports for item in items}:
        check_installed(vars(reports))
        core_tasks(reports)
    jobs = (item.settings.job for item in items)
    for place in {(job.data, job.text_column, job.val_shard) for job in jobs}:
        open_corpus(*place)


def places_for(asked, per_gpu, gpus):
    """How many runs go side by side.

    Raises:
        UserError: more than the GPUs take, or several per GPU without one.
    """
    if per_gpu > 1 and not gpus:
        raise UserError(f"--per-gpu {per_gpu} needs a GPU; use --jobs on a CPU")
    most = len(gpus) * per_gpu
    if gpus and asked and asked > most:
        raise UserError(
            f"--jobs {asked}: {len(gpus)} GPUs are visible, {most} runs at a time; lower it, drop "
            "it, or raise --per-gpu"
        )
    return asked or max(most, 1)


def find_rows(sweep, states, folder, beside, gpus):
    """The sweep, its runs with rows of a forward pass in place of auto.

    Args:
        beside: runs that share a device.

    Raises:
        UserError: for a variant none are found.
        RunEnded: a signal came meanwhile.
    """

    def search(searches):
        if not searches:
            return
        with Pool(folder, environments(gpus, max(len(gpus), 1))) as pool:
            yield from pool.run([(each, False) for each in searches])
            if pool.number is not None:
                raise RunEnded("stopped; the same command goes on", 128 + pool.number)

    asked = {item.variant for item in sweep.items if asks_for_rows(item.given)}
    if not asked:
        return sweep
    gpu = gpu_name() if gpus else None
    items = settle_rows(sweep.items, states, folder, beside, gpu, search)
    rows = {item.variant: item.given[ROWS] for item in items if item.variant in asked}
    print(f"rows: {', '.join(f'{name} {count}' for name, count in rows.items())}", flush=True)
    return replace(sweep, items=items)


def work(sweep, states, folder, places, drop):
    """Run what is left.

    Returns:
        names of the runs that failed, and the number of the signal that ended it, or None.
    """
    pairs = zip(sweep.items, states, strict=True)
    todo = [(item, state.kind == "stopped") for item, state in pairs if state.left]
    resumed = {item.run for item, goes_on in todo if goes_on}
    failed = []
    with Pool(folder, places) as pool:
        screen = Screen(len(todo), pool)
        try:
            for item, outcome in pool.run(todo, screen.glance):
                if outcome.kind == "finished":
                    seconds = None if item.run in resumed else outcome.seconds
                    settle(item, folder, seconds, drop)
                    screen.say(item, told(item, folder, outcome.seconds))
                elif outcome.kind == "stopped":
                    screen.say(item, "stopped")
                else:
                    failed.append(item.run)
                    screen.say(item, f"failed, {outcome.text} ({log_path(folder, item.run)})")
        finally:
            screen.bar.close()
        return failed, pool.number


def finish(sweep, folder, states, failed, number):
    """Write the table of what has finished, print it, and end as the runs did.

    Raises:
        RunEnded: a run failed, is not finished, or is not what the file expects.
    """
    results = gather(sweep, folder)
    if results:
        names, missing = write(sweep, results, folder)
        print()
        print("\n".join(report(sweep, results)))
        print()
        print(f"written to {folder}: {', '.join(names)}" + (f"; {missing}" if missing else ""))
    if number is not None:
        raise RunEnded("stopped; the same command goes on", 128 + number)
    if other := other_data(sweep, folder):
        print(other)
    problems = [] if other else list(unexpected(sweep, results))
    for line in problems:
        print(line)
    elsewhere = [i.run for i, s in zip(sweep.items, states, strict=True) if s.kind == "running"]
    said = []
    if failed:
        said.append(
            f"{len(failed)} of {len(sweep.items)} runs failed ({', '.join(failed[:NAMED])}"
            f"{', …' * (len(failed) > NAMED)}); the same command tries them again"
        )
    if elsewhere:
        said.append(f"other processes train {', '.join(elsewhere)}; call again when they have done")
    if problems:
        said.append(f"{len(problems)} values are not what {sweep.path} expects")
    if said:
        raise RunEnded("; ".join(said), 1)


def main(argv=None):
    parser = CommandParser(
        prog="python -m train.sweep",
        usage="%(prog)s FILE [--jobs N] [--per-gpu N] [--drop-weights] [--dry-run] "
        "[flags of train.run]",
        description=__doc__.partition("\n")[0],
        epilog="FILE" + __doc__.partition("\n\nFILE")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        type=not_empty,
        help="TOML file, or the name of one that comes along",
    )
    parser.add_argument(
        "--jobs", type=whole(1, MOST_JOBS), metavar="N",
        help="runs side by side (default: one on every GPU; on a CPU one)",
    )  # fmt: skip
    parser.add_argument(
        "--per-gpu", type=whole(1, MOST_PER_GPU), metavar="N", default=1,
        help="runs on a GPU at a time [1]; with more, ms/step are compared with nothing",
    )  # fmt: skip
    parser.add_argument(
        "--drop-weights",
        action="store_true",
        help="remove a run's checkpoints when it has finished",
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would run, and its time")
    args, rest = parser.parse_known_args(argv)
    extra = vars(build_parser().parse_args(rest))
    path = find_sweep(args.file)
    gpus = [] if extra.get("device_type") == "cpu" else visible_gpus()
    sweep = read_sweep(path, extra, bool(gpus))
    places = places_for(args.jobs, args.per_gpu, gpus)
    check_inputs(sweep.items)
    folder = SWEEPS_DIR / sweep.name
    if args.dry_run:
        states = [look(item, folder) for item in sweep.items]
        clock = Clock(sweep, folder, bool(gpus), args.per_gpu)
        print(headline(sweep, states, clock, places, gpus))
        print("\n".join(listing(sweep, states, clock)))
        return
    with RunLock() as lock:
        try:
            lock.take(folder)
        except Taken as taken:
            owner = str(taken).partition(": ")[2].partition(" is ")[0]
            raise UserError(f"{folder}: {owner} runs this sweep; wait for it, or end it") from None
        states = [look(item, folder) for item in sweep.items]
        for item, state in zip(sweep.items, states, strict=True):
            if state.kind == "finished":
                settle(item, folder, drop=args.drop_weights)
        clock = Clock(sweep, folder, bool(gpus), args.per_gpu)
        print(headline(sweep, states, clock, places, gpus), flush=True)
        beside = args.per_gpu if gpus else places
        sweep = find_rows(sweep, states, folder, beside, gpus)
        slots = environments(gpus, places, args.per_gpu)
        failed, number = work(sweep, states, folder, slots, args.drop_weights)
        finish(sweep, folder, states, failed, number)


if __name__ == "__main__":
    run_command(main)
