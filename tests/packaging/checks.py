"""What the tests of the wheel, the clone and the editable install share."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions, version
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ROOMS = ("kernels", "model", "train", "bench")
NOT_CODE = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "records"
)
# Hugging Face's, which have our former top-level name and import it.
NEIGHBOURS = ("kernels==0.17.0", "transformers==5.24.0")
THREE_STEPS = (
    "--num-iterations 3 --depth 1 --vocab-size 512 --data stdlib --device-type cpu "
    "--skip-initial-eval --eval-tokens 2048 --sample-every -1"
).split()
GET_KERNEL = "import kernels; from kernels import get_kernel; print(kernels.__file__)"
QUANTIZE = "import nanofuse.kernels.quantize as q; print(q.__file__)"
SPAWN = """
from multiprocessing import get_context
with get_context("spawn").Pool(1) as pool:
    print(pool.apply(eval, ("__import__('nanofuse.kernels.quantize').kernels.quantize.__file__",)))
"""


def link(source, target):
    """One file at two places; a copy, where a file system does not know that."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


class Environment:
    """A virtual environment; its Python runs in processes of their own."""

    def __init__(self, folder):
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        self.folder, self.executable = folder, folder / "bin/python"

    def python(self, *arguments, cwd):
        """Run Python with `arguments` in the folder `cwd`; returns what it prints, stripped.

        Nothing of the caller's reaches it: no PYTHONPATH, no interpreter of Triton's.
        """
        ours = ("PYTHONPATH", "TRITON_INTERPRET", "NANOFUSE_DIR")
        done = subprocess.run(
            [self.executable, *map(str, arguments)],
            cwd=cwd,
            env={name: value for name, value in os.environ.items() if name not in ours},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def install(self, *packages):
        """Without bytecode, which halves the time."""
        self.python("-m", "pip", "install", "--quiet", "--no-compile", *packages, cwd=self.folder)

    def link_torch(self):
        """The files of torch, Triton and CUDA's libraries as they are installed here: as `install`
        of this torch leaves them, but for a minute of unpacking. It brings the rest of what torch
        needs."""
        command = "import sysconfig; print(sysconfig.get_path('purelib'))"
        folder = Path(self.python("-c", command, cwd=self.folder))
        for package in distributions():
            if re.fullmatch("torch|triton|nvidia-.*", package.name):
                for file in package.files:
                    link(file.locate(), folder / file)
        self.install(f"torch=={version('torch')}")

    def uninstall(self):
        self.python("-m", "pip", "uninstall", "--quiet", "--yes", "nanofuse", cwd=self.folder)

    def imports_hugging_face(self, cwd):
        """Assert that `kernels` is Hugging Face's package, whole."""
        where = Path(self.python("-c", GET_KERNEL, cwd=cwd))
        assert where.is_relative_to(self.folder) and where.name == "__init__.py"

    def trains_three_steps(self, module, cwd):
        """Assert that the command trains and leaves a checkpoint under `cwd`."""
        self.python("-m", module, *THREE_STEPS, "--run", "three", cwd=cwd)
        assert (cwd / "runs/three/step_000003/model.safetensors").exists()
