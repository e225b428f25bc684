"""The tasks of CORE, read from a folder in the layout that nanochat's are in.

DIR/core.yaml           icl_tasks: label, dataset_uri, num_fewshot, icl_task_type and
                        continuation_delimiter of each
DIR/eval_data/…         an example a line, JSON, at each dataset_uri
DIR/eval_meta_data.csv  "Eval Task", "Random baseline": the accuracy of guessing, in percent

Source: nanochat's evals/core.py and scripts/base_eval.py (https://github.com/karpathy/nanochat).
Nothing here loads torch.
"""

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nanofuse.train.errors import UserError
from nanofuse.train.schemas import first_reason, read_bounded
from nanofuse.train.settings import Reports

CONFIG, DATA, BASELINES = "core.yaml", "eval_data", "eval_meta_data.csv"
MAX_CONFIG_BYTES, MAX_DATA_BYTES = 2**22, 2**31
SHUFFLE_SEED = 1337  # of the examples of a task, before the first ones are taken
LABEL, BASELINE = "Eval Task", "Random baseline"  # columns


class Example(BaseModel):
    """What all examples have in common; other fields are not read. Numbers become text."""

    model_config = ConfigDict(coerce_numbers_to_str=True)


class Choice(Example):
    """A query with continuations, of which `gold` is the right one."""

    query: str
    choices: list[str] = Field(min_length=1)
    gold: int = Field(ge=0)

    @model_validator(mode="after")
    def within(self) -> "Choice":
        if self.gold >= len(self.choices):
            raise ValueError("gold is none of the choices")
        return self


class Schema(Example):
    """Contexts, of which `gold` is the one that the continuation belongs to."""

    context_options: list[str] = Field(min_length=1)
    continuation: str
    gold: int = Field(ge=0)

    @model_validator(mode="after")
    def within(self) -> "Schema":
        if self.gold >= len(self.context_options):
            raise ValueError("gold is none of the context_options")
        return self


class Language(Example):
    """A context, and the only continuation that is right."""

    context: str
    continuation: str = Field(pattern=r"\S")


KINDS: dict[str, type[Example]] = {
    "multiple_choice": Choice,
    "schema": Schema,
    "language_modeling": Language,
}


class TaskEntry(BaseModel):
    """An entry of icl_tasks; other fields are not read."""

    label: str = Field(min_length=1)
    dataset_uri: str = Field(min_length=1)
    num_fewshot: list[int] = Field(min_length=1)  # the first counts
    icl_task_type: str
    continuation_delimiter: str = " "

    @model_validator(mode="after")
    def known(self) -> "TaskEntry":
        if self.icl_task_type not in KINDS:
            raise ValueError(f"icl_task_type must be one of {', '.join(KINDS)}")
        if self.num_fewshot[0] < 0:
            raise ValueError("num_fewshot must be at least 0")
        return self


class Config(BaseModel):
    """core.yaml."""

    icl_tasks: list[TaskEntry] = Field(min_length=1)


@dataclass(frozen=True)
class Task:
    """A task of CORE.

    Attributes:
        kind: of KINDS.
        shots: examples before the one that is asked.
        delimiter: between context and continuation.
        baseline: accuracy of guessing, in percent.
        examples: Choice, Schema or Language, in the order in which they count.
    """

    label: str
    kind: str
    shots: int
    delimiter: str
    baseline: float
    examples: list[Any]


def _read(path: Path, most: int) -> str:
    try:
        return read_bounded(path, most).decode("utf-8")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); --core-bundle takes a folder with "
            f"{CONFIG}, {DATA}/ and {BASELINES}"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not a file of a bundle ({error})") from None


def read_config(folder: Path) -> list[TaskEntry]:
    """The entries of core.yaml, each label once.

    Raises:
        UserError: pyyaml is not installed, or the file is missing or another.
    """
    try:
        import yaml
    except ImportError:
        raise UserError("CORE needs pyyaml; install it with pip install -e '.[core]'") from None
    path = folder / CONFIG
    text = _read(path, MAX_CONFIG_BYTES)
    try:
        entries = Config.model_validate(yaml.safe_load(text)).icl_tasks
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not YAML ({reason:.120})") from None
    except ValidationError as error:
        raise UserError(f"{path} is not the list of tasks ({first_reason(error):.160})") from None
    labels = [entry.label for entry in entries]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"{path} has the task {twice[0]} twice; each label names one")
    return entries


def read_baselines(folder: Path) -> dict[str, float]:
    """{label: accuracy of guessing in percent, below 100} of eval_meta_data.csv.

    Raises:
        UserError: it is missing or another file.
    """
    path, found = folder / BASELINES, {}
    for row in csv.DictReader(_read(path, MAX_CONFIG_BYTES).splitlines()):
        try:
            found[row[LABEL]] = float(row[BASELINE])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f'{path} lacks a label or a number in "{LABEL}", "{BASELINE}"'
            ) from None
        if not 0 <= found[row[LABEL]] < 100:
            raise UserError(f"{path}: the baseline of {row[LABEL]} is not from 0 to below 100")
    return found


def read_examples(path: Path, kind: str) -> list[Any]:
    """The examples of a task in the file's order.

    Raises:
        UserError: names the file and the line.
    """
    examples = []
    for number, line in enumerate(_read(path, MAX_DATA_BYTES).split("\n"), 1):
        if not line.strip():
            continue
        try:
            examples.append(KINDS[kind].model_validate(json.loads(line)))
        except (ValueError, RecursionError) as error:
            known = isinstance(error, ValidationError)
            reason = first_reason(error) if known else "it is not JSON"
            raise UserError(f"{path}, line {number} is no {kind} example ({reason})") from None
    if not examples:
        raise UserError(f"{path} holds no example")
    return examples


def load_bundle(folder: Path | str, max_per_task: int = -1) -> list[Task]:
    """The tasks of a bundle, every file read and checked.

    Args:
        max_per_task: examples of each task, the first ones of a fixed shuffle; -1: all. Shots come
            from these as well.

    Raises:
        UserError: names the file, and the line where there is one.
    """
    folder = Path(folder).expanduser()
    baselines, tasks = None, []
    for entry in read_config(folder):
        baselines = read_baselines(folder) if baselines is None else baselines
        if entry.label not in baselines:
            raise UserError(f"{folder / BASELINES} has no random baseline of {entry.label}")
        examples = read_examples(folder / DATA / entry.dataset_uri, entry.icl_task_type)
        random.Random(SHUFFLE_SEED).shuffle(examples)
        if max_per_task > 0:
            examples = examples[:max_per_task]
        tasks.append(
            Task(
                entry.label,
                entry.icl_task_type,
                entry.num_fewshot[0],
                entry.continuation_delimiter,
                baselines[entry.label],
                examples,
            )
        )
    return tasks


def core_tasks(reports: Reports) -> list[Task]:
    """The tasks of CORE that a run measures, for Reports; none without --core-every.

    Raises:
        UserError: no bundle is named, or it is damaged.
    """
    if reports.core_every < 0:
        return []
    if not reports.core_bundle:
        raise UserError("--core-every needs the tasks of CORE; name their folder as --core-bundle")
    return load_bundle(reports.core_bundle, reports.core_max_per_task)
