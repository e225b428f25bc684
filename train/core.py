"""CORE: how a model does in DCLM's tasks, as nanochat measures it.

An example is asked behind `shots` others that are answered. Of a multiple choice the model takes
the continuation, of a schema the context, that gives the continuation's tokens the lowest mean
loss. A language modelling example is right where every token of the continuation is the likeliest
one. Then

    centred accuracy = (accuracy - baseline / 100) / (1 - baseline / 100)
    CORE = mean of the centred accuracies of all tasks

The weights are used as evaluation uses them, in bf16 or fp32, never FP8. Sequences of all examples
of a task are sorted by length and batched, padded on the right, where no position before looks; the
logits of the continuations' positions alone are made.

Sources: DCLM (https://arxiv.org/abs/2406.11794); nanochat's evals/core.py for prompts, seeds and
what of a tie or a sequence too long.
"""

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanofuse.train.bpb import raise_failure
from nanofuse.train.ranks import ALONE

SHOTS_SEED = 1234  # plus the example's place in its task
LENGTH_MULTIPLE = 64  # of a batch's rows, so that few shapes occur
BATCH_TOKENS = 32768  # of a batch, at most
MOST_LOGITS = 2**26  # made at once: 256 MiB in fp32


@dataclass(frozen=True)
class Sequence:
    """Tokens, of which those from `start` on are the continuation; never the first one."""

    tokens: list
    start: int


def shots_of(task, index):
    """The answered examples before the one at `index`, drawn from the others of its task."""
    others = [i for i in range(len(task.examples)) if i != index]
    drawn = random.Random(SHOTS_SEED + index).sample(others, min(task.shots, len(others)))
    return [task.examples[i] for i in drawn]


def answered(task, example):
    """An example with its right answer, as a shot."""
    if task.kind == "multiple_choice":
        context, continuation = example.query, example.choices[example.gold]
    elif task.kind == "schema":
        context, continuation = example.context_options[example.gold], example.continuation
    else:
        context, continuation = example.context.strip(), example.continuation
    return f"{context}{task.delimiter}{continuation}\n\n"


def prompts_of(task, index):
    """The texts to compare for the example at `index`: one per choice or context; of language
    modelling the text without the continuation and the one with it."""
    example = task.examples[index]
    before = "".join(answered(task, shot) for shot in shots_of(task, index))
    if task.kind == "multiple_choice":
        return [f"{before}{example.query}{task.delimiter}{text}" for text in example.choices]
    if task.kind == "schema":
        tail = f"{task.delimiter}{example.continuation}"
        return [f"{before}{context}{tail}" for context in example.context_options]
    without = f"{before}{example.context.strip()}{task.delimiter}"
    # a blank at its end would be a part of the continuation's first token
    return [without.strip(), without + example.continuation]


def common_prefix(rows):
    """Length of what lists have in common at their start."""
    for length, tokens in enumerate(zip(*rows, strict=False)):
        if len(set(tokens)) > 1:
            return length
    return min(map(len, rows))


def sequences_of(task, index, tokenizer, most):
    """The Sequences of an example, as far as `most` tokens go: of a longer one the last."""
    rows = [[tokenizer.bos, *tokenizer.encode(text)] for text in prompts_of(task, index)]
    if task.kind == "schema":
        shared = common_prefix([row[::-1] for row in rows])
        starts = [len(row) - shared for row in rows]
    else:
        starts = [common_prefix(rows)] * len(rows)
    if task.kind == "language_modeling":
        rows, starts = rows[1:], starts[1:]
    found = []
    for row, start in zip(rows, starts, strict=True):
        cropped = max(len(row) - most, 0)
        found.append(Sequence(row[cropped:], max(start - cropped, 1)))
    return found


def batches_of(sequences, most_tokens):
    """Indices of sequences in batches of similar length, the longest first; a batch has at most
    `most_tokens` positions with its padding, or a single sequence."""
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i].tokens), i))
    batches = []
    for index in order:
        if batches:
            longest = padded_length(len(sequences[batches[-1][0]].tokens))
            if (len(batches[-1]) + 1) * longest <= most_tokens:
                batches[-1].append(index)
                continue
        batches.append([index])
    return batches


def padded_length(length):
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


@torch.no_grad()
def score_batch(model, sequences, pad):
    """(mean loss of the continuation in nats, whether each of its tokens is the likeliest) of
    every sequence; (inf, True) where there is no continuation.

    Args:
        model: GPT in evaluation mode.
        pad: token behind the end of the shorter ones; none of it counts.
    """
    device = model.resid_lambdas.device
    longest = min(padded_length(max(len(s.tokens) for s in sequences)), model.cos.size(0))
    rows = [s.tokens + [pad] * (longest - len(s.tokens)) for s in sequences]
    tokens = torch.tensor(rows, device=device)  # (B, T)
    x = model.hidden(tokens)  # (B, T, C)
    counts = [len(s.tokens) - s.start for s in sequences]
    places = [
        row * longest + position - 1  # what predicts a token is the position before it
        for row, s in enumerate(sequences)
        for position in range(s.start, len(s.tokens))
    ]
    places = torch.tensor(places, dtype=torch.int64, device=device)  # (P,)
    x = x.reshape(-1, x.size(-1))[places]  # (P, C)
    targets = tokens.reshape(-1)[places + 1]  # (P,)
    losses, hits = [], []
    size = max(MOST_LOGITS // model.config.padded_vocab_size, 1)
    for part, right in zip(x.split(size), targets.split(size), strict=True):
        logits = model.pieces.head(part[None])[0]  # (P, V) fp32
        losses.append(F.cross_entropy(logits, right, reduction="none"))
        hits.append(logits.argmax(dim=-1) == right)
    losses = torch.cat(losses).double().cpu().split(counts)
    hits = torch.cat(hits).cpu().split(counts)
    means = [part.mean().item() if len(part) else math.inf for part in losses]
    return list(zip(means, [bool(part.all()) for part in hits], strict=True))


def is_right(task, example, scores):
    """Whether an example is answered rightly, by the scores of its sequences; the first of equal
    ones is taken."""
    if task.kind == "language_modeling":
        return scores[0][1]
    means = [mean for mean, _ in scores]
    return means.index(min(means)) == example.gold


def right_answers(model, tokenizer, task, most_tokens, ranks, decide, note):
    """This rank's part of a task, every world-th example: [(index, whether it is right)]."""
    failure, sequences, owners, batches = None, [], [], []
    own = range(ranks.rank, len(task.examples), ranks.world)
    try:
        for index in own:
            found = sequences_of(task, index, tokenizer, model.cos.size(0))
            sequences += found
            owners += [index] * len(found)
        batches = batches_of(sequences, most_tokens)
    except BaseException as error:
        failure = error
    decide(failure)
    scores = [None] * len(sequences)
    for number in range(ranks.agree(len(batches))[0]):
        failure = None
        try:
            if number < len(batches):
                batch = batches[number]
                found = score_batch(model, [sequences[i] for i in batch], tokenizer.bos)
                for i, score in zip(batch, found, strict=True):
                    scores[i] = score
                note(len(batch))
        except BaseException as error:
            failure = error
        decide(failure)
    by_example = {index: [] for index in own}
    for index, score in zip(owners, scores, strict=True):
        by_example[index].append(score)
    return [(i, is_right(task, task.examples[i], found)) for i, found in by_example.items()]


def evaluate_core(
    model,
    tokenizer,
    tasks,
    most_tokens,
    ranks=ALONE,
    decide=raise_failure,
    note=lambda task, sequences: None,
):
    """CORE of a model, {"core", "tasks": {label: {"accuracy", "centred", "examples"}}}.

    Args:
        model: GPT, the same on every rank; put in evaluation mode and back.
        tokenizer: train.data.tokenizer.Tokenizer.
        tasks: list of train.core_bundle.Task, at least one.
        most_tokens: of a batch, with its padding.
        ranks: those that share the examples.
        decide: as evaluate_bpb's, called after every batch on all ranks at once.
        note: called with the task and the number of sequences of this rank that are done more.
    """
    was_training, attention = model.training, model.attention
    model.eval()
    if not attention.any_length:
        model.attention = model.cached_attention
    found = {}
    try:
        for task in tasks:
            own = right_answers(
                model, tokenizer, task, most_tokens, ranks, decide, lambda n, t=task: note(t, n)
            )
            every = [right for part in ranks.collect(own) for _, right in part]
            accuracy, guessed = sum(every) / len(every), 0.01 * task.baseline
            found[task.label] = {
                "accuracy": accuracy,
                "centred": (accuracy - guessed) / (1 - guessed),
                "examples": len(every),
            }
    finally:
        model.train(was_training)
        model.attention = attention
    return {"core": sum(t["centred"] for t in found.values()) / len(found), "tasks": found}
