"""Shared by all that time whole steps: the workload of one training step, and the timed step."""

import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from nanofuse.bench.harness import ON_GPU, zipf_tokens
from nanofuse.model.config import GPTConfig
from nanofuse.train.assemble import follow

STEP_ROWS = 256  # of 2,048 tokens each, in an optimiser step

# at the full rate the lambdas' first steps, made of rounding (dev/LOG.md), set contenders apart
LR_MULT, MOMENTUM, WEIGHT_DECAY = 0.1, 0.95, 0.1


@dataclass(frozen=True)
class Workload:
    """One optimiser step: a model, and micro-steps of `rows` rows each."""

    config: GPTConfig
    rows: int
    micro_steps: int

    @property
    def tokens(self):
        return self.rows * self.micro_steps * self.config.sequence_len

    def batches(self, device):
        """[(inputs, targets)] of the micro-steps, (B, T) int64 each; always the same tokens.

        They are drawn from a Zipf law: frequent words collide in embedding gradients, as in text.
        """
        shape = (self.micro_steps, self.rows, self.config.sequence_len + 1)
        tokens = zipf_tokens(shape, self.config.vocab_size, device)
        return [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in tokens]


def gpu_workload(depth, bigram_factor=5, rows=32, micro_steps=None):
    """The recipe's model of a depth on micro-batches of `rows` x 2048, by default as many as make
    524,288 tokens."""
    config = GPTConfig.from_depth(depth, bigram_embed_factor=bigram_factor)
    return Workload(config, rows, micro_steps or STEP_ROWS // rows)


def tiny_workload(depth, bigram_factor=5):
    """A model for a CPU, small enough for Triton's interpreter."""
    sizes = {"aspect_ratio": 32, "head_dim": 32, "sequence_len": 32, "vocab_size": 64}
    return Workload(GPTConfig.from_depth(depth, bigram_embed_factor=bigram_factor, **sizes), 1, 1)


def synchronize():
    if ON_GPU:
        torch.cuda.synchronize()


class PhaseClock:
    """Times consecutive phases, each from the end of the one before it to its own end. A phase
    within another one is taken out of that.

    On a GPU the times are those of CUDA events in the stream that is current when the clock is
    made: what other streams do meanwhile does not count. `seconds` synchronises.
    """

    def __init__(self):
        self.stream = torch.cuda.current_stream() if ON_GPU else None
        self.marks = [(None, self._now())]
        self.open = []  # names, the innermost last

    def _now(self):
        if not ON_GPU:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return event

    @contextmanager
    def __call__(self, name):
        if self.open:
            self.marks.append((self.open[-1], self._now()))
        self.open.append(name)
        yield
        self.open.pop()
        self.marks.append((name, self._now()))

    def seconds(self):
        """{phase: total seconds}."""
        synchronize()
        totals = {}
        for (_, start), (name, end) in zip(self.marks, self.marks[1:], strict=False):
            spent = start.elapsed_time(end) * 1e-3 if ON_GPU else end - start
            totals[name] = totals.get(name, 0.0) + spent
        return totals


def train_step(built, batches, phase, ranks=1, tokens=()):
    """One optimiser step; returns the loss () of its first micro-step.

    Args:
        built: train.assemble.Assembled.
        batches: [(inputs, targets)] of its micro-steps, (B, T) int64 each.
        ranks: that take a step together, each with as many micro-steps of its own.
        tokens: the inputs on the CPU, (B, T) each, for the optimiser of several ranks to note.
        phase: phase(name) gives a context manager for "forward", "backward" or "optimizer".
    """
    losses = []
    for (inputs, targets), on_host in zip(batches, tokens or [None] * len(batches), strict=True):
        with phase("forward"):
            loss = built.model(inputs, targets)
            if on_host is not None:
                built.optimizer.note(on_host)
        with phase("backward"):
            (loss / (ranks * len(batches))).backward()
        losses.append(loss.detach())
    with phase("optimizer"):
        built.optimizer.step(LR_MULT, MOMENTUM, WEIGHT_DECAY)
        built.optimizer.zero_grad()
        follow(built.model)
    return losses[0]
