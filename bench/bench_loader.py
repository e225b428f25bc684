"""The data loader: batches of 32 x 2048 tokens on the CPU, from the standard library's text cut
into documents as long as ClimbMix's.

It must stay ahead of the GPU, which at depth 4 consumes 4.7 million tokens per second. The second
case runs beside a thread that computes all the time and releases Python's global lock only when
forced to, every 5 ms. On few cores the loader falls behind there; it is a worst case, as the thread
that launches kernels waits, and so releases the lock, more often.
"""

import threading

import pytest

from nanofuse.train.data.corpus import StdlibCorpus
from nanofuse.train.data.loader import BATCHES_AHEAD, PackedLoader
from nanofuse.train.data.tokenizer import train_on_corpus

B, T = 32, 2048
VOCAB_SIZE, TRAINING_CHARS = 4096, 2_000_000


class LongDocuments(StdlibCorpus):
    DOCUMENT_CHARS = 4000


@pytest.mark.parametrize("busy", [False, True], ids=["alone", "beside-a-busy-thread"])
def bench_loader(benchmark, busy):
    corpus = LongDocuments()
    tokenizer = train_on_corpus(corpus, VOCAB_SIZE, TRAINING_CHARS)
    loader = PackedLoader(corpus, "train", tokenizer, B, T)
    done = threading.Event()

    def spin():
        while not done.is_set():
            pass

    if busy:
        threading.Thread(target=spin).start()
    try:
        # read the mean: batches prepared ahead hide the cost of single ones
        benchmark.pedantic(lambda: next(loader), rounds=24, warmup_rounds=BATCHES_AHEAD + 1)
    finally:
        done.set()
        loader.close()
    if not benchmark.disabled:
        benchmark.extra_info["tok_per_s"] = B * T / benchmark.stats.stats.mean
