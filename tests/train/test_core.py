"""CORE against an implementation without batches, and what padding, crops and ranks do to it."""

import itertools
import math

import pytest
import torch

from nanofuse.train.core import (
    Sequence,
    batches_of,
    common_prefix,
    evaluate_core,
    is_right,
    padded_length,
    prompts_of,
    score_batch,
    sequences_of,
)
from nanofuse.train.core_bundle import Language, Task, load_bundle
from nanofuse.train.ranks import Alone
from tests.helpers import random_model, small_config
from tests.train.bundles import BASELINES, write_bundle
from tests.train.plain_core import plain_core

CONFIG = {
    "words": ("multiple_choice", 2, "\nAnswer: "),
    "who": ("schema", 2, " "),
    "copy": ("language_modeling", 2, " "),
}


@pytest.fixture(scope="module")
def model():
    return random_model(small_config())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("core") / "bundle")


def likeliest(model, tokenizer, task, index):
    """The token that the model puts behind an example of language modelling."""
    (sequence,) = sequences_of(task, index, tokenizer, 2560)
    with torch.no_grad():
        return int(model(torch.tensor([sequence.tokens[: sequence.start]]))[0, -1].argmax())


@pytest.mark.parametrize("most", [None, 4])
def test_agrees_with_the_plain_one(model, tokenizer, bundle, most):
    tasks = load_bundle(bundle, most or -1)
    accuracies, core = plain_core(model, tokenizer, bundle, CONFIG, BASELINES, most)
    for batch in (1, 300, 10**6):
        found = evaluate_core(model, tokenizer, tasks, batch)
        assert {label: t["accuracy"] for label, t in found["tasks"].items()} == accuracies
        assert found["core"] == pytest.approx(core, abs=1e-12)
    assert 0 < accuracies["words"] < 1 and 0 < accuracies["who"] < 1
    assert [t["examples"] for t in found["tasks"].values()] == [most or 7] * 3


def test_scores_are_those_of_each_sequence_alone(model, tokenizer, bundle):
    """Means, and whether each token is the likeliest, against all logits; padding, its token and
    the rows beside change nothing."""
    words, _, copy = load_bundle(bundle)
    sequences = [s for i in range(3) for s in sequences_of(words, i, tokenizer, 2560)]
    known = likeliest(model, tokenizer, copy, 0)
    (asked,) = sequences_of(copy, 0, tokenizer, 2560)
    sequences.append(Sequence([*asked.tokens[: asked.start], known], asked.start))  # is right
    sequences.append(Sequence(sequences[0].tokens, len(sequences[0].tokens)))  # nothing to say
    scores = score_batch(model, sequences, tokenizer.bos)
    for sequence, (mean, right) in zip(sequences, scores, strict=True):
        with torch.no_grad():
            nats = -model(torch.tensor([sequence.tokens]))[0].log_softmax(-1)  # (T, V)
        at = range(sequence.start, len(sequence.tokens))
        targets = [sequence.tokens[i] for i in at]
        alone = [float(nats[i - 1, token]) for i, token in zip(at, targets, strict=True)]
        if alone:
            assert mean == pytest.approx(sum(alone) / len(alone), rel=1e-6)
        likely = [int(nats[i - 1].argmin()) for i in at]
        assert right == (likely == targets)
    assert scores[-2][1] and scores[-1] == (float("inf"), True)
    assert not all(right for _, right in scores)
    assert score_batch(model, sequences, 5) == scores


def test_a_long_sequence_keeps_its_end(model, tokenizer, bundle):
    task = load_bundle(bundle)[0]
    whole = sequences_of(task, 0, tokenizer, 10**6)
    for most in (40, 2):
        for sequence, cropped in zip(whole, sequences_of(task, 0, tokenizer, most), strict=True):
            assert cropped.tokens == sequence.tokens[-most:]
            gone = len(sequence.tokens) - len(cropped.tokens)
            assert gone > 0 and cropped.start == max(sequence.start - gone, 1)
    small = random_model(small_config(sequence_len=9))
    room = small.cos.size(0)  # less than a batch is padded to
    mean, _ = score_batch(small, [Sequence([tokenizer.bos] * room, room - 1)], 0)[0]
    assert room % 64 and math.isfinite(mean)


def test_prompts_of_language_modelling(tokenizer):
    """Contexts lose the blanks around them, and a prompt the one at its end."""
    examples = [
        Language(context=" a mat\n", continuation="sat"),
        Language(context="the cat ", continuation="fell on"),
    ]
    task = Task("t", "language_modeling", 1, " ", 0.0, examples)
    assert prompts_of(task, 0) == ["the cat fell on\n\na mat", "the cat fell on\n\na mat sat"]
    (sequence,) = sequences_of(task, 0, tokenizer, 99)
    before, whole = (tokenizer.encode(text) for text in prompts_of(task, 0))
    assert sequence == Sequence([tokenizer.bos, *whole], 1 + len(before))


def test_batches():
    lengths = [5, 64, 65, 200, 1]
    sequences = [Sequence([0] * n, 1) for n in lengths]
    assert batches_of(sequences, 256) == [[3], [2, 1], [0, 4]]
    assert batches_of(sequences, 1) == [[3], [2], [1], [0], [4]]
    assert batches_of([], 8) == []
    assert [padded_length(n) for n in (1, 64, 65)] == [64, 64, 128]
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert common_prefix([[1, 2, 3], [1, 5, 3]]) == 1


def test_the_first_of_equal_ones_is_taken(bundle):
    task = load_bundle(bundle)[0]
    for gold in range(3):
        example = task.examples[0].model_copy(update={"gold": gold})
        assert is_right(task, example, [(2.0, False), (1.0, False), (1.0, True)]) == (gold == 1)


class OneOf(Alone):
    """A rank of several, which leaves its part of each task and hears of no other."""

    def __init__(self, rank, world):
        self.rank, self.world, self.main, self.parts = rank, world, rank == 0, []

    def agree(self, count):
        return (count + 2,)  # another has more batches

    def collect(self, thing):
        self.parts.append(thing)
        return [thing]


def test_ranks_share_the_examples(model, tokenizer, bundle):
    tasks = load_bundle(bundle)
    whole = OneOf(0, 1)
    evaluate_core(model, tokenizer, tasks, 500, whole)
    ranks = [OneOf(rank, 3) for rank in range(3)]
    failures = []
    for each in ranks:
        evaluate_core(model, tokenizer, tasks, 500, each, failures.append)
    assert set(failures) == {None}
    for one, *parts in zip(whole.parts, *(each.parts for each in ranks), strict=True):
        assert sorted(itertools.chain(*parts)) == one and len(one) == 7


def test_a_failure_is_for_all_to_decide(model, tokenizer, bundle):
    class Gone(Exception):
        pass

    def decide(failure):
        seen.append(failure)
        if failure:
            raise Gone from failure

    seen, task = [], load_bundle(bundle)[0]
    model.train()
    with pytest.raises(Gone):
        evaluate_core(model, None, [task], 500, decide=decide)  # no tokenizer
    assert model.training and isinstance(seen[-1], AttributeError)
    model.eval()


def test_backends_for_one_length_are_passed_over(model, tokenizer, bundle):
    class Fixed:
        any_length = False

    tasks, before = load_bundle(bundle, 2), model.attention
    try:
        model.attention = fixed = Fixed()
        assert evaluate_core(model, tokenizer, tasks, 500)["core"] <= 1
        assert model.attention is fixed
    finally:
        model.attention = before
