"""What lies in a run's folder, to be found and read without loading torch.

runs/NAME/tokenizer.json, metrics.jsonl
runs/NAME/step_000500/model.safetensors, optim.safetensors, loader.safetensors, meta.json

Where several ranks trained, each wrote what it owns of optim.safetensors into a file of its own.
"""

import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nanofuse.train.errors import UserError
from nanofuse.train.files import not_read, remove_folder, way_out, write_text_atomically
from nanofuse.train.schemas import read_meta

META, MODEL, OPTIM, LOADER = (
    "meta.json",
    "model.safetensors",
    "optim.safetensors",
    "loader.safetensors",
)
RUNS_DIR = Path("runs")
MOST_NAME = 200  # bytes; file systems take 255, with what is added while a file is written
OPTIM_PART = re.compile(r"optim-(\d{5})-of-(\d{5})\.safetensors")
STEP_NAME = re.compile(r"step_(\d{6}|[1-9]\d{6,})")


def run_dir(name: str) -> Path:
    """Folder of a run.

    Raises:
        UserError: a name that is not a plain folder name.
    """
    if not re.fullmatch(r"[\w][\w.+-]*", name):
        raise UserError(f"--run {name!r} must be letters, digits and . _ + - only")
    if (size := len(os.fsencode(name))) > MOST_NAME:
        raise UserError(f"--run {name:.20}… has {size} bytes, {MOST_NAME} are the most; shorten it")
    return RUNS_DIR / name


def meta_text(meta: Mapping[str, Any]) -> str:
    """meta.json's content."""
    return json.dumps(meta, indent=2) + "\n"


def amend_meta(folder: Path, values: Mapping[str, Any]) -> None:
    """Change values of a checkpoint's meta.json."""
    write_text_atomically(folder / META, meta_text({**load_meta(folder), **values}))


def peek(folder: Path) -> dict[str, Any] | None:
    """meta.json as it is, or None where it cannot be read as JSON."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return meta if isinstance(meta, dict) else None


def digests(folder: Path) -> dict[str, str]:
    """{file name: SHA-256} that meta.json gives; empty where it gives none, as up to 0.1."""
    files = (peek(folder) or {}).get("files")
    return files if isinstance(files, dict) else {}


def optim_name(rank: int, world: int) -> str:
    """File of what a rank owns of the optimiser's state."""
    return OPTIM if world == 1 else f"optim-{rank + 1:05d}-of-{world:05d}.safetensors"


def optim_files(folder: Path) -> list[str]:
    """Names of the files that hold a checkpoint's optimiser state, in the order of the ranks."""
    return sorted(n for n in digests(folder) if n == OPTIM or OPTIM_PART.fullmatch(n))


def missing_files(folder: Path) -> list[str]:
    """Names of a checkpoint's files that are not there."""
    known = digests(folder)
    names = (META, MODEL, *optim_files(folder), *({LOADER} & known.keys()))
    return [name for name in names if not _is_there(folder / name)]


def _is_there(path: Path) -> bool:
    """Whether this is a file, or one that this user may not see."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except PermissionError:
        return True
    except OSError:
        return False


def is_complete(folder: Path) -> bool:
    """Whether every file of a checkpoint is there."""
    return not missing_files(folder)


def checkpoints(directory: Path | str) -> dict[int, Path]:
    """{step: folder} of a run's complete checkpoints, ascending; other names are not looked at."""
    folders = step_folders(directory)
    return {step: folder for step, folder in folders.items() if is_complete(folder)}


def step_folders(directory: Path | str) -> dict[int, Path]:
    """{step: folder} of what has a checkpoint's name in a run's folder, ascending, whole or not."""
    found = ((STEP_NAME.fullmatch(path.name), path) for path in Path(directory).glob("step_*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def passed_over(directory: Path | str, step: int = -1) -> str | None:
    """Words for the newest folder of a later step that is no complete checkpoint; None without."""
    later = [folder for at, folder in step_folders(directory).items() if at > step]
    for folder in reversed(later):
        if names := missing_files(folder):
            return f"{folder} has no {names[0]} and is passed over; put it back, or delete the rest"
    return None


def prune(directory: Path | str, keep: int, newest: int | None = None) -> list[Path]:
    """Remove all but the last `keep` checkpoints and the best by validation BPB.

    Args:
        newest: steps after it are not looked at.

    Returns:
        the folders that are gone.
    """
    found = checkpoints(directory)
    if newest is not None:
        found = {step: folder for step, folder in found.items() if step <= newest}
    if len(found) <= keep:
        return []
    bpbs = {step: (peek(folder) or {}).get("val_bpb") for step, folder in found.items()}
    known = [(b, step) for step, b in bpbs.items() if isinstance(b, float) and b < math.inf]
    kept = {*list(found)[-keep:], *(step for _, step in sorted(known)[:1])}
    doomed = [folder for step, folder in found.items() if step not in kept]
    for folder in doomed:
        remove_folder(folder)
    return doomed


def runs_with_checkpoints() -> Iterator[str]:
    """Names of the runs that have a checkpoint, in order."""
    for directory in sorted(RUNS_DIR.glob("*")):
        if checkpoints(directory):
            yield directory.name


def refuse_unreadable(directory: Path | str) -> None:
    """Raise UserError where a folder is there and this user may not list it."""
    try:
        os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"{directory} cannot be read ({error.strerror})") from None


def find_checkpoint(directory: Path | str, step: int | None = None, tell: bool = True) -> Path:
    """Folder of a run's latest complete checkpoint, the one of the largest number, or of `step`.

    Args:
        tell: say on stderr that a later one is not complete.

    Raises:
        UserError: the run or the step does not exist, or cannot be read.
    """
    refuse_unreadable(directory)
    found = checkpoints(directory)
    if not found:
        there = ", ".join(runs_with_checkpoints()) or "none"
        why = passed_over(directory) or f"runs that have one: {there}"
        raise UserError(f"no checkpoint in {directory}; {why}")
    if step is None:
        newest = max(found)
        if tell and (words := passed_over(directory, newest)):
            print(f"run: {words}", file=sys.stderr)
        return found[newest]
    if step not in found:
        names = ", ".join(map(str, found))
        raise UserError(f"{directory} has no checkpoint of step {step}; there are: {names}")
    return found[step]


def find_run(given: str, step: int | None = None) -> tuple[Path, Path]:
    """(folder of the run, folder of the checkpoint) of what was given: a run's folder, its name
    under runs/, or a checkpoint's folder. Of a run it is the latest checkpoint, or that of `step`.

    Raises:
        UserError: there is none.
    """
    places = Path(given), RUNS_DIR / given
    if places[0].is_dir() and not checkpoints(places[0]) and checkpoints(places[1]):
        places = places[::-1]  # a folder here has the name of a run
    for path in places:
        if STEP_NAME.fullmatch(path.name) and is_complete(path):
            number = int(path.name.removeprefix("step_"))
            if step not in (None, number):
                raise UserError(f"{given} is step {number}; drop --step, or name the run")
            return path.parent, path
        if path.is_dir():
            return path, find_checkpoint(path, step)
    there = ", ".join(runs_with_checkpoints()) or "none"
    raise UserError(f"{given}: no such run; runs that have a checkpoint: {there}")


def load_meta(folder: Path | str) -> dict[str, Any]:
    """meta.json of a checkpoint.

    Raises:
        UserError: missing, damaged or of another format.
    """
    path = Path(folder) / META
    try:
        meta = read_meta(path)
    except OSError as error:
        damage = f"is missing, damaged or of another format ({error.strerror})"
        raise UserError(not_read(path, error, damage)) from None
    except ValueError as error:
        raise UserError(
            f"{path} is missing, damaged or of another format ({error}); {way_out(folder)}"
        ) from None
    named = STEP_NAME.fullmatch(Path(folder).name)
    if named and meta["step"] != int(named[1]):
        raise UserError(
            f"{folder} is of step {meta['step']}, as its {META} says; give it that name, or move "
            "it out of the run"
        )
    return meta
