"""The wheel adds `nanofuse` alone, whole, and works beside Hugging Face's packages."""

import subprocess
import sys
import zipfile

import pytest

from tests.packaging.checks import QUANTIZE, ROOMS, ROOT

pytestmark = pytest.mark.packaging

BOTH_MODELS = """
import torch, transformers
from nanofuse.model.config import GPTConfig
from nanofuse.model.gpt import GPT

theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2))
ours = GPT(GPTConfig(
    n_layer=1, n_embd=32, n_head=2, n_kv_head=2, sequence_len=128, vocab_size=64))
ours.init_weights()
tokens = torch.arange(8)[None]
assert theirs(tokens).logits.shape == ours(tokens).shape == (1, 8, 64)
"""


def contents(wheel):
    """Names of the wheel's files, without its metadata's, and the folder of those."""
    names = zipfile.ZipFile(wheel).namelist()
    (metadata,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    return {name for name in names if not name.startswith(metadata)}, metadata


def read(wheel, name):
    return zipfile.ZipFile(wheel).read(name).decode()


def test_adds_nanofuse_alone(wheel):
    names, metadata = contents(wheel)
    assert {name.split("/")[0] for name in names} == {"nanofuse"}
    assert read(wheel, f"{metadata}/top_level.txt").split() == ["nanofuse"]
    recorded = {line.split(",")[0] for line in read(wheel, f"{metadata}/RECORD").splitlines()}
    assert recorded == set(zipfile.ZipFile(wheel).namelist())


def test_holds_every_file_of_every_folder(wheel, clone):
    files = {path.relative_to(clone).as_posix() for path in clone.glob("nanofuse/**/*.*")}
    for room in ROOMS:
        for path in (clone / room).glob("**/*.*"):
            files.add(f"nanofuse/{path.relative_to(clone).as_posix()}")
    files = {name for name in files if "__pycache__" not in name}
    assert contents(wheel)[0] == files
    assert {"nanofuse/py.typed", "nanofuse/kernels/common/tuned.json"} <= files


def test_holds_the_licence(wheel):
    assert "MIT License" in read(wheel, f"{contents(wheel)[1]}/licenses/LICENSE")


@pytest.fixture(scope="module")
def installed(environment, wheel):
    environment.install("--no-deps", wheel)
    yield environment
    environment.uninstall()


def test_kernels_is_hugging_faces(installed, tmp_path):
    installed.imports_hugging_face(tmp_path)


def test_nanofuse_is_the_wheels(installed, tmp_path):
    where = installed.python("-c", QUANTIZE, cwd=tmp_path)
    assert where.endswith("site-packages/nanofuse/kernels/quantize.py")


def test_both_models_run_in_one_process(installed, tmp_path):
    installed.python("-c", BOTH_MODELS, cwd=tmp_path)


def test_trains_three_steps(installed, tmp_path):
    installed.trains_three_steps("nanofuse.train.run", tmp_path)


def test_documentation_of_the_ops(installed, tmp_path):
    assert "residual_mix" in installed.python("-m", "pydoc", "nanofuse.ops", cwd=tmp_path)


def test_types_of_the_ops(installed, tmp_path):
    """mypy checks the installed ops, and tells a caller their types."""
    (tmp_path / "caller.py").write_text("from nanofuse import ops\n\nreveal_type(ops.quantize)\n")
    mypy = [sys.executable, "-m", "mypy", "--python-executable", installed.executable]
    command = [
        *mypy,
        "--config-file",
        ROOT / "pyproject.toml",
        "-m",
        "caller",
        "-p",
        "nanofuse.ops",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"def (x: torch._tensor.Tensor, scaling: nanofuse.' in done.stdout
