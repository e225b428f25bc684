"""Every flag of `python -m train.run`: name, default, group and one line of help, in one place.

Flags that nanochat has carry its names and meanings. On a machine without a GPU, flags that were
not given take CPU_PRESET's values, which train a small model in minutes.
"""

import dataclasses
import math
from argparse import SUPPRESS, BooleanOptionalAction, HelpFormatter
from dataclasses import dataclass, field

from nanofuse.kernels.newton_schulz import EQUILIBRATIONS
from nanofuse.model.backends.select import BACKENDS as ATTENTION_BACKENDS
from nanofuse.model.errors import UserError
from nanofuse.model.fp8.products import PROVIDERS
from nanofuse.train.command import CommandParser

COMPILE_MODES = ("default", "max-autotune-no-cudagraphs", "max-autotune", "reduce-overhead")


def flag(default, group, text, choices=None, metavar=None):
    """A dataclass field that is also a command-line flag."""
    metadata = {"group": group, "help": text, "choices": choices, "metavar": metavar}
    return field(default=default, metadata=metadata)


MODEL, HORIZON, OPTIM, RECIPE, EVAL, RUN, MACHINE = (
    "model",
    "horizon and batch",
    "optimiser",
    "bigram and Muon",
    "evaluation and logging",
    "run and data",
    "machine",
)


@dataclass(frozen=True)
class Settings:
    """The flags' values; the field `some_flag` is `--some-flag`."""

    depth: int = flag(16, MODEL, "layers; the one dial of size")
    aspect_ratio: int = flag(64, MODEL, "width per layer of depth")
    head_dim: int = flag(128, MODEL, "size of an attention head")
    n_kv_head: int = flag(0, MODEL, "key/value heads, a divisor of the heads (0: as many)")
    max_seq_len: int = flag(2048, MODEL, "tokens per row")
    window_pattern: str = flag("SSSL", MODEL, "attention windows, tiled: S quarter row, L whole")
    vocab_size: int = flag(32768, MODEL, "tokens of the tokenizer, where one is trained")

    num_iterations: int = flag(-1, HORIZON, "steps (-1: from the two flags below)")
    target_flops: float = flag(-1.0, HORIZON, "train for this many FLOPs (-1: off)")
    target_param_data_ratio: float = flag(8.0, HORIZON, "tokens per scaling parameter")
    device_batch_size: int = flag(32, HORIZON, "rows per forward pass")
    total_batch_size: int = flag(-1, HORIZON, "tokens per step (-1: from the horizon)")

    embedding_lr: float = flag(0.3, OPTIM, "AdamW, token embedding (value embeddings: half)")
    unembedding_lr: float = flag(0.008, OPTIM, "AdamW, lm_head")
    matrix_lr: float = flag(0.02, OPTIM, "Muon, matrices inside the blocks")
    scalar_lr: float = flag(0.3, OPTIM, "AdamW, x0 lambdas (residual lambdas: a hundredth)")
    weight_decay: float = flag(0.28, OPTIM, "Muon's cautious decay, before scaling")
    warmup_steps: int = flag(40, OPTIM, "steps of linear warm-up")
    warmdown_ratio: float = flag(0.65, OPTIM, "last share of the steps, with linear warm-down")
    final_lr_frac: float = flag(0.05, OPTIM, "share of the learning rate left at the end")

    bigram_embed_factor: int = flag(5, RECIPE, "bigram rows per vocabulary entry (0: dense)")
    bigram_lambda_init: float = flag(0.05, RECIPE, "start of every layer's bigram lambda")
    bigram_embedding_lr_mult: float = flag(1.0, RECIPE, "bigram table: times --embedding-lr")
    bigram_lambda_lr: float = flag(0.01, RECIPE, "AdamW, bigram lambdas")
    muon_plus: bool = flag(True, RECIPE, "rescale Muon's update to norm sqrt(min(rows, cols))")
    muon_eq: str = flag("row", RECIPE, "equilibration before Muon's iteration", EQUILIBRATIONS)

    eval_every: int = flag(250, EVAL, "steps between evaluations (-1: only at the ends)")
    eval_tokens: int = flag(80 * 524288, EVAL, "validation tokens per evaluation, at most")
    skip_initial_eval: bool = flag(False, EVAL, "no evaluation before the first step")
    sample_every: int = flag(2000, EVAL, "steps between samples (-1: none, 0: only at the end)")
    save_every: int = flag(-1, EVAL, "steps between checkpoints (-1: only at the end)")
    train_log_every: int = flag(50, EVAL, "steps between log lines; others never wait for the GPU")
    wandb: bool = flag(False, EVAL, "log to Weights & Biases as well (needs the wandb extra)")

    run: str = flag("", RUN, "name of the folder under runs/ (default d<depth>)", metavar="NAME")
    resume: bool = flag(False, RUN, "continue --run NAME from its latest checkpoint")
    data: str = flag("", RUN, "folder of parquet shards, or 'stdlib'", metavar="DIR")
    seed: int = flag(42, RUN, "seed of the initialisation and of samples")

    device_type: str = flag("auto", MACHINE, "where to run", ("auto", "cuda", "cpu"))
    backend: str = flag("auto", MACHINE, "how ops run", ("auto", "eager", "compile", "fused"))
    compile_mode: str = flag("default", MACHINE, "torch.compile's mode", COMPILE_MODES, "MODE")
    attention: str = flag(
        "auto", MACHINE, "attention backend", ("auto", *sorted(ATTENTION_BACKENDS))
    )
    fp8: str = flag("auto", MACHINE, "provider of FP8 matrix products", ("auto", *PROVIDERS))
    cuda_graphs: bool = flag(True, MACHINE, "record the fused training pass as CUDA graphs")
    deterministic: bool = flag(False, MACHINE, "same bits every time, attention included (slower)")


CPU_PRESET = {
    "depth": 4,
    "aspect_ratio": 48,
    "head_dim": 64,
    "max_seq_len": 256,
    "vocab_size": 4096,
    "device_batch_size": 8,
    "total_batch_size": 4096,
    "num_iterations": 100,
    "warmup_steps": 5,
    "embedding_lr": 1.0,  # the batch scaling takes all of these times 0.09
    "unembedding_lr": 0.03,
    "matrix_lr": 0.08,
    "scalar_lr": 1.0,
    "eval_every": 50,
    "eval_tokens": 32 * 2048,
    "train_log_every": 10,
    "sample_every": 0,
}

# What may change when a run is resumed; everything else is the checkpoint's.
RESUMABLE = {
    "run",
    "resume",
    "data",
    "eval_every",
    "eval_tokens",
    "skip_initial_eval",
    "sample_every",
    "save_every",
    "train_log_every",
    "wandb",
    "cuda_graphs",
}


def flag_name(name):
    """Command-line spelling of a field: some_flag -> --some-flag."""
    return "--" + name.replace("_", "-")


def build_parser():
    """The argument parser; values that were not given are absent from its namespace."""
    parser = CommandParser(
        prog="python -m train.run",
        usage="%(prog)s [flags]",
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=36, width=132),
        description="Train a nanochat-recipe GPT. With no flags and no GPU: a small model on "
        "Python's own standard library, in minutes.",
    )
    groups = {}
    for f in dataclasses.fields(Settings):
        name = f.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        choices, metavar = f.metadata["choices"], f.metadata["metavar"]
        text = f.metadata["help"]
        if choices and metavar:
            text += f": {', '.join(choices)}"
        if f.default != "":
            text += f" [{f.default}]"
        kwargs = {"help": text.replace("%", "%%"), "default": SUPPRESS, "dest": f.name}
        if f.type is bool:
            action = BooleanOptionalAction if f.default else "store_true"
            groups[name].add_argument(flag_name(f.name), action=action, **kwargs)
        else:
            if not choices and not metavar:
                metavar = {int: "N", float: "X", str: "NAME"}[f.type]
            kwargs |= {"type": f.type, "choices": choices, "metavar": metavar}
            groups[name].add_argument(flag_name(f.name), **kwargs)
    return parser


AT_LEAST_ONE = (
    "max_seq_len",
    "vocab_size",
    "device_batch_size",
    "eval_tokens",
    "train_log_every",
)
NOT_NEGATIVE = (
    "embedding_lr",
    "unembedding_lr",
    "matrix_lr",
    "scalar_lr",
    "weight_decay",
    "warmup_steps",
    "final_lr_frac",
    "bigram_embedding_lr_mult",
    "bigram_lambda_lr",
)


def check(settings):
    """Refuse values that no run can have.

    Raises:
        UserError: names the flag.
    """
    for names, least in ((AT_LEAST_ONE, 1), (NOT_NEGATIVE, 0)):
        for name in names:
            value = getattr(settings, name)
            if not value >= least:
                raise UserError(f"{flag_name(name)} must be at least {least}, got {value}")
    for name, value in vars(settings).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag_name(name)} must be a finite number, got {value}")
    if settings.n_kv_head < 0:
        raise UserError(f"--n-kv-head must be at least 0, got {settings.n_kv_head}")
    if not 0 <= settings.seed < 2**63:
        raise UserError(f"--seed must lie in 0..2^63-1, got {settings.seed}")
    if not 0 <= settings.warmdown_ratio <= 1:
        raise UserError(f"--warmdown-ratio must lie in 0..1, got {settings.warmdown_ratio}")


def resolve(given, device_type):
    """Settings of a new run from the flags that were given ({field: value})."""
    preset = CPU_PRESET if device_type == "cpu" else {}
    settings = Settings(**{**preset, **given})
    check(settings)
    return settings


def resolve_resumed(given, saved):
    """Settings of a resumed run: the saved ones, with RESUMABLE flags as given now.

    Raises:
        UserError: a flag that differs from the run's and cannot change, or saved settings of
            another version.
    """
    try:
        settings = Settings(**saved)
    except TypeError as error:
        raise UserError(f"the run's settings do not fit this version ({error})") from None
    for name, value in given.items():
        if name not in RESUMABLE and value != getattr(settings, name):
            raise UserError(
                f"{flag_name(name)} {value} differs from the run's {getattr(settings, name)}; "
                "drop the flag, or start a new --run"
            )
    changes = {name: value for name, value in given.items() if name in RESUMABLE}
    settings = dataclasses.replace(settings, **changes)
    check(settings)
    return settings
