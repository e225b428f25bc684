"""Without Triton, which exists on Linux only: everything but the kernels works."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.test_ops import ROOT

BLOCKED = """
import sys, warnings
warnings.simplefilter("ignore")
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""
TINY = (
    "--depth 1 --aspect-ratio 32 --head-dim 16 --max-seq-len 32 --device-batch-size 1 "
    "--total-batch-size 32 --eval-tokens 64 --vocab-size 320 --num-iterations 2 "
    "--bigram-embed-factor 0 --device-type cpu"
).split()


def blocked(code, *argv, cwd=ROOT, interpret=""):
    """Run Python code in a process that can't import Triton, on a CPU."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = dict(os.environ, PYTHONPATH=path, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    env |= {"TRITON_INTERPRET": interpret, "NANOFUSE_DIR": str(cwd)}
    command = [sys.executable, "-c", BLOCKED + code, *argv]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=300)


def fine(run):
    assert run.returncode == 0, run.stderr
    return run.stdout


def commands(*lines, cwd=ROOT):
    """Commands, each [module, argument, ...], in one process, which ends with the first that has an
    exit code."""
    code = """
import json, runpy
for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code: raise
    print("done", flush=True)
"""
    return blocked(code, json.dumps(lines), cwd=cwd)


def test_every_module_can_be_imported():
    files = [
        p
        for room in ("kernels", "model", "train", "nanofuse")
        for p in ROOT.glob(f"{room}/**/*.py")
    ]
    names = {str(Path(*p.relative_to(ROOT).with_suffix("").parts)).replace("/", ".") for p in files}
    names = {n if n.startswith("nanofuse") else f"nanofuse.{n}" for n in names}
    if find_spec("transformers") is None:
        names.remove("nanofuse.train.modeling_nanofuse")  # which that library loads
    names = sorted(n.removesuffix(".__init__") for n in names if not n.endswith("__main__"))
    assert len(names) > 60
    code = "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    fine(blocked(code + "assert 'triton' not in sys.modules", *names))


def test_ops_run_eagerly_and_kernels_say_what_is_missing():
    out = fine(
        blocked(
            """
import torch
from nanofuse import ops
from nanofuse.kernels.adamw import adamw_schedule, adamw
from nanofuse.kernels.linear_relu_squared import linear_relu_squared_fwd
from nanofuse.kernels.relu_squared import relu_squared_fwd
from nanofuse.kernels.softcap_cross_entropy import softcap_cross_entropy

x, tokens = torch.ones(16, 16), torch.zeros(2, 3, dtype=torch.int64)
print(ops.relu_squared(x, backend="eager").sum().item())
print(ops.bigram_rows(tokens, 9, backend="eager").shape)
loss = ops.softcap_cross_entropy(x, tokens.new_zeros(16), 16, backend="eager")
state = ops.adamw_tensors([x], [x.clone()], [x.clone()], [x.clone()], lr=0.1)
ops.adamw(state, step=1, backend="eager")
ops.fp8_scaling(1.0, device="cpu"), ops.rotary_table(4, 4)
for call in (
    lambda: ops.relu_squared(x),
    lambda: ops.softcap_cross_entropy(x, tokens.new_zeros(16), 16),
    lambda: relu_squared_fwd(x),
    lambda: softcap_cross_entropy(x, tokens.new_zeros(16), 16),
    lambda: linear_relu_squared_fwd(x, x),
    lambda: adamw(state, adamw_schedule(1.0, 1, "cpu")),
):
    try: call()
    except RuntimeError as error: print(error)
"""
        )
    ).splitlines()
    assert out[:2] == ["256.0", "torch.Size([2, 3])"] and len(out) == 8
    assert all("Triton is not installed" in line for line in out[2:]), out


@pytest.mark.parametrize("interpret", ["", "1"])
def test_the_fused_model_is_refused(interpret):
    run = blocked(
        """
from nanofuse.train.device import select_machine
from nanofuse.train.errors import UserError
for backend in ("auto", "eager"):
    assert select_machine("cpu", backend).backend == "eager"
try: select_machine("cpu", "fused")
except UserError as error: print(error)
""",
        interpret=interpret,
    )
    assert fine(run).splitlines() == [
        "--backend fused needs Triton, which is not installed; use --backend eager"
    ]


def test_training_generation_and_export(tmp_path, data_dir):
    train = ["nanofuse.train.run", *TINY, "--data", str(data_dir)]
    run = commands(
        ["nanofuse.train.run", "--help"],
        [*train, "--run", "a"],
        ["nanofuse.model.generate", "--run", "a", "--max-tokens", "3"],
        ["nanofuse.train.convert", "to-nanochat", "out", "--run", "a"],
        [*train, "--run", "b", "--backend", "fused"],
        cwd=tmp_path,
    )
    assert "--backend" in run.stdout and run.stdout.splitlines().count("done") == 4, run.stderr
    assert list(tmp_path.glob("out/model_*.pt"))
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "error: --backend fused needs Triton" in run.stderr


def test_versions_that_do_not_go_together_are_refused(pytestconfig, monkeypatch):
    """Every test of a kernel would fail in the interpreter of Triton 3.6 with numpy 2.4."""
    hooks = pytestconfig.pluginmanager.get_plugins()
    root = next(x for x in hooks if getattr(x, "__file__", "") == str(ROOT / "conftest.py"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for triton, numpy, fits in (("3.6.0", "2.4.6", False), ("3.6.0", "2.3.5", True),
                                ("3.7.1", "2.4.6", True)):  # fmt: skip
        monkeypatch.setattr(root, "version", lambda name, triton=triton: triton)
        monkeypatch.setattr(root.np, "__version__", numpy)
        if fits:
            root.pytest_configure(pytestconfig)
        else:
            with pytest.raises(
                pytest.UsageError, match=r"3\.6\.0 does not work with numpy 2\.4\.6"
            ):
                root.pytest_configure(pytestconfig)
