"""Add a table to the model: a second table of bigrams, under another hash.

    python -m examples.another_table

A hashed table has rows that several bigrams share. Two that share a row of one table hardly ever
share one of the other, so the sum of both rows tells them apart. What follows is all that the model
needs; parameters, counts, mixes, gradients, generation and the kernels of the fused pass follow
from it. In a fork the same lines go into model/pieces/mix.py, model/config.py and
train/optim/config.py: CONTRIBUTING.md, "Another table".
"""

from dataclasses import dataclass

import torch

from nanofuse.kernels.bigram_rows import bigram_rows, bigram_rows_ref
from nanofuse.model.config import GPTConfig
from nanofuse.model.pieces.mix import ROWS
from nanofuse.train.assemble import assemble
from nanofuse.train.device import select_fp8, select_machine
from nanofuse.train.optim.config import OptimConfig

SHIFT = 17  # odd: token t -> (17 t + 1) mod 2^20 gives every token another number


def other(
    tokens,  # (B, T) integer
):
    """Other numbers for the same tokens, one to one: their hash is another one, too."""
    return (SHIFT * tokens.long() + 1) % 2**20


# how tokens become rows, for the definition and for the fused pass; both look back one token
ROWS["second"] = (
    lambda tokens, rows: bigram_rows_ref(other(tokens), rows),
    lambda tokens, rows: bigram_rows(other(tokens), rows),
)


@dataclass(frozen=True)
class Config(GPTConfig):
    """GPTConfig with the second table, as large as the first."""

    second_lambda_init: float = 0.05

    @property
    def table_rows(self):
        rows = super().table_rows
        return rows | {"second": rows["bigram"]}


@dataclass(frozen=True)
class Optim(OptimConfig):
    """OptimConfig with rates for what the table adds: those of the first one."""

    def adamw_groups(self):
        groups = super().adamw_groups()
        return groups | {
            "second_embed": groups["bigram_embed"],
            "second_lambdas": groups["bigram_lambdas"],
        }


def train(config, optim, backend="auto", steps=10, rows=2):
    """Train on one random batch; returns (model, losses in nats per token)."""
    machine = select_machine("auto", backend)
    fp8 = select_fp8("off", machine, config, rows)
    made = assemble(config, machine, optim, fp8, cuda_graphs=False)
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(config.vocab_size, (rows, config.sequence_len + 1), generator=generator)
    row = row.to(machine.device)
    losses = []
    for _ in range(steps):
        loss = made.model(row[:, :-1].contiguous(), row[:, 1:].contiguous())
        loss.backward()
        made.optimizer.step()
        made.optimizer.zero_grad()
        losses.append(loss.item())
    return made.raw_model, losses


SMALL = GPTConfig.from_depth(2, 16, 16, sequence_len=64, vocab_size=320, bigram_embed_factor=3)

if __name__ == "__main__":
    one, before = train(SMALL, OptimConfig())
    two, after = train(Config(**SMALL.to_dict()), Optim())
    print(f"one table:  {one.config.num_params:,} parameters, loss {before[-1]:.3f}")
    print(f"two tables: {two.config.num_params:,} parameters, loss {after[-1]:.3f}")
