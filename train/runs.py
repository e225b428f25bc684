"""The runs under runs/: what state each is in, its BPB and its size on disk.

python -m train.runs [--json]

A run is running (its lock is held), finished, stopped before its last step, without a checkpoint,
converted, or damaged. Files are read, none is changed, and torch is not loaded. Weights are not
compared with their checksums, which loading does.
"""

import json
import os
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from nanofuse.train.command import CommandParser, run_command
from nanofuse.train.disk import in_units
from nanofuse.train.errors import UserError
from nanofuse.train.lock import LOCK_FILE, owner_of
from nanofuse.train.metrics import commit_of, read_metrics
from nanofuse.train.run_folder import (
    LOADER,
    META,
    MODEL,
    RUNS_DIR,
    digests,
    load_meta,
    optim_files,
    refuse_unreadable,
    step_folders,
)
from nanofuse.train.runlog import METRICS_FILE
from nanofuse.train.schemas import tensor_shapes
from nanofuse.train.tables import aligned_lines


@dataclass(frozen=True)
class Listed:
    """A run as it is listed; None: not known.

    Attributes:
        state: "running", "finished", "stopped", "no checkpoint", "converted" or "damaged".
        detail: the process that runs it, or what is damaged and the way out.
        step: of the newest checkpoint; of the log where it is running or has no checkpoint.
        steps: that the run is to have.
        bpb, best_bpb: the latest and the lowest validation BPB.
        changed: when its log or its newest checkpoint was last written, ISO 8601.
    """

    name: str
    state: str
    detail: str
    step: int | None
    steps: int | None
    bpb: float | None
    best_bpb: float | None
    bytes: int
    commit: str | None
    changed: str | None


def read_checkpoint(folder):
    """meta.json of a checkpoint whose files are all there, and as long as their headers say.

    Raises:
        UserError: what is wrong, and the way out.
    """
    meta = load_meta(folder)
    for name in (MODEL, *optim_files(folder), *({LOADER} & digests(folder).keys())):
        tensor_shapes(folder / name)
    return meta


def bytes_in(directory):
    """Bytes of all files of a folder; those that go away meanwhile do not count."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def last_change(paths):
    """When the newest of the files was written, in ISO 8601; None where there is none."""
    times = []
    for path in paths:
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return (
        datetime.fromtimestamp(max(times)).astimezone().isoformat("T", "seconds") if times else None
    )


def state_of(directory, meta, faults):
    """State and detail of Listed.

    Args:
        meta: of the newest checkpoint, or None.
        faults: what is damaged.
    """
    if owner := owner_of(directory):
        return "running", owner
    if faults:
        return "damaged", faults[0]
    if meta is None:
        return "no checkpoint", ""
    if meta.get("settings") is None:
        return "converted", ""
    return ("finished" if meta["step"] >= meta["num_iterations"] else "stopped"), ""


def describe(directory):
    """A run's folder as Listed."""
    faults, metas, folders = [], [], step_folders(directory)
    for folder in folders.values():
        try:
            metas.append(read_checkpoint(folder))
        except UserError as error:
            faults.append(str(error))
    metrics, train, val = directory / METRICS_FILE, {}, {}
    if metrics.exists():
        try:
            train, val, _ = read_metrics(metrics)
        except UserError as error:
            faults.append(str(error))
    meta = metas[-1] if metas else None
    state, detail = state_of(directory, meta, faults)
    step, progress = (meta["step"], meta.get("progress") or {}) if meta else (None, {})
    if meta is None or state == "running":
        step = max((*train, *val, step or 0), default=None) if train or val or meta else None
    bpbs = [record.bpb for record in val.values()]
    return Listed(
        directory.name,
        state,
        detail,
        step,
        meta and meta.get("num_iterations"),
        bpbs[-1] if bpbs else progress.get("val_bpb"),
        min(bpbs, default=progress.get("best_bpb")),
        bytes_in(directory),
        meta and commit_of(meta),
        last_change([metrics, *(folder / META for folder in folders.values())]),
    )


def unreadable(folder):
    """Words for a run's folder that this user may not read, or None."""
    try:
        refuse_unreadable(folder)
        (folder / LOCK_FILE).exists()  # may be listed, but not entered
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{folder} cannot be read ({error.strerror})"
    return None


def runs_in(directory):
    """Listed of every run's folder in a folder, by name; others are left out.

    Raises:
        UserError: the folder cannot be read.
    """
    refuse_unreadable(directory)
    for path in sorted(Path(directory).glob("*")):
        names = (LOCK_FILE, METRICS_FILE)
        if fault := unreadable(path):
            unknown = dict.fromkeys(("step", "steps", "bpb", "best_bpb", "commit", "changed"))
            yield Listed(path.name, "damaged", fault, bytes=0, **unknown)
            continue
        if path.is_dir() and (any((path / n).exists() for n in names) or step_folders(path)):
            yield describe(path)


def table(runs):
    """Lines of text."""
    head = ["run", "state", "step", "BPB", "best BPB", "size", "commit", "last written"]
    rows = []
    for run in runs:
        bpbs = ("–" if bpb is None else f"{bpb:.6f}" for bpb in (run.bpb, run.best_bpb))
        step = "–" if run.step is None else f"{run.step:,}"
        step += "" if run.steps is None else f" of {run.steps:,}"
        state = f"running ({run.detail})" if run.state == "running" else run.state
        changed = (run.changed or "–")[:16].replace("T", " ")
        size = in_units(run.bytes)
        rows.append([run.name, state, step, *bpbs, size, run.commit or "–", changed])
    yield from aligned_lines(head, rows)
    for run in runs:
        if run.state == "damaged":
            yield f"{run.name}: {run.detail}"


def main(argv=None):
    parser = CommandParser(prog="python -m train.runs", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="JSON in place of a table")
    args = parser.parse_args(argv)
    runs = list(runs_in(RUNS_DIR))
    if args.json:
        print(json.dumps([asdict(run) for run in runs], indent=1))
    elif not runs:
        print(f"no runs in {RUNS_DIR.absolute()}; python -m train.run makes one")
    else:
        print("\n".join(table(runs)))


if __name__ == "__main__":
    run_command(main)
