"""Runs of a sweep as processes: what state each is in, and one or more at a time on every GPU.

A run that ends as it should leaves a note in the sweep's folder, and is not started again. Every
other one starts, or goes on from its newest checkpoint. Nothing here loads torch.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from nanofuse.train.errors import UserError
from nanofuse.train.files import native, remove_folder, write_text_atomically
from nanofuse.train.lock import owner_of
from nanofuse.train.metrics import commit_of
from nanofuse.train.run_folder import checkpoints, load_meta, run_dir
from nanofuse.train.runlog import METRICS_FILE
from nanofuse.train.schemas import Strict, read_validated
from nanofuse.train.settings import ROWS, asks_for_rows, flag_name, resolve_resumed
from nanofuse.train.signals import NAMES

COMMAND = [sys.executable, "-m"]
GPU = "CUDA_VISIBLE_DEVICES"
LOOK_SECONDS = 0.1
LOG_END = 20_000  # bytes in which a run's last words are looked for
# Flags that do not change what a run comes to; all others must be those of its checkpoint.
FREE = {
    "run", "resume", "gpus", "data", "cache", "kernel_cache", "keep", "save_every", "sample_every",
    "core_every", "train_log_every", "wandb", "trackio", "tensorboard",
}  # fmt: skip


class Note(Strict):
    """What the sweep's folder keeps of a run that has finished.

    Attributes:
        seconds: of the process from start to end, None of one that was broken off.
        corpus: the fingerprint of its data.
        shared: whether others trained on the same GPU meanwhile.
    """

    settings: dict[str, Any]
    step: int
    bpb: float
    seconds: float | None
    commit: str | None
    corpus: str
    shared: bool = False


@dataclass(frozen=True)
class State:
    """Where a run stands: "finished", "stopped" at a step, "new", or "running" elsewhere. `rows`
    of a forward pass are its checkpoint's."""

    kind: str
    step: int = 0
    owner: str = ""
    rows: int | None = None

    @property
    def left(self):
        """Whether there is something to do."""
        return self.kind in ("stopped", "new")


@dataclass(frozen=True)
class Outcome:
    """How a run's process ended: "finished", "failed" or "stopped", by a signal; `text` is its last
    line where it failed."""

    kind: str
    seconds: float
    text: str = ""


def note_path(folder, run):
    return folder / f"{run}.json"


def log_path(folder, run):
    return folder / f"{run}.txt"


def shared_path(folder, run):
    """A file that is there where the run has shared a GPU."""
    return folder / f"{run}.shared"


def read_note(folder, run):
    """The Note of a run, None where there is none, or nothing of the run.

    Raises:
        UserError: it is damaged.
    """
    path = note_path(folder, run)
    if not path.is_file() or not (run_dir(run) / METRICS_FILE).is_file():
        return None
    try:
        return read_validated(path, Note)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it") from None


def refuse_others(item, settings):
    """Refuse a run that was made with other flags than the sweep gives it.

    Args:
        settings: {flag: value} of its checkpoint.

    Raises:
        UserError: names the first such flag.
    """
    place = run_dir(item.run)
    if settings is None:
        raise UserError(f"{place} was converted, and is not the sweep's; move it away")
    saved = resolve_resumed({}, {name: native(value) for name, value in settings.items()}).flat()
    for name, value in item.settings.flat().items():
        is_open = name == "vocab_size" and name not in item.given  # the tokenizer's
        is_open |= name == ROWS and asks_for_rows(item.given)
        if name not in FREE and not is_open and saved[name] != value:
            raise UserError(
                f"{place} was made with {flag_name(name)} {saved[name]}, and the sweep says "
                f"{value}; move that run away, or give the sweep's file another name"
            )


def look(item, folder):
    """State of a run.

    Args:
        item: definition.Item.
        folder: of the sweep.

    Raises:
        UserError: the run was made with other flags, or is damaged.
    """
    directory, note = run_dir(item.run), read_note(folder, item.run)
    if note:
        refuse_others(item, note.settings)
        return State("finished", note.step, rows=note.settings[ROWS])
    if owner := owner_of(directory):
        return State("running", owner=owner)
    found = checkpoints(directory)
    if not found:
        return State("new")
    meta = load_meta(found[max(found)])
    refuse_others(item, meta.get("settings"))
    whole = meta["step"] >= meta["num_iterations"] and meta.get("val_bpb") is not None
    kind = "finished" if whole else "stopped"
    return State(kind, meta["step"], rows=meta["settings"][ROWS])


def settle(item, folder, seconds=None, drop=False):
    """Note that a run has finished.

    Args:
        seconds: that its process took from the run's start to its end, where that is known.
        drop: remove its checkpoints; its metrics stay.
    """
    if read_note(folder, item.run) is None:
        found = checkpoints(run_dir(item.run))
        meta = load_meta(found[max(found)])
        note = Note(
            settings=meta["settings"],
            step=meta["step"],
            bpb=meta["val_bpb"],
            seconds=seconds,
            commit=commit_of(meta),
            corpus=meta["loader"]["corpus"],
            shared=shared_path(folder, item.run).exists(),
        )
        write_text_atomically(note_path(folder, item.run), note.model_dump_json(indent=1) + "\n")
    shared_path(folder, item.run).unlink(missing_ok=True)  # the note says so
    if drop:
        for place in checkpoints(run_dir(item.run)).values():
            remove_folder(place)


def environments(gpus, jobs, per_gpu=1):
    """Variables of the processes that run side by side; those of one GPU have the same.

    Args:
        gpus: names for CUDA_VISIBLE_DEVICES; empty: CPU.
        jobs: how many, `per_gpu` on each GPU at most; every GPU gets one before one gets two.
    """
    if gpus:
        return [{GPU: name} for name in (list(gpus) * per_gpu)[:jobs]]
    threads = str(max((os.cpu_count() or 1) // jobs, 1))
    return [{} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": threads}] * jobs


def last_words(path):
    """The line in which a process says why it failed: the last error in its log, else the end."""
    with open(path, "rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - LOG_END, 0))
        lines = file.read().decode("utf-8", "replace").splitlines()
    lines = [" ".join(line.split()) for line in lines if line.strip()] or ["it said nothing"]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1].removeprefix("error: ")[:300]


@dataclass
class Child:
    """A run's process, on one of the places."""

    item: Any
    resumed: bool
    place: dict[str, str]
    process: subprocess.Popen
    started: float


class Pool:
    """Runs as processes, one on each place at a time; a context manager that leaves none behind.

    Signals are noted, and handed on to every process once: each saves and ends, and no other one
    starts.

    Args:
        folder: of the sweep; a run's output is appended to RUN.txt there.
        places: environments().
        command: that runs a module of Python.

    Attributes:
        children: those that run.
        number: of the first signal, or None.
    """

    def __init__(self, folder, places, command=COMMAND):
        self.folder, self.free, self.command = folder, list(places), command
        self.children, self.signals, self.number, self.before = [], [], None, {}

    def __enter__(self):
        for number in (getattr(signal, name, None) for name in NAMES):
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error):
        for child in self.children:  # after an error of this process
            child.process.terminate()
        for child in self.children:
            child.process.wait()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.signals.append(number)

    def _beside(self, place):
        """The children on a place."""
        return [child for child in self.children if child.place == place]

    def start(self, item, resumed):
        """Start a run's process, where the fewest others are; one that is to go on does so from its
        newest checkpoint."""
        place = min(self.free, key=lambda place: len(self._beside(place)))
        self.free.remove(place)
        if not resumed:
            shared_path(self.folder, item.run).unlink(missing_ok=True)
        if GPU in place and (others := self._beside(place)):
            for run in (item.run, *(child.item.run for child in others)):
                shared_path(self.folder, run).touch()
        command = [*self.command, *item.command(resumed)]
        with open(log_path(self.folder, item.run), "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **place},
                start_new_session=True,  # a terminal's signals reach this process alone
            )
        self.children.append(Child(item, resumed, place, process, time.monotonic()))

    def run(self, todo, idle=lambda: None):
        """Run all, in their order; yields (Item, Outcome) of each that has ended.

        Args:
            todo: [(Item, whether it goes on)].
            idle: called now and then.
        """
        todo = list(todo)
        while self.children or (todo and self.number is None):
            while todo and self.free and self.number is None:
                self.start(*todo.pop(0))
            time.sleep(LOOK_SECONDS)
            while self.signals:
                number = self.signals.pop(0)
                self.number = self.number or number
                for child in self.children:
                    child.process.send_signal(number)
            for child in list(self.children):
                if child.process.poll() is not None:
                    self.children.remove(child)
                    self.free.append(child.place)
                    yield child.item, self._outcome(child)
            idle()

    def _outcome(self, child):
        """Outcome of a process that has ended."""
        code, seconds = child.process.returncode, time.monotonic() - child.started
        if code == 0:
            return Outcome("finished", seconds)
        if self.number is not None and code in (128 + self.number, -self.number):
            return Outcome("stopped", seconds)
        text = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return Outcome(
            "failed", seconds, f"{text}: {last_words(log_path(self.folder, child.item.run))}"
        )
