"""What a sweep is about to do, and how long it should take."""

import statistics

from nanofuse.train.launch import gpu_name
from nanofuse.train.measured import expected_seconds
from nanofuse.train.sweeps.definition import arguments
from nanofuse.train.sweeps.jobs import read_note
from nanofuse.train.tables import aligned_lines


def in_words(seconds):
    """A time for people, such as "3 min"; "unknown" of None."""
    if seconds is None:
        return "unknown"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def counted(things, name):
    """How many there are, such as "1 seed" or "2 seeds"."""
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


class Clock:
    """What a run is expected to take: as long as those of its variant did, else as was measured on
    such a GPU, else it is not known.

    Args:
        folder: of the sweep.
        gpu: whether runs have a GPU.
        per_gpu: runs that share one; their training takes as much longer.
    """

    def __init__(self, sweep, folder, gpu, per_gpu=1):
        self.per_gpu = per_gpu
        self.gpu, self.taken = gpu_name() if gpu else None, {name: [] for name in sweep.varied}
        for item in sweep.items:
            note = read_note(folder, item.run)
            if note and note.seconds is not None and note.shared == (per_gpu > 1):
                self.taken[item.variant].append(note.seconds)

    def seconds(self, item, done=0):
        """Of what is left of a run at step `done`."""
        taken = self.taken[item.variant]
        if taken:
            whole = statistics.mean(taken)
        else:
            whole = expected_seconds(self.gpu, item.settings, item.plan)
            whole = whole and whole * self.per_gpu
        return whole and whole * (1 - done / item.plan.num_iterations)

    def total(self, left, places):
        """Of several, (Item, step) each, side by side; None where one is not known."""
        each = [self.seconds(item, done) for item, done in left]
        return None if None in each else sum(each) / max(min(places, len(each)), 1)


def listing(sweep, states, clock):
    """Lines of --dry-run: every run, and what sets the variants apart."""
    rows = []
    for item, state in zip(sweep.items, states, strict=True):
        what, time = state.kind, "–"
        if state.owner:
            what = f"left to {state.owner}"
        elif state.left:
            what = f"goes on at step {state.step:,}" if state.kind == "stopped" else "starts"
            time = in_words(clock.seconds(item, state.step))
        plan = f"{item.plan.num_iterations:,} x {item.plan.total_batch_size:,}"
        rows.append([item.run, what, plan, time])
    yield from aligned_lines(["run", "what happens", "steps x tokens", "expected"], rows)
    for name, own in sweep.varied.items():
        yield f"{name}: {' '.join(arguments(own)) or 'no flags of its own'}"


def headline(sweep, states, clock, places, gpus):
    """One line: what there is to do, in so many `places` on these GPUs."""
    kinds = [state.kind for state in states]
    counts = {"finished": "finished", "stopped": "to go on", "new": "new", "running": "elsewhere"}
    words = [f"{kinds.count(kind)} {word}" for kind, word in counts.items() if kind in kinds]
    todo = [
        (item, state.step) for item, state in zip(sweep.items, states, strict=True) if state.left
    ]
    used = min(places, len(gpus))
    where = f"{used} GPU{'s' * (used > 1)}" if gpus else "the CPU"
    if places > used:
        where += f", {places} at a time"
    text = (
        f"sweep: {sweep.name}, {counted(sweep.varied, 'variant')} x "
        f"{counted(sweep.seeds, 'seed')} on {where}; " + ", ".join(words)
    )
    seconds = clock.total(todo, places) if todo else None
    return text + ("" if seconds is None else f"; expected: {in_words(seconds)}")
