"""Where a run's figures go: a progress bar, metrics.jsonl, and trackers if asked for."""

import json
import os
import sys
from functools import partial

from tqdm import tqdm

from nanofuse.train.errors import first_line
from nanofuse.train.files import make_folder, write_atomically

METRICS_FILE = "metrics.jsonl"


def _records(path):
    """(line, record) of the whole JSON objects in a file of metrics, in order."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    for line in content.split(b"\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            yield line, record


def trained_steps(path):
    """Number of training records in a file of metrics."""
    return sum(record.get("kind") == "train" for _, record in _records(path))


def kinds_at(path, step):
    """The kinds of the records of a step in a file of metrics."""
    return {record.get("kind") for _, record in _records(path) if record.get("step") == step}


def cut_back(path, step, again=()):
    """Leave in a file of metrics what belongs to a run that stands at `step`: whole lines, no later
    steps, and each record once, the last one.

    Args:
        again: kinds whose records of `step` itself are made again.

    Returns:
        the kinds of the records of `step` that stay.
    """
    kept, kinds = {}, set()
    for number, (line, record) in enumerate(_records(path)):
        kind, at = record.get("kind"), record.get("step")
        key = ("line", number)
        if isinstance(at, int) and isinstance(kind, str):
            if at > step or (at == step and kind in again):
                continue
            key = (kind, at)
            if at == step:
                kinds.add(kind)
        kept.pop(key, None)  # its place is that of the last one
        kept[key] = line
    content = b"".join(line + b"\n" for line in kept.values())
    if path.exists() and path.read_bytes() != content:
        write_atomically(path, content)
    return kinds


def named(prefix, value):
    """(name, figure) of a record's figures; those of a dict in it are prefix/key/..."""
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from named(f"{prefix}/{key}", inner)


class RunLog:
    """Progress bar and metrics of one run.

    Args:
        directory: the run's folder, made if need be; metrics.jsonl in it is appended to.
        first_step, num_iterations: range of the bar.
        trackers: of train.trackers, which take the figures as well.
        wandb_id: of the run in Weights & Biases, if no tracker says another.

    Attributes:
        wandb_id: of the run in Weights & Biases, None without one.
    """

    def __init__(self, directory, first_step, num_iterations, trackers=(), wandb_id=None):
        self.trackers, self.failed = trackers, set()
        ids = [tracker.id for tracker in trackers if hasattr(tracker, "id")]
        self.wandb_id = next(iter(ids), None) or wandb_id
        make_folder(directory)
        self.path = directory / METRICS_FILE
        self.file = self.path.open("a+b", buffering=0)
        self.bar = tqdm(
            total=num_iterations,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=1.0,
            disable=not (sys.stderr and sys.stderr.isatty()),
            bar_format="{n_fmt}/{total_fmt} {percentage:3.0f}%|{bar:20}| {desc} ETA {remaining}",
        )

    @property
    def has_bar(self):
        """Whether the bar is shown."""
        return not self.bar.disable

    def metrics(self, kind, step, **values):
        """Append one JSON object {"kind", "step", ...} and pass it on to the trackers.

        A whole line goes to the system at once, so that a killed process leaves no half.
        """
        record = {"kind": kind, "step": step, **values}
        line = (json.dumps(record) + "\n").encode()
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            error.filename = str(self.path)
            raise
        figures = dict(named(kind, values))
        for tracker in self.trackers:
            self._tell(tracker, partial(tracker.log, figures, step))

    def _tell(self, tracker, call):
        """Call a tracker; that it does not take the figures is said once and ends no run."""
        try:
            call()
        except Exception as error:
            if tracker.name not in self.failed:
                what = f"{tracker.name}: {first_line(error)}"
                self.print(f"{what}; {METRICS_FILE} has every figure")
            self.failed.add(tracker.name)

    def restore(self):
        """Write metrics.jsonl anew, with all it held, after it was removed under this process."""
        self.file.seek(0)
        content = self.file.read()
        file = self.path.open("a+b", buffering=0)
        self.file.close()
        self.file = file
        os.ftruncate(file.fileno(), 0)
        while content:
            content = content[file.write(content) :]

    def advance(self, status=None):
        """One step further; `status` replaces the text beside the bar."""
        if status is not None:
            self.bar.set_description_str(status, refresh=False)
        self.bar.update()

    def print(self, text):
        """A line on stdout that does not tear the bar."""
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self):
        self.bar.close()
        self.file.close()
        for tracker in self.trackers:
            self._tell(tracker, tracker.close)


class Silent:
    """The RunLog of every rank but rank 0, which speaks for all."""

    wandb_id = None
    has_bar = True  # so that no line takes its place

    def metrics(self, kind, step, **values):
        pass

    def advance(self, status=None):
        pass

    def print(self, text):
        pass

    def close(self):
        pass
