"""How a command ends: exit code and one line for what is told, a traceback for what is a fault."""

import errno

import pytest
import torch

from nanofuse.train import command
from nanofuse.train.command import not_empty, run_command
from nanofuse.train.errors import RunEnded, UserError


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("--depth is odd\nand long"), 2, "error: --depth is odd\\nand long\n"),
        (RunEnded("the GPU is gone", 1), 1, "error: the GPU is gone\n"),
        (RunEnded("stopped by SIGTERM", 143), 143, "stopped by SIGTERM\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 0, ""),
        (OSError(errno.EACCES, "Not yours", "a.txt"), 2, "error: a.txt: Not yours\n"),
        (OSError(errno.ENOSPC, "No space left"), 2, "error: No space left\n"),
        (MemoryError(), 2, "error: out of memory (MemoryError); ask for a smaller size\n"),
        (torch.OutOfMemoryError("CUDA out of memory\nmore"), 2,
         "error: out of memory (CUDA out of memory); ask for a smaller size\n"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_ends(error, code, line, capsys, monkeypatch):
    monkeypatch.delenv(command.DEBUG_ENV, raising=False)
    with pytest.raises(SystemExit) as stop:
        run_command(raising(error))
    assert (stop.value.code, capsys.readouterr().err) == (code, line)


def test_faults_are_not_hidden(capsys, monkeypatch):
    for error in (RuntimeError("a fault"), ValueError("a fault")):
        with pytest.raises(type(error), match="a fault"):
            run_command(raising(error))
    monkeypatch.setenv(command.DEBUG_ENV, "1")
    with pytest.raises(SystemExit):
        run_command(raising(UserError("--depth is odd")))
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("error: --depth is odd\n")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--dept", "4"], "did you mean --depth?"),
        (["depth=4"], "did you mean --depth?"),
        (["--device_batch_size=4"], "did you mean --device-batch-size?"),
        (["--depth", "4", "--zzz"], "--help lists the flags"),
    ],
)
def test_a_flag_that_is_not_known_has_a_neighbour(given, meant, capsys):
    parser = command.CommandParser()
    parser.add_argument("--depth")
    parser.add_argument("--device-batch-size")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(given)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.endswith(f"; {meant}\n") and err.count("\n") == 1


@pytest.mark.parametrize("lossy", [False, True])
def test_output_is_dropped_if_asked_to(lossy, monkeypatch):
    calls = []
    monkeypatch.setattr(command, "drop_failing_output", lambda *names: calls.append(names))
    run_command(lambda: calls.append("main"), lossy)
    assert calls == [("stdout", "stderr") if lossy else ("stderr",), "main"]


def test_an_empty_value_is_refused():
    assert not_empty("x") == "x"
    with pytest.raises(command.argparse.ArgumentTypeError, match="^is empty; give it a value"):
        not_empty("")
