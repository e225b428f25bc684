"""Batches of packed rows, made ahead in a thread or in a process of their own.

The rows are those of one stream for all ranks: they depend on the corpus, the tokenizer and the
state only, never on timing, threads, the cache, or how many ranks share them. Nothing here loads
torch, so that the process starts fast.
"""

import contextlib
import multiprocessing
import pickle
import queue
import signal
import threading
import traceback
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.util import Finalize

import numpy as np
from tqdm import tqdm

from nanofuse.train.data.encode import Encoders
from nanofuse.train.data.packing import BestFitPacker
from nanofuse.train.data.stream import OTHER_DATA, DocumentStream, Tokens, fetch_documents
from nanofuse.train.errors import UserError

BATCHES_AHEAD = 32
PIPE_BYTES = 1 << 20  # what Linux allows everybody
GOING_SECONDS = 60  # for a process to end, with a part of a cache to be written out
# The training process decides what they mean.
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
NO_DOCUMENTS = np.zeros((3, 0), np.int64)


@dataclass
class LoaderState:
    """Where the stream of rows stands: the next row of the corpus to read, and the packer's buffer.

    `epoch` counts what was trained, `reading` what was read: the buffer lies between.
    """

    reading: int = 0  # epoch of the next document
    unit: int = 0
    document: int = 0  # row within the unit's row group
    # of the buffer: keys, starts and lengths (train.data.packing); the key of kept[i] is -1 - i
    documents: np.ndarray = field(default_factory=lambda: NO_DOCUMENTS)  # (3, n) int64
    num_read: int | None = 0  # documents read so far; None: a state that did not say
    epoch_size: int = 0  # documents of one epoch; 0: the first one is not over
    kept: list = field(default_factory=list)  # (n,) int32 arrays: documents of a state of 0.1

    @property
    def epoch(self):
        """Whole epochs that the documents gone from the buffer into rows amount to."""
        if self.num_read is None:
            return self.reading
        gone = self.num_read - self.documents.shape[1]
        return max(gone, 0) // self.epoch_size if self.epoch_size else 0

    def position(self):
        """The next row to read."""
        return {"epoch": self.reading, "unit": self.unit, "document": self.document}

    def to_arrays(self):
        """{"documents": (3, n) int64, "counts": num_read and epoch_size, (2,) int64}; where there
        are kept documents, "kept": their tokens, (sum n,) int32, and "kept_lengths"."""
        arrays = {"documents": self.documents}
        if self.num_read is not None:
            arrays["counts"] = np.array([self.num_read, self.epoch_size])
        if self.kept:
            arrays["kept"] = np.concatenate(self.kept)
            arrays["kept_lengths"] = np.array([len(tokens) for tokens in self.kept])
        return arrays

    @classmethod
    def restore(cls, position, arrays):
        """The state of a `position()` and `to_arrays()`, or one of version 0.1: "tokens" and
        "lengths" of the buffer's documents.

        Raises:
            UserError: they do not fit together.
        """
        numbers = [position.get(name) for name in ("epoch", "unit", "document")]
        old, counts = "tokens" in arrays, arrays.get("counts")
        prefix = "" if old else "kept_"
        tokens = arrays.get("tokens" if old else "kept", np.zeros(0, np.int32))
        lengths = arrays.get(prefix + "lengths", None if old else np.zeros(0, np.int64))
        whole = arrays.get("whole_lengths", lengths)
        kinds = [(tokens, np.int32), *((a, np.int64) for a in (lengths, whole))]
        fits = (
            all(a is not None and a.dtype == dtype and a.ndim == 1 for a, dtype in kinds)
            and lengths.shape == whole.shape
            and bool((lengths > 0).all() and (whole >= lengths).all())
            and bool((lengths <= len(tokens)).all())
            and int(lengths.sum()) == len(tokens)
            and bool((tokens >= 0).all())
            and all(type(number) is int and 0 <= number < 2**31 for number in numbers)
            and (counts is None or (counts.dtype == np.int64 and counts.shape == (2,)))
            and (counts is None or bool((counts >= 0).all()))
        )
        if fits:
            kept = np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []
            if old:
                keys = -1 - np.arange(len(whole))
                documents = np.stack([keys, np.zeros_like(whole), whole])
            else:
                documents = arrays.get("documents")
            fits = documents is not None and _documents_fit(documents, lengths)
        if not fits:
            raise UserError("the saved state of the data loader is damaged; resume from another")
        num_read, epoch_size = (None, 0) if counts is None else counts.tolist()
        return cls(*numbers, documents, num_read, epoch_size, kept)


def _documents_fit(documents, kept):
    """Whether an array can be the documents of a LoaderState.

    Args:
        kept: (n,) int64, lengths of the kept documents.
    """
    shape_fits = documents.dtype == np.int64 and documents.ndim == 2 and len(documents) == 3
    if not shape_fits:
        return False
    keys, starts, lengths = documents
    return bool(
        (keys >= -len(kept)).all()
        and (keys < 2**62).all()
        and (starts >= 0).all()
        and (starts < 2**40).all()
        and (lengths > 0).all()
        and (lengths < 2**40).all()
        and (lengths[1:] >= lengths[:-1]).all()
        and (starts[keys < 0] < kept[-1 - keys[keys < 0]]).all()
    )


@dataclass(frozen=True)
class Packing:
    """What a loader packs, and which rows of each micro-batch are its own."""

    corpus: object  # train.data.corpus.ParquetCorpus or StdlibCorpus
    split: str
    tokenizer: object  # train.data.tokenizer.Tokenizer
    batch_size: int  # B
    seq_len: int  # T
    long_documents: str = "crop"  # or "split"
    cache: object = None  # train.data.tokens.TokenCache
    rank: int = 0
    world: int = 1

    def say(self, line):
        """Tell the user, by rank 0 for all."""
        if self.rank == 0:
            tell(line)


def packed_batches(packing, state=None, say=print):
    """Endless iterator of (rows (B, T+1) int32, LoaderState after the micro-batch).

    A micro-batch is world * B rows of the stream; rank r has the r-th B of them.

    Args:
        state: LoaderState to continue from.
        say: called with a line for the user.

    Raises:
        UserError: a state of other data or of another tokenizer, a shard that cannot be read, a
            split without text.
    """
    p, state, split = packing, state or LoaderState(), packing.long_documents == "split"
    if state.unit >= max(p.corpus.num_units(p.split), 1):
        raise UserError(OTHER_DATA.format(p.corpus.name))
    if any(tokens.max() >= p.tokenizer.vocab_size for tokens in state.kept):
        raise UserError("the saved state of the data loader is of another tokenizer")
    row_len = p.seq_len + 1
    encoders = Encoders(p.tokenizer)
    tokens = Tokens(p.corpus, p.tokenizer, p.cache, say, encoders)
    at = state.reading, state.unit, state.document, state.num_read, state.epoch_size
    stream = DocumentStream(tokens, p.split, row_len, split, *at)
    most = None if split else row_len
    with encoders, contextlib.closing(iter(stream)) as slices:
        buffer = fetch_documents(tokens, p.split, state.documents, state.kept, most)
        packer = BestFitPacker(slices, row_len, p.tokenizer.bos, split, buffer)
        while True:
            rows = np.empty((p.batch_size, row_len), np.int32)
            for rank in range(p.world):
                for row in rows:
                    packer.next_row(row if rank == p.rank else None)
            if line := p.corpus.tell_replaced():
                say(line)
            yield (
                rows,
                LoaderState(
                    stream.epoch,
                    stream.unit,
                    stream.row,
                    packer.snapshot(),
                    stream.num_read,
                    stream.epoch_size,
                    state.kept,
                ),
            )


def tell(line):
    """Print a line beside the bar; a stdout that is gone ends no run."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(line)


class ThreadLoader:
    """Batches made ahead in a thread of this process, which its tokenising threads share.

    Args:
        packing: Packing.
        state: LoaderState to continue from.
    """

    def __init__(self, packing, state=None):
        self.packing = packing
        self.batches = packed_batches(packing, state, packing.say)
        self.queue = queue.Queue(BATCHES_AHEAD)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._fill, name="loader", daemon=True)
        self.thread.start()

    def _put(self, item):
        while not self.stopped.is_set():
            with contextlib.suppress(queue.Full):
                return self.queue.put(item, timeout=0.1)

    def _fill(self):
        try:
            with contextlib.closing(self.batches):
                for item in self.batches:
                    self._put(item)
                    if self.stopped.is_set():
                        return
        except BaseException as error:  # raised again where the batch is asked for
            self._put(error)

    def take(self, rows):
        """Write the next batch into `rows`, (B, T+1) int32; returns the LoaderState after it.

        Raises:
            UserError: as packed_batches.
        """
        item = self.queue.get()
        if isinstance(item, BaseException):
            self.queue.put(item)
            raise item
        rows[:], state = item
        return state

    def close(self):
        """Stop the background threads."""
        self.stopped.set()
        self.thread.join(GOING_SECONDS)  # a file system may not answer; it ends with the process


class WorkerError(RuntimeError):
    """An error of the loader's process that is none of the user's; its cause is the traceback."""


class ProcessLoader:
    """Batches made ahead in a process of its own, so that the thread that launches kernels never
    waits for the interpreter's lock. It ends when this process closes the loader or dies.

    Args:
        packing: Packing.
        state: LoaderState to continue from.
    """

    def __init__(self, packing, state=None):
        self.packing, self.kept = packing, state.kept if state else []
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe(duplex=False)
        orders, mine = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_serve, args=(theirs, orders), name="loader", daemon=True
        )
        with _holding_signals():
            self.process.start()
        for end in (theirs, orders):  # so that the pipes end when the process does
            end.close()
        # not among the arguments: a process that dies at its start would leave `start` writing them
        # for ever
        with mine, contextlib.suppress(OSError):  # `take` says how it ended
            mine.send((packing, state))
        _widen(self.pipe)
        # multiprocessing waits for it at exit, and by then it must have been told
        self.told = Finalize(self, self.pipe.close, exitpriority=0)
        self.error = None

    def take(self, rows):
        """As ThreadLoader.take.

        Raises:
            UserError: as packed_batches.
            WorkerError: any other error of the process, or its death.
        """
        while self.error is None:
            try:
                kind, content = pickle.loads(self.pipe.recv_bytes())
                if kind == "batch":
                    self.pipe.recv_bytes_into(memoryview(rows).cast("B"))
                    return LoaderState(*content, self.kept)
            except (EOFError, OSError):  # it is gone, or died in mid-message
                self.process.join()
                code = self.process.exitcode
                how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with {code}"
                self.error = WorkerError(f"the data loader's process {how}")
                break
            if kind == "line":
                self.packing.say(content)
            else:
                self.error, text = content
                self.error.__cause__ = text and WorkerError(text)
        raise self.error

    def close(self):
        """End the process."""
        self.told()
        self.process.join(GOING_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _widen(pipe):
    """Have a pipe hold whole batches, so that taking one need not wait for the other process; on
    Linux alone, and as far as it may."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _signal_name(number):
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextlib.contextmanager
def _holding_signals():
    """A process that is started within it does not get SIGNALS; this one gets them afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # which would let them through where it is not there yet
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe, orders):
    """The loader's process: send batches until nobody reads them any more."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    try:
        packing, state = orders.recv()
    except (EOFError, OSError):  # the other process is gone, perhaps in mid-message
        return
    lock = threading.Lock()  # lines may come from other threads
    ahead = queue.Queue(BATCHES_AHEAD)

    def send(kind, content, rows=None):
        with lock:
            pipe.send_bytes(pickle.dumps((kind, content)))
            if rows is not None:
                pipe.send_bytes(rows)

    def pump():
        try:
            while (item := ahead.get()) is not None:
                rows, s = item
                fields = s.reading, s.unit, s.document, s.documents, s.num_read, s.epoch_size
                send("batch", fields, rows)
        except OSError:  # nobody reads them
            pass
        finally:
            gone.set()
            with contextlib.suppress(queue.Empty):
                while True:
                    ahead.get_nowait()

    gone = threading.Event()
    sender = threading.Thread(target=pump, daemon=True)
    sender.start()
    batches = packed_batches(packing, state, lambda line: send("line", line))
    try:
        with contextlib.closing(batches):
            for item in batches:
                ahead.put(item)
                if gone.is_set():
                    return
    except BaseException as error:  # raised again where the batch is asked for
        ahead.put(None)
        sender.join()
        text = None
        if not isinstance(error, UserError):
            text = traceback.format_exc()
            error = WorkerError(f"{type(error).__name__}: {error}")
        with contextlib.suppress(OSError):
            send("error", (error, text))
