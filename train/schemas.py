"""What the JSON files that are read back may hold, with bounds, and the sizes of their tensors.

A file is validated whole before anything follows from it, and the sizes that it claims are compared
with the tensors' headers before anything of that size is allocated.
"""

import math
import os
import stat
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)
from safetensors import SafetensorError, safe_open

from nanofuse.model.config import (
    MAX_LAYERS,
    MAX_SEQUENCE,
    MAX_VOCABULARY,
    Dials,
    GPTConfig,
)
from nanofuse.model.option import options
from nanofuse.train.errors import UserError
from nanofuse.train.files import not_read

FORMAT = 1
MAX_FILE_BYTES = 2**26
SMALL = 2**20  # parameters that may always be allocated
MAX_COUNT = 2**53  # of steps, units, documents: exact in any JSON reader

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Width = Annotated[int, Field(ge=1, le=2**24)]
Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """Fields of exactly these names and types; every number is finite."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Sizes(Strict):
    """What nanochat's model_config and this project's have in common."""

    sequence_len: int = Field(ge=1, le=MAX_SEQUENCE)
    vocab_size: int = Field(ge=1, le=MAX_VOCABULARY)
    n_layer: int = Field(ge=1, le=MAX_LAYERS)
    n_head: Width
    n_kv_head: Width
    n_embd: Width
    window_pattern: str = Field(min_length=1, max_length=MAX_LAYERS)


def _own_fields() -> dict[str, Any]:
    """{name: (type, default or ...)} of GPTConfig's fields that are not in Sizes; those of dials
    that came with a later version have a default."""
    since = {dial.name: dial.metadata["since"] for dial in options(Dials)}
    return {
        f.name: (Count if f.type is int else f.type, f.default if since[f.name] else ...)
        for f in fields(GPTConfig)
        if f.name not in Sizes.model_fields
    }


_Own: Any = create_model("_Own", __base__=Sizes, **_own_fields())


class Architecture(_Own):
    """GPTConfig's fields."""


class NanochatSizes(Sizes):
    """model_config of nanochat: what older files leave out is as nanochat takes it, and its branch
    with a bigram table has two fields more."""

    window_pattern: str = Field("L", min_length=1, max_length=MAX_LAYERS)
    bigram_embed_factor: Count = 0
    bigram_lambda_init: float = Dials.bigram_lambda_init


class ProgressFields(Strict):
    """What a checkpoint carries of the loop; train/loop.py knows which other numbers."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int | float | None]

    step: Count
    train_seconds: float = Field(ge=0)
    val_bpb: float | None = None
    best_bpb: float | None = None
    loss: float | None = None
    val_step: Count | None = None
    loss_ema: float = 0.0
    loss_ema_steps: Count = 0


class Position(Strict):
    """Where the data loader stands, and in which data."""

    model_config = ConfigDict(extra="allow")

    epoch: Count
    unit: Count
    document: Count
    corpus: str
    content: str | None = None  # not known of 0.1's and of the standard library


class Meta(Strict):
    """meta.json of a checkpoint; a converted one has no training to go on with."""

    model_config = ConfigDict(extra="allow")

    format: Literal[1]
    step: Count
    architecture: Architecture = Field(alias="model_config")
    val_bpb: float | None = None
    settings: dict[str, Any] | None = None  # train/settings.py checks them
    progress: ProgressFields | None = None
    num_iterations: Count | None = None
    optimizer_steps: Count | None = None
    loader: Position | None = None
    files: dict[str, str] | None = None  # SHA-256 by name
    tokenizer: str | None = None  # its fingerprint
    wandb: str | None = None  # id of its run

    @model_validator(mode="after")
    def consistent(self) -> "Meta":
        if self.settings is None:
            return self
        if self.progress is None or self.loader is None:
            raise ValueError("progress or loader is missing")
        if self.num_iterations is None or self.optimizer_steps is None:
            raise ValueError("num_iterations or optimizer_steps is missing")
        if self.progress.step != self.step or self.optimizer_steps > self.step:
            raise ValueError("its steps disagree")
        dials = {f.name for f in options(Dials)} & self.settings.keys()
        try:
            asked = Dials(**{name: self.settings[name] for name in dials}).config()
        except (TypeError, ValueError, OverflowError):
            asked = None
        there = GPTConfig(**self.architecture.model_dump())
        # the tokenizer may have fewer tokens than were asked for
        if asked is None or replace(asked, vocab_size=there.vocab_size) != there:
            raise ValueError("settings and model_config disagree")
        return self


class NanochatMeta(BaseModel):
    """meta_NNNNNN.json of nanochat, as far as it is read."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    declared: dict[str, Any] = Field(alias="model_config")
    val_bpb: float | None = None


def first_reason(error: ValidationError) -> str:
    """The first thing that a schema found wrong, in one line."""
    found = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, found["loc"]))
    text = " ".join(found["msg"].removeprefix("Value error, ").split())
    return f"{where[:80]}: {text}" if where else text


def read_bounded(path: Path | str, most: int) -> bytes:
    """Content of a regular file of at most so many bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else, or longer.
    """
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("it is not a regular file")
    if facts.st_size > most:
        raise ValueError(f"it has {facts.st_size:,} bytes, {most:,} are the most")
    with open(path, "rb") as file:
        return file.read(most)


def read_validated(path: Path | str, schema: type[Model]) -> Model:
    """A JSON file, validated.

    Raises:
        OSError: it cannot be read.
        ValueError: what is wrong with it, in one line.
    """
    text = read_bounded(path, MAX_FILE_BYTES)
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(first_reason(error)) from None


def read_json(path: Path | str, schema: type[Model]) -> Model:
    """As read_validated; a file that cannot be read is a ValueError, too."""
    try:
        return read_validated(path, schema)
    except OSError as error:
        raise ValueError(error.strerror) from None


def read_meta(path: Path | str) -> dict[str, Any]:
    """meta.json of a checkpoint, as a dict.

    Raises:
        OSError, ValueError: as read_validated.
    """
    return read_validated(path, Meta).model_dump(by_alias=True, exclude_unset=True)


def tensor_shapes(path: Path | str) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a safetensors file; no tensor is read.

    Raises:
        UserError: the file is missing, cut short or damaged.
    """
    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(not_read(Path(path), error, "is missing or cut short")) from None


def check_size(config: GPTConfig, shapes: dict[str, tuple[int, ...]], source: Path | str) -> None:
    """Refuse a config that claims far more than the tensors that are there have together; what is
    about right can be made, and compared name by name.

    Raises:
        UserError: names the source.
    """
    there = sum(math.prod(shape) for shape in shapes.values())
    if config.num_params > 2 * there + SMALL:
        raise UserError(
            f"{source}: model_config claims {config.num_params:,} parameters, the file holds "
            f"{there:,}"
        )
