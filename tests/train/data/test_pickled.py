"""nanochat's tokenizer.pkl: what it means, and that a hostile one does nothing."""

import codecs
import gzip
import io
import os
import pickle
import random
import time
import tracemalloc
from contextlib import redirect_stderr

import pytest
import tiktoken
import torch

from nanofuse.train import convert
from nanofuse.train.command import run_command
from nanofuse.train.data import pickled as module
from nanofuse.train.data.pickled import MAX_BYTES, Reader, load_pickled, pickled
from nanofuse.train.data.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN
from nanofuse.train.errors import UserError
from nanofuse.train.run_folder import run_dir

TEXTS = ["", "the cat", "naïve 日本語 🎉", "x = 12345\n\n\tif y:", "<|bos|> is text here", " " * 9]


class Raw:
    """Pickles to a call with these arguments, and a state if there is one."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def encoding(tokenizer, **state):
    """An encoding as nanochat makes it; `state` in place of what it would be pickled with."""
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    made = tiktoken.Encoding(
        "rustbpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials
    )
    names = {"pat_str": "_pat_str", "mergeable_ranks": "_mergeable_ranks",
             "special_tokens": "_special_tokens", "name": "name"}  # fmt: skip
    for name, value in state.items():
        setattr(made, names[name], value)
    return made


@pytest.mark.parametrize("fix_imports", [True, False])
@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_is_read(tokenizer, tmp_path, protocol, fix_imports):
    made = encoding(tokenizer)
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(made, protocol, fix_imports=fix_imports))
    found = load_pickled(path)
    assert found.fingerprint == tokenizer.fingerprint
    assert [found.encode(text) for text in TEXTS] == [made.encode_ordinary(t) for t in TEXTS]
    assert found.bos == made.encode_single_token("<|bos|>")


def test_what_is_written_is_read_by_pickle(tokenizer):
    found = pickle.loads(pickled(tokenizer))
    assert type(found) is tiktoken.Encoding and found.n_vocab == tokenizer.vocab_size
    assert [found.encode_ordinary(text) for text in TEXTS] == [tokenizer.encode(t) for t in TEXTS]
    assert [found.encode_single_token(name) for name in SPECIAL_TOKENS] == list(range(311, 320))


def hostile(tokenizer, marker):
    """{what: content of a file that is refused}; some would make the file `marker` if run."""
    good = pickled(tokenizer)
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    touch = Raw(os.system, (f"touch {marker}",))
    opened = Raw(open, (str(marker), "w"))

    def spoilt(**state):
        return pickle.dumps(encoding(tokenizer, **state))

    def edited(changes, drop=()):
        return spoilt(mergeable_ranks={t: r for t, r in (ranks | changes).items() if t not in drop})

    nine = b"".join(b"h" + bytes([i, 104, i]) + b"\x86\x94" for i in range(200))
    call = b"cposix\nsystem\n"
    text = f"V touch {marker}\n".encode()
    files = {f"reduce, protocol {p}": pickle.dumps(touch, p) for p in range(6)}
    files |= {
        "open": pickle.dumps(opened),
        "eval": pickle.dumps(Raw(eval, (f"open({str(marker)!r}, 'w')",))),
        "in the ranks": edited({b"zz": touch}),
        "in the specials": spoilt(special_tokens=specials | {"<|x|>": opened}),
        "as pattern": spoilt(pat_str=touch),
        "before the encoding": b"\x80\x04" + call + text + b"\x85R0" + good[2:],
        "after the encoding": good[:-1] + call + text + b"\x85R0.",
        "inst": b"(" + text + b"iposix\nsystem\n.",
        "obj": b"(" + call + text + b"o.",
        "newobj": b"\x80\x02" + call + text + b"\x85\x81.",
        "newobj ex": b"\x80\x04" + call + text + b"\x85}\x92.",
        "persistent id": b"Pposix.system\n.",
        "binary persistent id": b"\x80\x02" + text + b"Q.",
        "extension": b"\x80\x02\x82\x01.",
        "encoding of a name": pickle.dumps(Raw(tiktoken.Encoding, ("gpt2",))),
        "method of the class": b"\x80\x04\x8c\rtiktoken.core\x8c\x11Encoding.__init__\x93.",
        "another object": pickle.dumps(Raw(object.__new__, (tiktoken.Encoding,))),
        "another codec": pickle.dumps(Raw(codecs.encode, ("x", "rot13"))),
        "two states": good[:-1] + b"}b.",
        "only a name": b"\x80\x02ctiktoken.core\nEncoding\n)\x81Vgpt2\nb.",
        "no state": b"\x80\x02ctiktoken.core\nEncoding\n)\x81.",
        "state of another type": b"\x80\x02ctiktoken.core\nEncoding\n)\x81]b.",
        "dict": pickle.dumps({"name": "x"}),
        "list": pickle.dumps([1]),
        "itself": b"\x80\x04}\x94\x8c\x01ah\x00s.",
        "memo of 2**32": b"\x80\x02}r\xff\xff\xff\xff.",
        "memo that is not there": b"\x80\x02h\x07.",
        "bytes of 2**62": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x3f",
        "text of 2**62": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x3f",
        "frame of 2**62": b"\x80\x04\x95" + b"\xff" * 7 + b"\x3f.",
        "number of 2**31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "number of a million digits": b"I" + b"9" * 10**6 + b"\n.",
        "key of 2**200 tuples": b"\x80\x04)\x94" + nine + b"}h\xc8K\x01s.",
        "bytes from one text": b"\x80\x04Vx\n\x94c_codecs\nencode\n\x94Vlatin1\n\x94"
        + b"h\x01h\x00h\x02\x86R" * 1000 + b".",
        "deep": b"(" * 10**6,
        "many values": b"\x80\x04" + b"}" * 10**6,
        "no mark": b"\x80\x02}u.",
        "empty stack": b"\x80\x02s.",
        "odd items": b"\x80\x02}(Vx\nu.",
        "empty": b"",
        "cut short": good[:-100],
        "without its end": good[:-1],
        "gzip": gzip.compress(good),
        "random bytes": random.Random(0).randbytes(1000),
        "JSON": tokenizer.to_json().encode(),
        "no special tokens": spoilt(special_tokens={}),
        "another special token": spoilt(special_tokens=specials | {"<|end|>": 320}),
        "specials in another order": spoilt(
            special_tokens=dict(zip(SPECIAL_TOKENS[::-1], specials.values(), strict=True))
        ),
        "specials in the merges": spoilt(special_tokens=specials | {"<|bos|>": 5}),
        "a hole in the ranks": edited({}, drop=[tokenizer.tokens[300]]),
        "a rank twice": edited({tokenizer.tokens[300]: 299}),
        "a negative rank": edited({tokenizer.tokens[0]: -1}),
        "a rank of 2**80": edited({tokenizer.tokens[-1]: 2**80}),
        "a rank that is True": edited({tokenizer.tokens[1]: True}),
        "a byte missing": edited({b"qqqq": tokenizer.tokens.index(b"A")}, drop=[b"A"]),
        "an empty token": edited({b"": 311}),
        "a token of text": edited({"zz": 311}),
        "no ranks": spoilt(mergeable_ranks={}),
        "a pattern of bytes": spoilt(pat_str=b"."),
        "a pattern that leaves digits out": spoilt(pat_str=r"\p{L}+|[^\p{L}\p{N}]+"),
        "a pattern that is open": spoilt(pat_str="(a"),
        "a pattern of a surrogate": spoilt(pat_str=r"[\s\S]|" + "\ud800"),
        "a pattern without end": spoilt(pat_str="x" * 10**5),
        "another field": good.replace(b"\x8c\x04name", b"\x8c\x04game"),
    }  # fmt: skip
    return files


def said(*argv):
    """(exit code, stderr) of the command."""
    err = io.StringIO()
    with redirect_stderr(err):
        try:
            run_command(lambda: convert.main([*map(str, argv)]))
        except SystemExit as stop:
            return stop.code, err.getvalue()
    return 0, err.getvalue()


def test_hostile_files_are_one_line_and_nothing_is_run(tokenizer, work_dir, capfd):
    """Through the command, which reads the tokenizer first."""
    marker, path = work_dir / "marker", work_dir / "tokenizer.pkl"
    files = hostile(tokenizer, marker)
    assert len(files) > 60
    reasons = {}
    for what, content in files.items():
        path.write_bytes(content)
        started = time.perf_counter()
        code, err = said("from-nanochat", work_dir, "--run", "x", "--tokenizer", path)
        assert time.perf_counter() - started < 2, what
        assert code == 2 and err.count("\n") == 1 and len(err) < 600, (what, err)
        assert err.startswith(f"error: {path} is not nanochat's tokenizer ("), (what, err)
        assert not marker.exists() and not run_dir("x").exists(), what
        reasons[what] = err
    assert "posix.system, which is not looked up" in reasons["reduce, protocol 4"]
    assert "only the name 'gpt2'" in reasons["only a name"]
    assert "not nanochat's nine: <|end|>" in reasons["another special token"]
    assert "300 is missing" in reasons["a hole in the ranks"]
    assert "0x41 has no token" in reasons["a byte missing"]
    assert "panicked" not in capfd.readouterr().err


def test_the_hostile_calls_would_run(tokenizer, tmp_path):
    """With pickle's own reader, so that the test above means something."""
    marker = tmp_path / "marker"
    for what in ("reduce, protocol 0", "open", "before the encoding", "inst", "obj"):
        pickle.loads(hostile(tokenizer, marker)[what])
        assert marker.exists(), what
        marker.unlink()


def test_little_memory_is_taken(tokenizer):
    """By files that claim much; and where a program is long, its opcodes are counted."""
    files = hostile(tokenizer, "marker")
    tracemalloc.start()
    for what, content in files.items():
        if " of 2**" in what or what in ("deep", "many values", "bytes from one text"):
            with pytest.raises(ValueError):
                module._tokenizer(Reader(content).read())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_long_programs_are_not_run_to_their_end(monkeypatch):
    monkeypatch.setattr(module, "MAX_OPCODES", 1000)
    with pytest.raises(ValueError, match="more than 1,000 opcodes"):
        Reader(b"\x80\x04}" + b"\x94" * 10**5 + b".").read()


@pytest.mark.parametrize(
    "program",
    [
        b"c__builtin__\nobject\n)\x81.",  # another class made
        b"ctiktoken.core\nEncoding\n)R.",  # the class called
        b"ctiktoken.core\nEncoding\nN\x85\x81.",  # made with an argument
        b"c_codecs\nencode\nq\x00V" + b"a" * 60 + b"\nq\x01Vlatin1\nq\x02"
        + b"h\x00h\x01h\x02\x86R" * 9 + b".",  # more bytes than the file has
    ],
)  # fmt: skip
def test_only_an_encoding_and_bytes_are_made(program):
    with pytest.raises(ValueError, match="it makes what is neither an encoding nor bytes"):
        Reader(b"\x80\x02" + program).read()


def test_values_at_once_are_bounded():
    with pytest.raises(ValueError, match="puts more than 4,096 values on its stack"):
        Reader(b"\x80\x02" + b"N" * 4097 + b".").read()
    with pytest.raises(ValueError, match="holds no encoding"):
        Reader(b"\x80\x02" + b"N" * 4096 + b".").read()


def test_files_of_another_kind_are_named(tmp_path, work_dir):
    path = tmp_path / "tokenizer.pkl"
    with pytest.raises(UserError, match="no tokenizer at .* --tokenizer"):
        load_pickled(path)
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(UserError, match="33,554,433 bytes"):
        load_pickled(path)
    path.unlink()
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="is not nanochat's tokenizer"):
        load_pickled(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a regular file"):
        load_pickled(path)


def test_random_edits_are_refused_or_give_a_tokenizer(tokenizer):
    draw = random.Random(0)
    refused = 0
    for protocol in (0, 2, 4):
        whole = pickle.dumps(encoding(tokenizer), protocol)
        for _ in range(150):
            content = bytearray(whole)
            for _ in range(draw.randint(1, 3)):
                at = draw.randrange(100 if draw.random() < 0.5 else len(content))
                kind = draw.randrange(3)
                content[at : at + kind] = bytes([draw.randrange(256)]) * (2 - kind)
            try:
                found = module._tokenizer(Reader(bytes(content)).read())
            except ValueError:
                refused += 1
            else:
                assert all(found.decode(found.encode(text)) == text for text in TEXTS)
    assert refused > 200
