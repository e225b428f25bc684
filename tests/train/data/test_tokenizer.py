import base64
import json
import os
import random
import runpy
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rustbpe

from nanofuse.train.data import tokenizer as module
from nanofuse.train.data.__main__ import main
from nanofuse.train.data.corpus import ParquetCorpus, StdlibCorpus
from nanofuse.train.data.tokenizer import (
    BOS,
    MAX_BLANKS,
    MAX_VOCAB_SIZE,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    Tokenizer,
    cut_blanks,
    train_on_corpus,
)
from nanofuse.train.errors import UserError
from nanofuse.train.schemas import MAX_FILE_BYTES
from nanofuse.train.start import find_tokenizer
from tests.helpers import documents

TEXTS = ["", "the cat", "naïve 日本語 🎉", "x = 12345\n\n\tif y:", "<|bos|> is text here", " " * 9]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


ORDINARY = [text for text in TEXTS if BOS not in text] + ["<|user_start|>", "<|bo", "s|> "]


@pytest.mark.parametrize(
    "texts",
    [TEXTS, ORDINARY, ORDINARY[::-1], ["", "", ""], [BOS], [], *([text] for text in TEXTS)],
    ids=lambda texts: f"{len(texts)} texts, {texts[:1]}",
)
def test_a_document_is_bos_and_its_text(tokenizer, texts):
    """Whatever its neighbours; special tokens in text stay text."""
    found = tokenizer.encode_documents(texts)
    for ids, text in zip(found, texts, strict=True):
        assert ids.dtype == tokenizer.dtype == "uint16"
        assert ids.tolist() == [tokenizer.bos, *tokenizer.encode(text)]
        assert tokenizer.bos not in ids[1:].tolist()


def test_no_document_has_no_token(tokenizer):
    for texts in [["", None, "cat"], [None, BOS], [None], []]:
        tokens, offsets = tokenizer.encode_flat(texts)
        assert len(offsets) == len(texts) + 1 and offsets[-1] == len(tokens)
        for text, start, end in zip(texts, offsets, offsets[1:], strict=False):
            expected = [] if text is None else [tokenizer.bos, *tokenizer.encode(text)]
            assert tokens[start:end].tolist() == expected


def test_documents_share_one_call(tokenizer, monkeypatch):
    calls = []
    encode = tokenizer.encoding.encode_to_numpy
    monkeypatch.setattr(
        tokenizer.encoding,
        "encode_to_numpy",
        lambda text, **options: calls.append(text) or encode(text, **options),
    )
    tokenizer.encode_documents(ORDINARY)
    assert len(calls) == 1


def test_vocabulary(tokenizer):
    assert tokenizer.vocab_size == 320
    assert tokenizer.bos == 320 - len(SPECIAL_TOKENS) and len(SPECIAL_TOKENS) == 9
    assert tokenizer.decode([tokenizer.bos]) == BOS


def test_numbers_split_after_two_digits():
    tokenizer = Tokenizer.train(["1234 1234 1234 1234"] * 50, 300)
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("1234")]
    assert pieces == ["12", "34"]


def test_token_bytes_sum_to_the_text(tokenizer):
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (320,) and lengths.dtype == np.int64
    for text, ids in zip(TEXTS, tokenizer.encode_documents(TEXTS), strict=True):
        assert lengths[ids.tolist()].sum() == len(text.encode())


def test_saved_as_json_and_read_back(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert isinstance(json.loads(path.read_text()), dict)
    again = Tokenizer.load(path)
    assert again.fingerprint == tokenizer.fingerprint
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_training_is_deterministic():
    a, b = (Tokenizer.train(documents(50), 300) for _ in range(2))
    assert a.fingerprint == b.fingerprint


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '{"format": "other"}', "not json"])
def test_damaged_files_are_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(path)
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "absent.json")


def test_damaged_data_is_not_the_tokenizers_fault(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [" ".join(documents(9, seed=seed)) for seed in range(40)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=10)
    content = bytearray(path.read_bytes())
    content[200:900] = os.urandom(700)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^shard .*a\.parquet is damaged .*; copy it anew"):
        train_on_corpus(ParquetCorpus(path), 300)


@pytest.mark.parametrize("text", ["", None])
def test_no_tokenizer_is_made_of_no_text(tmp_path, text):
    """It would stay beside the data, and serve it once the data is mended."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([text] * 40, pa.string())}), path)
    with pytest.raises(UserError, match="no training document holds text; name another --data"):
        main(["train-tokenizer", "--data", str(path), "--vocab-size", "300"])
    assert os.listdir(tmp_path) == ["a.parquet"]


def test_a_tokenizer_that_could_not_be_kept_is_not_trained(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": documents(40)}), path)
    monkeypatch.setattr(os, "access", lambda folder, mode: False)
    with pytest.raises(UserError, match=r"a\.parquet\.tokenizer\.json cannot be written; copy"):
        main(["train-tokenizer", "--data", str(path), "--vocab-size", "300"])


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(UserError, match="--vocab-size 264 is below the minimum of 265"):
        Tokenizer.train(["text"], 264)
    assert Tokenizer.train(["text"], 265).vocab_size == 265


def test_a_small_corpus_gives_fewer_tokens():
    assert Tokenizer.train(["ab"], 1000).vocab_size < 300


def test_training_stops_at_the_character_budget():
    class Counting(StdlibCorpus):
        documents = 0

        def head(self):
            for text in super().head():
                self.documents += 1
                yield text

    corpus = Counting()
    train_on_corpus(corpus, 300, max_chars=1000)
    assert 1 < corpus.documents < 20


@pytest.mark.parametrize(
    ("max_chars", "doc_cap"), [(10**9, 10**9), (10**9, 40), (3000, 40), (3000, 10**9), (1, 1)]
)
def test_merges_are_those_of_the_documents_cut_and_counted_by_hand(data_dir, max_chars, doc_cap):
    """Cut first, then counted; the one that takes the sum beyond the limit is the last, whole."""
    texts, total = [], 0
    for path in (data_dir / "shard_00000.parquet", data_dir / "shard_00001.parquet"):
        for text in pq.read_table(path)["text"].to_pylist():
            if total <= max_chars:
                texts.append(text[:doc_cap])
                total += len(texts[-1])
    assert (total > max_chars) == (max_chars < 10**9)
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), 330 - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    seen = []
    found = train_on_corpus(ParquetCorpus(data_dir), 330, max_chars, doc_cap, seen.append)
    assert found.tokens == [bytes(token) for token, _ in ranks]
    assert seen == [len(text) for text in texts]


def test_the_limits_of_training_are_flags(data_dir):
    path = data_dir / "tokenizer.json"
    argv = ["train-tokenizer", "--data", str(data_dir), "--vocab-size", "300"]
    tokens = {}
    for flags in ((), ("--max-chars", "500"), ("--doc-cap", "3"), ("--doc-cap", "10000")):
        main([*argv, *flags])
        tokens[flags] = Tokenizer.load(path).fingerprint
    assert len(set(tokens.values())) == 3 and tokens[()] == tokens["--doc-cap", "10000"]


def test_command_writes_a_tokenizer(data_dir, capsys):
    (data_dir / "tokenizer.json").unlink()
    main(["train-tokenizer", "--data", str(data_dir), "--vocab-size", "300"])
    assert Tokenizer.load(data_dir / "tokenizer.json").vocab_size == 300
    out = capsys.readouterr().out
    assert "300 tokens" in out and "in place of" not in out
    main(["train-tokenizer", "--data", str(data_dir), "--vocab-size", "301"])
    assert "in place of the one that was there" in capsys.readouterr().out
    with pytest.raises(UserError, match="--data"):
        main(["train-tokenizer", "--data", "stdlib"])


RUNS = {
    "spaces": " ",
    "tabs": "\t",
    "ideographic": "\u3000",
    "no-break": "\u00a0",
    "mixed": " \t\u3000\u00a0",
    "newlines": "\n",
}
LONG = 1_100_000


@pytest.fixture(scope="module")
def tokenizer_of_blanks():
    """One that has tokens of many blanks."""
    return Tokenizer.train([f"x{unit * 999}y" for unit in RUNS.values()], 400)


@pytest.mark.parametrize("unit", RUNS.values(), ids=RUNS)
def test_a_million_blanks_come_back(tokenizer_of_blanks, unit):
    """Alone, and in the middle of a text among others."""
    tokenizer, run = tokenizer_of_blanks, unit * (LONG // len(unit))
    assert tokenizer.decode(tokenizer.encode(run)) == run
    texts = ["the cat", f"a{run}b", f"{BOS} is text here", ""]
    for ids, text in zip(tokenizer.encode_documents(texts), texts, strict=True):
        assert ids[0] == tokenizer.bos and ids.dtype == np.uint16
        assert tokenizer.decode(ids[1:].tolist()) == text


@pytest.mark.parametrize("unit", [" ", " \t\u3000\u00a0"])
def test_a_tokenizer_learns_from_a_million_blanks(unit):
    text = "the cat" + unit * (LONG // len(unit)) + "sat"
    tokenizer = Tokenizer.train([text, *documents(50)], 300)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_only_runs_that_are_too_long_are_cut():
    assert cut_blanks("") == [""]
    text = "a b\n" * MAX_BLANKS
    assert cut_blanks(text) == [text]
    for length in (MAX_BLANKS - 1, MAX_BLANKS, MAX_BLANKS + 1, 3 * MAX_BLANKS + 7):
        for before in (0, 1, MAX_BLANKS // 2 - 1, MAX_BLANKS // 2 + 5):
            text = "x" * before + " " * length + "y z"
            pieces = cut_blanks(text)
            assert "".join(pieces) == text and len(pieces) == max(-(-length // MAX_BLANKS), 1)
            assert all(len(p) - len(p.strip()) <= MAX_BLANKS for p in pieces)


def test_tokens_of_other_texts_are_those_of_the_library(tokenizer):
    """Ordinary text, and runs of blanks as long as it can take them."""
    for text in [*TEXTS, *documents(30), "a" + " " * 400_000 + "b", "words " * 200_000]:
        expected = tokenizer.encoding.encode_ordinary(text)
        assert tokenizer.encode(text) == expected
        if BOS not in text:
            assert tokenizer.encode_documents([text])[0].tolist() == [tokenizer.bos, *expected]


def test_training_on_ordinary_text_is_that_of_the_library():
    trainer = rustbpe.Tokenizer()
    texts = documents(100)
    trainer.train_from_iterator(texts, 300 - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    assert Tokenizer.train(texts, 300).tokens == [bytes(token) for token, _ in ranks]


def test_a_panic_of_the_library_is_an_error_with_a_name(tokenizer, monkeypatch):
    """What the cuts do not know of: a panic is a BaseException, which ends threads silently."""
    monkeypatch.setattr(module, "cut_blanks", lambda text: [text])
    text = "x" + " " * LONG + "y"
    with pytest.raises(UserError, match="failed on a text of 1,100,002 characters"):
        tokenizer.encode(text)
    with pytest.raises(UserError, match="failed on 1 documents of 1,100,002 characters"):
        tokenizer.encode_documents([text])
    with pytest.raises(UserError, match="failed on the text to train on"):
        Tokenizer.train([text], 300)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
def test_what_is_no_failure_of_the_library_stays_what_it_is(error):
    with pytest.raises(error), module.naming_failures("a text"):
        raise error("stopped")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # runpy's
def test_the_old_command_is_the_new_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.tokenizer", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("nanofuse.train.tokenizer", run_name="__main__")
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and "train-tokenizer" in out and "--max-chars" in out
    assert err == "train.tokenizer is now called train.data train-tokenizer\n"


def spoilt(tokenizer):
    """{what: fields of a tokenizer file that is none}"""
    whole = json.loads(tokenizer.to_json())
    tokens = whole["tokens"]

    def encoded(raw):
        return base64.b64encode(raw).decode()

    changes = {
        "empty pattern": {"pattern": ""},
        "pattern that matches nothing": {"pattern": "a*"},
        "pattern of blanks at the end": {"pattern": r"\s*$|[^\s]+|\s+"},
        "pattern that leaves digits out": {"pattern": r"\p{L}+|[^\p{L}\p{N}]+"},
        "pattern that leaves newlines out": {"pattern": ".+"},
        "open bracket": {"pattern": "(a"},
        "unknown class": {"pattern": r"\p{Nonsense}+|."},
        "repeats": {"pattern": r"(?:(?!a)b){100000000}|[\s\S]"},
        "nested repeats": {"pattern": r"(((a{99}){99}){99}){99}|[\s\S]"},
        "long pattern": {"pattern": SPLIT_PATTERN + "|x" * 10_000},
        "pattern of another type": {"pattern": 3},
        "no pattern": {"pattern": None},
        "missing byte": {"tokens": [t for t in tokens if t != encoded(b"A")] + [encoded(b"zzzz")]},
        "twice": {"tokens": [*tokens, tokens[300]]},
        "byte twice": {"tokens": [*tokens, tokens[5]]},
        "empty token": {"tokens": [*tokens, ""]},
        "no base64": {"tokens": [*tokens, "a?b="]},
        "base64 cut short": {"tokens": [*tokens, "YWJjZ"]},
        "token that is a number": {"tokens": [*tokens, 7]},
        "token that is null": {"tokens": [*tokens, None]},
        "no tokens": {"tokens": []},
        "tokens of another type": {"tokens": dict.fromkeys(tokens, 1)},
        "other specials": {"special_tokens": ["<|bos|>"]},
        "specials of another type": {"special_tokens": "<|bos|>"},
        "other format": {"format": "nanofuse-bpe-99"},
        "format of another type": {"format": ["nanofuse-bpe-1"]},
        "unknown field": {"from_the_future": 1},
        "asked size of another type": {"asked_vocab_size": "many"},
        "absurd asked size": {"asked_vocab_size": 2**70},
        "negative asked size": {"asked_vocab_size": -1},
    }
    texts = {what: json.dumps({**whole, **change}) for what, change in changes.items()}
    for name in whole:
        texts[f"without {name}"] = json.dumps({n: v for n, v in whole.items() if n != name})
    return texts | {
        "cut short": tokenizer.to_json()[:-20],
        "list": json.dumps([whole]),
        "deep": "[" * 100_000,
        "long number": '{"asked_vocab_size": ' + "9" * 10_000 + "}",
        "NaN": tokenizer.to_json().replace('"format"', '"asked_vocab_size": NaN, "format"'),
        "surrogate": json.dumps(whole).replace(r"\\s+(?!", r"\ud800\\s+(?!"),
    }


def test_files_that_are_no_tokenizers_are_refused(tokenizer, tmp_path, capfd):
    """In one line that names the file, and without a word of the native libraries."""
    path = tmp_path / "tokenizer.json"
    for what, text in spoilt(tokenizer).items():
        path.write_text(text)
        with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer of nano") as error:
            Tokenizer.load(path)
        message = str(error.value)
        assert "\n" not in message and len(message) < 500, what
        assert "delete" not in message
    path.write_bytes(b"\xff" + tokenizer.to_json().encode())
    with pytest.raises(UserError, match="is not a tokenizer"):
        Tokenizer.load(path)
    assert "panicked" not in capfd.readouterr().err


def test_random_edits_of_a_file_load_or_are_refused(tokenizer, tmp_path):
    """Bytes changed, dropped and doubled: no other exception, and what loads gives text back."""
    path, draw = tmp_path / "tokenizer.json", random.Random(0)
    whole = tokenizer.to_json().encode()
    refused = 0
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(400 if draw.random() < 0.5 else len(content))
            kind = draw.randrange(3)
            content[at : at + kind] = bytes([draw.randrange(256)]) * (2 - kind)
        path.write_bytes(content)
        try:
            loaded = Tokenizer.load(path)
        except UserError as error:
            assert "tokenizer.json" in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert all(loaded.decode(loaded.encode(text)) == text for text in TEXTS)
    assert refused > 50


def test_an_absurd_file_is_not_read(tmp_path):
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(UserError, match="67,108,865 bytes"):
        Tokenizer.load(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a regular file"):
        Tokenizer.load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="not a regular file"):
        Tokenizer.load(path)


def test_patterns_of_others_load(tokenizer, tmp_path):
    """GPT-2's, GPT-4's and one that takes single characters."""
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for pattern in (gpt2, SPLIT_PATTERN.replace("{1,2}", "{1,3}"), r"[\s\S]"):
        Tokenizer(tokenizer.tokens, pattern).save(tmp_path / "tokenizer.json")
        loaded = Tokenizer.load(tmp_path / "tokenizer.json")
        assert loaded.pattern == pattern
        assert all(loaded.decode(loaded.encode(text)) == text for text in TEXTS)


@pytest.mark.parametrize("size", [MAX_VOCAB_SIZE + 1, 2**63, 2**200, 0, -1])
def test_absurd_sizes_are_refused(size):
    with pytest.raises(UserError, match=f"--vocab-size {size} is (above|below) the m"):
        Tokenizer.train(["text"], size)


def two_shards(folder, texts):
    folder.mkdir()
    for name in "ab":
        pq.write_table(pa.table({"text": texts}), folder / f"{name}.parquet")
    return ParquetCorpus(folder)


def test_fewer_tokens_than_asked_for_are_said_and_the_same_size_works_again(tmp_path, capsys):
    corpus = two_shards(tmp_path / "data", documents(20))
    first = find_tokenizer(corpus, 5000, True)
    out = capsys.readouterr().out
    words = f"{first.vocab_size:,} tokens are all that the text gave of the 5,000"
    assert first.vocab_size < 5000 and words in out
    again = find_tokenizer(corpus, 5000, True)
    assert again.fingerprint == first.fingerprint and words in capsys.readouterr().out
    assert find_tokenizer(corpus, first.vocab_size, True).tokens == first.tokens
    with pytest.raises(UserError, match="--vocab-size 4000: .*drop the flag"):
        find_tokenizer(corpus, 4000, True)


def test_a_tokenizer_of_another_size_than_the_default_is_said(tmp_path, capsys):
    corpus = two_shards(tmp_path / "data", documents(20))
    find_tokenizer(corpus, 300, True)
    capsys.readouterr()
    assert find_tokenizer(corpus, 4096, False).vocab_size == 300
    out = capsys.readouterr().out
    assert "has 300 tokens, not the default of 4,096; move that file away" in out
    find_tokenizer(corpus, 300, False)
    assert not capsys.readouterr().out


def test_what_was_asked_for_is_saved_and_is_no_part_of_the_fingerprint(tmp_path, tokenizer):
    few = Tokenizer.train(["ab"], 1000)
    few.save(tmp_path / "few.json")
    again = Tokenizer.load(tmp_path / "few.json")
    assert again.asked_vocab_size == 1000 and again.fingerprint == few.fingerprint
    assert Tokenizer(few.tokens).fingerprint == few.fingerprint
    assert "asked_vocab_size" not in tokenizer.to_json() and tokenizer.shortfall is None


def test_the_command_says_fewer_tokens(tmp_path, capsys):
    corpus = two_shards(tmp_path / "data", documents(20))
    main(["train-tokenizer", "--data", str(corpus.directory), "--vocab-size", "5000"])
    assert "of the 5,000" in capsys.readouterr().out
    main(["train-tokenizer", "--data", str(corpus.shards[0]), "--vocab-size", "300"])
    assert Tokenizer.load(tmp_path / "data" / "a.parquet.tokenizer.json").vocab_size == 300


def test_no_traceback_from_the_command(tmp_path):
    """As a user meets it: exit 2 and a line."""
    (tmp_path / "data").mkdir()
    command = [sys.executable, "-m", "nanofuse.train.data", "train-tokenizer", "--data", "data"]
    root = str(module.__file__).split("/train/data/")[0]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "0 parquet" in done.stderr
