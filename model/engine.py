"""Text generation with a KV cache: one prefill of the prompt, then batched decoding.

Beside keys and values the cache holds what else a position reads of those before it: the previous
tokens, for the tables of the mixes, and the previous normalised embedding, for smear.
"""

import hashlib
import math
from dataclasses import dataclass

import torch

from nanofuse.model.pieces.mix import LOOKBACK

LEAST_TEMPERATURE = 1e-6  # below it the draw is greedy, and rounding would decide


class KVCache:
    """Keys and values of all layers, (B, capacity, K, D) each; a full cache doubles its capacity.

    Attributes:
        length: positions stored so far.
        prev_tokens: (B, P) last tokens, LOOKBACK or all; None before the first.
        prev_embedding: (B, C) last token embedding, normalised, before smear; None before the
            first.
    """

    def __init__(self, config, batch_size, dtype, device, capacity=256):
        shape = (batch_size, capacity, config.n_kv_head, config.head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.values = [torch.empty_like(k) for k in self.keys]
        self.length = 0
        self.prev_tokens = None
        self.prev_embedding = None

    @property
    def capacity(self):
        return self.keys[0].size(1)

    def _grow(self, needed):
        """Double the capacity until it holds `needed` positions, keeping what is stored."""
        capacity = self.capacity
        while capacity < needed:
            capacity *= 2

        def grown(x):  # (B, old capacity, K, D)
            bigger = x.new_empty(x.size(0), capacity, *x.shape[2:])
            bigger[:, : self.length] = x[:, : self.length]
            return bigger

        self.keys = [grown(k) for k in self.keys]
        self.values = [grown(v) for v in self.values]

    def insert(
        self,
        layer,
        k,  # (B, T, K, D)
        v,  # (B, T, K, D)
    ):
        """Append the keys and values of T positions in one layer; returns that layer's keys and
        values of all positions, (B, length + T, K, D) each."""
        stop = self.length + k.size(1)
        if stop > self.capacity:
            self._grow(stop)
        self.keys[layer][:, self.length : stop] = k
        self.values[layer][:, self.length : stop] = v
        return self.keys[layer][:, :stop], self.values[layer][:, :stop]

    def advance(
        self,
        tokens,  # (B, T)
        prev_embedding,  # (B, C)
    ):
        """Count T positions as stored, once every layer has inserted them, and remember their last
        tokens and embedding."""
        self.length += tokens.size(1)
        if self.prev_tokens is not None:
            tokens = torch.cat([self.prev_tokens, tokens], dim=1)
        self.prev_tokens, self.prev_embedding = tokens[:, -LOOKBACK:], prev_embedding

    def expand(self, batch_size):
        """A copy of a one-row cache for batch_size rows.

        Raises:
            ValueError: the cache holds more than one row.
        """
        if self.keys[0].size(0) != 1:
            raise ValueError(f"only a one-row cache expands, this one has {self.keys[0].size(0)}")
        other = object.__new__(KVCache)
        other.keys = [k.repeat(batch_size, 1, 1, 1) for k in self.keys]
        other.values = [v.repeat(batch_size, 1, 1, 1) for v in self.values]
        other.length = self.length
        other.prev_tokens = self.prev_tokens.repeat(batch_size, 1)
        other.prev_embedding = self.prev_embedding.repeat(batch_size, 1)
        return other


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: temperature 0 is greedy, top_k 0 keeps every token."""

    temperature: float = 1.0
    top_k: int = 50
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a number from 0 on, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")


def row_generators(seed, count, device):
    """A torch.Generator for every row: row 0 has the seed, row i one made of the seed and i.

    So the draws of a row do not depend on how many stand beside it.
    """

    def seed_of(row):
        digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1 if row else seed

    return [torch.Generator(device).manual_seed(seed_of(row)) for row in range(count)]


def sample_next(
    logits,  # (B, V)
    sampling,
    generators,
):
    """Draw one token per row, (B,) int64, each with its generator; waits for nothing.

    The draw is torch.multinomial's of each row: the largest of p / e, of exponential variates e.
    """
    if sampling.temperature < LEAST_TEMPERATURE:
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature  # no overflow
    if sampling.top_k:
        k = min(sampling.top_k, logits.size(-1))
        kth = logits.topk(k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, float("-inf"))
    variates = torch.empty_like(logits)
    for row, generator in zip(variates, generators, strict=True):
        row.exponential_(generator=generator)
    return (logits.softmax(dim=-1) / variates).argmax(dim=-1)


@torch.inference_mode()
def generate(
    model,
    prompt,
    num_samples=1,
    max_tokens=256,
    sampling=Sampling(),
    stop_token=None,
    decoder=None,
):
    """Sample num_samples continuations of a prompt; yields a list of num_samples tokens per step.

    A row ends at the stop token, which is not yielded; from then on its entry is None. The prompt
    is prefilled once and its cache copied to all rows. The model keeps its mode, train or eval. Row
    i draws the same whatever num_samples is (its logits may round otherwise beside other rows).

    Args:
        prompt: non-empty list of token ids.
        max_tokens: steps at most; generation ends earlier when every row has ended.
        sampling: Sampling: temperature, top_k and seed.
        stop_token: token id that ends a row, or None.
        decoder: model.decode.Decoder of the model, which then runs every step after the prefill.

    Raises:
        ValueError: an empty prompt, num_samples below 1, or logits that are no finite numbers.
    """
    if not prompt:
        raise ValueError("the prompt needs at least one token")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    device = model.resid_lambdas.device
    generators = row_generators(sampling.seed, num_samples, device)
    was_training = model.training
    model.eval()
    try:
        cache = KVCache(model.config, 1, model.dtype, device)
        logits = model(torch.tensor([prompt], device=device), cache=cache)[:, -1]  # (1, V)
        logits = logits.repeat(num_samples, 1)
        if decoder is not None:
            decoder.start(cache, num_samples, len(prompt) + max_tokens)
        else:
            cache = cache.expand(num_samples)
        ended = [False] * num_samples
        for step in range(max_tokens):
            tokens = sample_next(logits, sampling, generators)  # (num_samples,)
            *column, finite = torch.cat([tokens, logits.isfinite().all()[None]]).tolist()
            if not finite:
                raise ValueError("the model's logits are not finite; its weights are no numbers")
            ended = [e or t == stop_token for e, t in zip(ended, column, strict=True)]
            if all(ended):
                return
            yield [None if e else t for e, t in zip(ended, column, strict=True)]
            if step + 1 < max_tokens and decoder is not None:
                logits = decoder.step(tokens)
            elif step + 1 < max_tokens:
                logits = model(tokens[:, None], cache=cache)[:, -1]
    finally:
        model.train(was_training)
