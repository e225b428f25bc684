"""Exported tokenizers against tiktoken, and lm-eval on an exported model."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanofuse.train.data.tokenizer import PROBE, SPECIAL_TOKENS, Tokenizer
from nanofuse.train.errors import UserError
from nanofuse.train.hugging_face import fast_tokenizer, merge_of, save_tokenizer
from tests.helpers import documents, small_config
from tests.train.hub import export, needs_lm_eval, needs_transformers

pytestmark = needs_transformers
SOURCE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(Tokenizer of 2,000 tokens, transformers' of its files)."""
    from transformers import AutoTokenizer

    texts = [path.read_text(encoding="utf-8") for path in sorted(SOURCE.glob("train/*.py"))]
    ours = Tokenizer.train([*texts, PROBE * 3, *documents(50)], 2000)
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, ours, 256)
    return ours, AutoTokenizer.from_pretrained(folder)


PIECES = st.sampled_from(
    ["'s", "'LL", "'\u017f", "\u017ft", "\n", "\r\n", "  ", "\t", "123", "\u00bd", "aa", "the"]
    + ["\x00", "\x1c", "\x85", "\u00a0", "\u2028", "\u180e", "e\u0301", "日本", "🎉", "\ufffd"]
    + list(SPECIAL_TOKENS)
)
TEXTS = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"])),
    st.lists(st.one_of(PIECES, st.text("ab '\n0", max_size=4)), max_size=20).map("".join),
    st.text("ab", max_size=80),
)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
@example(text="")
@example(text="".join(map(chr, range(256))))
@example(text="<|bos|>the<|bos|")
def test_ids_are_tiktokens_for_every_text(both, text):
    ours, theirs = both
    ids = ours.encode(text)
    assert theirs(text, add_special_tokens=False).input_ids == ids
    assert theirs(text).input_ids == [ours.bos, *ids]
    special = ours.encoding.encode(text, allowed_special="all")
    asked = {"add_special_tokens": False, "split_special_tokens": False}
    assert theirs(text, **asked).input_ids == special
    assert theirs.decode(special) == text


def test_every_kind_of_character(both):
    """A sample of all code points, each beside letters, digits, blanks and an apostrophe."""
    ours, theirs = both
    for start in range(0, 0x110000, 97 * 64):
        points = range(start, min(start + 97 * 64, 0x110000), 97)
        text = "".join(
            f"a{c}{c}1'{c} {c}\n{c}S" for c in map(chr, points) if not 0xD800 <= ord(c) < 0xE000
        )
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)


def test_tokens_that_are_no_text_decode_alike(both):
    ours, theirs = both
    ids = torch.randint(
        ours.vocab_size, (400,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    assert theirs.decode(ids) == ours.decode(ids)
    assert len(theirs) == ours.vocab_size and theirs.bos_token_id == ours.bos
    assert theirs.all_special_ids == [ours.bos + i for i in range(len(SPECIAL_TOKENS))]


def test_merges_are_the_last_joins():
    ranks = {bytes([b]): b for b in range(256)}
    for token in (b"aa", b"ab", b"aaa", b"cab", b"xyz"):
        ranks[token] = len(ranks)
    assert merge_of(b"aaa", ranks) == (b"aa", b"a")
    assert merge_of(b"cab", ranks) == (b"c", b"ab")
    assert merge_of(b"xyz", ranks) is None  # neither xy nor yz is a token: only a whole piece


def test_tokens_that_no_merge_makes():
    """A table that no training made: a whole piece that is a token is one all the same."""
    tokens = [bytes([b]) for b in range(256)] + [b"xyz", b" xyz", b"aa", b"aaaa", b"aaa"]
    ours = Tokenizer(tokens)
    theirs = fast_tokenizer(ours)
    for text in ("xyz", "xyzz", "q xyz", *("a" * n for n in range(9)), "baaaab"):
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text), text


def test_a_pattern_that_means_something_else_is_refused():
    """{1,2}+ gives nothing back there, and repeats here."""
    tokens = [bytes([b]) for b in range(256)] + [b"23"]
    fast_tokenizer(Tokenizer(tokens, r"\p{N}{1,2}|\P{N}"))
    with pytest.raises(UserError, match="pattern"):
        fast_tokenizer(Tokenizer(tokens, r"\p{N}{1,2}+|\P{N}"))


TASK = """
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@needs_lm_eval
def test_lm_eval_scores_a_local_task_as_we_do(tmp_path, tokenizer):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, folder = export(tmp_path / "m", small_config(), torch.float32, tokenizer)
    rows, task = tmp_path / "rows.jsonl", tmp_path / "tasks" / "local.yaml"
    choices = ["cat", "rain fell loudly"]
    items = [
        {"text": text, "choices": choices, "answer": i % 2} for i, text in enumerate(documents(5))
    ]
    rows.write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    task.parent.mkdir()
    task.write_text(TASK.format(rows=rows), encoding="utf-8")
    scored = HFLM(
        str(folder), trust_remote_code=True, device="cpu", batch_size=4, add_bos_token=True
    )
    found = lm_eval.simple_evaluate(
        scored,
        tasks=["local"],
        task_manager=TaskManager(include_path=str(task.parent), include_defaults=False),
        bootstrap_iters=0,
    )
    right = 0
    for item, sample in zip(items, found["samples"]["local"], strict=True):
        ours = [loglikelihood(model, tokenizer, item["text"], f" {c}") for c in choices]
        theirs = [response[0][0] for response in sample["resps"]]
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-4)
        right += ours[item["answer"]] == max(ours)
    assert found["results"]["local"]["acc,none"] == right / len(items)


@torch.no_grad()
def loglikelihood(model, tokenizer, text, more):
    """Log-likelihood of `more` after a text, in nats."""
    before = len(tokenizer.encode(text)) + 1
    ids = [tokenizer.bos, *tokenizer.encode(text + more)]
    logs = model(torch.tensor([ids]))[0].double().log_softmax(dim=-1)
    return sum(logs[i - 1, ids[i]].item() for i in range(before, len(ids)))
