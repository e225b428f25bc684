"""What ran: the commit of the code and the versions of the libraries, for a checkpoint's meta."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "nanofuse",
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "pyarrow",
    "tiktoken",
    "rustbpe",
    "transformer-engine",
    "flash-attn-4",
)


def versions():
    """{name: version} of Python, CUDA and the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _git(*args):
    done = subprocess.run(
        ["git", "-C", str(ROOT), *args],
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=10,
    )
    return done.stdout.strip() if done.returncode == 0 else None


def code():
    """{"commit": hash, "changed": whether files differ from it}; None outside of a clone."""
    try:
        if not (top := _git("rev-parse", "--show-toplevel")) or Path(top).resolve() != ROOT:
            return None
        # what git does not know, such as a user's own files, is no change of the code
        tracked = "status", "--porcelain", "--untracked-files=no"
        commit, changes = _git("rev-parse", "HEAD"), _git(*tracked)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return {"commit": commit, "changed": changes != ""} if commit else None
