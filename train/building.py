"""From a Start to a Trainer, and through the run: what the command does once its flags are read."""

import gc
import json
import threading
import time
from contextlib import closing, suppress

import torch

from nanofuse.model import providers
from nanofuse.model.backends import flash_ahead, flash_loading
from nanofuse.train.ahead import Ahead
from nanofuse.train.assemble import assemble
from nanofuse.train.checkpoint import load_optim, load_tensors, load_weights
from nanofuse.train.clock import Phases, process_seconds
from nanofuse.train.command import command_module
from nanofuse.train.data.corpus import StdlibCorpus
from nanofuse.train.data.device_loader import DeviceLoader, restore_state
from nanofuse.train.data.tokenizer import FILE_NAME
from nanofuse.train.device import bf16_peak
from nanofuse.train.disk import room, size_of
from nanofuse.train.errors import RunEnded, UserError
from nanofuse.train.figures import summary
from nanofuse.train.files import portable
from nanofuse.train.lock import RunLock
from nanofuse.train.loop import Trainer
from nanofuse.train.memory import check_training_memory, out_of_memory
from nanofuse.train.progress import Progress
from nanofuse.train.ranks import ALONE, join
from nanofuse.train.run_folder import LOADER, MODEL
from nanofuse.train.runlog import METRICS_FILE, RunLog, Silent, cut_back
from nanofuse.train.saving import Saver, run_and_save
from nanofuse.train.schedules import Schedule
from nanofuse.train.signals import Interrupted, Signals
from nanofuse.train.start import describe, start_with_rank_0
from nanofuse.train.state import load_training_state, training_state
from nanofuse.train.trackers import close_all, start_trackers
from nanofuse.train.trial import settle_rows


def load_attention(start):
    """Import FlashAttention 4 in a thread, where the Start will take it: that takes seconds, of
    which this thread waits for the GPU or for kernels. Not while products are measured: an import
    keeps Python's lock, and times that end when the lock comes back say nothing.

    An import that fails fails again, and is told, where the backend is made.
    """

    def load():
        with suppress(Exception):
            flash_loading.load()

    refused = providers.find(providers.ATTENTION, "fa4").refusal(start.machine.need())
    if not refused and flash_ahead.expected(start.settings.machine.attention):
        threading.Thread(target=load, name="attention").start()


def build_trainer(start, phases, signals=None, ahead=None):
    """The Trainer of a Start.

    Args:
        phases: train.clock.Phases since the start of the process.
        signals: train.signals.Signals that were installed, or None.
        ahead: train.ahead.Ahead that was told of the kernels, or None.

    Raises:
        UserError: an attention backend that cannot run here, or a damaged checkpoint.
    """
    settings, config, machine = start.settings, start.config, start.machine
    plan, ranks = start.plan, start.ranks
    ranks.use(machine.device)
    memory = check_training_memory(settings, config, machine, start.fp8.name)
    if ranks.main:
        for line in (*describe(start, plan), f"memory: {memory} expected"):
            print(line, flush=True)
    state = None
    if start.checkpoint:
        state = restore_state(start.meta["loader"], load_tensors(start.checkpoint / LOADER))
    loader = DeviceLoader(start.packing, machine.device, state)  # reads while the model is built
    try:
        return build_with(loader, start, phases, signals or Signals(), ahead or Ahead())
    except BaseException:
        loader.close()
        raise


def build_with(loader, start, phases, signals, ahead):
    """As build_trainer, with a DeviceLoader that makes its batches."""
    trackers = []  # rank 0's; before the model, as they may not start

    def begin():
        values = {name: portable(value) for name, value in start.settings.flat().items()}
        meta = start.meta or {}
        known = meta.get("step"), meta.get("wandb")
        trackers.extend(start_trackers(start.settings.reports, start.directory, values, *known))

    start.ranks.by_main(begin)
    try:
        return build_and_log(loader, start, phases, signals, ahead, trackers)
    except BaseException:
        close_all(trackers)
        raise


def build_and_log(loader, start, phases, signals, ahead, trackers):
    """As build_with, with trackers that have started."""
    settings, config, machine = start.settings, start.config, start.machine
    plan, directory, ranks = start.plan, start.directory, start.ranks

    def set_weights(model):
        load_attention(start)  # the products are chosen by now
        if start.checkpoint:
            load_weights(model, load_tensors(start.checkpoint / MODEL), start.checkpoint / MODEL)
        else:
            model.init_weights(settings.job.seed)

    def ready():
        ranks.by_main(ahead.ready)  # rank 0's are in the caches of all

    phases.end("data")
    built = assemble(
        config,
        machine,
        settings.optim,
        start.fp8,
        settings.machine.attention,
        settings.machine.deterministic,
        settings.machine.compile_mode,
        settings.machine.cuda_graphs,
        plan.lr_scale,
        set_weights,
        settings.horizon.device_batch_size,
        ranks,
        ready,
        phases.end,
    )
    progress, done, wandb_id = Progress(), set(), None
    if start.checkpoint:
        meta, folder = start.meta, start.checkpoint
        saved = load_optim(folder)
        load_training_state(built.model, built.optimizer, saved, meta["optimizer_steps"])
        try:
            progress = Progress(**meta["progress"])
        except TypeError as error:
            raise UserError(f"{folder}: progress is of another version ({error})") from None
        wandb_id = meta.get("wandb")
        evaluated = meta.get("val_bpb") is not None
        again = set() if evaluated else {"val"}
        kept = ranks.by_main(cut_back, directory / METRICS_FILE, progress.step, again)
        done = kept | {"val"} - again
    else:
        ranks.by_main(start.tokenizer.save, directory / FILE_NAME)

    reports = settings.reports
    at = progress.step if start.checkpoint else None
    log = Silent()
    if ranks.main:
        log = RunLog(directory, progress.step, plan.num_iterations, trackers, wandb_id)
    saver = Saver(start.lock, log, start.tokenizer, reports.keep, at, ranks)
    beside = ranks.collect(size_of(training_state(built.model, built.optimizer)))
    needed = size_of(built.raw_model.state_dict()) + sum(beside)
    for line in (*built.facts, room(needed, directory)):
        log.print(line)
    trainer = Trainer(
        model=built.model,
        raw_model=built.raw_model,
        optimizer=built.optimizer,
        schedule=Schedule(plan.num_iterations, settings.schedule),
        settings=settings,
        plan=plan,
        tokenizer=start.tokenizer,
        corpus=start.corpus,
        loader=loader,
        log=log,
        saver=saver,
        directory=directory,
        prompt="def " if isinstance(start.corpus, StdlibCorpus) else "The capital of France is",
        peak_flops=bf16_peak(machine.name),
        phases=phases,
        progress=progress,
        estimate=start.estimate,
        tasks=start.tasks,
        signals=signals,
        ranks=ranks,
        resumed=start.checkpoint is not None,
        done=frozenset(done),
    )
    if trainer.energy.missing:
        log.print(trainer.energy.missing)
    return trainer


def train(given, compiling=None):
    """Train as the flags say that were given ({name: value}), as one of several ranks where it is
    one; rank 0 prints the summary as JSON.

    Args:
        compiling: train.compiling.Compiling, started; it is closed. None: nothing compiles ahead.

    Raises:
        UserError: any bad input.
        RunEnded: an error on the way, or a signal.
    """
    phases = Phases(time.perf_counter() - process_seconds())
    phases.end("imports")
    ahead = Ahead(compiling, given.get("kernel_cache"))
    ranks = ALONE
    try:
        with Signals() as signals, closing(ahead):
            try:
                ranks = join()
                train_as(ranks, given, phases, ahead, signals)
            except BaseException as failure:
                stop = failure
                if not isinstance(failure, Interrupted):
                    if signals.number is None or signals.deferred:
                        raise
                    # what a signal interrupts may make an error of it, as torch's compiler does
                    stop = Interrupted(signals.number)
                text, code = f"stopped by {stop} before the first step", 128 + stop.number
                raise RunEnded(text, code) from failure
        ranks.close()
    except BaseException as failure:
        if ranks is ALONE:
            raise
        ranks.leave(failure)


def train_as(ranks, given, phases, ahead, signals):
    """As train.

    Args:
        ranks: train.ranks.Ranks.
        phases: train.clock.Phases since the start of the process.
        ahead: train.ahead.Ahead.
        signals: train.signals.Signals that were installed.
    """
    given = {**given, "gpus": str(ranks.world)}
    with RunLock() as lock:
        start = start_with_rank_0(given, lock, ranks, ahead)
        phases.end("data")
        start = settle_rows(start, ahead.ready)
        try:
            trainer = build_trainer(start, phases, signals, ahead)
            phases.end("model")
        except torch.OutOfMemoryError:
            rows, device = start.settings.horizon.device_batch_size, start.machine.device
            raise UserError(out_of_memory(rows, start.estimate, device)) from None
        try:
            run_and_save(trainer)
        finally:
            trainer.loader.close()
            trainer.log.close()
            gc.unfreeze()
    facts = summary(trainer)
    if ranks.main:
        name, package = trainer.directory.name, command_module().removesuffix("run")
        print(f'done: python -m {package}generate --run {name} --prompt "..." continues a text')
        print(json.dumps(facts))
