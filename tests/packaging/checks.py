"""What the tests of the wheel, the clone and the editable install share."""

import os
import shutil
import subprocess
import sys
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
