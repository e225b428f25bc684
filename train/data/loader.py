"""Batches of packed tokens.

Worker threads tokenise ahead, one packs ahead, and on a GPU the next batch is copied from pinned
memory while the current one is used. The batches depend on the corpus, the tokenizer and the
state only, never on timing.
"""

import contextlib
import itertools
import os
import queue
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from nanofuse.train.data.packing import BestFitPacker
from nanofuse.train.errors import UserError

UNITS_AHEAD = 4
BATCHES_AHEAD = 4
PINNED_SLOTS = 3
TOKENIZER_THREADS = min(8, os.cpu_count() or 1)
DOCUMENTS_A_TASK = 128  # 8 tasks fill the packer's buffer of 1000 for the first time


@dataclass
class LoaderState:
    """Where the stream of batches stands: the next document to read, and the packer's buffer.

    `epoch` counts what was trained, `reading` what was read: the buffer lies between.
    """

    reading: int = 0  # epoch of the next document
    unit: int = 0
    document: int = 0  # within the unit
    buffer: list = field(default_factory=list)  # (n,) int32 arrays, a row of each document at most
    lengths: list = field(default_factory=list)  # whole lengths of the buffer's documents
    num_read: int | None = 0  # documents read so far; None: a state that did not say
    epoch_size: int = 0  # documents of one epoch; 0: the first one is not over

    @property
    def epoch(self):
        """Whole epochs that the documents gone from the buffer into rows amount to."""
        if self.num_read is None:
            return self.reading
        gone = self.num_read - len(self.buffer)
        return gone // self.epoch_size if self.epoch_size else 0

    def to_tensors(self):
        """{"tokens": (sum n,) int32, "lengths": (docs,) int64, of the buffer, "whole_lengths":
        (docs,) int64, "counts": num_read and epoch_size, (2,) int64}."""
        tokens = np.concatenate([*self.buffer, np.empty(0, np.int32)]).astype(np.int32)

        def integers(values):
            return torch.tensor(values, dtype=torch.int64)

        tensors = {
            "tokens": torch.from_numpy(tokens),
            "lengths": integers([len(document) for document in self.buffer]),
            "whole_lengths": integers(self.lengths),
        }
        if self.num_read is not None:
            tensors["counts"] = integers([self.num_read, self.epoch_size])
        return tensors

    def position(self):
        """The next document to read."""
        return {"epoch": self.reading, "unit": self.unit, "document": self.document}

    @classmethod
    def restore(cls, position, tensors):
        """The state of a `position()` and `to_tensors()`; those of version 0.1 had whole documents
        and no counts.

        Raises:
            UserError: they do not fit together.
        """
        tokens, lengths = tensors.get("tokens"), tensors.get("lengths")
        whole, counts = tensors.get("whole_lengths", lengths), tensors.get("counts")
        kinds = [(tokens, torch.int32), *((t, torch.int64) for t in (lengths, whole))]
        numbers = [position.get(name) for name in ("epoch", "unit", "document")]
        fits = (
            all(t is not None and t.dtype == dtype and t.dim() == 1 for t, dtype in kinds)
            and lengths.shape == whole.shape
            and bool((lengths > 0).all() and (whole >= lengths).all())
            and bool((whole[1:] >= whole[:-1]).all())
            and bool((lengths <= len(tokens)).all())
            and int(lengths.sum()) == len(tokens)
            and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
            and (counts is None or (counts.dtype == torch.int64 and counts.shape == (2,)))
            and (counts is None or bool((counts >= 0).all()))
        )
        if not fits:
            raise UserError("the saved state of the data loader is damaged; resume from another")
        ends = np.cumsum(lengths.numpy())
        buffer = np.split(tokens.numpy(), ends[:-1]) if len(ends) else []
        num_read, epoch_size = (None, 0) if counts is None else counts.tolist()
        return cls(*numbers, list(buffer), whole.tolist(), num_read, epoch_size)


class PackedLoader:
    """Iterator of (rows (B, T+1) int32 numpy, LoaderState after them), made in the background.

    Args:
        corpus, split: documents to read (train.data.corpus).
        tokenizer: train.data.tokenizer.Tokenizer.
        batch_size, seq_len: B and T.
        epochs: passes over the split; None goes on for ever.
        state: LoaderState to continue from.
        fill: rows left over at the end make a last batch together with rows of `<|bos|>` only,
            which count no bytes; otherwise they are dropped.

    Raises:
        UserError: a state of other data or of another tokenizer; from the iterator, when a shard
            cannot be read or the split holds no text.
    """

    def __init__(
        self, corpus, split, tokenizer, batch_size, seq_len, epochs=None, state=None, fill=False
    ):
        self.corpus, self.split, self.tokenizer = corpus, split, tokenizer
        self.batch_size, self.row_len, self.epochs = batch_size, seq_len + 1, epochs
        self.fill = fill
        state = state or LoaderState()
        if state.unit >= max(corpus.num_units(split), 1):
            raise UserError(f"the saved state of the data loader is of other data ({corpus.name})")
        if any(d.min() < 0 or d.max() >= tokenizer.vocab_size for d in state.buffer):
            raise UserError("the saved state of the data loader is of another tokenizer")
        self.reading, self.unit, self.document = state.reading, state.unit, state.document
        self.num_read, self.epoch_size = state.num_read, state.epoch_size
        self.packer = BestFitPacker(
            self._documents(), self.row_len, buffer=state.buffer, lengths=state.lengths
        )
        self.queue = queue.Queue(BATCHES_AHEAD)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._pack, daemon=True)
        self.thread.start()

    def _load(self, encode, first, count):
        """Read `count` units from unit `first` and have their texts tokenised.

        Args:
            encode: list of texts -> future of their documents.

        Returns:
            ([(unit, number of documents)], futures of the documents in order, the error that
            ended the reading early or None)
        """
        texts, counts, error = [], [], None
        try:
            spans = [self.corpus.read_span(self.split, first, count)]
        except UserError as damage:  # what lies before the damage is whole
            spans, error = [], damage
            for unit in range(first, first + count):
                try:
                    spans.append(self.corpus.read_span(self.split, unit, 1))
                except UserError:
                    break
        for unit, documents in enumerate(itertools.chain.from_iterable(spans), first):
            counts.append((unit, len(documents)))
            texts += documents
        starts = range(0, len(texts), DOCUMENTS_A_TASK)
        tasks = [encode(texts[i : i + DOCUMENTS_A_TASK]) for i in starts]
        if line := self.corpus.tell_replaced():
            with contextlib.suppress(OSError, ValueError):  # a stdout that is gone ends no run
                tqdm.write(line)
        return counts, tasks, error

    def _documents(self):
        """Tokenised documents in order; self.reading, unit and document name the next one."""
        start_epoch, start_unit, start_document = self.reading, self.unit, self.document

        def order():
            for epoch in itertools.count(start_epoch):
                if self.epochs is not None and epoch >= self.epochs:
                    return
                first = start_unit if epoch == start_epoch else 0
                for unit, count in self.corpus.spans(self.split, first):
                    yield epoch, unit, count

        order = order()
        readers = ThreadPoolExecutor(1)
        workers = ThreadPoolExecutor(TOKENIZER_THREADS)
        encode = partial(workers.submit, self.tokenizer.encode_documents)

        ahead, seen = deque(), False
        try:
            while True:
                for epoch, unit, count in itertools.islice(order, UNITS_AHEAD - len(ahead)):
                    ahead.append((epoch, readers.submit(self._load, encode, unit, count)))
                if not ahead:
                    return
                epoch, loading = ahead.popleft()
                if epoch > start_epoch and not seen:
                    raise UserError(f"{self.split} documents of {self.corpus.name} hold no text")
                counts, tasks, error = loading.result()
                documents = itertools.chain.from_iterable(task.result() for task in tasks)
                for unit, count in counts:
                    skip = start_document if (epoch, unit) == (start_epoch, start_unit) else 0
                    for number, document in enumerate(itertools.islice(documents, count), 1):
                        seen = True
                        if number > skip:
                            self._count(epoch)
                            self.reading, self.unit, self.document = epoch, unit, number
                            yield document
                if error:
                    raise error
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
            workers.shutdown(wait=False, cancel_futures=True)

    def _count(self, epoch):
        """One document of `epoch` more; that of a first one's successor tells its size."""
        if self.num_read is None:
            return
        if epoch and not self.epoch_size:
            self.epoch_size = self.num_read
        self.num_read += 1

    def _put(self, item):
        while not self.stopped.is_set():
            try:
                return self.queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _state(self):
        """The LoaderState after the rows packed so far."""
        return LoaderState(
            self.reading,
            self.unit,
            self.document,
            list(self.packer.buffer),
            list(self.packer.lengths),
            self.num_read,
            self.epoch_size,
        )

    def _pack(self):
        try:
            while not self.stopped.is_set():
                found = (self.packer.next_row() for _ in range(self.batch_size))
                rows = list(itertools.takewhile(lambda row: row is not None, found))
                missing = self.batch_size - len(rows)
                if missing and not (rows and self.fill):
                    return self._put(StopIteration())
                rows += [np.full(self.row_len, self.tokenizer.bos, np.int32)] * missing
                self._put((np.stack(rows), self._state()))
        except BaseException as error:  # raised again where the batch is asked for
            self._put(error)

    def __iter__(self):
        return self

    def __next__(self):
        item = self.queue.get()
        if isinstance(item, BaseException):
            self.queue.put(item)
            raise item
        return item

    def close(self):
        """Stop the background threads."""
        self.stopped.set()
        self.thread.join()
        self.packer.documents.close()


class DeviceLoader:
    """Batches on a device: iterator of (inputs, targets), (B, T) int64 each.

    `state` is the LoaderState after the batches handed out so far. On a GPU a batch is copied
    from pinned memory on a side stream one batch ahead; a pinned buffer is written again only
    after its copy has finished.
    """

    def __init__(self, loader, device):
        self.loader, self.device = loader, torch.device(device)
        self.state = None
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            self.stream = torch.cuda.Stream(self.device)
            shape = (loader.batch_size, loader.row_len)
            self.slots = itertools.cycle(
                [
                    (torch.empty(shape, dtype=torch.int64, pin_memory=True), torch.cuda.Event())
                    for _ in range(PINNED_SLOTS)
                ]
            )
            self.staged = self._stage()

    def _stage(self):
        """Start copying the next batch; returns (rows on the device, event, state) or None."""
        item = next(self.loader, None)
        if item is None:
            return None
        rows, state = item
        pinned, copied = next(self.slots)
        copied.synchronize()
        pinned.copy_(torch.from_numpy(rows))
        with torch.cuda.stream(self.stream):
            on_device = pinned.to(self.device, non_blocking=True)
            copied.record()
        return on_device, copied, state

    def __iter__(self):
        return self

    def __next__(self):
        if not self.cuda:
            rows, self.state = next(self.loader)
            rows = torch.from_numpy(rows).long()  # (B, T+1)
        else:
            if self.staged is None:
                raise StopIteration
            rows, copied, self.state = self.staged
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            rows.record_stream(current)
            self.staged = self._stage()
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def close(self):
        self.loader.close()
