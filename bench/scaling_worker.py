"""One rank of bench_scaling: a model of each contender, and steps on request.

bench.scaling starts `work` in a process for each rank and talks to it by a pipe. What it sends goes
to all ranks alike: the name of a contender to build ("alone" is this process by itself, with the
whole batch, while the others are as busy), "drop" to forget all that were built, "step NAME", or
"library", the time of the collectives. Every rank answers each of them.
"""

import gc
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from nanofuse.bench.collectives import Collectives
from nanofuse.bench.harness import ON_GPU
from nanofuse.bench.schemes import AllReduced, Nanochat
from nanofuse.bench.training import PhaseClock, Workload, synchronize, train_step
from nanofuse.model.fp8.scaling import CALIBRATED_STEPS
from nanofuse.model.fused import FusedGPT
from nanofuse.train.assemble import assemble, gathered, prepare_products
from nanofuse.train.device import select_fp8, select_machine
from nanofuse.train.loop import settle_garbage
from nanofuse.train.optim.config import OptimConfig
from nanofuse.train.optim.updates import EagerUpdate, KernelUpdate
from nanofuse.train.placement import is_small
from nanofuse.train.ranks import ALONE, Pending, Ranks
from nanofuse.train.rendezvous import Place

FIRST_STEPS = CALIBRATED_STEPS + 1 if ON_GPU else 2  # till graphs run
REPEATS, WARMUP = (20, 5) if ON_GPU else (1, 0)  # of a collective
ROOM = 1.05  # memory that is to be free for a contender, in times of the one before it
GIB = 2**30


@dataclass(frozen=True)
class Task:
    """What all ranks of a bench share: the workload of one process, and choices as train.run's
    flags."""

    workload: Workload
    backend: str
    fp8: str


def meet(ranks, device):
    """Have what follows begin on all ranks at once: on GPUs behind a message of theirs, which no
    process is late for."""
    synchronize()
    ranks.maximum_(torch.zeros(1, device=device))


@dataclass(frozen=True)
class _InPhase:
    """A transfer that is waited for within a phase."""

    pending: Pending
    phase: Callable
    name: str

    def wait(self):
        with self.phase(self.name):
            self.pending.wait()


class Contender:
    """A model in training by one scheme, on this rank.

    Args:
        name: "alone", or one of bench.scaling.SCHEMES.
        machine: train.device.Machine.
        ranks: those that are there, even for "alone".
    """

    def __init__(self, name, task, machine, ranks):
        self.ranks, self.device = ranks, machine.device
        self.crew = ALONE if name == "alone" else ranks
        workload, optim = task.workload, OptimConfig()
        batches = workload.batches(machine.device)
        self.batches = batches[self.crew.rank :: self.crew.world]
        self.tokens = [inputs.cpu() for inputs, _ in self.batches]
        owned = self.crew if name == "owned" else ALONE
        fp8 = select_fp8(task.fp8, machine, workload.config, workload.rows)
        if machine.backend == "fused":  # or each would choose algorithms for itself
            sizes = workload.config, workload.rows, machine.device
            prepare_products(fp8.made, *sizes, ranks)
        self.built = built = assemble(
            workload.config, machine, optim, fp8, rows=workload.rows, ranks=owned
        )
        if name == "nanochat":
            built.optimizer = self._nanochat(machine, optim)
        elif name == "all-reduce":
            built.optimizer = AllReduced(built.optimizer, Collectives(ranks), self.phase)
        elif owned.world > 1:
            self._watch(built)

    def _nanochat(self, machine, optim):
        model, config = self.built.model, self.built.raw_model.config
        update = partial(EagerUpdate, newton_schulz_dtype=machine.dtype)
        if isinstance(model, FusedGPT):
            update, model.operands.taken = KernelUpdate, None  # it takes every step
        roles = self.built.raw_model.param_roles()
        collectives = Collectives(self.ranks)
        return Nanochat(roles, optim, config.n_embd, 1.0, update, collectives, self.phase)

    def phase(self, name):
        """Of the step under way."""
        return self.clock(name)

    def _watch(self, built):
        """Have the product's exchange within the phases of the step."""
        sharing, operands = built.optimizer.sharing, getattr(built.model, "operands", None)
        return_values = sharing.return_values

        def in_phase(run):
            def timed(*args):
                with self.phase("gradients"):
                    run(*args)

            return timed

        def give_back(bucket):
            return Pending([_InPhase(return_values(bucket), self.phase, "values")])

        for name in ("start", "sum_gradients", "add_gradients"):
            setattr(sharing, name, in_phase(getattr(sharing, name)))
        sharing.return_values = give_back
        if operands is not None:
            arrive = operands.arrive

            def operands_arrive():
                with self.phase("values"):
                    arrive()

            operands.arrive = operands_arrive

    def step(self):
        """Take a step that begins on all ranks at once; {phase: seconds} and the first loss.

        The phases "gradients" and "values" are the time in which the stream that computes waits for
        other ranks' parts, and adds or copies them. What runs beside it does not count.
        """
        meet(self.ranks, self.device)
        self.clock = PhaseClock()
        loss = train_step(self.built, self.batches, self.clock, self.crew.world, self.tokens)
        return self.clock.seconds(), loss.item()

    def checksum(self):
        """A number that differs where weights do."""
        with gathered(self.built.model):
            sums = [p.detach().double().sum() for p in self.built.raw_model.parameters()]
        return torch.stack(sums).sum().item()


class Worker:
    """The commands of a rank; see above."""

    def __init__(self, task, ranks, machine):
        self.task, self.ranks, self.machine = task, ranks, machine
        self.contenders, self.peak = {}, 0
        self.sizes = {}  # elements of the parameters that have an owner, by dtype

    def build(self, name):
        """Build a contender and take its first steps. Its peak memory, losses and facts; {} on
        every rank where one of them has no room for as much as the contender before took."""
        gc.collect()
        before = reserved = 0
        if ON_GPU:
            torch.cuda.empty_cache()
            full = torch.cuda.mem_get_info()[0] < ROOM * self.peak
            if self.ranks.agree(full) == (True,):
                return {}
            torch.cuda.reset_peak_memory_stats()
            before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        made = Contender(name, self.task, self.machine, self.ranks)
        losses = [made.step()[1] for _ in range(FIRST_STEPS)]
        expected = math.log(self.task.workload.config.vocab_size)  # logits are ~0 at the start
        assert abs(losses[0] - expected) < 0.05, f"{name}: loss {losses[0]}"
        self.contenders[name] = made
        self.sizes = {}
        for p in made.built.raw_model.parameters():
            if not is_small(p.shape):
                self.sizes[p.dtype] = self.sizes.get(p.dtype, 0) + p.numel()
        settle_garbage()
        told = {"losses": losses, "facts": made.built.facts, "peak_gib": None}
        if ON_GPU:
            self.peak = torch.cuda.max_memory_reserved() - reserved
            told["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / GIB
        return told

    def step(self, name):
        seconds, _ = self.contenders[name].step()
        return seconds

    def check(self):
        """Refuse ranks that do not have the same weights."""
        for name, made in self.contenders.items():
            sums = self.ranks.collect(made.checksum())
            if made.crew.world > 1:
                assert len(set(sums)) == 1, f"{name}: the ranks' weights differ, {sums}"

    def drop(self):
        self.check()
        self.contenders, self.peak = {}, 0
        gc.unfreeze()
        gc.collect()

    def library(self):
        """Seconds of the library's own reduce-scatter of all gradients, and all-gather of all
        values, on GPUs that do nothing else, {name: seconds}; and the bytes of each."""
        collectives, pairs = Collectives(self.ranks), []
        for dtype, size in self.sizes.items():
            count = -(-size // self.ranks.world)
            part = torch.zeros(count, dtype=dtype, device=self.machine.device)
            pairs.append((part.new_zeros(count * self.ranks.world), part))

        def gradients():
            for whole, part in pairs:
                collectives.reduce_scatter(part, whole).wait()

        def values():
            for whole, part in pairs:
                collectives.all_gather(whole, part).wait()

        seconds = {run.__name__: self._median(run) for run in (gradients, values)}
        return seconds, sum(whole.nbytes for whole, _ in pairs)

    def _median(self, run):
        seconds = []
        for _ in range(WARMUP + REPEATS):
            meet(self.ranks, self.machine.device)
            clock = PhaseClock()
            with clock("all"):
                run()
            seconds.append(clock.seconds()["all"])
        return statistics.median(seconds[WARMUP:])


def work(rank, world, port, pipe, task):
    """A rank's process: answers what comes by the pipe until "close"."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if ON_GPU:
        torch.cuda.set_device(rank)
        machine = select_machine("cuda", task.backend, rank)
        torch.set_num_threads(max((os.cpu_count() or 1) // world, 1))  # as train.run --gpus
    else:
        torch.set_num_threads(1)
        machine = select_machine("cpu", task.backend)
    ranks = Ranks(Place(rank, world, rank), machine.device) if world > 1 else ALONE
    worker = Worker(task, ranks, machine)
    commands = {"build": worker.build, "step": worker.step}
    commands |= {"drop": worker.drop, "library": worker.library, "close": worker.drop}
    while True:
        command, *args = pipe.recv()
        pipe.send(commands[command](*args))
        if command == "close":
            break
    ranks.close()
