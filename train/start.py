"""What a run starts from: flags, folder, data and checkpoint, all checked on the way."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanofuse.model import providers
from nanofuse.model.config import GPTConfig
from nanofuse.train.ahead import Ahead
from nanofuse.train.checkpoint import config_of, load_tokenizer
from nanofuse.train.core_bundle import core_tasks
from nanofuse.train.data.corpus import ParquetCorpus, StdlibCorpus, open_corpus
from nanofuse.train.data.loader import Packing
from nanofuse.train.data.survey import describe_data
from nanofuse.train.data.tokenizer import Tokenizer, train_on_corpus
from nanofuse.train.data.tokens import open_cache
from nanofuse.train.device import Machine, own_machine, select_device, select_products
from nanofuse.train.errors import UserError
from nanofuse.train.files import native
from nanofuse.train.lock import Followed, RunLock, Taken, owner_of
from nanofuse.train.memory import check_training_memory, training_estimate
from nanofuse.train.plan import Plan, make_plan, make_resumed_plan
from nanofuse.train.ranks import ALONE, Alone
from nanofuse.train.run_folder import (
    checkpoints,
    find_checkpoint,
    load_meta,
    run_dir,
)
from nanofuse.train.runlog import METRICS_FILE, kinds_at
from nanofuse.train.settings import (
    Settings,
    asks_for_rows,
    flag_name,
    naming_flags,
    refuse_empty,
    resolve,
    resolve_resumed,
    without_auto,
)
from nanofuse.train.trackers import check_installed
from nanofuse.train.trial import choose_rows


def take_new_folder(settings, lock):
    """Take the folder of a new run; without --run the first free one of d<depth>, d<depth>-2, ...

    Args:
        lock: train.lock.RunLock, which holds it then.

    Raises:
        UserError: --run names one that holds a run, or it cannot be made.
    """
    if settings.job.run:
        lock.take(run_dir(settings.job.run), new=True)
        return
    name = f"d{settings.model.depth}"
    for count in itertools.count(1):
        directory = run_dir(name if count == 1 else f"{name}-{count}")
        if directory.is_symlink() or checkpoints(directory):
            continue
        try:
            return lock.take(directory, new=True)
        except Taken:
            continue


def find_tokenizer(corpus, vocab_size, size_given):
    """The data's tokenizer, or one trained on the corpus and kept there if it can be.

    Raises:
        UserError: the tokenizer there is damaged, or not of the --vocab-size given.
    """
    path = corpus.tokenizer_path
    if path and path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a link to {path.readlink()}, which is not there; mend it")
    if path and path.exists():
        tokenizer = Tokenizer.load(path)
        other = vocab_size not in (tokenizer.vocab_size, tokenizer.asked_vocab_size)
        if other and size_given:
            raise UserError(
                f"--vocab-size {vocab_size}: {path} has {tokenizer.vocab_size} tokens; "
                "drop the flag, or move that file away to train another"
            )
        if other:
            print(
                f"tokenizer: {path} has {tokenizer.vocab_size:,} tokens, not the default of "
                f"{vocab_size:,}; move that file away to train one of the default"
            )
        elif vocab_size != tokenizer.vocab_size:
            print(f"tokenizer: {tokenizer.shortfall} ({path})")
        return tokenizer
    print(f"tokenizer: training {vocab_size:,} tokens on {corpus.name}", flush=True)
    tokenizer = train_on_corpus(corpus, vocab_size)
    if tokenizer.shortfall:
        print(f"tokenizer: {tokenizer.shortfall}")
    if path:
        try:
            tokenizer.save(path)
        except OSError as error:
            print(f"tokenizer: kept with the run only ({error.strerror}: {path.parent})")
    return tokenizer


def describe(start, plan):
    """Lines that say what is about to run."""
    settings, config, machine = start.settings, start.config, start.machine
    rows, world = settings.horizon.device_batch_size, start.ranks.world
    count = f"{world} x " if world > 1 else ""
    shared = f" on each of {world} ranks" if world > 1 else ""
    counts = "  ".join(f"{role} {n:,}" for role, n in config.param_counts().items())
    mode = f", mode {settings.machine.compile_mode}" if machine.backend == "compile" else ""
    return [
        f"device: {count}{machine.name}, {machine.dtype}, torch {torch.__version__}",
        f"backend: {machine.backend} ({machine.why}{mode})",
        *describe_data(start.packing, plan.tokens // config.sequence_len),
        f"model: {config.n_layer} layers, width {config.n_embd}, {config.n_head} heads "
        f"({config.n_kv_head} kv), T {config.sequence_len}, windows {config.windows}",
        f"parameters: {config.num_params:,} ({config.num_scaling_params:,} scaling): {counts}",
        f"FLOPs per token: {config.flops_per_token:,}",
        f"plan: {plan.num_iterations:,} steps x {plan.total_batch_size:,} tokens = "
        f"{plan.tokens:,}; {plan.micro_steps // world} micro-steps of {rows} rows{shared}; "
        f"lr x{plan.lr_scale:.4f}, weight decay {plan.weight_decay:.4f}",
        f"run: {start.directory}"
        + (f", resumed at step {start.meta['step']}" if start.checkpoint else ""),
    ]


@dataclass(frozen=True)
class Start:
    """What a run starts from: everything checked, nothing built yet, its folder locked."""

    settings: Settings
    machine: Machine
    corpus: ParquetCorpus | StdlibCorpus
    tokenizer: Tokenizer
    config: GPTConfig
    fp8: providers.Choice
    plan: Plan
    lock: RunLock | Followed
    ranks: Alone
    tasks: list  # of train.core_bundle.Task
    auto_rows: bool = False  # whether the rows of a micro-step were found out
    checkpoint: Path | None = None
    meta: dict | None = None  # the checkpoint's

    @property
    def estimate(self):
        """Bytes of memory that are expected, by rows of a micro-step."""
        return training_estimate(self.config, self.machine, self.fp8.name)

    @property
    def directory(self):
        return self.lock.directory

    @property
    def packing(self):
        """What the training loader packs."""
        job, ranks = self.settings.job, self.ranks
        cache = open_cache(self.corpus, self.tokenizer, job.cache)
        if cache and not ranks.main:
            cache.keeps = False  # rank 0 does
        return Packing(
            self.corpus,
            "train",
            self.tokenizer,
            self.settings.horizon.device_batch_size,
            self.settings.model.max_seq_len,
            job.long_documents,
            cache,
            ranks.rank,
            ranks.world,
        )

    def for_others(self):
        """What the other ranks need to start, in place of what belongs to this process."""
        return replace(self, machine=None, fp8=None, lock=None, ranks=None), self.directory


def check_backend_flags(given, machine):
    """Refuse flags that were given and that another backend than this Machine's would read.

    Raises:
        UserError: naming the flag and its backend.
    """
    fields = {"compile_mode": "compile", "cuda_graphs": "fused", "kernel_cache": "fused"}
    for field, backend in fields.items():
        if given.get(field) and machine.backend != backend:
            raise UserError(
                f"{flag_name(field)} needs --backend {backend}, and this run is {machine.backend}; "
                "drop it"
            )


def start_with_rank_0(given, lock, ranks, ahead):
    """The Start of every rank: rank 0 finds out what it is, for all.

    Args:
        ahead: train.ahead.Ahead, which rank 0 tells of the kernels.

    Raises:
        UserError: any bad input.
        PeerFailed: of rank 0's.
    """
    start = None

    def settle():
        nonlocal start
        start = (start_resumed if given.get("resume") else start_new)(given, lock, ranks, ahead)
        return start.for_others()

    found, directory = ranks.by_main(settle)
    if start is None:
        settings, options = found.settings, found.settings.machine
        machine = own_machine(options, ranks.local)
        fp8 = select_products(settings, machine, found.config)
        folder = Followed(directory)
        start = replace(found, machine=machine, fp8=fp8, lock=folder, ranks=ranks)
    return start


def start_new(given, lock, ranks=ALONE, ahead=None):
    """Start of a new run from the flags that were given ({field: value}).

    Args:
        lock: train.lock.RunLock, which takes the run's folder.
        ranks: those that train.
        ahead: train.ahead.Ahead, told of the kernels as soon as they are known; or None.

    Raises:
        UserError: any bad input.
    """
    device_type = select_device(given.get("device_type", "auto")).type
    settings = resolve(without_auto(given), device_type)
    options, auto = settings.machine, asks_for_rows(given)
    machine = own_machine(options, ranks.local)
    check_backend_flags(given, machine)
    check_installed(vars(settings.reports))
    with naming_flags():
        config = settings.model.config()

    def sized(settings, config):
        """Settings and providers.Choice of the products, for the rows of a micro-step."""
        fp8 = select_products(settings, machine, config, given)
        if auto:
            settings = choose_rows(settings, config, machine, fp8.name, ranks.world)
            fp8 = select_products(settings, machine, config)
        return settings, fp8

    # bad sizes are refused before a tokenizer is trained
    make_plan(settings, config, world=ranks.world)
    settings, fp8 = sized(settings, config)
    least = config if "vocab_size" in given else replace(config, vocab_size=1)
    check_training_memory(settings, least, machine, fp8.name)
    tasks = core_tasks(settings.reports)
    take_new_folder(settings, lock)
    job = settings.job
    corpus = open_corpus(job.data, job.text_column, job.val_shard)
    ahead = ahead or Ahead()
    if not (corpus.tokenizer_path and corpus.tokenizer_path.exists()):
        ahead.begin(
            settings, machine, config, fp8, ranks.world
        )  # beside its training, for the size asked for
    tokenizer = find_tokenizer(corpus, settings.model.vocab_size, "vocab_size" in given)
    if "vocab_size" not in given:  # a size that was given is kept, for the same flags to resume
        settings = settings.replace({"vocab_size": tokenizer.vocab_size})
    config = replace(config, vocab_size=tokenizer.vocab_size)
    if auto:  # a vocabulary of another size takes other memory
        settings, fp8 = sized(settings, config)
    ahead.begin(settings, machine, config, fp8, ranks.world)
    plan = make_plan(settings, config, world=ranks.world)
    return Start(settings, machine, corpus, tokenizer, config, fp8, plan, lock, ranks, tasks, auto)


def start_resumed(given, lock, ranks=ALONE, ahead=None):
    """Start of a run that continues from its latest checkpoint.

    Args:
        lock: train.lock.RunLock, which takes the run's folder.
        ranks: those that train.
        ahead: as of `start_new`.

    Raises:
        UserError: nothing to resume, flags or data that differ from the run's, damaged files.
    """
    if "run" not in given:
        raise UserError("--resume needs the run to continue; add --run NAME")
    refuse_empty(given)
    directory = run_dir(given["run"])
    if owner_of(directory) is None:  # else `take` refuses, and says who has it
        find_checkpoint(directory, tell=False)
    lock.take(directory)
    checkpoint = find_checkpoint(directory)  # the last owner may have saved another
    meta = load_meta(checkpoint)
    if meta.get("settings") is None:
        raise UserError(f"--resume: {checkpoint} was converted and holds no optimiser state")
    settled = {name: native(value) for name, value in meta["settings"].items()}
    settings = resolve_resumed(without_auto(given), settled)
    check_installed(vars(settings.reports))
    config = config_of(meta, checkpoint)
    saved, auto = resolve_resumed({}, settled), asks_for_rows(given)
    length = meta["num_iterations"]
    reported = kinds_at(directory / METRICS_FILE, meta["step"])
    evaluated = meta.get("val_bpb") is not None
    evaluated &= settings.reports.core_every < 0 or "core" in reported
    at = meta["step"], length, evaluated, ranks.world
    plan = make_resumed_plan(settings, saved, config, *at)
    job = settings.job
    corpus = open_corpus(job.data, job.text_column, job.val_shard)
    trained = meta["loader"]
    known = trained.get("content") and corpus.content
    if trained["corpus"] != corpus.fingerprint or known and trained["content"] != corpus.content:
        raise UserError(f"--resume: {corpus.name} differ from the run's data; pass its --data")
    tokenizer = load_tokenizer(directory, config, meta)
    options = settings.machine
    machine = own_machine(options, ranks.local)
    check_backend_flags(given, machine)
    fp8 = select_products(settings, machine, config, given)
    if auto:
        total = plan.total_batch_size
        settings = choose_rows(settings, config, machine, fp8.name, ranks.world, total)
        fp8 = select_products(settings, machine, config)
        plan = make_resumed_plan(settings, saved, config, *at)
    (ahead or Ahead()).begin(settings, machine, config, fp8, ranks.world)
    if plan.num_iterations != length:
        print(
            f"plan: {plan.num_iterations:,} steps in place of {length:,}; from now on the schedule "
            "is that of a run of this length"
        )
    tasks = core_tasks(settings.reports)
    known = settings, machine, corpus, tokenizer, config, fp8, plan, lock, ranks, tasks
    return Start(*known, auto, checkpoint, meta)
