import json

import pytest
import torch

from nanofuse.train.data.__main__ import main
from nanofuse.train.data.corpus import StdlibCorpus
from nanofuse.train.data.tokenizer import BOS, SPECIAL_TOKENS, Tokenizer, train_on_corpus
from nanofuse.train.errors import UserError
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
        assert ids.dtype == "int32" and len(ids.base or ids) <= ids.nbytes  # keeps nothing else
        assert ids.tolist() == [tokenizer.bos, *tokenizer.encode(text)]
        assert tokenizer.bos not in ids[1:].tolist()


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
    assert lengths.shape == (320,) and lengths.dtype == torch.int64
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


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(UserError, match="--vocab-size 264 is below the minimum of 265"):
        Tokenizer.train(["text"], 264)
    assert Tokenizer.train(["text"], 265).vocab_size == 265


def test_a_small_corpus_gives_fewer_tokens():
    assert Tokenizer.train(["ab"], 1000).vocab_size < 300


def test_training_stops_at_the_character_budget():
    class Counting(StdlibCorpus):
        read_units = 0

        def read(self, split, unit):
            self.read_units += 1
            assert split == "train"
            return super().read(split, unit)

    corpus = Counting()
    train_on_corpus(corpus, 300, max_chars=1000)
    assert corpus.read_units <= 2


def test_command_writes_a_tokenizer(data_dir, capsys):
    (data_dir / "tokenizer.json").unlink()
    main(["train-tokenizer", "--data", str(data_dir), "--vocab-size", "300"])
    assert Tokenizer.load(data_dir / "tokenizer.json").vocab_size == 300
    assert "300 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="--data"):
        main(["train-tokenizer", "--data", "stdlib"])
