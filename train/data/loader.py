"""Batches of packed tokens.

Worker threads tokenise ahead, one packs ahead, and on a GPU the next batch is copied from pinned
memory while the current one is used. The batches depend on the corpus, the tokenizer and the
state only, never on timing.
"""

import itertools
import os
import queue
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from nanofuse.train.data.packing import BestFitPacker
from nanofuse.train.errors import UserError

UNITS_AHEAD = 4
BATCHES_AHEAD = 4
PINNED_SLOTS = 3
TOKENIZER_THREADS = min(8, os.cpu_count() or 1)
DOCUMENTS_A_TASK = 128  # 8 tasks fill the packer's buffer of 1000 for the first time


@dataclass
class LoaderState:
    """Where the stream of batches stands: next document to read, and the packer's buffer."""

    epoch: int = 0
    unit: int = 0
    document: int = 0  # within the unit
    buffer: list = field(default_factory=list)  # (n,) int32 arrays

    def to_tensors(self):
        """The buffer as {"tokens": (sum n,) int32, "lengths": (docs,) int64}."""
        tokens = np.concatenate(self.buffer) if self.buffer else np.empty(0, np.int32)
        lengths = [len(document) for document in self.buffer]
        return {
            "tokens": torch.from_numpy(tokens),
            "lengths": torch.tensor(lengths, dtype=torch.int64),
        }

    def position(self):
        return {"epoch": self.epoch, "unit": self.unit, "document": self.document}

    @classmethod
    def restore(cls, position, tensors):
        ends = np.cumsum(tensors["lengths"].numpy())
        buffer = np.split(tensors["tokens"].numpy(), ends[:-1]) if len(ends) else []
        return cls(**position, buffer=list(buffer))


class PackedLoader:
    """Iterator of (rows (B, T+1) int32 numpy, LoaderState after them), made in the background.

    Args:
        corpus, split: documents to read (train.corpus).
        tokenizer: train.data.tokenizer.Tokenizer.
        batch_size, seq_len: B and T.
        epochs: passes over the split; None goes on for ever. Rows left over at the end that do
            not fill a batch are dropped.
        state: LoaderState to continue from.

    Raises:
        UserError: from the iterator, when a shard cannot be read or the split holds no text.
    """

    def __init__(self, corpus, split, tokenizer, batch_size, seq_len, epochs=None, state=None):
        self.corpus, self.split, self.tokenizer = corpus, split, tokenizer
        self.batch_size, self.row_len, self.epochs = batch_size, seq_len + 1, epochs
        state = state or LoaderState()
        self.epoch, self.unit, self.document = state.epoch, state.unit, state.document
        self.packer = BestFitPacker(self._documents(), self.row_len, buffer=state.buffer)
        self.queue = queue.Queue(BATCHES_AHEAD)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._pack, daemon=True)
        self.thread.start()

    def _documents(self):
        """Tokenised documents in order; self.epoch, unit and document name the next one."""
        start_epoch, start_unit, start_document = self.epoch, self.unit, self.document
        units = self.corpus.num_units(self.split)

        def order():
            for epoch in itertools.count(start_epoch):
                if self.epochs is not None and epoch >= self.epochs:
                    return
                first = start_unit if epoch == start_epoch else 0
                yield from ((epoch, unit) for unit in range(first, units))

        order = order()
        encode = self.tokenizer.encode_documents
        readers = ThreadPoolExecutor(1)
        workers = ThreadPoolExecutor(TOKENIZER_THREADS)

        def load(unit):
            texts = self.corpus.read(self.split, unit)
            starts = range(0, len(texts), DOCUMENTS_A_TASK)
            return [workers.submit(encode, texts[i : i + DOCUMENTS_A_TASK]) for i in starts]

        ahead, seen = deque(), False
        try:
            while True:
                for epoch, unit in itertools.islice(order, UNITS_AHEAD - len(ahead)):
                    ahead.append((epoch, unit, readers.submit(load, unit)))
                if not ahead:
                    return
                epoch, unit, loading = ahead.popleft()
                if epoch > start_epoch and not seen:
                    raise UserError(f"{self.split} documents of {self.corpus.name} hold no text")
                tasks = loading.result()
                skip = start_document if (epoch, unit) == (start_epoch, start_unit) else 0
                documents = itertools.chain.from_iterable(task.result() for task in tasks)
                for number, document in enumerate(documents, 1):
                    seen = True
                    if number > skip:
                        self.epoch, self.unit, self.document = epoch, unit, number
                        yield document
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
            workers.shutdown(wait=False, cancel_futures=True)

    def _put(self, item):
        while not self.stopped.is_set():
            try:
                return self.queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _pack(self):
        try:
            while not self.stopped.is_set():
                rows = [self.packer.next_row() for _ in range(self.batch_size)]
                if any(row is None for row in rows):
                    return self._put(StopIteration())
                state = LoaderState(self.epoch, self.unit, self.document, list(self.packer.buffer))
                self._put((np.stack(rows), state))
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
