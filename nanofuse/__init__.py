"""nanofuse: kernel-first training of nanochat-recipe GPTs on NVIDIA Hopper GPUs.

One import name for everything: nanofuse.kernels, nanofuse.model, nanofuse.train, nanofuse.bench,
and nanofuse.ops with the public kernels. Installed, these are folders of this package. In a clone
they lie beside it, where `python -m train.run` and `pytest bench/` find them, and the clone's root
joins the search path of the package.
"""

from pathlib import Path

_HERE = Path(__file__).parent
if not (_HERE / "kernels").is_dir():
    __path__.append(str(_HERE.parent))
