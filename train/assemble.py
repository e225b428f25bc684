"""A model and its optimiser for one machine and backend, ready to train: used by run and bench."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from nanofuse.model.backends.choice import select_attention
from nanofuse.model.fp8.linear import set_fp8
from nanofuse.model.fp8.peers import Peers
from nanofuse.model.fp8.shapes import for_provider
from nanofuse.model.fused import FusedGPT
from nanofuse.model.gpt import GPT
from nanofuse.model.providers import Choice
from nanofuse.train.device import choosing
from nanofuse.train.optim.muon_adamw import MuonAdamW
from nanofuse.train.optim.updates import EagerUpdate, KernelUpdate, NumbersOnDevice
from nanofuse.train.placement import matrix_owners, row_blocks
from nanofuse.train.ranks import ALONE
from nanofuse.train.settings import naming_flags


@dataclass
class Assembled:
    """What trains: `model` is called for losses, `raw_model` is the GPT that holds the weights.

    `attention` is what was chosen; `facts` are lines that say what runs and why.
    """

    model: Callable
    raw_model: GPT
    optimizer: MuonAdamW
    attention: Choice
    facts: list


def follow(model):
    """Make now what a model's pass derives from its weights, behind the update that changed them
    and not before the next batch, where the GPU may wait for it.

    Args:
        model: what is called for losses.
    """
    if isinstance(model, FusedGPT):
        model.operands.follow()


def gathered(model):
    """A context within which a model's parameters are all there, to be read, where several ranks
    share them. Every rank enters it at once.

    Args:
        model: what is called for losses.
    """
    fused = isinstance(model, FusedGPT)
    return model.weights.gathered() if fused else contextlib.nullcontext()


def peers_of(ranks):
    """The Peers of a FusedGPT that train.ranks.Ranks share; None for a run of one process."""
    world = ranks.world
    if world == 1:
        return None
    deal, rows = (partial(f, world=world) for f in (matrix_owners, row_blocks))
    return Peers(ranks.rank, world, deal, rows, ranks.swap, ranks.maximum_)


def fused_optimizer(fused, optim, lr_scale=1.0, ranks=ALONE):
    """The optimiser of a FusedGPT by the kernels. What a step that it leaves out recorded stays out
    of the scales.

    Args:
        fused: FusedGPT.
        optim, lr_scale, ranks: as of `assemble`.
    """
    roles, width = fused.model.param_roles(), fused.model.config.n_embd
    stored, masters = fused.weights.stacks, fused.weights.masters
    shared = stored, ranks, masters, fused.model.lookups
    numbers = NumbersOnDevice(fused.weights.stacks[0][2].device)
    update = partial(KernelUpdate, pool=fused.pool, numbers=numbers)
    optimizer = MuonAdamW(roles, optim, width, lr_scale, update, *shared)
    fused.operands.taken = optimizer.watch.ok
    if ranks.world > 1:
        optimizer.operands = fused.operands
    return optimizer


def prepare_products(provider, config, rows, device, ranks=ALONE, say=print):
    """Have a provider of products choose what suits those of a training pass: rank 0 measures, and
    all take its choice, as a run has to repeat bit by bit.

    Args:
        provider: of model.fp8.products.
        config: GPTConfig.
        rows: of a micro-step.
        say: called with a line before a measurement.

    Returns:
        rank 0's line about it, or None.
    """
    shapes = for_provider(config, rows * config.sequence_len, device, provider.fp8)

    def choose():
        return provider.prepare(shapes, say), provider.choices

    line, choices = ranks.by_main(choose)
    if not ranks.main:
        provider.prepare(shapes, say, choices)
    return line


def assemble(
    config,
    machine,
    optim,
    fp8,
    attention="auto",
    deterministic=False,
    compile_mode="default",
    cuda_graphs=True,
    lr_scale=1.0,
    set_weights=GPT.init_weights,
    rows=None,
    ranks=ALONE,
    ready=lambda: None,
    ended=lambda phase: None,
    say=print,
):
    """Build model and optimiser.

    Args:
        config: GPTConfig.
        machine: train.device.Machine.
        optim: OptimConfig.
        fp8: providers.Choice of train.device.select_fp8.
        attention: name of a record of providers.ATTENTION, or "auto".
        deterministic: ask torch and the attention backend for the same bits every time.
        compile_mode: torch.compile's, for the backend "compile".
        cuda_graphs: let the fused backend record its training pass, on a GPU, and with several
            ranks the update.
        lr_scale: the batch's factor on learning rates.
        set_weights: called with the GPT before anything depends on its weights.
        rows: of a micro-step, for which a provider of products may measure what suits them, before
            memory fills up; None: it does not.
        ranks: train.ranks.Ranks that share the optimiser.
        ready: called before the first kernel of this project or of an attention backend.
        ended: called with the name of each phase of the work as it ends.
        say: called with a line before products are measured.

    Raises:
        UserError: an attention backend or FP8 provider that cannot run here.
    """
    compiled, fused = machine.backend == "compile", machine.backend == "fused"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # outputs are written whole
    torch.set_float32_matmul_precision("high")
    prepared, positions = None, (rows or 1) * config.sequence_len
    if fused and rows:
        prepared = prepare_products(fp8.made, config, rows, machine.device, ranks, say)
        ended("products")
    raw_model = GPT(config, machine.dtype, device=machine.device)
    set_weights(raw_model)
    ended("model")
    ready()
    ended("kernels")
    with choosing("attention", attention):
        chosen = select_attention(attention, machine.need(), deterministic, config)
    chosen.made.prepare(config.sequence_len, config.windows, machine.device)
    raw_model.attention = chosen.made
    ended("attention")
    facts = [f"attention: {chosen} ({chosen.why})"]
    if fused:
        left = chosen.made.leave_sums(config, machine.device)
        facts += [left] if left else []
        graphs = cuda_graphs and machine.device.type == "cuda"
        ranks.agree()  # all have compiled what comes before the first word by NCCL
        with naming_flags("--backend fused: "):
            model = FusedGPT(raw_model, fp8.made, graphs, peers_of(ranks))
        optimizer = fused_optimizer(model, optim, lr_scale, ranks)
        products = len(model.weights.all())
        graphed = "on" if graphs else "off"
        facts.append(f"kernels: {model.describe(positions)}; CUDA graphs: {graphed}")
    else:
        products = set_fp8(raw_model, fp8.made.linear)
        update = partial(EagerUpdate, compile=compiled, newton_schulz_dtype=machine.dtype)
        roles = raw_model.param_roles()
        shared = {"ranks": ranks, "lookups": raw_model.lookups}
        optimizer = MuonAdamW(roles, optim, config.n_embd, lr_scale, update, **shared)
        model = raw_model
        if compiled:
            mode = None if compile_mode == "default" else compile_mode
            # a break would silently run products piece by piece (dev/LOG.md, 2026-11-29)
            model = torch.compile(raw_model, dynamic=False, fullgraph=True, mode=mode)
    count = f"{products} linears in training; " if fp8.made.fp8 else ""
    facts += [prepared] if prepared else []
    facts.append(f"fp8: {fp8} ({count}{fp8.why})")
    return Assembled(model, raw_model, optimizer, chosen, facts)
