"""The data loader: batches of 32 x 2048 tokens, on the CPU.

It must stay ahead of the GPU: at depth 4 one H200 takes 4.9 million tokens a second, eight of them
36 million of one stream, of which each loader packs an eighth. The text is that of the standard
library in documents about as long as ClimbMix's, written to a shard of its own.

- cache: the loader's process reads the cache of the shard's tokens.
- beside-launches: the same beside a thread that calls small torch operations all the time, as a
  training loop does, and takes the interpreter's lock as it does.
- one-of-eight: the rows of one rank of eight; tokens/s are those of all ranks.
- first-pass: no cache yet. The text is tokenised, and the cache written.
- tokenizer: the tokenizer alone on all cores, one process each: what first-pass is held against.
"""

import itertools
import multiprocessing
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanofuse.bench.harness import ON_GPU
from nanofuse.train.data.corpus import ParquetCorpus, StdlibCorpus
from nanofuse.train.data.encode import fill_cache, num_cores, split_tasks
from nanofuse.train.data.library import split_text
from nanofuse.train.data.loader import BATCHES_AHEAD, Packing, ProcessLoader
from nanofuse.train.data.tokenizer import FILE_NAME, train_on_corpus
from nanofuse.train.data.tokens import TokenCache

B, T = 32, 2048
VOCAB_SIZE, TRAINING_CHARS = 32768, 20_000_000
DOCUMENT_CHARS, GROUP_DOCUMENTS = 4000, 1000
MIN_CHARS = 50_000_000  # of the shard: the library again and again
SMALL_CHARS = 2_000_000
ROUNDS = 3 if ON_GPU else 1


@pytest.fixture(scope="module")
def packing(tmp_path_factory, request):
    """Of a shard of long text, and of a short one that validates; small without a GPU, and where
    nothing is timed."""
    small = not ON_GPU or request.config.getoption("benchmark_disable")
    folder = tmp_path_factory.mktemp("shards")
    whole = "\n\n".join(StdlibCorpus().head())
    texts = split_text(whole[: SMALL_CHARS if small else None], DOCUMENT_CHARS)
    texts *= 1 if small else -(-MIN_CHARS // len(whole))
    order = np.random.default_rng(0).permutation(len(texts))
    for name, part in (("a", order), ("b", order[:GROUP_DOCUMENTS])):
        table = pa.table({"text": [texts[i] for i in part]})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=GROUP_DOCUMENTS)
    corpus = ParquetCorpus(folder)
    tokenizer = train_on_corpus(corpus, VOCAB_SIZE, SMALL_CHARS if small else TRAINING_CHARS)
    tokenizer.save(folder / FILE_NAME)
    return Packing(corpus, "train", tokenizer, B, T)


@pytest.fixture(scope="module")
def cached(packing):
    cache = TokenCache(packing.corpus, packing.tokenizer)
    fill_cache(packing.corpus, packing.tokenizer, cache)
    return replace(packing, cache=cache)


def launch(done):
    """Small operations, one after the other."""
    x = torch.ones(64)
    while not done.is_set():
        x = x.mul(1.0)


def measure(benchmark, packing, batches=400, tokens=B * T):
    """Time batches of a loader's process, after the ones that it made ahead."""
    loader = ProcessLoader(packing)
    rows = np.empty((B, T + 1), np.int32)

    def take():
        for _ in range(batches):
            loader.take(rows)

    try:
        for _ in range(BATCHES_AHEAD + 8):
            loader.take(rows)
        benchmark.pedantic(take, rounds=ROUNDS)
    finally:
        loader.close()
    if not benchmark.disabled:
        benchmark.extra_info["m_tok_per_s"] = 1e-6 * batches * tokens / benchmark.stats.stats.median


def bench_cache(benchmark, cached):
    measure(benchmark, cached)


def bench_beside_launches(benchmark, cached):
    done = threading.Event()
    thread = threading.Thread(target=launch, args=(done,))
    thread.start()
    try:
        measure(benchmark, cached)
    finally:
        done.set()
        thread.join()


def bench_one_of_eight(benchmark, cached):
    measure(benchmark, replace(cached, rank=3, world=8), 100, 8 * B * T)


def bench_first_pass(benchmark, packing, cached, tmp_path):
    """From its first batch on, with a new folder for the cache each round."""
    groups, folders, seconds = max(packing.corpus.num_groups(0) - 4, 1), itertools.count(), []
    documents = groups * GROUP_DOCUMENTS

    def setup():
        cache = TokenCache(packing.corpus, packing.tokenizer, tmp_path / str(next(folders)))
        loader = ProcessLoader(replace(packing, cache=cache))
        return (loader, np.empty((B, T + 1), np.int32)), {}

    def take(loader, rows):
        first = loader.take(rows).num_read
        began = time.perf_counter()
        while loader.take(rows).num_read < first + documents:
            pass
        seconds.append(time.perf_counter() - began)
        loader.close()

    benchmark.pedantic(take, setup=setup, rounds=ROUNDS)
    there = cached.cache.open(0)
    tokens = sum(len(there.group(group).tokens) for group in range(groups))
    if ON_GPU:  # else the shard is so small that all of it is read before time begins
        benchmark.extra_info["m_tok_per_s"] = 1e-6 * tokens / float(np.median(seconds))


def begin(tokenizer):
    """The tokenizer of a process that encodes."""
    global its_tokenizer
    its_tokenizer = tokenizer


def count_tokens(texts):
    return len(its_tokenizer.encode_flat(texts)[0])


def bench_tokenizer(benchmark, packing):
    groups = packing.corpus.read_groups(0, 0, packing.corpus.num_groups(0))
    tasks = [task for group in groups for task in split_tasks(group)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_cores(), context, begin, (packing.tokenizer,)) as pool:
        list(pool.map(count_tokens, tasks[: 8 * num_cores()]))
        tokens = benchmark.pedantic(lambda: sum(pool.map(count_tokens, tasks)), rounds=ROUNDS)
    if not benchmark.disabled:
        benchmark.extra_info["m_tok_per_s"] = 1e-6 * tokens / benchmark.stats.stats.median
