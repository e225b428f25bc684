"""The process that train/compiling.py starts: compiles the kernels of one Request.

It reads the Request as a line of JSON from stdin, and writes a line of JSON for each thing that
happens to stdout. It sees no GPU: launches are found by a rehearsal on tensors without memory, and
each compiles in a forked process, which has everything imported. FlashAttention 4 has a branch of
its own, which imports it before the Request comes, as that takes seconds.
"""

import json
import multiprocessing
import os
import sys
import time

FORK = multiprocessing.get_context("fork")


class Reports:
    """Lines to whoever started this process; several processes may write."""

    def __init__(self):
        self.file = os.dup(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no report

    def __call__(self, event, **values):
        line = json.dumps({"event": event, **values}) + "\n"
        os.write(self.file, line.encode())  # whole: shorter than a pipe's atomic size


def _compiled(report, name, compile, entries):
    """Compile one kernel and report it.

    Args:
        compile: compile() returns whether it was in the cache.
        entries: entries() are the names of what it has in the caches.
    """
    began = time.perf_counter()
    try:
        there = compile()
        found = entries()
    except Exception as error:  # of compilers: the run goes on without this kernel
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        return report("failed", name=name, why=why[:200])
    seconds = round(time.perf_counter() - began, 3)
    report("kernel", name=name, seconds=seconds, there=there, entries=found)


def _share(tasks, count, report):
    """Compile what `tasks` name, arguments of `_compiled`, with `count` processes."""
    done = FORK.Value("i", 0)

    def work():
        while True:
            with done.get_lock():
                index, done.value = done.value, done.value + 1
            if index >= len(tasks):
                return
            _compiled(report, *tasks[index])

    _run([FORK.Process(target=work, name=f"compiler {i}") for i in range(count)], report)


def _run(processes, report):
    """Start processes and wait for them; one that dies is reported."""
    for process in processes:
        process.start()
    _join(processes, report)


def _join(processes, report):
    for process in processes:
        process.join()
        if process.exitcode:
            report("failed", name=process.name, why=f"its process ended with {process.exitcode}")


def _triton(report, request, config, optim, gpu):
    """The kernels of Triton, with as many processes as there are cores."""
    from nanofuse.kernels.common import ahead
    from nanofuse.model.backends.flash import why_no_sums
    from nanofuse.train.kernel_cache import triton_entry
    from nanofuse.train.rehearsal import rehearse

    def task(name, kernel):
        return name, kernel.compile, lambda: [triton_entry(key) for key in set(kernel.entries)]

    sums = request.flash and why_no_sums(config, gpu.capability) is None
    ways = request.world, sums, request.gradients
    launches = rehearse(config, optim, request.rows, request.fp8, gpu, *ways)
    kernels = [ahead.Support(), *launches]
    report("found", count=len(kernels))
    tasks = [task(kernel.name, kernel) for kernel in kernels]
    _share(tasks, min(len(tasks), len(os.sched_getaffinity(0))), report)


def _flash(report, hopper, inbox):
    """The kernels of FlashAttention 4, with a process each.

    Args:
        inbox: gives the Request, its config and Gpu; or None.
    """
    from nanofuse.model.backends import flash_ahead
    from nanofuse.train.kernel_cache import flash_entry

    flash_ahead.aim(hopper)
    flash_ahead.load()
    order = inbox.recv()
    if order is None:
        return
    request, config, gpu = order
    flash_ahead.aim(gpu)
    passes = config, request.rows, request.deterministic

    def task(kernel):
        return (
            kernel[0],
            lambda: flash_ahead.compile_kernel(kernel, *passes),
            lambda: [flash_entry(flash_ahead.cached_file(kernel))],
        )

    tasks = [task(kernel) for kernel in flash_ahead.kernels(*passes)]
    report("found", count=len(tasks))
    _share(tasks, len(tasks), report)


def main():
    report = Reports()
    import torch

    from nanofuse.kernels.common import ahead
    from nanofuse.kernels.common.tuning import Gpu
    from nanofuse.model.backends import flash_ahead
    from nanofuse.model.config import GPTConfig
    from nanofuse.train.compiling import Request
    from nanofuse.train.optim.config import OptimConfig
    from nanofuse.train.rehearsal import rehearse

    torch.set_num_threads(1)  # threads do not survive a fork
    # what takes long at its first use, before the Request comes
    small, hopper = GPTConfig.from_depth(1, vocab_size=64), Gpu("", (9, 0), 1)
    inbox, outbox = FORK.Pipe(duplex=False)
    branches = []
    if flash_ahead.versions():
        args = report, hopper, inbox
        branches.append(FORK.Process(name="FlashAttention 4", target=_flash, args=args))
        branches[0].start()
    ahead.load(hopper.capability)
    rehearse(small, OptimConfig(), 1, True, hopper)
    line = sys.stdin.readline()
    if not line:
        return outbox.send(None)
    request = Request(**json.loads(line))
    config, optim = GPTConfig(**request.config), OptimConfig(**request.optim)
    gpu = Gpu(request.gpu, tuple(request.capability), request.sms)
    outbox.send((request, config, gpu) if request.flash else None)
    branch = FORK.Process(name="Triton", target=_triton, args=(report, request, config, optim, gpu))
    branch.start()
    _join([branch, *branches], report)
    report("end")


if __name__ == "__main__":
    main()
