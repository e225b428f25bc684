"""Ranks for bench_scaling, and what their steps say: starts the processes of
bench/scaling_worker.py, and makes figures and tables of their answers."""

import itertools
import multiprocessing
import socket
import statistics
from multiprocessing.connection import wait

from nanofuse.bench.against import difference
from nanofuse.bench.scaling_worker import work

SCHEMES = ("owned", "nanochat", "all-reduce")
WORLDS = (1, 2, 4, 8)
WAITING = ("gradients", "values")  # phases of a step in which it waits for other ranks
CLOSE_SECONDS = 60


class Crew:
    """The processes of W ranks; a context manager, which ends them.

    Args:
        world: W.
        task: bench.scaling_worker.Task.
    """

    def __init__(self, world, task):
        self.world, self.task = world, task

    def __enter__(self):
        context = multiprocessing.get_context("spawn")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.processes, self.pipes = [], []
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            args = rank, self.world, port, theirs, self.task
            process = context.Process(target=work, args=args, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)
        return self

    def ask(self, *command):
        """Every rank's answer to a command.

        Raises:
            RuntimeError: a rank has ended instead; it has said why.
        """
        for pipe in self.pipes:
            pipe.send(command)
        answers, left = {}, dict(zip(self.pipes, range(self.world), strict=True))
        while left:
            for pipe in wait(list(left)):
                rank = left.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    raise RuntimeError(f"rank {rank} has ended at {command}, see above") from None
        return [answers[rank] for rank in range(self.world)]

    def __exit__(self, kind, *error):
        try:
            if kind is None:
                self.ask("close")
                for process in self.processes:
                    process.join(CLOSE_SECONDS)
        finally:
            for process in self.processes:
                process.kill()
                process.join()


def take_turns(crew, names, rounds, warmup):
    """Steps of contenders that take turns, in the other order every second time.

    Returns:
        {name: what every rank answers of each step}, without the first `warmup` rounds.
    """
    steps = {name: [] for name in names}
    orders = itertools.cycle([names, names[::-1]])
    for _ in range(warmup + rounds):
        for name in next(orders):
            steps[name].append(crew.ask("step", name))
    return {name: taken[warmup:] for name, taken in steps.items()}


def own_seconds(phases):
    """Of a step on one rank, in which it does not wait for the others."""
    return sum(seconds for name, seconds in phases.items() if name not in WAITING)


def exposed_seconds(phases):
    """Of a step on one rank, in which it waits for the others' parts, and adds and copies them."""
    return sum(phases.get(name, 0.0) for name in WAITING)


def step_seconds(ranks):
    """Of a step that began on all ranks at once: the slowest's, from {phase: seconds} of each."""
    return max(sum(phases.values()) for phases in ranks)


def skew(seconds):
    """The slowest in times of the mean."""
    return max(seconds) / statistics.mean(seconds)


def scheme_figures(steps, told, alone):
    """What is reported of a scheme.

    Args:
        steps: of each step [{phase: seconds} of each rank].
        told: what each rank said when it was built.
        alone: seconds of a step on each GPU by itself.

    Returns:
        {name: number}. Communication that is exposed is that of the rank that has least, which is
        the last to come: the others also wait for it.
    """
    seconds = statistics.median(map(step_seconds, steps))
    figures = {
        "ms_per_step": 1e3 * seconds,
        "speedup_slowest": max(alone) / seconds,
        "speedup_mean": statistics.mean(alone) / seconds,
        "exposed_ms": 1e3 * statistics.median(min(map(exposed_seconds, s)) for s in steps),
        "exposed_mean_ms": 1e3
        * statistics.median(statistics.mean(map(exposed_seconds, s)) for s in steps),
        "skew": statistics.median(skew([*map(own_seconds, s)]) for s in steps),
        "peak_gib": [each["peak_gib"] for each in told],
        "losses": [each["losses"] for each in told],
    }
    for name in WAITING:
        least = (min(phases.get(name, 0.0) for phases in s) for s in steps)
        figures[f"{name}_ms"] = 1e3 * statistics.median(least)
    return figures


def differences(steps, names):
    """What the first scheme's step takes more than each other one's: {name: (median, (low, high))}
    of the rounds' relative differences, with its 95 % interval.

    Args:
        steps: {name: as of scheme_figures}, in turns.
    """
    seconds = {name: list(map(step_seconds, steps[name])) for name in names}
    return {name: difference(seconds[names[0]], seconds[name]) for name in names[1:]}


def _number(x, digits=1):
    return "" if x is None else f"{x:,.{digits}f}"


def scaling_table(benches):
    """Lines of Markdown: a row for each scheme of each world, and what they are held against.

    Args:
        benches: extra_info of bench_scaling's.
    """
    head = ["depth", "ranks", "scheme", "ms/step", "faster than slowest alone", "than mean"]
    head += ["exposed ms", "gradients", "values", "skew", "peak GiB"]
    yield f"| {' | '.join(head)} |"
    yield "| --- |" + " ---: |" * (len(head) - 1)
    for info in benches:
        alone, world = info["alone_ms"], info["world"]
        whole = statistics.mean(alone)
        own = [str(info["depth"]), str(world), "alone", _number(whole), "", "", "", "", ""]
        peak = max((x for x in info["alone_peak_gib"] if x is not None), default=None)
        yield f"| {' | '.join([*own, _number(skew(alone), 4), _number(peak)])} |"
        for name, figures in info["schemes"].items():
            peak = max((x for x in figures["peak_gib"] if x is not None), default=None)
            cells = [str(info["depth"]), str(world), name, _number(figures["ms_per_step"])]
            cells += [f"{figures[f'speedup_{of}']:.3f}" for of in ("slowest", "mean")]
            cells += [_number(figures[f"{x}_ms"], 2) for x in ("exposed", *WAITING)]
            cells += [_number(figures["skew"], 4), _number(peak)]
            yield f"| {' | '.join(cells)} |"
    for info in benches:
        start = f"d{info['depth']} on {info['world']}: "
        yield start + "alone " + ", ".join(map(_number, info["alone_ms"])) + " ms"
        if info["library_ms"]:
            scatter, gather = (info["library_ms"][name] for name in WAITING)
            size = f"{start}{info['nbytes'] / 1e6:,.0f} MB, "
            yield f"{size}library's reduce-scatter {scatter:.2f}, all-gather {gather:.2f} ms"
        for name, (median, (low, high)) in info["against"].items():
            first = next(iter(info["schemes"]))
            yield f"{start}{first} against {name} {median:+.2%} ({low:+.2%} to {high:+.2%})"
        for line in info["left_out"]:
            yield start + line
