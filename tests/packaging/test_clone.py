"""The clone, not installed, beside Hugging Face's `kernels`: its folder of that name gives way."""

from pathlib import Path

import pytest

from tests.packaging.checks import QUANTIZE, SPAWN

pytestmark = pytest.mark.packaging


def test_kernels_is_hugging_faces(environment, clone):
    environment.imports_hugging_face(clone)


def test_transformers_imports(environment, clone):
    environment.python("-c", "from transformers import LlamaForCausalLM", cwd=clone)


def test_nanofuse_is_the_clones(environment, clone):
    assert Path(environment.python("-c", QUANTIZE, cwd=clone)) == clone / "kernels/quantize.py"


def test_spawned_process_imports_it(environment, clone):
    assert Path(environment.python("-c", SPAWN, cwd=clone)) == clone / "kernels/quantize.py"


def test_torchrun_starts_the_command(environment, clone):
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=1".split()
    out = environment.python(*torchrun, "-m", "train.run", "--help", cwd=clone)
    assert "--depth" in out


def test_trains_three_steps(environment, clone):
    environment.trains_three_steps("train.run", clone)
