"""`train.run --gpus N`: a process for each GPU of this machine, and one exit code for all of them.

Each process is told its rank in torchrun's words. A signal goes to every rank once: they finish the
step, save it together and leave. Nothing here loads torch.
"""

import os
import signal
import socket
import subprocess
import sys
import time

from nanofuse.train.errors import UserError
from nanofuse.train.signals import NAMES

HOST = "127.0.0.1"
STORE_FD = "NANOFUSE_STORE_FD"  # the socket on which rank 0 is to serve the ranks' store
PARENT = "NANOFUSE_PARENT"  # process that forwards signals
LOOK_SECONDS = 0.05
GOING_SECONDS = 60  # for the other ranks to end after one has
NO_GROUP = "--gpus {} needs processes of Linux or macOS; drop it"


def is_rank():
    """Whether this process is one of several already, or was started by torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _gpu_lines():
    """What nvidia-smi says of each GPU of the machine, such as "GPU 0: NVIDIA H200 (UUID: …)"."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in done.stdout.splitlines() if line.startswith("GPU ")]


def gpu_name():
    """The name of the machine's first GPU, None without one."""
    lines = _gpu_lines()
    return lines[0].partition(": ")[2].partition(" (UUID")[0] if lines else None


def visible_gpus():
    """What CUDA_VISIBLE_DEVICES calls the GPUs that CUDA would show; empty without a driver."""
    chosen, there = os.environ.get("CUDA_VISIBLE_DEVICES"), len(_gpu_lines())
    if chosen is None:
        return [str(index) for index in range(there)]
    names = [name.strip() for name in chosen.split(",")]
    stop = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
    return names[: min(there, stop)]


def number_of_ranks(asked, device_type):
    """Processes to start for --gpus; where there is no GPU, or --device-type is cpu, they compute
    on the CPU.

    Args:
        asked: value of --gpus, a number or "auto", which takes every GPU.

    Raises:
        UserError: it is neither, or more than there are.
    """
    if asked == "1":
        return 1
    if asked != "auto" and not (asked.isdecimal() and asked.isascii() and 0 < int(asked) <= 4096):
        raise UserError(f"--gpus must be a number from 1 to 4096, or auto, got {asked!r:.50}")
    there = 0 if device_type == "cpu" else len(visible_gpus())
    if asked == "auto":
        return max(there, 1)
    if there and int(asked) > there:
        raise UserError(f"--gpus {asked}: {there} GPUs are visible; lower it, or take auto")
    return int(asked)


def _environment(rank, world, port):
    """Variables of a rank's process."""
    cores = (os.cpu_count() or 1) // world
    return {
        "OMP_NUM_THREADS": str(max(cores, 1)),
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        PARENT: str(os.getpid()),
    }


def _start(processes, command, world):
    """Add the processes of all ranks, in order; signals of a terminal reach this process alone."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen(2 * world)
        number, port = listener.fileno(), listener.getsockname()[1]
        for rank in range(world):
            env, passed = _environment(rank, world, port), ()
            if rank == 0:
                env[STORE_FD], passed = str(number), (number,)
            processes.append(
                subprocess.Popen(command, env=env, pass_fds=passed, start_new_session=True)
            )


def launch(argv, module, world):
    """Run a command in `world` processes until all have ended.

    Args:
        argv: arguments of the command.
        module: its name, as for python -m.

    Returns:
        the exit code: that of the first rank that failed, 1 for one that was killed.

    Raises:
        UserError: this system has not what it takes.
    """
    if os.name != "posix":
        raise UserError(NO_GROUP.format(world))
    signals, processes = [], []

    def note(number, frame):
        signals.append(number)

    wanted = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {n: signal.signal(n, note) for n in wanted if signal.getsignal(n) != signal.SIG_IGN}
    try:
        _start(processes, [sys.executable, "-m", module, *argv], world)
        return _wait(processes, signals)
    finally:
        _send(processes, signal.SIGKILL)
        for process in processes:
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(processes, number):
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _wait(processes, signals):
    """Hand signals on as they come, until all processes have ended; the exit code."""
    left, code, until, forwarded = dict(enumerate(processes)), 0, None, []
    while left:
        time.sleep(LOOK_SECONDS)
        while signals:
            forwarded.append(signals.pop(0))
            _send(left.values(), forwarded[-1])
        for rank, process in list(left.items()):
            if process.poll() is None:
                continue
            del left[rank]
            if until is None:
                until = time.monotonic() + GOING_SECONDS
            if code == 0 and process.returncode != 0:
                code = _told_code(rank, process.returncode, forwarded)
                _send(left.values(), signal.SIGCONT)  # one that was stopped ends itself then
        if until is not None and time.monotonic() > until:
            _send(left.values(), signal.SIGKILL)
    return code


def _told_code(rank, code, forwarded):
    """The command's exit code for the first rank that failed; says what that rank cannot say."""
    if code > 0:
        return code
    if -code in forwarded:  # it had not yet got ready for signals
        return 128 - code
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = "; the system may be short of memory" if name == "SIGKILL" else ""
    print(f"error: rank {rank} was killed by {name}{hint}", file=sys.stderr, flush=True)
    return 1
