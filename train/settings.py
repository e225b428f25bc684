"""Every flag of `python -m train.run`, made from the dataclasses that own the defaults.

The model's (model/config.py), the optimiser's (train/optim/config.py) and the schedule's
(train/schedules.py) stand with what they configure, the others below. A field declared by `option`
is a flag: some_field is --some-field. Flags that nanochat has carry its names and meanings. On a
machine without a GPU, flags that were not given take CPU_PRESET's values, which train a small model
in minutes. Nothing here loads torch, so that --help is there at once.
"""

import dataclasses
import math
import re
from argparse import SUPPRESS, BooleanOptionalAction, HelpFormatter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import Field, dataclass
from typing import Any

from nanofuse.model import providers
from nanofuse.model.config import Dials
from nanofuse.model.option import option, options
from nanofuse.train.command import CommandParser
from nanofuse.train.errors import UserError
from nanofuse.train.flags import number, whole
from nanofuse.train.optim.config import OptimConfig
from nanofuse.train.schedules import ScheduleConfig

MAX_STEPS = 10**12
KEEP_ALL = 10**12  # checkpoints
LEAST_LAMBDA = 1e-9  # of a bigram lambda's start: AdamW's epsilon hides the gradients of less
OTHER_DATA = "the loader's state is of the run's data"  # why a resumed run keeps a value
AUTO = "auto"  # in place of a number
ROWS = "device_batch_size"  # the field that takes it
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs", "max-autotune", "reduce-overhead")


@dataclass(frozen=True)
class Horizon:
    """How long a run is, and its batch."""

    num_iterations: int = option(
        -1, "steps (-1: from the two flags below)", least=-1, most=MAX_STEPS
    )
    target_flops: float = option(-1.0, "train for this many FLOPs (-1: off)", least=-1, most=1e40)
    target_param_data_ratio: float = option(8.0, "tokens per scaling parameter", most=1e9)
    device_batch_size: int = option(
        32,
        "rows per forward pass; auto: the most that fit",
        metavar="N",
        least=1,
        most=2**24,
        word=AUTO,
    )
    total_batch_size: int = option(
        -1,
        "tokens per step (-1: from the horizon)",
        least=-1,
        most=2**32,
        fixed="learning rates and weight decay are scaled to it",
    )


@dataclass(frozen=True)
class Reports:
    """Evaluation, samples, checkpoints and logs."""

    eval_every: int = option(
        250, "steps between evaluations (-1: only at the ends)", least=-1, most=MAX_STEPS
    )
    eval_tokens: int = option(
        80 * 524288,
        "validation tokens per evaluation; fewer are gone over again",
        least=1,
        most=2**48,
    )
    skip_initial_eval: bool = option(False, "no evaluation before the first step")
    core_every: int = option(
        -1,
        "steps between evaluations of CORE, and at the end (-1: none, 0: only at the end)",
        least=-1,
        most=MAX_STEPS,
        since="0.2",
    )
    core_bundle: str = option(
        "", "folder of CORE's tasks, as nanochat's eval_bundle", metavar="DIR", since="0.2"
    )
    core_max_per_task: int = option(
        500, "examples of each of CORE's tasks (-1: all)", least=-1, most=MAX_STEPS, since="0.2"
    )
    sample_every: int = option(
        2000, "steps between samples (-1: none, 0: only at the end)", least=-1, most=MAX_STEPS
    )
    save_every: int = option(
        -1, "steps between checkpoints (-1: only at the end)", least=-1, most=MAX_STEPS
    )
    keep: int = option(
        KEEP_ALL,
        "checkpoints to keep: the last N, and the best by validation BPB",
        least=1,
        most=KEEP_ALL,
        since="0.2",
    )
    train_log_every: int = option(
        50,
        "steps between log lines; others do not wait for their end on the GPU",
        least=1,
        most=MAX_STEPS,
    )
    wandb: bool = option(False, "log to Weights & Biases as well (needs the wandb extra)")
    trackio: bool = option(False, "log to Trackio as well (needs the trackio extra)", since="0.2")
    tensorboard: bool = option(
        False,
        "write TensorBoard's files into the run's folder (needs the tensorboard extra)",
        since="0.2",
    )


@dataclass(frozen=True)
class Job:
    """Which run, and on what."""

    run: str = option("", "name of the folder under runs/ (default d<depth>)", metavar="NAME")
    resume: bool = option(False, "continue --run NAME from its latest checkpoint")
    data: str = option("", "folder of parquet shards, one shard, or 'stdlib'", metavar="PATH")
    val_shard: str = option(
        "",
        "shard that validates (default: val*, test* or the last)",
        metavar="FILE",
        since="0.2",
        fixed=OTHER_DATA,
    )
    text_column: str = option(
        "text", "column of the shards that holds the text", since="0.2", fixed=OTHER_DATA
    )
    long_documents: str = option(
        "crop",
        "what no row has room for: dropped, or in a later row",
        ("crop", "split"),
        since="0.2",
        fixed=OTHER_DATA,
    )
    cache: str = option(
        "",
        "folder for tokens of shards (default: .tokens beside them; off: none)",
        metavar="DIR",
        since="0.2",
    )
    seed: int = option(
        42,
        "seed of the initialisation and of samples",
        least=0,
        most=2**63 - 1,
        fixed="only a new run starts from it",
    )


@dataclass(frozen=True)
class MachineOptions:
    """Where and how to compute."""

    device_type: str = option("auto", "where to run", ("auto", "cuda", "cpu"))
    gpus: str = option(
        "1",
        "GPUs of this machine to train on, each by a process; auto: all (without a GPU: processes)",
        metavar="N",
        since="0.2",
    )
    backend: str = option("auto", "how ops run", ("auto", *providers.BACKENDS))
    compile_mode: str = option("default", "torch.compile's mode", COMPILE_MODES, "MODE")
    attention: str = option("auto", "attention backend", providers.choices(providers.ATTENTION))
    fp8: str = option("auto", "provider of FP8 products", providers.choices(providers.PRODUCTS))
    fp8_gradients: str = option(
        "e5m2",
        "format of the layers' gradients in FP8: range or precision (lm_head's are e5m2)",
        ("e5m2", "e4m3"),
        since="0.2",
        fixed="the FP8 scales are for it",
    )
    kernel_cache: str = option(
        "", "compiled kernels, of python -m train.warm", metavar="FILE", since="0.2"
    )
    cuda_graphs: bool = option(True, "record the fused pass, and ranks' updates, as CUDA graphs")
    deterministic: bool = option(False, "same bits every time, attention included (slower)")


@dataclass(frozen=True)
class Settings:
    """The values of all flags, by part."""

    model: Dials = Dials()
    horizon: Horizon = Horizon()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    reports: Reports = Reports()
    job: Job = Job()
    machine: MachineOptions = MachineOptions()

    def flat(self) -> dict[str, Any]:
        """{name: value} of every flag, the form in which settings are saved."""
        parts = [getattr(self, part) for part in TITLES]
        return {f.name: getattr(part, f.name) for part in parts for f in options(part)}

    def replace(self, values: Mapping[str, Any]) -> "Settings":
        """These settings with other values for some flags, {name: value}.

        Raises:
            KeyError: a name that no flag has.
        """
        changes: dict[str, dict[str, Any]] = {part: {} for part in TITLES}
        for name, value in values.items():
            changes[FLAGS[name][0]][name] = value
        parts = {p: dataclasses.replace(getattr(self, p), **new) for p, new in changes.items()}
        return Settings(**parts)


TITLES = {  # of the help's groups, by part of the settings
    "model": "model",
    "horizon": "horizon and batch",
    "optim": "optimiser",
    "schedule": "learning-rate schedule",
    "reports": "evaluation and logging",
    "job": "run and data",
    "machine": "machine",
}
FLAGS: dict[str, tuple[str, Field[Any]]] = {  # name -> part and field
    f.name: (part, f) for part in TITLES for f in options(getattr(Settings, part))
}

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

# Each of them sets the length of a run, unless it has this value.
LENGTHS = {"num_iterations": -1, "target_flops": -1, "target_param_data_ratio": None}

METAVARS: dict[Any, str] = {int: "N", float: "X", str: "NAME"}
PARSERS: dict[Any, Any] = {int: whole(), float: number(), str: str}  # check() has the bounds
KINDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "on or off"}

# Words of model/ for what a flag sets under another name.
MODEL_WORDS = {"n_layer": "depth", "sequence_len": "max_seq_len"}


def flag_name(name: str) -> str:
    """Command-line spelling of a field: some_flag -> --some-flag."""
    return "--" + name.replace("_", "-")


@contextmanager
def naming_flags(prefix: str = "") -> Iterator[None]:
    """Within the context a ValueError of model/ or kernels/ becomes a UserError, in which the
    fields of the model are flags.

    Args:
        prefix: goes before the message, such as "--attention ".
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        fields = {f.name: f.name for f in options(Dials)} | MODEL_WORDS
        words = rf"\b({'|'.join(fields)})\b"
        text = re.sub(words, lambda word: flag_name(fields[word[1]]), str(error))
        raise UserError(prefix + text) from error


def parser_of(f: Field[Any]) -> Any:
    """The type of a flag: of its number, its text, or of the word that it has beside numbers."""
    word, parse = f.metadata["word"], PARSERS[f.type]
    return parse if word is None else lambda text: text if text == word else parse(text)


def build_parser() -> CommandParser:
    """The argument parser; values that were not given are absent from its namespace."""
    parser = CommandParser(
        prog="python -m train.run",
        usage="%(prog)s [flags]",
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=36, width=132),
        description="Train a nanochat-recipe GPT. With no flags and no GPU: a small model on "
        "Python's own standard library, in minutes.",
        epilog="Without a GPU these defaults take the place of those in brackets: "
        + ", ".join(f"{flag_name(name)} {value}" for name, value in CPU_PRESET.items()),
    )
    groups = {part: parser.add_argument_group(title) for part, title in TITLES.items()}
    for part, f in FLAGS.values():
        choices, metavar, text = (f.metadata[key] for key in ("choices", "metavar", "help"))
        if choices and metavar:
            text += f": {', '.join(choices)}"
        if f.default != "":
            text += " [all]" if f.name == "keep" else f" [{f.default}]"
        kwargs = {"help": text.replace("%", "%%"), "default": SUPPRESS, "dest": f.name}
        if f.type is bool:
            # what a run was started with may be turned off for the rest of it
            action = "store_true" if f.name == "resume" else BooleanOptionalAction
            groups[part].add_argument(flag_name(f.name), action=action, **kwargs)
        else:
            if not choices and not metavar:
                metavar = METAVARS[f.type]
            kwargs |= {"type": parser_of(f), "choices": choices, "metavar": metavar}
            groups[part].add_argument(flag_name(f.name), **kwargs)
    return parser


def refuse_empty(given: Mapping[str, Any]) -> None:
    """Refuse a flag that was given as '', such as by a variable of a shell that is not set.

    Raises:
        UserError: names the flag.
    """
    for name, value in given.items():
        if value == "":
            raise UserError(f"{flag_name(name)} is empty; give it a value, or drop it")


def check(settings: Settings) -> None:
    """Refuse values that no run can have.

    Raises:
        UserError: names the flag.
    """
    for name, value in settings.flat().items():
        flag, f = flag_name(name), FLAGS[name][1]
        choices, least, most = (f.metadata[key] for key in ("choices", "least", "most"))
        kinds = (float, int) if f.type is float else (f.type,)
        if type(value) not in kinds:
            raise UserError(f"{flag} must be {KINDS[f.type]}, got {value!r:.50}")
        if isinstance(value, str) and "\0" in value:
            raise UserError(f"{flag} must be without null bytes")
        if choices and value not in choices:
            raise UserError(f"{flag} must be one of {', '.join(choices)}, got {value!r:.50}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} must be a finite number, got {value}")
        if least is not None and value < least:
            raise UserError(f"{flag} must be at least {least}, got {value}")
        if most is not None and value > most:
            raise UserError(f"{flag} must be at most {most:,}, got {value}")
    flops = settings.horizon.target_flops
    if flops != LENGTHS["target_flops"] and flops <= 0:
        raise UserError(f"--target-flops must be above 0, or -1 for off, got {flops}")


def asks_for_rows(given: Mapping[str, Any]) -> bool:
    """Whether the rows of a forward pass are to be found out, by the flags that were given."""
    return given.get(ROWS) == AUTO


def without_auto(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The flags that were given, with one row in place of auto, which every batch can be split
    into."""
    return {**given, ROWS: 1} if asks_for_rows(given) else given


def given_lengths(given: Mapping[str, Any]) -> list[str]:
    """The flags among those given that set the length of the run: one at most.

    Raises:
        UserError: names two of them.
    """
    names = [name for name, off in LENGTHS.items() if given.get(name, off) != off]
    if len(names) > 1:
        flags = " and ".join(map(flag_name, names[:2]))
        raise UserError(f"{flags} both set the length of the run; drop one of them")
    return names


def check_bigram(settings: Settings) -> None:
    """Refuse a bigram table that could never learn: it starts at zero, and its gradient has the
    factor lambda, whose gradient has the factor table.

    Raises:
        UserError: names the flag.
    """
    start, mult = settings.model.bigram_lambda_init, settings.optim.bigram_embedding_lr_mult
    if not settings.model.bigram_embed_factor:
        return
    hint = "; raise it, or leave the table out with --bigram-embed-factor 0"
    if abs(start) < LEAST_LAMBDA:
        raise UserError(f"--bigram-lambda-init {start}: the bigram table would never learn{hint}")
    if mult == 0:
        raise UserError(f"--bigram-embedding-lr-mult 0: the bigram table would stay zero{hint}")


def resolve(given: Mapping[str, Any], device_type: str) -> Settings:
    """Settings of a new run from the flags that were given ({name: value}).

    Raises:
        UserError: a value that no run can have, or flags that exclude each other.
    """
    refuse_empty(given)
    preset = CPU_PRESET if device_type == "cpu" else {}
    if given_lengths(given):  # in place of the preset's
        preset = {name: value for name, value in preset.items() if name not in LENGTHS}
    settings = Settings().replace({**preset, **given})
    check(settings)
    check_bigram(settings)
    return settings


def resolve_resumed(given: Mapping[str, Any], saved: Mapping[str, Any]) -> Settings:
    """Settings of a resumed run: the saved ones, with what may change as given now. A flag that is
    younger than the run has its default.

    Raises:
        UserError: a flag that differs from the run's and cannot change, or saved settings that
            lack a flag or have one of another version.
    """
    refuse_empty(given)
    young = {name: f.default for name, (_, f) in FLAGS.items() if f.metadata["since"]}
    saved = {**young, **saved}
    unknown, missing = sorted(saved.keys() - FLAGS), sorted(FLAGS.keys() - saved)
    if unknown or missing:
        what = f"{unknown[0]!r:.50} is unknown" if unknown else f"{missing[0]!r} is missing"
        raise UserError(f"the run's settings do not fit this version ({what})")
    settings = Settings().replace(saved)
    try:
        check(settings)
    except UserError as error:
        raise UserError(f"the run's settings are damaged: {error}") from None
    for name, value in given.items():
        reason = FLAGS[name][1].metadata["fixed"]
        if reason and value != saved[name]:
            raise UserError(
                f"{flag_name(name)} {value} differs from the run's {saved[name]}, and {reason}; "
                "drop the flag, or start a new --run"
            )
    changes = dict(given)
    if lengths := given_lengths(given):  # in place of the run's
        changes |= {n: off for n, off in LENGTHS.items() if off is not None and n not in lengths}
    settings = settings.replace(changes)
    check(settings)
    return settings
