"""Small models and texts for the tests."""

from itertools import chain

import torch

from nanofuse.model.config import GPTConfig
from nanofuse.model.gpt import GPT
from nanofuse.model.option import options

WORDS = "the cat sat on a mat while rain fell and 1234 birds sang loudly over hills".split()


def documents(count, seed=0, longest=60):
    """`count` texts of 1 to `longest` words, reproducible."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high):
        return int(torch.randint(high, (), generator=generator))

    return [
        " ".join(WORDS[draw(len(WORDS))] for _ in range(1 + draw(longest))) for _ in range(count)
    ]


def ranges(dataclass):
    """{name: (default, least, most)} of the flags that a dataclass declares."""
    return {
        f.name: (f.default, f.metadata["least"], f.metadata["most"]) for f in options(dataclass)
    }


def units_of(corpus, split):
    """Documents of each unit of a split, nulls left out."""
    for shard, group, low, high in corpus.units[split]:
        (texts,) = corpus.read_groups(shard, group, 1)
        yield [text for text in texts[low:high] if text is not None]


def texts_of(corpus, split):
    """Documents of a split."""
    return list(chain.from_iterable(units_of(corpus, split)))


def small_config(**fields):
    """Two heads of 16, four layers with windows 128, 128, 128, 256."""
    return GPTConfig.from_depth(
        4, 8, 16, **{"sequence_len": 256, "vocab_size": 320, "bigram_embed_factor": 3, **fields}
    )


def not_looked_up(model, tokens):
    """{table: a mask (R, 1) of its rows that a training pass of these tokens does not look up}."""
    absent = {}
    for rows, tables in model.lookups(tokens):
        mask = torch.ones(len(tables[0]), 1, dtype=torch.bool)
        mask[rows.flatten()] = False
        absent |= dict.fromkeys(tables, mask)
    return absent


def random_model(config, dtype=torch.float64, seed=0, device="cpu"):
    """A GPT whose every parameter is random and large enough to matter."""
    model = GPT(config, dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, device=device) * 0.2)
        model.resid_lambdas.add_(1)
    return model.eval()
