"""The command that trains.

    python -m train.run [--depth 16] [--data DIR] [--run NAME [--resume]] ...

See --help for every flag; runs/NAME/ gets the tokenizer, metrics.jsonl and the checkpoints.
"""

import dataclasses
import json
import time

import torch

from model.attention import select_attention
from model.config import GPTConfig
from model.errors import UserError
from model.gpt import GPT
from model.linear import set_fp8
from train.checkpoint import (
    LOADER,
    MODEL,
    OPTIM,
    config_of,
    find_checkpoint,
    load_meta,
    load_tensors,
    load_tokenizer,
    load_weights,
    run_dir,
)
from train.command import run_command
from train.corpus import StdlibCorpus, open_corpus
from train.data import DeviceLoader, LoaderState, PackedLoader
from train.device import bf16_peak, select_device, select_machine
from train.logging import RunLog
from train.loop import Progress, Trainer
from train.optim import MuonAdamW, OptimConfig
from train.plan import make_plan
from train.schedules import Schedule
from train.settings import build_parser, resolve, resolve_resumed
from train.tokenizer import FILE_NAME, Tokenizer, train_on_corpus

GIB = 2**30


def new_run_dir(settings):
    """Folder of a new run; without --run the first free one of d<depth>, d<depth>-2, ...

    Raises:
        UserError: --run names one that exists.
    """
    if settings.run:
        directory = run_dir(settings.run)
        if directory.exists():
            raise UserError(
                f"--run {settings.run}: {directory} exists; add --resume or choose another name"
            )
        return directory
    directory, count = run_dir(f"d{settings.depth}"), 1
    while directory.exists():
        count += 1
        directory = run_dir(f"d{settings.depth}-{count}")
    return directory


def find_tokenizer(corpus, settings, size_given):
    """The corpus folder's tokenizer, or one trained on the corpus and kept there if it can be.

    Raises:
        UserError: the folder's tokenizer is damaged, or not of the --vocab-size given.
    """
    path = corpus.directory / FILE_NAME if corpus.directory else None
    if path and path.exists():
        tokenizer = Tokenizer.load(path)
        if size_given and tokenizer.vocab_size != settings.vocab_size:
            raise UserError(
                f"--vocab-size {settings.vocab_size}: {path} has {tokenizer.vocab_size} tokens; "
                "drop the flag, or move that file away to train another"
            )
        return tokenizer
    print(f"tokenizer: training {settings.vocab_size:,} tokens on {corpus.name}", flush=True)
    tokenizer = train_on_corpus(corpus, settings.vocab_size)
    if path:
        try:
            tokenizer.save(path)
        except OSError as error:
            print(f"tokenizer: kept with the run only ({error.strerror}: {corpus.directory})")
    return tokenizer


def describe(machine, attention, fp8, config, plan, settings, corpus, tokenizer):
    """Lines that say what is about to run."""
    activation_bytes = machine.dtype.itemsize
    memory = config.memory_estimate(
        settings.device_batch_size, activation_bytes, fp8=settings.fp8 != "off"
    )
    counts = "  ".join(f"{role} {n:,}" for role, n in config.param_counts().items())
    mode = f", mode {settings.compile_mode}" if machine.backend == "compile" else ""
    return [
        f"device: {machine.name}, {machine.dtype}, torch {torch.__version__}",
        f"backend: {machine.backend} ({machine.why}{mode})",
        f"attention: {attention}",
        f"fp8: {fp8}",
        f"data: {corpus.name}; tokenizer of {tokenizer.vocab_size:,} tokens",
        f"model: {config.n_layer} layers, width {config.n_embd}, {config.n_head} heads "
        f"({config.n_kv_head} kv), T {config.sequence_len}, windows {config.windows}",
        f"parameters: {config.num_params:,} ({config.num_scaling_params:,} scaling): {counts}",
        f"FLOPs per token: {config.flops_per_token:,}",
        f"plan: {plan.num_iterations:,} steps x {plan.total_batch_size:,} tokens = "
        f"{plan.tokens:,}; {plan.micro_steps} micro-steps of {settings.device_batch_size} rows; "
        f"lr x{plan.lr_scale:.4f}, weight decay {plan.weight_decay:.4f}",
        f"memory: about {memory / GIB:.1f} GiB expected",
    ]


def build_trainer(given, started):
    """Everything that the flags describe, checked; the run's folder is made last.

    Raises:
        UserError: any bad input.
    """
    resumed = None
    if given.get("resume"):
        if not given.get("run"):
            raise UserError("--resume needs the run to continue; add --run NAME")
        resumed = find_checkpoint(run_dir(given["run"]))
        meta = load_meta(resumed)
        settings = resolve_resumed(given, meta["settings"])
    else:
        device_type = select_device(given.get("device_type", "auto")).type
        settings = resolve(given, device_type)
    machine = select_machine(settings)
    attention, why = select_attention(settings.attention, machine.device.type)
    corpus = open_corpus(settings.data)
    if resumed:
        directory, config = resumed.parent, config_of(meta, resumed)
        if meta["loader"]["corpus"] != corpus.fingerprint:
            raise UserError(
                f"{corpus.name} is not what {directory} was trained on; pass its --data"
            )
        tokenizer = load_tokenizer(directory, config)
    else:
        directory = new_run_dir(settings)
        config = GPTConfig.from_depth(
            settings.depth,
            settings.aspect_ratio,
            settings.head_dim,
            settings.n_kv_head,
            sequence_len=settings.max_seq_len,
            vocab_size=settings.vocab_size,
            window_pattern=settings.window_pattern,
            bigram_embed_factor=settings.bigram_embed_factor,
            bigram_lambda_init=settings.bigram_lambda_init,
        )
        make_plan(settings, config)  # refuses bad sizes before a tokenizer is trained
        tokenizer = find_tokenizer(corpus, settings, "vocab_size" in given)
        settings = dataclasses.replace(settings, vocab_size=tokenizer.vocab_size)
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    plan = make_plan(settings, config)

    compiled = machine.backend == "compile"
    torch.set_float32_matmul_precision("high")
    attention.prepare(config.sequence_len, config.windows, machine.device)
    raw_model = GPT(config, machine.dtype, attention, machine.device)
    fp8_count = set_fp8(raw_model, settings.fp8)
    options = {
        f.name: getattr(settings, f.name)
        for f in dataclasses.fields(OptimConfig)
        if hasattr(settings, f.name)
    }
    optimizer = MuonAdamW(
        raw_model.param_roles(),
        OptimConfig(**options),
        config.n_embd,
        plan.lr_scale,
        compiled,
        machine.dtype,
    )
    state, progress = None, Progress()
    if resumed:
        load_weights(raw_model, load_tensors(resumed / MODEL), resumed / MODEL)
        optimizer.load_state_dict(load_tensors(resumed / OPTIM), meta["optimizer_steps"])
        position = {name: meta["loader"][name] for name in LoaderState().position()}
        state = LoaderState.restore(position, load_tensors(resumed / LOADER))
        progress = Progress(**meta["progress"])
        if progress.step >= plan.num_iterations:
            raise UserError(f"--resume: {directory} has finished its {progress.step} steps")
    else:
        raw_model.init_weights(settings.seed)
    model = raw_model
    if compiled:
        mode = None if settings.compile_mode == "default" else settings.compile_mode
        model = torch.compile(raw_model, dynamic=False, mode=mode)

    log = RunLog(directory, progress.step, plan.num_iterations, settings.wandb)
    if not resumed:
        tokenizer.save(directory / FILE_NAME)
    fp8 = "off" if settings.fp8 == "off" else f"{settings.fp8}, {fp8_count} linears in training"
    lines = describe(
        machine, f"{attention.name} ({why})", fp8, config, plan, settings, corpus, tokenizer
    )
    lines.append(f"run: {directory}" + (f", resumed at step {progress.step}" if resumed else ""))
    for line in lines:
        log.print(line)
    packed = PackedLoader(
        corpus,
        "train",
        tokenizer,
        settings.device_batch_size,
        settings.max_seq_len,
        state=state,
    )
    return Trainer(
        model=model,
        raw_model=raw_model,
        optimizer=optimizer,
        schedule=Schedule(
            plan.num_iterations,
            settings.warmup_steps,
            settings.warmdown_ratio,
            settings.final_lr_frac,
        ),
        settings=settings,
        plan=plan,
        tokenizer=tokenizer,
        corpus=corpus,
        loader=DeviceLoader(packed, machine.device),
        log=log,
        directory=directory,
        prompt="def " if isinstance(corpus, StdlibCorpus) else "The capital of France is",
        peak_flops=bf16_peak(machine.name),
        started=started,
        progress=progress,
    )


def main(argv=None):
    started = time.perf_counter()
    given = vars(build_parser().parse_args(argv))
    trainer = build_trainer(given, started)
    try:
        trainer.run()
    finally:
        trainer.loader.close()
        trainer.log.close()
    print(json.dumps(trainer.summary()))


if __name__ == "__main__":
    run_command(main)
