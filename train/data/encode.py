"""Text of shards to tokens, on all cores: one thread reads ahead, the others tokenise."""

import contextlib
import copy
import itertools
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from nanofuse.train.data.token_file import TokenGroup
from nanofuse.train.data.tokens import content_of
from nanofuse.train.errors import UserError

TASK_DOCUMENTS, TASK_CHARS = 128, 1 << 19  # tokenised by one thread in one call, at most
TASKS_AHEAD = 2  # for each thread; a row group that is larger is ahead alone
MIN_CHARS_AHEAD = 1 << 24


def num_cores():
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def split_tasks(texts):
    """Cut a list of texts into lists of up to TASK_DOCUMENTS of them and TASK_CHARS characters; a
    longer text is alone."""
    tasks, chars = [], 0
    for text in texts:
        length = len(text or "")
        if not tasks or chars + length > TASK_CHARS or len(tasks[-1]) == TASK_DOCUMENTS:
            tasks.append([])
            chars = 0
        tasks[-1].append(text)
        chars += length
    return tasks


def join_groups(parts):
    """One TokenGroup of several, in order."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.tokens) for part in parts)])
    offsets = [part.offsets[1:] + start for part, start in zip(parts, starts[:-1], strict=True)]
    return TokenGroup(
        np.concatenate([part.tokens for part in parts]), np.concatenate([[0], *offsets])
    )


class Encoders:
    """Threads that tokenise, each with an encoding of its own; a context manager that stops them.

    tiktoken's regular expressions are quick for the first thread that uses them; all others share a
    pool behind a lock. An encoding of 32,768 tokens takes about 20 ms and 9 MB, so for several
    shards use one object.

    Args:
        tokenizer: train.data.tokenizer.Tokenizer.
        threads: their number; None: one per core.
    """

    def __init__(self, tokenizer, threads=None):
        self.tokenizer, self.threads = tokenizer, threads or num_cores()
        self.own = threading.local()
        self.pool = ThreadPoolExecutor(self.threads, "encode", self._begin)

    def _begin(self):
        self.own.tokenizer = copy.copy(self.tokenizer)  # as if it were read anew

    def _encode(self, texts):
        return TokenGroup(*self.own.tokenizer.encode_flat(texts))

    def submit(self, texts):
        """Future of the TokenGroup of a list of str or None."""
        return self.pool.submit(self._encode, texts)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pool.shutdown(cancel_futures=True)


class _Ahead:
    """Row groups read and not asked for yet, up to so many documents and characters; one that is
    larger than that is taken when there is no other.

    Args:
        documents, chars: the bounds.
    """

    def __init__(self, documents, chars):
        self.room = np.array([documents, chars])
        self.items = deque()  # (item, [documents, chars])
        self.changed = threading.Condition()
        self.closed = False

    def wait_for_room(self, size):
        """Wait until [documents, chars] more fit; returns False if nobody wants them any more."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.closed or not self.items or (size <= self.room).all()
            )
            return not self.closed

    def put(self, item, size=(0, 0)):
        with self.changed:
            self.items.append((item, size))
            self.room -= size
            self.changed.notify_all()

    def get(self):
        with self.changed:
            self.changed.wait_for(lambda: self.items)
            item, size = self.items.popleft()
            self.room += size
            self.changed.notify_all()
            return item

    def close(self):
        """Take nothing more."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def cancel(self):
        """Drop the tasks of what nobody asked for."""
        for item, _ in self.items:
            if isinstance(item, tuple):
                for future in item[0]:
                    future.cancel()


def _read(corpus, shard, first, end, encoders, ahead):
    """Put what is read together into `ahead`, as (futures of its TokenGroups, rows of each of its
    row groups); then the error that ended the reading, or None."""
    try:
        most, group = corpus.groups_a_read(shard), first
        while group < end:
            count = min(most, end - group)
            try:
                groups = corpus.read_groups(shard, group, count)
            except UserError:  # what lies before the damage is whole
                if count == 1:
                    raise
                most = 1
                continue
            rows = [len(texts) for texts in groups]
            texts = groups.pop() if count == 1 else list(itertools.chain.from_iterable(groups))
            del groups
            size = len(texts), sum(len(text or "") for text in texts)
            if not ahead.wait_for_room(size):
                return
            tasks = split_tasks(texts) or [[]]
            del texts  # what was tokenised need not wait for the rest
            ahead.put(([encoders.submit(task) for task in tasks], rows), size)
            group += count
        ahead.put(None)
    except BaseException as error:  # raised again where the row group is asked for
        ahead.put(error)


def parted(whole, rows):
    """The TokenGroups of row groups that one holds, in views of it.

    Args:
        rows: of each row group.
    """
    if len(rows) == 1:
        yield whole
        return
    tokens, offsets = whole
    first = 0
    for count in rows:
        part = offsets[first : first + count + 1]
        yield TokenGroup(tokens[part[0] : part[-1]], part - part[0])
        first += count


def encoded_groups(corpus, tokenizer, shard, first=0, count=None, threads=None, encoders=None):
    """Tokenise row groups of a shard: an iterator of TokenGroups, in order and always the same.

    Closing it stops its threads. What is read ahead is bounded, see TASKS_AHEAD.

    Args:
        corpus: train.data.corpus.ParquetCorpus or StdlibCorpus.
        tokenizer: train.data.tokenizer.Tokenizer.
        shard: its index in the corpus.
        first, count: row groups; None: all from `first`.
        threads: that tokenise; None: one per core.
        encoders: Encoders of the tokenizer to use, which stay; None: new ones.

    Raises:
        UserError: from the iterator, where a row group cannot be read, after all that lie before
            it; or where its text cannot be tokenised, or that of others read with it.
    """
    end = corpus.num_groups(shard) if count is None else first + count
    with contextlib.ExitStack() as stack:
        encoders = encoders or stack.enter_context(Encoders(tokenizer, threads))
        tasks = TASKS_AHEAD * encoders.threads
        ahead = _Ahead(tasks * TASK_DOCUMENTS, max(tasks * TASK_CHARS, MIN_CHARS_AHEAD))
        args = corpus, shard, first, end, encoders, ahead
        reader = threading.Thread(target=_read, args=args, name="read", daemon=True)
        reader.start()
        try:
            while (item := ahead.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                futures, rows = item
                yield from parted(join_groups([future.result() for future in futures]), rows)
        finally:
            ahead.close()
            reader.join()
            ahead.cancel()


def used_shards(corpus):
    """Shards that train or validate, in order."""
    return sorted({shard for units in corpus.units.values() for shard, *_ in units})


def fill_cache(corpus, tokenizer, cache, threads=None, progress=None):
    """Write what is missing of the caches of all shards that are used.

    What is whole of a shard's cache is kept where that ends early.

    Args:
        corpus, tokenizer, threads: as encoded_groups has them.
        cache: train.data.tokens.TokenCache of the two.
        progress: called with the number of row groups that are there, or newly done.

    Returns:
        (shards, tokens) that were written

    Raises:
        UserError: a row group cannot be read, or a shard was replaced meanwhile.
        OSError: a cache cannot be written.
    """
    progress = progress or (lambda groups: None)
    shards = used_shards(corpus)
    num_shards = num_tokens = 0

    def is_complete(shard):
        if (cached := cache.open(shard)) is None:
            return False
        cached.close()
        return cached.complete

    def put(writer, shard):
        if not writer.close() and not is_complete(shard):  # by another process
            path = corpus.shard_path(shard)
            raise UserError(f"shard {path} has changed since the start; start again")

    # ends the last shard and begins the next meanwhile
    with ThreadPoolExecutor(1, "disk") as disk, Encoders(tokenizer, threads) as encoders:
        closing = None
        for shard, following in zip(shards, [*shards[1:], None], strict=True):
            if following is not None:
                disk.submit(content_of, corpus.shard_path(following))
            if is_complete(shard):
                progress(corpus.num_groups(shard))
                continue
            with contextlib.ExitStack() as failed:
                writer = cache.writer(shard)
                failed.callback(writer.close)
                if cached := cache.open(shard):
                    with contextlib.closing(cached), contextlib.suppress(ValueError):
                        writer.copy_from(cached)  # up to what is damaged
                progress(writer.num_groups)
                groups = encoded_groups(
                    corpus, tokenizer, shard, writer.num_groups, encoders=encoders
                )
                with contextlib.closing(groups):
                    for group in groups:
                        writer.append(group)
                        num_tokens += len(group.tokens)
                        progress(1)
                if closing is not None:
                    closing.result()
                closing = disk.submit(put, writer, shard)
                failed.pop_all()
            num_shards += 1
        if closing is not None:
            closing.result()
    return num_shards, num_tokens
