"""One owner for a run's folder: a lock that the system releases when its process dies."""

import contextlib
import os
import socket
import time
from pathlib import Path

from nanofuse.train.data.tokenizer import FILE_NAME
from nanofuse.train.errors import UserError
from nanofuse.train.files import make_folder, remove_leftovers
from nanofuse.train.run_folder import META, STEP_NAME
from nanofuse.train.runlog import METRICS_FILE, trained_steps

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None

LOCK_FILE = ".lock"
GLANCE = 0.05  # seconds; longer than `owner_of` holds a lock


class Taken(UserError):
    """The run's folder belongs to a process that lives, or holds a run already."""


class RunLock:
    """The lock on a run's folder; a context manager that gives it back.

    `take` makes the folder where need be. A folder that this process took for a new run, and that
    gets no checkpoint, is removed with the lock, unless steps were logged there; either way its
    name is free. Where the system or the file system has no locks, that is said and nothing locked.

    Attributes:
        directory: the folder, None before `take`.
    """

    def __init__(self):
        self.directory = self.handle = self.place = None
        self.new = False
        self.made = []  # folders that were missing

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.release()

    def take(self, directory, new=False):
        """Lock the folder, and remove what killed processes left half-written in it.

        Args:
            new: for a new run: what a start without a checkpoint left there is removed.

        Raises:
            Taken: another process has it, or it holds a run and `new`.
            UserError: it cannot be made or written to.
        """
        directory = Path(directory)
        missing = [p for p in (directory, *directory.parents) if not os.path.lexists(p)]
        try:
            make_folder(directory)
            self.made += missing
            self._lock(directory)
        except OSError as error:
            self._remove_made()
            raise UserError(f"{directory} cannot be written to ({error.strerror})") from None
        self.directory, self.new = directory, new
        self.place = _identity(os.stat(directory))
        remove_leftovers(directory)
        if new:
            self._clear()

    def _lock(self, directory):
        path = directory / LOCK_FILE
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._flock(handle, directory)
                if _same_file(handle, path):  # or its last owner has just removed it
                    break
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)
        try:
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError:  # such as on a full disk
            path.unlink()
            os.close(handle)
            raise
        self.handle = handle

    def _flock(self, handle, directory):
        if fcntl is None:
            print("run: this system has no file locks; start no second process on this run")
            return
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # by `owner_of`, perhaps
                time.sleep(GLANCE)
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Taken(
                f"--run {directory.name}: {_named(handle)} is training it; wait for it, or end it "
                "first"
            ) from None
        except OSError as error:  # such as some network file systems
            print(f"run: {directory} cannot be locked ({error.strerror}); start no second process")

    def _clear(self):
        """Remove what a start without a checkpoint left.

        Raises:
            Taken: the folder holds more than that.
        """
        names = {path.name for path in self.directory.iterdir()}
        if any(STEP_NAME.match(name) for name in names):
            text = "exists; add --resume or choose another name"
        elif names - {LOCK_FILE} and METRICS_FILE not in names and FILE_NAME not in names:
            text = "exists and is not a run's; choose another name"
        else:
            if count := trained_steps(self.directory / METRICS_FILE):
                print(f"run: {self.directory} has no checkpoint; its {count} records are dropped")
            for name in (METRICS_FILE, FILE_NAME):
                (self.directory / name).unlink(missing_ok=True)
            return
        directory = self.directory
        self.new = False
        self.release()
        raise Taken(f"--run {directory.name}: {directory} {text}")

    @property
    def lost(self):
        """Whether the lock that was taken is no longer there, or another has its name."""
        return self.handle is None or not _same_file(self.handle, self.directory / LOCK_FILE)

    @property
    def moved(self):
        """Whether the whole folder is no longer there, or another has its name."""
        try:
            return _identity(os.stat(self.directory)) != self.place
        except OSError:
            return True

    def retake(self):
        """Lock the folder anew, after the lock was lost; what is in it stays.

        Raises:
            UserError: as `take`; it is not locked then.
        """
        self._close()
        self.take(self.directory)

    def _close(self):
        handle, self.handle = self.handle, None
        if handle is not None:
            os.close(handle)

    def release(self):
        """Give the folder back, and remove it where nothing came of it."""
        if self.directory is None:
            self._remove_made()
            return
        directory, self.directory = self.directory, None
        with contextlib.suppress(OSError):
            mine = self.handle is not None and _same_file(self.handle, directory / LOCK_FILE)
            if mine and self.new and not any(directory.glob(f"step_*/{META}")):
                metrics = directory / METRICS_FILE
                if not trained_steps(metrics):
                    for path in (metrics, directory / FILE_NAME):
                        path.unlink(missing_ok=True)
            if mine:
                (directory / LOCK_FILE).unlink()
        self._close()
        self._remove_made()

    def _remove_made(self):
        """Remove the folders that `take` made, where they are empty."""
        for path in self.made:
            with contextlib.suppress(OSError):
                path.rmdir()
        self.made = []


class Followed:
    """The folder of a run that rank 0 has locked, for the other ranks."""

    lost = False

    def __init__(self, directory):
        self.directory = directory


def owner_of(directory):
    """Words for the process that trains in a folder, "process 12 on host"; None: there is none.

    Nothing is written, and nobody is kept from the lock for more than an instant. Where the system
    or the file system has no locks, a process that was killed cannot be told from one that runs.
    """
    try:
        handle = os.open(directory / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return None
    try:
        if fcntl is not None:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
        return _named(handle)
    except OSError:
        return _named(handle)
    finally:
        os.close(handle)


def _named(handle):
    """The process that an open lock file names."""
    return os.read(handle, 300).decode("utf-8", "replace").strip() or "a process"


def _same_file(handle, path):
    """Whether the open file is the one that has this name."""
    try:
        there = os.stat(path)
    except OSError:
        return False
    return _identity(os.fstat(handle)) == _identity(there)


def _identity(facts):
    """What tells a file or folder from every other one, of os.stat."""
    return facts.st_dev, facts.st_ino
