"""Runs of the training command in forks of one process that has imported the project, so that many
can be started and killed in little time.

As a program: reads a JSON object a line, {"args", "cwd", "signal", "after", "metrics", "lines",
"fault", "job", "env"}, runs train.run with these arguments, sends the signal (or none) so many
seconds after the file of metrics has so many lines, and answers {"code", "err", "seconds"}. The
ranks that the command starts are forks, too. A fault is (kind of FAULTS, rank, step). A job is a
function that runs in place of the command, "module:name"; its argument is the Ranks. What hangs is
aborted after PATIENCE, and "err" ends with its stacks.
"""

import contextlib
import faulthandler
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace

ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT
PATIENCE = 120  # seconds for a command; the tests allow 25 at most
ROOT = Path(__file__).parent.parent.parent


class Forks:
    """Client of the program; a context manager that ends it."""

    def __enter__(self):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env={
                **os.environ,
                "PYTHONPATH": path,
                "CUDA_VISIBLE_DEVICES": "",  # more ranks than GPUs
                "OMP_NUM_THREADS": "1",
                "TORCH_CPP_LOG_LEVEL": "ERROR",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait()

    def run(self, args, cwd, signal=None, after=0.0, metrics="", lines=0, **more):
        """(exit code, stderr) of one command; the code is negative for a signal that killed it."""
        job = {"args": [str(a) for a in args], "cwd": str(cwd), "signal": signal, "after": after,
               "metrics": str(metrics), "lines": lines, **more}  # fmt: skip
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        self.seconds = answer["seconds"]
        return answer["code"], answer["err"]


class Fork:
    """What subprocess.Popen is to train.launch: a fork that goes on as the command's process."""

    job = None

    def __init__(self, command, env, pass_fds, start_new_session):
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            os.environ.update(env)
            command_of(self.job)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self):
        while self.poll() is None:
            time.sleep(0.01)


def command_of(job):
    """Run the command, or the job; does not return."""
    from nanofuse.train import ranks
    from nanofuse.train.command import run_command
    from nanofuse.train.run import main

    def call():
        if not job.get("job") or "RANK" not in os.environ:
            return main(job["args"])
        joined = ranks.join()
        try:
            resolve_name(job["job"])(joined)
            joined.close()
        except BaseException as failure:
            joined.leave(failure)

    alone = "--gpus 1" in " ".join(job["args"])
    if job.get("fault") and os.environ.get("RANK", "0" if alone else "") == str(job["fault"][1]):
        commit(*job["fault"])
    code = 0
    try:
        run_command(call, lossy=True)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def commit(kind, rank, step):
    """Have this rank fail at a step, counted from 1, or at the first call of what fails."""
    import torch

    from nanofuse.train import bpb, building, checkpoint, loop

    micro_steps = loop.Trainer.micro_steps

    def fail(error):
        def failing(*args, **kwargs):
            raise error

        return failing

    def faulty(self):
        if self.progress.step + 1 != step:
            return micro_steps(self)
        if kind in ("SIGKILL", "SIGSTOP", "SIGTERM"):
            if kind == "SIGSTOP":  # the others know what it has promised
                assert self.ranks.guard.published.wait(20)
            os.kill(os.getpid(), getattr(signal, kind))
        elif kind == "hang":
            threading.Event().wait()
        elif kind == "error":
            raise RuntimeError("out of luck")
        elif kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        elif kind == "data":
            self.loader.loader.take = fail(OSError(5, "Input/output error", "shard"))
        elif kind == "update":
            self.optimizer.step = fail(RuntimeError("no update"))
        total = micro_steps(self)
        if kind == "nan":
            self.raw_model.lm_head.weight.grad[0, 0] = float("nan")
        return total

    def killed(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    loop.Trainer.micro_steps = faulty
    if kind == "evaluation":
        bpb._batch_sums = fail(RuntimeError("no sums"))
    elif kind == "disk":
        checkpoint.save_file = fail(OSError(28, "No space left on device"))
    elif kind == "SIGKILL in an evaluation":
        bpb._batch_sums = killed
    elif kind == "SIGKILL in a save":
        checkpoint.save_file = killed
    elif kind == "SIGKILL in the start":
        building.assemble = killed


def child(job, err):
    """Run one command; does not return."""
    from nanofuse.train import accord, guard, launch

    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.chdir(job["cwd"])
    os.environ.update(job.get("env", {}))
    Fork.job = job
    launch.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": Fork})
    if job.get("fault"):
        guard.SILENT_SECONDS, guard.DEAF_SECONDS, accord.LEAST_SECONDS = 3, 1, 3
        guard.TOLD_SECONDS, guard.PULSE_SECONDS = 1, 0.2
    command_of(job)


def abort(pid):
    """End a process and those that it started, stopped ones as well; each says where it is."""
    with contextlib.suppress(OSError):  # it has ended meanwhile
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            abort(int(child))
        os.kill(pid, signal.SIGABRT)
        os.kill(pid, signal.SIGCONT)


def status_of(pid, until):
    """Of a child, which is aborted if it has not ended by then."""
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.002)
    abort(pid)
    return os.waitpid(pid, 0)[1]


def lines_in(path):
    return Path(path).read_bytes().count(b"\n") if os.path.exists(path) else 0


def serve():
    import torch

    import nanofuse.train.building  # noqa: F401  what the forks share

    torch.set_num_threads(1)
    gc.freeze()  # else a fork's collections copy the pages of all objects
    faulthandler.enable()
    err = Path(tempfile.mkdtemp()) / "err"
    for line in sys.stdin:
        job = json.loads(line)
        err.write_text("")
        began = time.monotonic()
        until = began + PATIENCE
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            child(job, err)
        if job["signal"]:
            while (
                lines_in(job["metrics"]) < job["lines"]
                and os.waitid(os.P_PID, pid, ENDED) is None
                and time.monotonic() < until
            ):
                time.sleep(0.002)
            time.sleep(job["after"])
            os.kill(pid, job["signal"])
        code = os.waitstatus_to_exitcode(status_of(pid, until))
        answer = {"code": code, "err": err.read_text(), "seconds": time.monotonic() - began}
        print(json.dumps(answer), flush=True)
    gc.unfreeze()  # else native modules report leaks


if __name__ == "__main__":
    serve()
