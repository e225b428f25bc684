"""bench.step_profile on a CPU: the trace's phases, the tables, and the refusal."""

import subprocess
import sys
from pathlib import Path

import pytest

from nanofuse.bench.chrome_trace import PHASES, Kernel, breakdown, dearest, read_kernels
from nanofuse.bench.roofline import floor_parts
from nanofuse.bench.step_profile import class_table, kernel_table, load_trace, main, record
from nanofuse.bench.training import tiny_workload
from nanofuse.model.config import GPTConfig
from nanofuse.train.assemble import assemble
from nanofuse.train.device import select_fp8, select_machine
from nanofuse.train.errors import UserError
from nanofuse.train.optim.config import OptimConfig

ROOT = Path(__file__).parents[2]


def test_the_trace_holds_the_phases_of_one_step(tmp_path):
    workload = tiny_workload(2)
    machine = select_machine("cpu", "eager")
    fp8 = select_fp8("off", machine, workload.config, workload.rows)
    built = assemble(workload.config, machine, OptimConfig(), fp8)
    record(built, workload.batches(machine.device) * 2, tmp_path / "trace.json.gz")
    trace = load_trace(tmp_path / "trace.json.gz")
    ranges = [e for e in trace["traceEvents"] if e.get("cat") == "user_annotation"]
    names = [e["name"] for e in sorted(ranges, key=lambda e: e["ts"]) if e["name"] in PHASES]
    assert names == ["forward", "backward"] * 2 + ["optimizer"]
    assert read_kernels(trace) == []


def test_tables():
    kernels = [Kernel("nvjet_a", 0, 3000, "forward"), Kernel("x" * 200, 4000, 5000, "backward")]
    floor = floor_parts(GPTConfig.from_depth(16), 32)
    lines = list(class_table(breakdown(kernels, 1, 8), floor))
    assert "| GEMM | 3.00 | 60.0% | 1 | 69.0 |" in lines
    assert "| gaps | 1.00 | 20.0% |  |  |" in lines
    assert lines[-1].startswith("| sum | 5.00 | 100.0% |  | 1")
    rows = list(kernel_table(dearest(kernels, 1, 8)))
    assert rows[2] == "| 3.000 | 1.00 | GEMM | `nvjet_a` |"
    assert max(map(len, rows)) < 130


def test_it_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        main(["--depth", "4"])


@pytest.mark.parametrize("flag", ["--micro-steps", "--depth", "--bigram-factor"])
def test_numbers_are_checked(flag, capsys):
    for value in ("-1", 2**63, "nan", "1e999", ""):
        with pytest.raises(SystemExit, match="2"):
            main([f"{flag}={value}"])
        assert capsys.readouterr().err.startswith(f"error: {flag} must be ")


def test_the_old_name_runs_it_and_names_the_new_one():
    command = [sys.executable, "-m", "bench.profile", "--micro-steps", "0"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    notice, error = result.stderr.splitlines()
    assert notice == "bench.profile is now called bench.step_profile"
    assert error == "error: --micro-steps must be at least 1, got 0"


def test_the_old_name_hides_no_standard_module():
    """A script in bench/ has that folder first on its path; cProfile imports `profile`."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r}); import cProfile, profile; "
    code += "profile.Profile().runctx('1', {}, {}); print(profile.__file__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).parent.name.startswith("python3")
