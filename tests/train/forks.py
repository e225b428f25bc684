"""Runs of the training command in forks of one process that has imported the project, so that many
can be started and killed in little time.

As a program: reads a JSON object a line, {"args", "cwd", "signal", "after", "metrics", "lines"},
runs train.run with these arguments, sends the signal (or none) so many seconds after the file of
metrics has so many lines, and answers {"code", "err"}.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT
ROOT = Path(__file__).parent.parent.parent


class Forks:
    """Client of the program; a context manager that ends it."""

    def __enter__(self):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait()

    def run(self, args, cwd, signal=None, after=0.0, metrics="", lines=0):
        """(exit code, stderr) of one command; the code is negative for a signal that killed it."""
        job = {"args": [str(a) for a in args], "cwd": str(cwd), "signal": signal, "after": after,
               "metrics": str(metrics), "lines": lines}  # fmt: skip
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], answer["err"]


def child(job, err):
    """Run one command; does not return."""
    from nanofuse.train.command import run_command
    from nanofuse.train.run import main

    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
    os.chdir(job["cwd"])
    code = 0
    try:
        run_command(lambda: main(job["args"]), lossy=True)
    except SystemExit as stop:
        code = stop.code
    sys.stderr.flush()
    os._exit(code)


def lines_in(path):
    return Path(path).read_bytes().count(b"\n") if os.path.exists(path) else 0


def serve():
    import torch

    import nanofuse.train.start  # noqa: F401  what the forks share

    torch.set_num_threads(1)
    err = Path(tempfile.mkdtemp()) / "err"
    for line in sys.stdin:
        job = json.loads(line)
        err.write_text("")
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            child(job, err)
        if job["signal"]:
            while job["lines"] and lines_in(job["metrics"]) < job["lines"]:
                time.sleep(0.002)
                job["lines"] -= 100 * (os.waitid(os.P_PID, pid, ENDED) is not None)
            time.sleep(job["after"])
            os.kill(pid, job["signal"])
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"code": code, "err": err.read_text()}), flush=True)


if __name__ == "__main__":
    serve()
