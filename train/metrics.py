"""What runs have logged: metrics.jsonl, validated, and the settings of the checkpoint beside it."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanofuse.model.config import GPTConfig
from nanofuse.train.errors import UserError
from nanofuse.train.run_folder import RUNS_DIR, checkpoints, load_meta
from nanofuse.train.runlog import METRICS_FILE
from nanofuse.train.schemas import Count, first_reason, read_bounded

MAX_METRICS_BYTES = 2**30
# Settings in which runs of one configuration may differ.
NOT_COMPARED = {"run", "seed", "resume", "gpus"}


class Record(BaseModel):
    """A line of the file, of any kind; figures that are not read may be anything."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    kind: str
    step: Count


class Train(Record):
    """Of a window of steps; logs of 0.1 lack what has a default."""

    loss: float | None
    loss_ema: float | None = None
    grad_norm: float | None = None
    lr_mult: float
    ms_per_step: float = Field(gt=0)
    tok_per_s: float = Field(gt=0)
    train_seconds: float = Field(ge=0)
    fp8_clipped: Count | None = None


class Val(Record):
    """Of an evaluation."""

    bpb: float = Field(gt=0)
    train_seconds: float = Field(ge=0)


class Core(Record):
    """Of an evaluation of CORE."""

    core: float
    train_seconds: float = Field(ge=0)


def parse(line: bytes) -> Record:
    """A line of the file: a Train, a Val, a Core, or a Record of a kind that is not read.

    Raises:
        ValidationError: it is none.
    """
    kinds: dict[str, type[Record]] = {"train": Train, "val": Val, "core": Core}
    record = Record.model_validate_json(line)
    return kinds.get(record.kind, Record).model_validate_json(line)


@dataclass(frozen=True)
class Run:
    """One run's log.

    Attributes:
        name: in tables and legends.
        train, val, core: {step: record}, ascending.
        settings: {flag: value} of the newest checkpoint; None: there is none, or it was converted.
        flops_per_token: of the model, None without a checkpoint.
        commit: of the code that wrote it, where that is known.
    """

    name: str
    path: Path
    train: dict[int, Train]
    val: dict[int, Val]
    settings: dict[str, Any] | None = None
    flops_per_token: int | None = None
    commit: str | None = None
    core: dict[int, Core] = field(default_factory=dict)

    @property
    def tokens_per_step(self) -> int | None:
        """Of what was logged; None where no step was."""
        sizes = [r.tok_per_s * r.ms_per_step / 1e3 for r in self.train.values()]
        return round(statistics.median(sizes)) if sizes else None

    @property
    def ms_per_step(self) -> float | None:
        """Median over the windows after the first, which compiles."""
        times = [record.ms_per_step for record in self.train.values()][1:]
        return statistics.median(times) if times else None

    def seconds(self, record: Train | Val | Core) -> float:
        """Of training up to a record; the first window, which compiles, counts as others do."""
        first, ms = next(iter(self.train.values()), None), self.ms_per_step
        if first is None or ms is None or record.step < first.step:
            return record.train_seconds
        extra = first.train_seconds - first.step * ms / 1e3
        return record.train_seconds - max(extra, 0.0)

    @property
    def configuration(self) -> dict[str, Any] | None:
        """The settings in which runs that differ by seed only are alike."""
        if self.settings is None:
            return None
        return {k: v for k, v in self.settings.items() if k not in NOT_COMPARED}


def read_metrics(path: Path | str) -> tuple[dict[int, Train], dict[int, Val], dict[int, Core]]:
    """Records of training, validation and CORE in a metrics.jsonl by step; the last of a step
    counts.

    A last line that a killed process left without its end is left out.

    Raises:
        UserError: it cannot be read, or a line is none of a run's; names the file and the line.
    """
    found: dict[type[Record], dict[int, Any]] = {Train: {}, Val: {}, Core: {}}
    try:
        *lines, rest = read_bounded(path, MAX_METRICS_BYTES).split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path} is not the log of a run ({error})") from None
    for number, line in enumerate([*lines, rest], 1):
        try:
            record = parse(line)
        except ValidationError as error:
            if number > len(lines):
                continue
            reason = first_reason(error)
            raise UserError(
                f"{path}, line {number} is not of a run's log ({reason:.120}); delete the line, or "
                "give another run"
            ) from None
        if type(record) in found:
            found[type(record)][record.step] = record
    train, val, core = (dict(sorted(records.items())) for records in found.values())
    return train, val, core


def find_metrics(given: str) -> Path:
    """The metrics of a run that was given by its folder, by its name under runs/, or as the file.

    Raises:
        UserError: there is none.
    """
    for path in (Path(given), RUNS_DIR / given):
        if path.is_file():
            return path
        if (path / METRICS_FILE).is_file():
            return path / METRICS_FILE
    if not Path(given).is_dir():
        raise UserError(f"{given}: no such run; python -m train.runs lists those that are there")
    raise UserError(f"{given} has no {METRICS_FILE}; give folders that train.run wrote")


def commit_of(meta: dict[str, Any]) -> str | None:
    """First digits of the commit that a checkpoint's meta names, with a + where files differed."""
    code = meta.get("code")
    if not isinstance(code, dict) or not isinstance(code.get("commit"), str):
        return None
    return code["commit"][:7] + ("+" if code.get("changed") else "")


def read_run(given: str) -> Run:
    """The log of a run, with what its newest checkpoint says of it.

    Raises:
        UserError: as find_metrics and read_metrics; no evaluation; a damaged checkpoint.
    """
    path = find_metrics(given)
    train, val, core = read_metrics(path)
    if not val:
        raise UserError(f"{path} holds no evaluation; train with --eval-every above 0")
    if path.name != METRICS_FILE:
        return Run(path.stem, path, train, val, core=core)
    name = path.absolute().parent.name
    found = checkpoints(path.parent)
    if not found:
        return Run(name, path, train, val, core=core)
    meta = load_meta(found[max(found)])
    if meta.get("settings") is None:
        return Run(name, path, train, val, core=core)
    flops = GPTConfig(**meta["model_config"]).flops_per_token
    return Run(name, path, train, val, meta["settings"], flops, commit_of(meta), core)
