"""Training that was done is saved, whatever ends the run."""

import json
import os
import shutil
import signal
from pkgutil import resolve_name

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanofuse.train.checkpoint import load_tensors
from nanofuse.train.disk import check_room, room
from nanofuse.train.errors import RunEnded, UserError
from nanofuse.train.loop import Trainer
from nanofuse.train.run import main
from nanofuse.train.run_folder import LOADER, MODEL, OPTIM, load_meta, run_dir
from nanofuse.train.signals import Signals
from tests.train.bundles import write_bundle
from tests.train.tiny import TINY, losses, records, steps, strangers


class Panic(BaseException):
    """As native libraries raise: no Exception."""


@pytest.fixture
def train(data_dir, work_dir):
    def run(name, count, *flags):
        args = [*TINY, "--data", data_dir, "--num-iterations", count, "--run", name, *flags]
        main([str(a) for a in args])
        return run_dir(name)

    return run


def failing(monkeypatch, target, call, error):
    """From its call number `call` on, `target` raises `error`."""
    module, _, name = target.rpartition(".")
    holder = resolve_name(module)
    real, calls = getattr(holder, name), [0]

    def broken(*args, **kwargs):
        calls[0] += 1
        if calls[0] >= call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(holder, name, broken)


def assert_resumes_as_if_nothing_happened(train, name, count):
    main(["--run", name, "--resume"])
    whole = train("whole", count)
    assert losses(run_dir(name)) == losses(whole)
    assert [r["step"] for r in records(run_dir(name))] == list(range(1, count + 1))
    for file in (MODEL, OPTIM, LOADER):
        a, b = (load_tensors(d / f"step_{count:06d}" / file) for d in (run_dir(name), whole))
        assert all(torch.equal(a[key], b[key]) for key in b)


ERRORS = [
    (RuntimeError("out of luck\nand more"), RunEnded, r"^RuntimeError: out of luck \("),
    (Panic("index out of bounds"), RunEnded, "^Panic: index out of bounds"),
    (UserError("row group 3 is damaged"), UserError, "^row group 3 is damaged; step 5 is saved"),
    (torch.OutOfMemoryError("CUDA out of memory"), UserError, "^--device-batch-size 2 does not"),
    (OSError(5, "Input/output error", "shard"), UserError, "^shard: Input/output error; step 5"),
]


@pytest.mark.parametrize(("error", "raised", "message"), ERRORS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize(
    ("target", "call"),
    [
        ("torch.autograd.backward", 12),  # two a step: in the second half of step 6
        ("nanofuse.train.optim.muon_adamw.MuonAdamW.step", 6),
        ("nanofuse.train.data.device_loader.DeviceLoader.__next__", 12),
    ],
    ids=["backward", "optimiser", "data"],
)
def test_an_error_in_mid_step_saves_the_last_whole_step(
    train, monkeypatch, target, call, error, raised, message
):
    with monkeypatch.context() as patch, pytest.raises(raised, match=message) as stop:
        failing(patch, target, call, error)
        train("a", 9)
    text = str(stop.value)
    assert "step 5 is saved" in text and text.endswith("python -m train.run --run a --resume")
    assert "\n" not in text and steps("a") == [5]
    if raised is RunEnded:
        assert stop.value.code == 1
    if error is ERRORS[0][0]:
        assert_resumes_as_if_nothing_happened(train, "a", 9)


def test_weights_between_two_steps_are_not_saved(train, monkeypatch):
    """An update that was cut off in the middle; the checkpoint before it is named."""
    said = "step 3 is not saved .the update of step 4 was cut off"
    with monkeypatch.context() as patch, pytest.raises(RunEnded, match=said):
        failing(patch, "torch._foreach_copy_", 16, RuntimeError("no"))
        train("a", 9, "--save-every", 2)
    assert steps("a") == [2]
    assert_resumes_as_if_nothing_happened(train, "a", 9)


def test_an_error_of_the_evaluation_costs_nothing(train, monkeypatch):
    failing(monkeypatch, "nanofuse.train.bpb.evaluate_bpb", 1, Panic("no"))
    with pytest.raises(RunEnded, match="step 4 is saved; go on with"):
        train("a", 8, "--eval-every", 4)
    assert steps("a") == [4]


def test_a_sample_that_fails_is_said_and_the_run_goes_on(train, monkeypatch, capsys):
    for number, error in enumerate((RuntimeError("cannot draw\nmore"), Panic("no"))):
        with monkeypatch.context() as patch:
            failing(patch, "nanofuse.train.samples.generate", 1, error)
            train(f"a{number}", 4, "--sample-every", 2, "--save-every", 2)
        assert steps(f"a{number}") == [2, 4]
        assert capsys.readouterr().out.count("no sample (") == 2


@pytest.mark.parametrize("length", [1, 2, 5])
def test_short_rows_give_short_samples(train, length):
    flags = ("--max-seq-len", length, "--total-batch-size", 4 * length, "--sample-every", 0)
    directory = train("a", 2, *flags, "--eval-tokens", 64)
    assert records(directory, "sample")[0]["text"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_after_the_step(train, monkeypatch, number):
    real = Trainer.train_step

    def stepping(self):
        if self.progress.step == 5:
            os.kill(os.getpid(), number)
        return real(self)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(RunEnded) as stop:
        patch.setattr(Trainer, "train_step", stepping)
        train("a", 9)
    assert stop.value.code == 128 + number and signal.getsignal(number) == before
    assert f"stopped by {number.name} after step 6; step 6 is saved; go on with" in str(stop.value)
    assert steps("a") == [6] and strangers(run_dir("a")) == []
    assert_resumes_as_if_nothing_happened(train, "a", 9)


def test_a_second_signal_ends_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr("os._exit", codes.append)
    with Signals() as signals:
        signals.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)  # the same request, to all processes of a service
        assert signals.number == signal.SIGTERM and codes == []
        monkeypatch.setattr("time.monotonic", lambda: signals.since + 0.6)
        os.kill(os.getpid(), signal.SIGINT)
    assert codes == [130]


def test_a_signal_that_was_ignored_stays_so(train, monkeypatch):
    real = Trainer.train_step

    def stepping(self):
        os.kill(os.getpid(), signal.SIGHUP)
        return real(self)

    monkeypatch.setattr(Trainer, "train_step", stepping)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train("a", 3)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert steps("a") == [3]


@pytest.mark.parametrize("wrapped", [False, True])  # as torch's compiler does
def test_a_signal_before_the_first_step_leaves_nothing(train, monkeypatch, work_dir, wrapped):
    def building(*args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:
            if wrapped:
                raise RuntimeError(f"{type(error).__name__}: {error}") from None
            raise

    monkeypatch.setattr("nanofuse.train.building.assemble", building)
    with pytest.raises(RunEnded, match="stopped by SIGTERM before the first step") as stop:
        train("a", 3)
    assert stop.value.code == 143 and not (work_dir / "runs").exists()


def test_a_signal_ends_an_evaluation_which_the_resume_makes(train, monkeypatch, capsys):
    real = Trainer.evaluate

    def evaluating(self):
        os.kill(os.getpid(), signal.SIGTERM)
        real(self)

    with monkeypatch.context() as patch, pytest.raises(RunEnded, match="step 4 is saved"):
        patch.setattr(Trainer, "evaluate", evaluating)
        train("a", 4)
    directory = run_dir("a")
    assert load_meta(directory / "step_000004")["val_bpb"] is None
    capsys.readouterr()
    main(["--run", "a", "--resume"])  # all steps are made, the evaluation is not
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert load_meta(directory / "step_000004")["val_bpb"] == summary["val_bpb"] is not None
    assert losses(directory) == losses(train("whole", 4))
    with pytest.raises(UserError, match="has finished its 4 steps"):
        main(["--run", "a", "--resume"])


def test_weights_without_a_finite_bpb_are_named(train, monkeypatch):
    train("a", 4, "--save-every", 2)
    with monkeypatch.context() as patch:
        patch.setattr("nanofuse.train.bpb.Validation.bpb", lambda *args: float("nan"))
        with pytest.raises(UserError, match="BPB is nan at step 6; delete .*a/step_000006 to use"):
            train("a", 6, "--resume")
    shutil.rmtree(run_dir("a") / "step_000006")
    train("a", 6, "--resume")
    assert steps("a") == [2, 4, 6]


def test_core_at_the_end_is_measured_by_a_resume(train, monkeypatch, tmp_path, capsys):
    def measuring(self):
        os.kill(os.getpid(), signal.SIGTERM)
        self.accord.decide_now()

    bundle = write_bundle(tmp_path / "bundle")
    with monkeypatch.context() as patch, pytest.raises(RunEnded, match="step 4 is saved; go on"):
        patch.setattr(Trainer, "measure_core", measuring)
        train("a", 4, "--core-every", 0, "--core-bundle", bundle)
    main(["--run", "a", "--resume"])
    assert "step      4  CORE" in capsys.readouterr().out
    with pytest.raises(UserError, match="has finished its 4 steps"):
        main(["--run", "a", "--resume"])


def test_a_full_disk_is_one_line_and_keeps_what_was_saved(train, monkeypatch):
    """A limit on the size of files, as a quota has: the write of the third checkpoint fails."""
    from nanofuse.train import checkpoint

    real, calls = checkpoint.save_file, [0]

    def full(tensors, path, metadata):
        calls[0] += 1
        if calls[0] > 2 * 3:  # files of two checkpoints
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"runs/a/step_000003 cannot be saved: No space left") as e:
        train("a", 5, "--save-every", 1)
    assert "bytes" in str(e.value) and "--run a --resume" in str(e.value)
    assert steps("a") == [1, 2] and strangers(run_dir("a")) == []


def test_a_save_is_tried_again_without_leftovers(train, monkeypatch):
    from nanofuse.train import checkpoint

    real = checkpoint.save_file
    left = run_dir("a") / ".step_000009.0123abcd"

    def full_while_there_are_leftovers(tensors, path, metadata):
        if path.parent.name.startswith(".step_000002") and not left.exists() and not full:
            left.mkdir()
            full.append(True)
        if left.exists():
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    full = []
    monkeypatch.setattr(checkpoint, "save_file", full_while_there_are_leftovers)
    train("a", 3, "--save-every", 1)
    assert full and steps("a") == [1, 2, 3] and strangers(run_dir("a")) == []


def test_room_is_compared_with_the_size_of_a_checkpoint(train, work_dir, monkeypatch, capsys):
    assert "checkpoint: 1.0 KiB each" in room(1024, work_dir)
    monkeypatch.setattr("nanofuse.train.disk.free_bytes", lambda path: 1000)
    assert "24 bytes are missing" in room(1024, work_dir)
    with pytest.raises(UserError, match="runs/a cannot be saved: the disk is full.*24 bytes"):
        check_room("runs/a", 1024)
    with pytest.raises(UserError, match="step_000002 cannot be saved: the disk is full"):
        train("b", 2)
    assert "warning: it does not fit" in capsys.readouterr().out


def test_a_save_does_not_need_the_shards(train, monkeypatch, data_dir):
    real = Trainer.save

    def without_shards(self):
        for shard in data_dir.glob("*.parquet"):
            shard.rename(shard.with_suffix(".away"))
        real(self)
        for shard in data_dir.glob("*.away"):
            shard.rename(shard.with_suffix(".parquet"))

    monkeypatch.setattr(Trainer, "save", without_shards)
    train("a", 2)
    assert steps("a") == [2]


def test_damaged_data_in_the_middle(train, data_dir):
    """The damaged row group is read in the background, long after the start."""
    path = data_dir / "shard_00000.parquet"
    texts = [f"{'word ' * 30}{i}" for i in range(2400)]
    table = pa.table({"text": texts})
    pq.write_table(table, path, row_group_size=1000, compression="none", use_dictionary=False)
    raw = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    raw[start : start + 200] = b"\xff" * 200
    path.write_bytes(raw)
    with pytest.raises(UserError, match="shard_00000.*step .* is saved; go on with") as stop:
        train("a", 5000, "--total-batch-size", 1024, "--train-log-every", 100)
    assert steps("a") and "\n" not in str(stop.value)


def test_the_debug_variable_keeps_the_cause(train, monkeypatch):
    monkeypatch.setenv("NANOFUSE_DEBUG", "1")
    failing(monkeypatch, "torch.autograd.backward", 3, RuntimeError("why"))
    with pytest.raises(RunEnded) as stop:
        train("a", 3)
    assert str(stop.value.__cause__) == "why" and stop.value.__cause__.__traceback__ is not None


def test_a_checkpoint_that_cannot_be_removed_ends_nothing(train, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr("nanofuse.train.run_folder.remove_folder", refuse)
    train("a", 5, "--save-every", 1, "--keep", 1)
    assert steps("a") == [1, 2, 3, 4, 5]
    out = capsys.readouterr().out
    assert out.count("step_000001 cannot be removed (Operation not permitted)") == 1
