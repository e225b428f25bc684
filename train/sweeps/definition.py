"""A sweep's file: variants of a run, and seeds; everything is checked before a run starts.

    about = "one line"
    seeds = [1, 2, 3]
    baseline = "dense"                  # what the others are compared with; default: the first

    [flags]                             # of train.run, for every run
    depth = 4

    [[variants]]                        # a list of variants, each with flags of its own ...
    name = "dense"
    bigram-embed-factor = 0

    [grid]                              # ... or every combination of these values
    matrix-lr = [0.01, 0.02]

    tolerance = 2e-3                    # at the top of the file; with it:
    corpus = "51461-..."                # if it is of this data alone: python -m train.data digest
    [expected.dense]                    # validation BPB at these steps, of each run of a variant
    20 = 3.2233

The name of a sweep is that of its file. Nothing here loads torch.
"""

import difflib
import itertools
import math
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from nanofuse.train.errors import UserError
from nanofuse.train.flags import SEEDS, whole
from nanofuse.train.plan import Plan, make_plan
from nanofuse.train.schemas import Strict, first_reason, read_bounded
from nanofuse.train.settings import (
    FLAGS,
    ROWS,
    Settings,
    check,
    flag_name,
    naming_flags,
    refuse_empty,
    resolve,
    without_auto,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODULE = "nanofuse.train.run"
SHIPPED = Path(__file__).parent
MAX_BYTES = 2**20
MOST_RUNS = 10_000
NAME = re.compile(r"\w[\w+-]*")  # of a sweep; dots part it from variant and seed
VARIANT = re.compile(r"\w[\w.+-]*")
OWN = {  # flags that a sweep sets itself
    "run": "the sweep names its runs",
    "resume": "the sweep goes on with what was broken off",
    "seed": "give the file seeds = [1, 2, ...]",
    "gpus": "each run is on one GPU",
}


class Content(Strict):
    """The file as it is written."""

    about: str = ""
    seeds: list[int] = Field(min_length=1)
    baseline: str | None = None
    tolerance: float | None = Field(default=None, gt=0)
    corpus: str | None = None
    flags: dict[str, Any] = {}
    variants: list[dict[str, Any]] = []
    grid: dict[str, list[Any]] = {}
    expected: dict[str, dict[str, float]] = {}


def arguments(flags: Mapping[str, Any]) -> list[str]:
    """{field: value} as words of a command line; on and off are said where they differ from the
    default."""
    words = []
    for name, value in flags.items():
        flag = flag_name(name)
        if not isinstance(value, bool):
            words.append(f"{flag}={value}")
        elif value != FLAGS[name][1].default:
            words.append(flag if value else flag.replace("--", "--no-", 1))
    return words


@dataclass(frozen=True)
class Item:
    """A run of a sweep.

    Attributes:
        run: its name under runs/.
        given: {field: value} of train.run's flags, without its name.
        settings, plan: what the run makes of them; with one row where they ask for auto.
    """

    run: str
    variant: str
    seed: int
    given: dict[str, Any]
    settings: Settings
    plan: Plan

    def command(self, resume: bool) -> list[str]:
        """The module to run, and its arguments."""
        return [
            MODULE,
            "--run",
            self.run,
            *(["--resume"] if resume else []),
            *arguments(self.given),
        ]


@dataclass(frozen=True)
class Sweep:
    """A sweep; its runs come seed by seed, so that what was broken off can be compared.

    Attributes:
        varied: {variant: {field: value}} of what is its own.
        expected: {variant: {step: BPB}}.
        corpus: digest of the data that they are of (train.data.digest), None: of any.
    """

    name: str
    path: Path
    about: str
    baseline: str
    seeds: list[int]
    varied: dict[str, dict[str, Any]]
    items: list[Item]
    tolerance: float | None = None
    expected: dict[str, dict[int, float]] = field(default_factory=dict)
    corpus: str | None = None


def find_sweep(given: str) -> Path:
    """The file of a sweep: a path, or the name of one that comes with nanofuse.

    Raises:
        UserError: there is none.
    """
    path, shipped = Path(given), SHIPPED / f"{given}.toml"
    if path.is_file():
        return path
    if NAME.fullmatch(given) and shipped.is_file():
        return shipped
    there = ", ".join(sorted(each.stem for each in SHIPPED.glob("*.toml")))
    raise UserError(f"{given} is no file, and no sweep that comes along; those are {there}")


def read_content(path: Path) -> Content:
    """The file, its tables and their types checked.

    Raises:
        UserError: names the file and the key.
    """
    try:
        written = tomllib.loads(read_bounded(path, MAX_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, or too long
        raise UserError(f"{path} is no TOML file ({str(error).splitlines()[0]:.150})") from None
    for key in written:
        if key in Content.model_fields:
            continue
        if key.replace("-", "_") in FLAGS:
            raise UserError(f"{path}: {key!r:.50} is a flag of train.run; put it under [flags]")
        near = difflib.get_close_matches(key, Content.model_fields, 1)
        mend = (
            f"did you mean {near[0]!r}?" if near else f"keys are {', '.join(Content.model_fields)}"
        )
        raise UserError(f"{path}: {key!r:.50} is not known; {mend}")
    if "seeds" not in written:
        raise UserError(f"{path} has no seeds; give it some, such as seeds = [1, 2, 3]")
    try:
        return Content.model_validate(written)
    except ValidationError as error:
        raise UserError(f"{path}: {first_reason(error)}") from None


def check_number(content: Content, path: Path) -> None:
    """Refuse a file that makes too many runs, before anything is made of them.

    Raises:
        UserError: with their number.
    """
    variants = math.prod(map(len, content.grid.values())) if content.grid else len(content.variants)
    if (count := variants * len(content.seeds)) > MOST_RUNS:
        raise UserError(
            f"{path} makes {count:,} runs, {MOST_RUNS:,} are the most; take fewer seeds or values"
        )


def checked_flags(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """{field: value} of {flag: value} as written, each within its bounds.

    Args:
        where: file and table, for the message.

    Raises:
        UserError: an unknown flag, one that is the sweep's own, or a value that no run can have.
    """
    found = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name in OWN:
            raise UserError(f"{where}: {key!r} cannot be set here, as {OWN[name]}; drop it")
        if name not in FLAGS or "_" in key:
            spelled = [other.replace("_", "-") for other in FLAGS]
            near = difflib.get_close_matches(name.replace("_", "-"), spelled, 1)
            mend = f"did you mean {near[0]!r}?" if near else "see python -m train.run --help"
            raise UserError(f"{where}: {key!r} is no flag of train.run; {mend}")
        if FLAGS[name][1].type is float and type(value) is int:
            value = float(value)
        try:
            check(Settings().replace(without_auto({name: value})))
            refuse_empty({name: value})
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        found[name] = value
    return found


def spelled(value: Any) -> str:
    """A value of a grid in the name of a variant."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def variants_of(content: Content, path: Path) -> dict[str, dict[str, Any]]:
    """{name: {field: value}}, in the order of the file.

    Raises:
        UserError: none, or both a list and a grid; names that are missing, unfit or doubled.
    """
    if bool(content.variants) == bool(content.grid):
        raise UserError(f"{path}: give either [[variants]], each with a name, or a [grid]")
    found: dict[str, dict[str, Any]] = {}
    if content.grid:
        for key, values in content.grid.items():
            if not values:
                raise UserError(f"{path}, [grid]: {key!r} has no values; give some, or drop it")
            for value in values:
                checked_flags({key: value}, f"{path}, [grid]")
        for values in itertools.product(*content.grid.values()):
            flags = dict(zip(content.grid, values, strict=True))
            name = "_".join(f"{key}-{spelled(value)}" for key, value in flags.items())
            where = f"{path}, [grid]"
            add_variant(found, name, checked_flags(flags, where), where)
        return found
    for number, each in enumerate(content.variants, 1):
        where = f"{path}, variant {number}"
        name = each.get("name")
        if not isinstance(name, str):
            raise UserError(f'{where} has no name; give it one, such as name = "dense"')
        flags = {key: value for key, value in each.items() if key != "name"}
        add_variant(found, name, checked_flags(flags, f"{path}, {name!r:.50}"), where)
    return found


def add_variant(
    found: dict[str, dict[str, Any]], name: str, flags: dict[str, Any], where: str
) -> None:
    """Add a variant to those found.

    Raises:
        UserError: its name is unfit or taken.
    """
    if not VARIANT.fullmatch(name):
        raise UserError(f"{where}: name {name!r:.50} must be letters, digits and . _ + - only")
    if name in found:
        raise UserError(f"{where}: {name!r:.50} is there twice; name each variant once")
    found[name] = flags


def expectations(content: Content, names: list[str], path: Path) -> dict[str, dict[int, float]]:
    """{variant: {step: BPB}} of the file.

    Raises:
        UserError: of a variant that is not there, a step that is none, or without a tolerance.
    """
    found: dict[str, dict[int, float]] = {}
    for name, values in content.expected.items():
        where = f"{path}, [expected.{name}]"
        if name not in names:
            raise UserError(f"{where}: no such variant; there are {', '.join(names)}")
        try:
            found[name] = {whole(0)(step): bpb for step, bpb in values.items()}
        except ArgumentTypeError as error:
            raise UserError(f"{where}: a step {error}") from None
    if bool(found) != (content.tolerance is not None):
        raise UserError(f"{path}: tolerance and [expected] need each other; give both, or none")
    if content.corpus is not None and not found:
        raise UserError(f"{path}: corpus says what [expected] is of, and there is none; drop it")
    return found


def refuse_unevaluated(expected: Mapping[str, Mapping[int, float]], items: list[Item], path: Path):
    """Refuse a BPB that is expected at a step after which none is measured.

    Raises:
        UserError: names file, variant and step.
    """
    for item in items:
        plan, reports = item.plan, item.settings.reports
        for step in expected.get(item.variant, {}):
            if not plan.evaluates(step, reports):
                raise UserError(
                    f"{path}, [expected.{item.variant}]: step {step} is not evaluated, of "
                    f"{plan.num_iterations:,} with --eval-every {reports.eval_every}; name another"
                )


def make_item(run: str, variant: str, given: Mapping[str, Any], device_type: str) -> Item:
    """The run of one variant and one seed.

    Raises:
        UserError: flags that no run can have together.
    """
    settings = resolve(without_auto(given), device_type)
    with naming_flags():
        config = settings.model.config()
    plan = make_plan(settings, config)
    return Item(run, variant, given["seed"], dict(given), settings, plan)


def with_rows(item: Item, rows: int) -> Item:
    """A run with these rows of a forward pass, which it asked for as auto."""
    settings = item.settings.replace({ROWS: rows})
    plan = make_plan(settings, settings.model.config())
    return replace(item, given={**item.given, ROWS: rows}, settings=settings, plan=plan)


def read_sweep(path: Path, extra: Mapping[str, Any], gpu: bool) -> Sweep:
    """The sweep in a file.

    Args:
        extra: {field: value} of flags given on the command line, for every run.
        gpu: whether runs have a GPU.

    Raises:
        UserError: anything in the file or among the flags that cannot be; names file and key.
    """
    if not NAME.fullmatch(path.stem):
        raise UserError(
            f"{path}: the name of a sweep's file must be letters, digits and _ + - only"
        )
    content = read_content(path)
    check_number(content, path)
    seeds = content.seeds
    for seed in seeds:
        if not SEEDS[0] <= seed <= SEEDS[1]:
            raise UserError(f"{path}: seeds: {seed} must be from {SEEDS[0]} to {SEEDS[1]:,}")
        if seeds.count(seed) > 1:
            raise UserError(f"{path}: seeds: {seed} is there twice; give each seed once")
    shared = checked_flags(content.flags, f"{path}, [flags]")
    variants = variants_of(content, path)
    baseline = content.baseline or next(iter(variants))
    if baseline not in variants:
        raise UserError(f"{path}: baseline {baseline!r:.50} is none of {', '.join(variants)}")
    expected = expectations(content, list(variants), path)
    for name in extra:
        flag = flag_name(name)
        if name in OWN:
            raise UserError(f"{flag} cannot be given to a sweep, as {OWN[name]}; drop it")
        if any(name in own for own in variants.values()):
            raise UserError(f"{flag} is what variants of {path.name} differ in; change it there")
    refuse_empty(extra)
    check(Settings().replace(without_auto(extra)))
    items = []
    for seed, (name, own) in itertools.product(seeds, variants.items()):
        given = {**shared, **own, **extra, "seed": seed}
        on_gpu = gpu and given.get("device_type") != "cpu"
        try:
            items.append(
                make_item(f"{path.stem}.{name}.{seed}", name, given, "cuda" if on_gpu else "cpu")
            )
        except UserError as error:
            raise UserError(f"{path}, {name!r}: {error}") from None
    if not (content.corpus and extra):  # else they may be of other data, of which nothing is known
        refuse_unevaluated(expected, items, path)
    known = path.stem, path, content.about, baseline, seeds, variants, items
    return Sweep(*known, content.tolerance, expected, content.corpus)
