"""Text of shards to tokens, on all cores: one thread reads ahead, the others tokenise."""

import contextlib
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from nanofuse.train.data.tokens import TokenGroup, content_of
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
        with self.changed:
            self.closed = True
            self.changed.notify_all()


def _read(corpus, shard, first, end, encode, ahead):
    """Put lists of futures of TokenGroups into `ahead`, one list per row group; then the error
    that ended the reading, or None.

    Args:
        encode: list of texts -> future of their TokenGroup.
    """

    def put(texts):
        size = len(texts), sum(len(text or "") for text in texts)
        if wanted := ahead.wait_for_room(size):
            ahead.put([encode(task) for task in split_tasks(texts) or [[]]], size)
        return wanted

    most, group = corpus.groups_a_read(shard), first
    try:
        while group < end:
            count = min(most, end - group)
            try:
                groups = corpus.read_groups(shard, group, count)
            except UserError:  # what lies before the damage is whole
                if count == 1:
                    raise
                most = 1
                continue
            while groups:
                if not put(groups.pop(0)):
                    return
            group += count
        ahead.put(None)
    except BaseException as error:  # raised again where the row group is asked for
        ahead.put(error)


def encoded_groups(corpus, tokenizer, shard, first=0, count=None, threads=None):
    """Tokenise row groups of a shard: an iterator of TokenGroups, in order and always the same.

    Closing it stops its threads. What is read ahead is bounded, see TASKS_AHEAD.

    Args:
        corpus: train.data.corpus.ParquetCorpus or StdlibCorpus.
        tokenizer: train.data.tokenizer.Tokenizer.
        shard: its index in the corpus.
        first, count: row groups; None: all from `first`.
        threads: that tokenise; None: one per core.

    Raises:
        UserError: from the iterator, where a row group cannot be read or tokenised, after all
            that lie before it.
    """
    threads = threads or num_cores()
    end = corpus.num_groups(shard) if count is None else first + count
    tasks = TASKS_AHEAD * threads
    ahead = _Ahead(tasks * TASK_DOCUMENTS, max(tasks * TASK_CHARS, MIN_CHARS_AHEAD))
    pool = ThreadPoolExecutor(threads, "encode")

    def encode(texts):
        return pool.submit(lambda: TokenGroup(*tokenizer.encode_flat(texts)))

    reader = threading.Thread(
        target=_read, args=(corpus, shard, first, end, encode, ahead), name="read", daemon=True
    )
    reader.start()
    try:
        while (item := ahead.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield join_groups([future.result() for future in item])
    finally:
        ahead.close()
        reader.join()
        pool.shutdown(cancel_futures=True)


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

    with ThreadPoolExecutor(1, "disk") as disk:  # ends the last shard and begins the next meanwhile
        closing = None
        for shard, following in zip(shards, [*shards[1:], None], strict=True):
            if following is not None:
                disk.submit(content_of, corpus.shard_path(following))
            if is_complete(shard):
                progress(corpus.num_groups(shard))
                continue
            writer = cache.writer(shard)
            try:
                if cached := cache.open(shard):
                    with contextlib.closing(cached), contextlib.suppress(ValueError):
                        writer.copy_from(cached)  # up to what is damaged
                progress(writer.num_groups)
                groups = encoded_groups(corpus, tokenizer, shard, writer.num_groups, None, threads)
                with contextlib.closing(groups):
                    for group in groups:
                        writer.append(group)
                        num_tokens += len(group.tokens)
                        progress(1)
            except BaseException:
                writer.close()
                raise
            if closing is not None:
                closing.result()
            closing = disk.submit(put, writer, shard)
            num_shards += 1
        if closing is not None:
            closing.result()
    return num_shards, num_tokens
