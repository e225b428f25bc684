"""The kernels of a run compile in processes of their own while it starts.

`Compiling.start` begins such a process (train/compiler.py) as early as possible, so that its
imports run beside those of the run; `ask` tells it what the run will launch, and `wait` is for the
moment before the first kernel. What it compiles goes into the caches on disk of Triton and
FlashAttention 4, where the launches of this process, and those of other ranks, find it. Nothing
here loads torch.
"""

import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nanofuse
from nanofuse.train.command import DEBUG_ENV

DRIVER = Path("/dev/nvidiactl")  # there where a GPU of NVIDIA's is
SILENT_SECONDS = 180  # without a word of the process, after which the run no longer waits
GOING_SECONDS = 5  # for it to end


@dataclass(frozen=True)
class Request:
    """What decides which kernels a run of --backend fused launches.

    Fields: GPTConfig and OptimConfig as {name: value}; rows of a micro-step; whether products are
    in FP8; whether attention is FlashAttention 4, and deterministic; the GPU's name, compute
    capability and streaming multiprocessors; number of ranks; FP8 format of the layers' gradients.
    """

    config: dict[str, Any]
    optim: dict[str, Any]
    rows: int
    fp8: bool
    flash: bool
    deterministic: bool
    gpu: str
    capability: tuple[int, int]
    sms: int
    world: int = 1
    gradients: str = "e5m2"

    @classmethod
    def of(cls, config, optim, *others, **named):
        """The Request of a GPTConfig, an OptimConfig and the other fields."""
        return cls(asdict(config), asdict(optim), *others, **named)

    def text(self):
        return json.dumps(asdict(self), sort_keys=True)

    def digest(self):
        return hashlib.sha256(self.text().encode()).hexdigest()


def on_gpu(given):
    """Whether a run by the flags that were given may compute on a GPU here."""
    return given.get("device_type") != "cpu" and DRIVER.exists()


def wanted(given):
    """Whether such a run may launch kernels here, and this process is to have them compiled."""
    asked = given.get("backend", "auto") in ("auto", "fused")
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # the caches are every rank's
    return asked and first and on_gpu(given)


class Compiling:
    """The process that compiles, or none, for which every method does nothing.

    Attributes:
        entries: what it compiled or found, names as in train/kernel_cache.py; once waited for.
        seconds: of each kernel that it compiled, [(seconds, name)].
        problem: in one line why it could not do all of it, or None.
    """

    def __init__(self, process=None):
        self.process, self.asked, self.note = process, None, None
        self.entries, self.seconds, self.problem, self.found = [], [], None, 0

    @classmethod
    def start(cls, **environment):
        """Start the process; `environment` are variables that it has beside this one's."""
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        path = [str(Path(nanofuse.__file__).parents[1]), env.get("PYTHONPATH", "")]
        env |= {"PYTHONPATH": os.pathsep.join(filter(None, path)), "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(
            [sys.executable, "-m", "nanofuse.train.compiler"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get(DEBUG_ENV) else subprocess.DEVNULL,
            env=env | environment,
            text=True,
            start_new_session=True,  # it ends with this process, and not by signals to both
        )
        return cls(process)

    def ask(self, request):
        """Have the kernels of a Request compiled. Only the first one counts."""
        if self.process is None or self.asked is not None:
            return
        self.asked, self.began = request, time.perf_counter()
        try:
            self.process.stdin.write(request.text() + "\n")
            self.process.stdin.flush()
        except OSError:
            self.problem = "the process that compiles them ended"

    def drop(self, note):
        """There is nothing to compile: `note` is what `wait` says."""
        self.close()
        self.note = note

    def _read(self):
        """Events of the process, until it has done everything, ends or says nothing any more."""
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()

        def pump(file):
            with suppress(OSError, ValueError):  # closed under it
                for line in file:
                    lines.put(line)
            lines.put("")

        threading.Thread(target=pump, args=(self.process.stdout,), daemon=True).start()
        while True:
            try:
                event = json.loads(lines.get(timeout=SILENT_SECONDS))
            except queue.Empty:
                self.problem = f"the process that compiles them says nothing for {SILENT_SECONDS} s"
                return
            except ValueError:  # also of "", its end
                self.problem = self.problem or "the process that compiles them ended early"
                return
            if event["event"] == "end":
                return
            yield event

    def wait(self, say=print):
        """Wait until everything is compiled; say(line) what was."""
        if self.note:
            say(self.note)
            self.note = None
        if self.process is None or self.asked is None:
            return self.close()
        waited = time.perf_counter()
        say(f"kernels: compiling beside the start, {waited - self.began:.1f} s so far")
        for event in self._read():
            self.found += event.get("count", 0)
            self.entries += event.get("entries", [])
            if event["event"] == "kernel" and not event["there"]:
                self.seconds.append((event["seconds"], event["name"]))
            if event["event"] == "failed":
                self.problem = f"{event['name']}: {event['why']}"
        now = time.perf_counter()
        line = f"kernels: {len(self.seconds)} of {self.found} compiled in {now - self.began:.1f} s"
        if self.seconds:
            slowest, name = max(self.seconds)
            line += f", the slowest ({name}) in {slowest:.1f} s"
        say(f"{line}; waited {now - waited:.1f} s for them")
        if self.problem:
            say(f"kernels: the rest compile when they are launched ({self.problem})")
        self.close()

    def close(self):
        """End the process, with all that it started."""
        process, self.process = self.process, None
        if process is None:
            return
        with suppress(OSError):
            process.stdin.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)  # with all that it forked
            with suppress(subprocess.TimeoutExpired):
                process.wait(GOING_SECONDS)
        process.stdout.close()  # waits for who reads it, and so for whoever may write to it
