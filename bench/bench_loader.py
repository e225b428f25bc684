"""The data loader: batches of 32 x 2048 tokens from the standard library's text, on the CPU.

It must stay ahead of the GPU, which at depth 4 takes 4.7 million tokens a second. Alone, and beside
a thread that never lets go of the interpreter's lock, worse than one that launches kernels.
"""

import threading

import pytest

from train.corpus import StdlibCorpus
from train.data import BATCHES_AHEAD, PackedLoader
from train.tokenizer import train_on_corpus

B, T = 32, 2048
VOCAB_SIZE, TRAINING_CHARS = 4096, 2_000_000


@pytest.mark.parametrize("beside", ["nothing", "a busy thread"])
def bench_loader(benchmark, beside):
    corpus = StdlibCorpus()
    tokenizer = train_on_corpus(corpus, VOCAB_SIZE, TRAINING_CHARS)
    loader = PackedLoader(corpus, "train", tokenizer, B, T)
    done = threading.Event()

    def spin():
        while not done.is_set():
            pass

    busy = threading.Thread(target=spin)
    if beside == "a busy thread":
        busy.start()
    try:
        # the mean counts: what lies ready hides single batches
        benchmark.pedantic(lambda: next(loader), rounds=24, warmup_rounds=BATCHES_AHEAD + 1)
    finally:
        done.set()
        loader.close()
    benchmark.extra_info["tok_per_s"] = B * T / benchmark.stats.stats.mean
