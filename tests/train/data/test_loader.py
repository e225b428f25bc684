import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanofuse.train.data import loader as module
from nanofuse.train.data.corpus import ParquetCorpus
from nanofuse.train.data.loader import (
    LoaderState,
    Packing,
    ProcessLoader,
    ThreadLoader,
    WorkerError,
    packed_batches,
)
from nanofuse.train.data.tokens import TokenCache
from nanofuse.train.errors import UserError
from tests.helpers import documents


@pytest.fixture
def corpus(data_dir):
    return ParquetCorpus(data_dir)


@pytest.fixture
def packing(corpus, tokenizer):
    """Batches of three rows of 64 tokens."""
    return Packing(corpus, "train", tokenizer, 3, 64)


def take(packing, count, state=None, kind=ThreadLoader):
    """[(rows, LoaderState)] of the first batches."""
    loader = kind(packing, state)
    items = []
    try:
        for _ in range(count):
            rows = np.empty((packing.batch_size, packing.seq_len + 1), np.int32)
            items.append((rows, loader.take(rows)))
    finally:
        loader.close()
    return items


def restored(state):
    return LoaderState.restore(state.position(), state.to_arrays())


def assert_same(expected, found):
    for (rows, state), (others, other) in zip(expected, found, strict=True):
        assert np.array_equal(rows, others)
        assert state.position() == other.position() and state.epoch == other.epoch
        assert np.array_equal(state.documents, other.documents)


def write(path, texts, **options):
    pq.write_table(pa.table({"text": texts}), path, **options)


def test_rows_start_with_bos_and_batches_repeat(packing, tokenizer):
    runs = [take(packing, 40) for _ in range(2)]
    for rows, _ in runs[0]:
        assert rows.shape == (3, 65) and (rows[:, 0] == tokenizer.bos).all()
    assert_same(*runs)


@pytest.mark.parametrize("long_documents", ["crop", "split"])
def test_they_are_the_same_with_a_cache_and_any_number_of_threads(
    packing, monkeypatch, long_documents
):
    """Of the first pass, of the second one, and after a resume amid either."""
    packing = replace(packing, seq_len=24, long_documents=long_documents)
    whole = take(packing, 120)
    cached = replace(packing, cache=TokenCache(packing.corpus, packing.tokenizer))
    for _ in range(2):
        assert_same(whole, take(cached, 120))
    for threads in (1, 7):
        monkeypatch.setattr("nanofuse.train.data.encode.num_cores", lambda threads=threads: threads)
        assert_same(whole, take(packing, 120))
    for cut in (1, 50, 77):
        for there in (packing, cached):
            assert_same(whole[cut:], take(there, 120 - cut, restored(whole[cut - 1][1])))
    assert whole[-1][1].epoch >= 1  # the corpus was read more than once


@pytest.mark.parametrize("long_documents", ["crop", "split"])
def test_ranks_share_one_stream(packing, long_documents):
    """Micro-batch by micro-batch in rank order, and a state serves any number of ranks."""
    packing = replace(packing, seq_len=24, long_documents=long_documents)
    whole = take(packing, 24)
    for world in (2, 4, 8):
        ranks = [take(replace(packing, rank=r, world=world), 24 // world) for r in range(world)]
        rows = [rank[i][0] for i in range(24 // world) for rank in ranks]
        assert np.array_equal(np.concatenate(rows), np.concatenate([rows for rows, _ in whole]))
        for rank in ranks:
            for number, (_, state) in enumerate(rank, 1):
                assert np.array_equal(state.documents, whole[number * world - 1][1].documents)
        state = restored(ranks[0][2][1])
        assert_same(whole[3 * world :], take(packing, 24 - 3 * world, state))


def test_batch_size_does_not_change_the_rows(packing):
    one = [rows for rows, _ in take(replace(packing, batch_size=1), 30)]
    five = [rows for rows, _ in take(replace(packing, batch_size=5), 6)]
    assert np.array_equal(np.concatenate(one), np.concatenate(five))


def test_a_process_gives_what_a_thread_gives(packing):
    """Its state, too, and one of 0.1; what it says is printed here."""
    state = take(packing, 12)[11][1]
    old = replace(state, kept=[np.arange(4, dtype=np.int32)])
    old.documents = np.concatenate([[[-1], [0], [4]], state.documents], axis=1)
    expected = take(packing, 20, old)
    found = take(packing, 20, old, ProcessLoader)
    assert_same(expected, found)
    assert all(state.kept[0].tolist() == [0, 1, 2, 3] for _, state in found)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux pipes")
def test_a_pipe_holds_whole_batches(packing):
    """A batch of 32 x 2048 tokens is there at once."""
    import fcntl

    loader = ProcessLoader(packing)
    size = fcntl.fcntl(loader.pipe.fileno(), fcntl.F_GETPIPE_SZ)
    loader.close()
    assert size >= 4 * 32 * 2049 + 3 * 8 * 1127


def test_errors_of_a_process_are_raised_here(packing, tokenizer, tmp_path, capsys):
    raw = [b"caf\xe9 and birds", *(text.encode() for text in documents(40))] * 3
    for name in "ab":
        write(tmp_path / f"{name}.parquet", pa.array(raw, pa.binary()), row_group_size=41)
    corpus = ParquetCorpus(tmp_path)
    corpus.units["train"].append((7, 0, 0, None))  # a shard that is not there
    loader = ProcessLoader(replace(packing, corpus=corpus, batch_size=1))
    rows = np.empty((1, 65), np.int32)
    with pytest.raises(WorkerError, match="IndexError: list index") as caught:
        while True:
            loader.take(rows)
    assert "in packed_batches" in str(caught.value.__cause__)
    assert "123 training documents" not in capsys.readouterr().out
    with pytest.raises(WorkerError):
        loader.take(rows)
    loader.close()
    assert not loader.process.is_alive()
    state = LoaderState(unit=99)
    loader = ProcessLoader(packing, state)
    with pytest.raises(UserError, match="is of other data"):
        loader.take(rows)
    loader.close()


def test_a_process_outlives_signals_and_its_death_is_named(packing):
    loader = ProcessLoader(packing)
    rows = np.empty((3, 65), np.int32)
    for seconds in (0, 0.1, 0.3):  # while it starts, too
        time.sleep(seconds)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(loader.process.pid, number)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    for _ in range(100):
        loader.take(rows)
    loader.process.kill()
    with pytest.raises(WorkerError, match="process was killed by SIGKILL"):
        while True:
            loader.take(rows)
    loader.close()


UNGUARDED = """
import numpy as np
from nanofuse.train.data.loader import Packing, ProcessLoader
if __name__ != "__main__":
    raise SystemExit(7)
loader = ProcessLoader(Packing(None, "train", bytes(1_000_000), 1, 64))
loader.take(np.empty((1, 65), np.int32))
"""


def test_the_death_of_a_process_at_its_start_is_named(tmp_path):
    """Such as of a script without a main guard; its orders are more than a pipe holds."""
    path = tmp_path / "script.py"
    path.write_text(UNGUARDED)
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, path]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert "WorkerError: the data loader's process ended with 7" in done.stderr


def test_orders_that_end_in_the_middle_are_no_error():
    """As of a run that ends while its loader starts."""
    for parts in ((), (b"\0\0\1\0", b"half of it")):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        for part in parts:
            os.write(theirs.fileno(), part)
        theirs.close()
        code = (
            "from multiprocessing.connection import Connection\n"
            "from nanofuse.train.data.loader import _serve\n"
            f"_serve(None, Connection({ours.fileno()}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], pass_fds=[ours.fileno()], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")


CHILD = """
import os, signal, numpy as np
from nanofuse.train.data.corpus import ParquetCorpus
from nanofuse.train.data.loader import Packing, ProcessLoader
from nanofuse.train.data.tokenizer import Tokenizer
if __name__ == "__main__":
    corpus = ParquetCorpus("{}")
    tokenizer = Tokenizer.load(corpus.tokenizer_path)
    loader = ProcessLoader(Packing(corpus, "train", tokenizer, 1, 64))
    loader.take(np.empty((1, 65), np.int32))
"""


def test_it_ends_when_its_parent_is_killed(data_dir):
    """Though nobody told it."""
    code = CHILD.format(data_dir) + (
        "    print(loader.process.pid, flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pid, deadline = int(done.stdout), time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{pid}/stat") as file:  # where nobody reaps it
            if file.read().rpartition(")")[2].split()[0] == "Z":
                return
        time.sleep(0.05)
    pytest.fail("it still runs")


def test_an_exit_without_close_does_not_wait_for_the_process(data_dir):
    """Which does not listen to the signal that multiprocessing sends at exit."""
    code = CHILD.format(data_dir) + "    print('end')\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_a_thread_that_hangs_holds_up_no_end(packing, monkeypatch):
    """As where a file system does not answer."""
    answers = threading.Event()

    def batches(*args):
        yield answers.wait()

    monkeypatch.setattr(module, "packed_batches", batches)
    monkeypatch.setattr(module, "GOING_SECONDS", 0.2)
    loader, began = ThreadLoader(packing), time.monotonic()
    closing = threading.Thread(target=loader.close)
    closing.start()
    closing.join(10)
    try:
        assert not closing.is_alive() and time.monotonic() - began < 10
        assert loader.thread.is_alive()
    finally:
        answers.set()


def test_closing_ends_the_thread(packing):
    loader = ThreadLoader(packing)
    loader.close()
    assert not loader.thread.is_alive()


def test_an_unreadable_shard_raises_in_the_caller(packing):
    (packing.corpus.directory / "shard_00000.parquet").write_bytes(b"PAR1")
    loader = ThreadLoader(packing)
    for _ in range(2):
        with pytest.raises(UserError, match="shard_00000"):
            loader.take(np.empty((3, 65), np.int32))
    loader.close()


def test_validation_begins_anew_where_it_ends(packing, tokenizer):
    """As nanochat's; the buffer of 1,000 holds a small split many times."""
    items = take(replace(packing, split="val"), 60)
    assert items[0][1].reading > 10 and items[-1][1].epoch > 0
    texts = set()
    for unit in packing.corpus.units["val"]:
        texts.update(packing.corpus.read_groups(*unit[:2], 1)[0])
    whole = {(tokenizer.bos, *tokenizer.encode(text)) for text in texts}
    for rows, _ in items:
        for row in rows:
            starts = [*np.flatnonzero(row == tokenizer.bos), 65]
            for low, high in itertools.pairwise(starts):
                piece = tuple(row[low:high].tolist())
                assert any(document[: len(piece)] == piece for document in whole)


def small_groups(folder, groups, count=300):
    """Two shards of the same documents, in row groups of these sizes, again and again."""
    folder.mkdir()
    texts = documents(count, seed=4)
    schema = pa.schema([("text", pa.string())])
    for name in ("a", "b"):
        with pq.ParquetWriter(folder / f"{name}.parquet", schema) as writer:
            rest = list(texts)
            for size in itertools.cycle(groups):
                if not rest:
                    break
                writer.write_table(pa.table({"text": rest[:size]}), row_group_size=size)
                del rest[:size]
    return ParquetCorpus(folder)


@pytest.mark.parametrize("cut", [1, 8, 50])
def test_resume_amid_small_row_groups_is_exact(tmp_path, packing, cut, monkeypatch):
    """Units keep their meaning whatever is read together."""
    monkeypatch.setattr("nanofuse.train.data.corpus.READ_DOCUMENTS", 40)
    packing = replace(packing, corpus=small_groups(tmp_path / "small", [1, 9, 2]))
    whole = take(packing, cut + 30)
    monkeypatch.setattr("nanofuse.train.data.corpus.READ_DOCUMENTS", 7)
    packing = replace(packing, corpus=ParquetCorpus(tmp_path / "small"))
    assert_same(whole[cut:], take(packing, 30, restored(whole[cut - 1][1])))


def test_thousands_of_row_groups_are_read_at_half_the_speed_or_more(tmp_path, packing):
    """Of the processor's time, which other processes do not change."""
    texts = documents(3000, seed=1)
    seconds = {}
    for size in (1000, 1):
        folder = tmp_path / str(size)
        folder.mkdir()
        write(folder / "a.parquet", texts, row_group_size=size)
        write(folder / "b.parquet", texts[:9])
        there, times = replace(packing, corpus=ParquetCorpus(folder)), []
        for _ in range(3):
            began = time.process_time()
            states = (state for _, state in packed_batches(there))
            next(state for state in states if state.unit * size >= 2900 or state.reading)
            times.append(time.process_time() - began)
            states.close()
        seconds[size] = min(times)
    assert seconds[1] <= 2 * seconds[1000], seconds


def test_the_epoch_is_that_of_what_was_trained(tmp_path, packing):
    """400 documents and a store of 1,000: two epochs and a half are read before the first row."""
    folder = tmp_path / "few"
    folder.mkdir()
    texts = documents(400)
    write(folder / "a.parquet", texts, row_group_size=64)
    write(folder / "b.parquet", texts[:9])
    items = take(replace(packing, corpus=ParquetCorpus(folder), batch_size=4), 400)
    assert items[0][1].reading == 2 and items[0][1].epoch == 0
    tokens = sum(map(len, packing.tokenizer.encode_documents(texts)))
    for number, (_, state) in enumerate(items, 1):
        passes = 4 * 65 * number / tokens  # at least: what was cropped is not in the rows
        assert int(passes) <= state.epoch <= 1.6 * passes + 0.1
    states = [state for _, state in items]
    assert states[-1].epoch >= 2 and states[-1].epoch_size == 400
    first = next(i for i, state in enumerate(states) if state.epoch == 1)
    gone = [state.num_read - state.documents.shape[1] for state in states]
    assert gone[first - 1] < 400 <= gone[first]


def test_a_state_of_0_1_continues(packing, tokenizer):
    """Its buffer held tokens, of whole documents or of a row each, and it had no counts at first.
    None is lost: those still there are saved again."""
    state = take(packing, 10)[9][1]
    found = take(packing, 1, state)[0][1]
    texts = {}
    for number, (shard, group, _, _) in enumerate(packing.corpus.units["train"]):
        for row, text in enumerate(packing.corpus.read_groups(shard, group, 1)[0]):
            texts[number << 32 | row] = [tokenizer.bos, *tokenizer.encode(text)]
    buffer = [texts[key] for key in state.documents[0].tolist()]
    heads = [document[:65] for document in buffer]
    whole_lengths = np.array([len(document) for document in buffer])
    expected = take(packing, 40, restored(state))
    for saved in (buffer, heads):
        old = {
            "tokens": np.array(sum(saved, []), np.int32),
            "lengths": np.array([len(document) for document in saved]),
        }
        if saved is heads:
            old |= {"whole_lengths": whole_lengths, "counts": np.array([found.num_read, 160])}
        begin = LoaderState.restore(state.position(), old)
        assert (begin.num_read is None) == (saved is buffer)
        first = take(packing, 5, begin)
        rest = take(packing, 35, restored(first[4][1]))
        for (rows, _), (others, _) in zip(expected, first + rest, strict=True):
            assert np.array_equal(rows, others)


def test_the_state_is_small(tmp_path, packing):
    texts = ["birds sang " * 400 + str(i) for i in range(60)]
    for name in "ab":
        write(tmp_path / f"{name}.parquet", texts, row_group_size=20)
    items = take(replace(packing, corpus=ParquetCorpus(tmp_path), seq_len=32), 20)
    assert sum(array.nbytes for array in items[9][1].to_arrays().values()) < 3 * 8 * 1130
    rest = take(
        replace(packing, corpus=ParquetCorpus(tmp_path), seq_len=32), 10, restored(items[9][1])
    )
    assert_same(items[10:], rest)


@pytest.mark.parametrize("process", [False, True], ids=["thread", "process"])
def test_memory_stays_flat_over_10_000_batches(tmp_path, packing, process):
    """Of documents longer than a row, of which the buffer would keep ever more."""
    texts = [f"{i} " + "birds sang loudly over hills " * (i % 90) for i in range(400)]
    for name in "ab":
        write(tmp_path / f"{name}.parquet", texts, row_group_size=100)
    packing = replace(packing, corpus=ParquetCorpus(tmp_path), batch_size=1)
    loader = (ProcessLoader if process else ThreadLoader)(packing)
    rows, pid = np.empty((1, 65), np.int32), loader.process.pid if process else os.getpid()

    def resident():
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    seen = []
    for number in range(10_001):
        loader.take(rows)
        if number % 2500 == 0 and number:
            seen.append(resident())
    loader.close()
    assert max(seen) < seen[0] + (24 << 20), seen


WELL = {
    "documents": np.array([[-2, 5 << 32, 7], [1, 0, 3], [4, 5, 9]]),
    "counts": np.array([20, 7]),
    "kept": np.arange(9, dtype=np.int32),
    "kept_lengths": np.array([4, 5]),
}
OLD = {"tokens": np.zeros(9, np.int32), "lengths": np.array([4, 5])}


@pytest.mark.parametrize(
    ("parts", "change"),
    [
        (OLD, {"tokens": np.zeros(5, np.int32)}),
        (OLD, {"tokens": np.zeros(9, np.int64)}),
        (OLD, {"tokens": np.full(9, -1, np.int32)}),
        (OLD, {"tokens": np.zeros((3, 3), np.int32)}),
        (OLD, {"lengths": None}),
        (OLD, {"lengths": np.array([9, 0])}),
        (OLD, {"lengths": np.array([-1, 10])}),
        (OLD, {"lengths": np.array([2**62, 2**62])}),
        (OLD, {"lengths": np.array([4.0, 5.0])}),
        (OLD, {"whole_lengths": np.array([3, 5])}),
        (OLD, {"whole_lengths": np.array([7, 5])}),
        (OLD, {"whole_lengths": np.array([9])}),
        (WELL, {"documents": None}),
        (WELL, {"documents": np.zeros((2, 3), np.int64)}),
        (WELL, {"documents": np.zeros((3, 3), np.int32)}),
        (WELL, {"documents": np.array([[-3], [0], [1]])}),
        (WELL, {"documents": np.array([[-1], [4], [1]])}),
        (WELL, {"documents": np.array([[1], [-1], [1]])}),
        (WELL, {"documents": np.array([[1], [0], [0]])}),
        (WELL, {"documents": np.array([[1, 2], [0, 0], [2, 1]])}),
        (WELL, {"documents": np.array([[2**62], [0], [1]])}),
        (WELL, {"documents": np.array([[1], [2**62], [1]])}),
        (WELL, {"documents": np.array([[1], [0], [2**62]])}),
        (WELL, {"kept": np.zeros(5, np.int32)}),
        (WELL, {"counts": np.array([1])}),
        (WELL, {"counts": np.array([-1, 0])}),
        (WELL, {"counts": np.array([1.0, 0.0])}),
        (WELL, {"epoch": -1}),
        (WELL, {"unit": 1.5}),
        (WELL, {"document": None}),
        (WELL, {"epoch": True}),
        (WELL, {"unit": 2**63}),
    ],
    ids=str,
)
def test_a_damaged_state_is_refused(parts, change):
    position = {"epoch": 0, "unit": 1, "document": 2}

    def restore(parts):
        return LoaderState.restore(
            {n: v for n, v in parts.items() if n in position},
            {n: v for n, v in parts.items() if n not in position and v is not None},
        )

    again = restore({**position, **parts})
    assert again.position() == position
    if parts is WELL:
        assert (again.num_read, again.epoch_size) == (20, 7)
        assert np.array_equal(restored(again).documents, WELL["documents"])
    with pytest.raises(UserError, match="state of the data loader is damaged"):
        restore({**position, **parts, **change})


def test_a_state_of_other_data_or_another_tokenizer_is_refused(packing):
    rows = np.empty((3, 65), np.int32)
    kept = LoaderState.restore(
        LoaderState().position(), {"tokens": np.full(3, 320, np.int32), "lengths": np.array([3])}
    )
    for state, what in ((LoaderState(unit=99), "other data"), (kept, "another tokenizer")):
        loader = ThreadLoader(packing, state)
        with pytest.raises(UserError, match=f"is of {what}"):
            loader.take(rows)
        loader.close()


def test_documents_that_are_not_utf8_are_told_of_once(tmp_path, packing, capsys):
    raw = [b"caf\xe9 and birds", *(text.encode() for text in documents(40))] * 5
    for name in "ab":
        write(tmp_path / f"{name}.parquet", pa.array(raw, pa.binary()), row_group_size=41)
    packing = replace(packing, corpus=ParquetCorpus(tmp_path))
    for _ in range(2):
        take(packing, 30)
    out = capsys.readouterr().out
    assert out.count("UTF-8") == 1 and "5 training documents" in out
    take(replace(packing, split="val"), 3)
    assert "5 validation documents" in capsys.readouterr().out
