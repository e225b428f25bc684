import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanofuse.train.checkpoint import load_optim, save_checkpoint
from nanofuse.train.disk import SaveError
from nanofuse.train.errors import UserError
from nanofuse.train.optim_files import OptimFiles, rows_text
from nanofuse.train.run_folder import META, checkpoints, is_complete, optim_files
from tests.helpers import random_model, small_config
from tests.train.thread_ranks import run_ranks

WHOLE = {
    "table": torch.arange(21.0).view(7, 3),
    "stack": torch.arange(40.0).view(5, 2, 4).bfloat16(),
    "embedding": torch.arange(10.0).view(5, 2),
    "scalar": torch.tensor(5.0),
    "small": torch.arange(3.0),
}
MINE = {  # of rank 0 and 1: (first row, rows, step)
    "table": ([(0, 3, 1)], [(3, 4, 1)]),
    "stack": ([(0, 1, 1), (3, 1, 1)], [(1, 2, 1), (4, 1, 1)]),
    "embedding": ([(0, 3, 2)], [(1, 2, 2)]),
}


def part(rank):
    """What a rank keeps: tensors and rows."""
    tensors, rows = {}, {}
    for name, x in WHOLE.items():
        if name in MINE:
            rows[name] = tuple(x.shape), MINE[name][rank]
            tensors[name] = torch.cat([x[at::step][:n] for at, n, step in MINE[name][rank]])
        elif rank == 0:
            rows[name] = tuple(x.shape), [(0, len(x) if x.dim() else 1, 1)]
            tensors[name] = x
    return tensors, rows


@pytest.fixture
def model():
    return random_model(small_config(vocab_size=64, sequence_len=32), torch.float32)


@pytest.fixture
def saved(work_dir, model):
    def save(ranks):
        tensors, rows = part(ranks.rank)
        loader = {"documents": torch.zeros(3, 0, dtype=torch.int64)} if ranks.main else None
        return save_checkpoint("runs/a", 3, {}, model, tensors, loader, ranks, rows)

    folders = run_ranks(2, save)
    assert folders[0] == folders[1]
    return folders[0]


def test_the_whole_is_read_from_the_files_of_all_ranks(saved):
    names = {path.name for path in saved.iterdir()}
    parts = {"optim-00001-of-00002.safetensors", "optim-00002-of-00002.safetensors"}
    assert names == {"model.safetensors", "loader.safetensors", META, *parts}
    assert json.loads((saved / META).read_text())["files"].keys() == names - {META}
    assert set(optim_files(saved)) == parts
    found = load_optim(saved)
    assert set(found) == WHOLE.keys() and len(found) == len(WHOLE)
    for name, x in WHOLE.items():
        assert found[name].dtype == x.dtype and torch.equal(found[name], x)


def test_without_one_of_the_files_a_checkpoint_is_none(saved):
    (saved / "optim-00002-of-00002.safetensors").unlink()
    assert not is_complete(saved) and not checkpoints("runs/a")


def test_a_damaged_file_is_named(saved):
    path = saved / "optim-00002-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="optim-00002-of-00002.safetensors is damaged"):
        load_optim(saved)


@pytest.mark.parametrize(
    "rows, said",
    [
        ([(2, 4)], "table are missing or there twice"),
        ([(4, 3)], "is missing or damaged"),
        ([(3, 3)], "is missing or damaged"),
        ([(-3, 4)], "missing or there twice"),
        ([("x", 4)], "is missing or damaged"),
        ([3], "is missing or damaged"),
        ([(3, 2, 1), (3, 2, 1)], "missing or there twice"),
        ([(3, 4, 2)], "missing or there twice"),
        ([(3, 4, 0)], "missing or there twice"),
        ([(3, 4, 1, 1)], "is missing or damaged"),
        ([(3, 5, 1), (3, -1, 1)], "missing or there twice"),
    ],
)
def test_rows_that_do_not_make_a_whole_are_refused(saved, rows, said):
    path = saved / "optim-00002-of-00002.safetensors"
    kept = {name: (tuple(x.shape), MINE[name][1]) for name, x in WHOLE.items() if name in MINE}
    text = json.loads(rows_text(kept)["rows"])
    text["table"][1] = rows
    save_file(load_file(path), path, {"rows": json.dumps(text)})
    with pytest.raises(UserError, match=said):
        OptimFiles([saved / "optim-00001-of-00002.safetensors", path])


def test_files_that_give_no_step_are_read(saved):
    """As they were written before embedding tables were divided row by row."""
    for rank in (0, 1):
        path = saved / f"optim-0000{rank + 1}-of-00002.safetensors"
        tensors, rows = part(rank)
        del tensors["embedding"]
        text = {n: (shape, [at[:2] for at in places]) for n, (shape, places) in rows.items()}
        save_file(tensors, path, {"rows": json.dumps({n: text[n] for n in ("table", "stack")})})
    found = OptimFiles([saved / name for name in sorted(optim_files(saved))])
    assert all(torch.equal(found[name], WHOLE[name]) for name in ("table", "stack", "small"))


def test_where_one_rank_cannot_write_none_has_written(work_dir, model, monkeypatch):
    """Both raise, nothing is left, and the next save works."""
    from nanofuse.train import checkpoint

    write = checkpoint.write_tensors
    broken = {"optim-00002-of-00002.safetensors"}

    def fail(path, tensors, metadata):
        if path.name in broken:
            raise OSError(28, "No space left on device", str(path))
        write(path, tensors, metadata)

    monkeypatch.setattr(checkpoint, "write_tensors", fail)

    def save(ranks):
        tensors, rows = part(ranks.rank)
        try:
            save_checkpoint("runs/a", 3, {}, model, tensors, None, ranks, rows)
        except SaveError as error:
            return str(error)

    said = run_ranks(2, save)
    assert said[0] == said[1] and "cannot be saved" in said[0]
    assert not list((work_dir / "runs" / "a").iterdir())
    broken.clear()
    assert run_ranks(2, save) == [None, None]
    assert list(checkpoints("runs/a")) == [3]
