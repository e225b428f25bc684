"""train.doctor: what is said of this machine, of a GPU that is made up, and of a real one."""

import json
import runpy
import subprocess
import sys
import warnings

import pytest
import torch

from nanofuse.model import providers
from nanofuse.model.fp8.products import PlainGemm, TorchGemm
from nanofuse.model.providers import Provider
from nanofuse.train import checkup, device, doctor, gpu, versions
from nanofuse.train.checkup import check_products, tried
from nanofuse.train.device import select_machine
from nanofuse.train.doctor import main
from nanofuse.train.errors import UserError
from nanofuse.train.measured import measured_step

GIB = 2**30
CPU = torch.device("cpu")


@pytest.fixture
def h200(monkeypatch, work_dir):
    """An H200 without FlashAttention 3, with a damaged Transformer Engine and without nvmath-python
    until it is called."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *d: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (130 * GIB, 140 * GIB))
    monkeypatch.setattr(device, "kernels_are_interpreted", lambda: False)
    monkeypatch.setattr(gpu, "nvidia_smi", lambda *fields: "580.1")
    monkeypatch.setattr(checkup, "self_check", lambda *args: 0.002)
    monkeypatch.setattr(checkup, "check_products", lambda *args: "agrees with fp32 to 0.002")
    monkeypatch.setattr(checkup, "copy_ceiling", lambda: 4254e9)
    monkeypatch.setattr(checkup, "matmul_ceiling", lambda: 396e12)

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")

    monkeypatch.setattr(checkup, "fp8_matmul_ceiling", full)
    damaged = {"te"}

    def make(record, *args):
        if record.name == "fa3":
            raise ModuleNotFoundError("No module", name="flash_attn_interface")
        if damaged and record.library == "nvmath":
            raise ModuleNotFoundError("No module", name="nvmath")
        if record.name in damaged:
            raise ImportError("libcudnn.so: no such file")
        return object()

    monkeypatch.setattr(Provider, "make", make)
    return damaged.clear


def as_json(capsys, *argv):
    main([*argv, "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_machine_without_a_gpu(work_dir, capsys):
    found = as_json(capsys)
    if found["capability"]:
        pytest.skip("there is a GPU")
    assert found["chosen"] == {"backend": "eager", "attention": "sdpa", "fp8": "off"}
    works = {each["name"]: each["works"] for each in found["attention"]}
    assert works == {"fa3": False, "fa4": False, "te": False, "flex": False, "sdpa": True}
    assert found["rates"] is None and found["versions"]["torch"] == torch.__version__
    assert found["advice"]["commands"] == ["python -m train.run"]
    assert (found["advice"]["rows"], found["advice"]["ms_per_step"]) == (16, None)
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("no CUDA GPU is visible")
    assert "attention: no, fa4 needs a CUDA GPU of compute capability 9.0 or later" in lines
    assert lines[-2].endswith("the time of one is not measured without a GPU")


def test_a_gpu_with_a_library_that_is_damaged(h200, capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "device: NVIDIA H200, compute capability 9.0, driver 580.1, 130.0 GiB of 140.0 GiB free"
    )
    for line in (
        "backend: yes, fused is the default (auto on Hopper)",
        "attention: no, fa3 is not installed: "
        "build hopper/ of github.com/Dao-AILab/flash-attention",
        "attention: yes, fa4 agrees with SDPA to 0.002",
        "fp8: no, te: libcudnn.so: no such file (to install: pip install 'nanofuse[fp8]')",
        "auto takes: --backend fused, --attention fa4, --fp8 torch",
        "rate: copy 4,254 GB/s, 100% of the 4,254 on record",
        "rate: bf16 product 396 TFLOP/s, 50% of the 792 on record",
        "rate: FP8 product not measured (OutOfMemoryError: CUDA out of memory. Tried)",
        "run: python -m train.data download -n 8",
        "run: python -m train.run --depth 16 --save-every 500 --keep 2",
        "predicted: 3,584 steps of 524,288 tokens; the time of one is not measured on this GPU, "
        "with these providers",
        "batch: --device-batch-size up to 128 by the memory estimate",
    ):
        assert line in lines


def test_lines_come_as_they_are_found(h200, monkeypatch, capsys):
    found, before = {}, []
    for part in doctor.examine():
        found |= part
        lines = list(doctor.report(found))
        assert lines[: len(before)] == before
        before = lines
    said = []

    def broken():
        said.extend(capsys.readouterr().out.splitlines())
        raise KeyboardInterrupt

    monkeypatch.setattr(checkup, "copy_ceiling", broken)
    with pytest.raises(KeyboardInterrupt):
        main([])
    assert said and said == before[: len(said)] and said[-1].startswith("auto takes: ")


def test_a_slow_check_is_said_with_its_seconds_and_without_warnings(h200, monkeypatch, capsys):
    clock = iter(range(0, 10_000, 7))
    monkeypatch.setattr(checkup.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(
        checkup, "self_check", lambda *args: warnings.warn("aux", stacklevel=1) or 0.002
    )
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        main(["--quick"])
    assert "attention: yes, fa4 agrees with SDPA to 0.002 (took 7 s)" in capsys.readouterr().out
    assert not shown


def test_the_step_time_of_a_known_gpu(h200, capsys, data_dir):
    h200()
    found = as_json(capsys, "--data", str(data_dir), "--quick")
    assert found["chosen"] == {"backend": "fused", "attention": "fa4", "fp8": "nvmath"}
    assert found["advice"]["ms_per_step"] == 1037.8 and found["rates"] is None
    assert found["advice"]["commands"] == [
        f"python -m train.run --depth 16 --save-every 500 --keep 2 --data {data_dir}"
    ]
    main(["--data", str(data_dir), "--quick"])
    lines = capsys.readouterr().out.splitlines()
    assert "predicted: 3,584 steps of 524,288 tokens at 1,038 ms, 1.0 h " in lines[-2]
    assert lines[-2].endswith("(records/2026-11-29-loss-products)")


def test_a_gpu_of_little_memory_gets_a_smaller_model_or_batch(h200, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (8 * GIB, 140 * GIB))
    advice = as_json(capsys, "--quick")["advice"]
    assert advice["depth"] < 16 and 8 <= advice["rows"] < 32
    assert advice["commands"][1].endswith(" --device-batch-size auto")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (GIB // 8, 140 * GIB))
    assert as_json(capsys, "--quick")["advice"]["rows"] == 0
    main(["--quick"])
    assert "batch: not one row fits in the free memory" in capsys.readouterr().out


def test_the_module_is_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.doctor", "--help"])
    monkeypatch.delitem(sys.modules, "nanofuse.train.doctor")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("nanofuse.train.doctor", run_name="__main__")
    assert stop.value.code == 0 and "--quick" in capsys.readouterr().out


def test_what_is_found_of_the_data(work_dir, data_dir, capsys, monkeypatch):
    from nanofuse.train.data.__main__ import main as data_command

    found = as_json(capsys, "--data", str(data_dir))["data"]
    assert (found["shards"], found["tokenizer"], found["cached"]) == (3, 320, 0)
    data_command(["tokenize", "--data", str(data_dir)])
    capsys.readouterr()
    main(["--data", str(data_dir)])
    out = capsys.readouterr().out
    assert "tokenizer of 320 tokens; tokens kept of 3 of 3 shards" in out
    (data_dir / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        main(["--data", str(data_dir)])
    monkeypatch.setenv("NANOFUSE_DIR", str(data_dir))
    assert "tokenizer.json" in as_json(capsys)["data"]["error"]


def test_products_are_compared_with_fp32(monkeypatch):
    assert check_products(PlainGemm(), CPU, torch.float32).startswith("agrees with fp32 to")
    forward = PlainGemm.forward
    monkeypatch.setattr(PlainGemm, "forward", lambda self, x, w: 1.02 * forward(self, x, w))
    with pytest.raises(RuntimeError, match="forward is off by 0.02"):
        check_products(PlainGemm(), CPU, torch.float32)


def test_operands_in_fp8_are_what_the_providers_take(monkeypatch):
    def product(self, a, b, x, w, dtype, fast):
        exact = (a.float() * x.inverse_scale) @ (b.float() * w.inverse_scale).t()
        return exact.to(dtype)

    monkeypatch.setattr(TorchGemm, "_product", product)
    assert check_products(TorchGemm(), CPU, torch.bfloat16) == "agrees with fp32 to 0.002"
    assert all(size % 16 == 0 for size in checkup.PRODUCT)


def test_a_provider_that_is_wrong_does_not_work():
    record = providers.find(providers.ATTENTION, "sdpa")
    need = select_machine("cpu", "eager").need()

    def check(backend):
        raise RuntimeError("y is off\nby far")

    expected = {"name": "sdpa", "works": False, "why": "sdpa: y is off"}
    found = tried(record, need, check, False)
    assert found.pop("seconds") >= 0 and found == expected


def test_files_that_git_does_not_know_are_no_change_of_the_code(tmp_path, monkeypatch):
    """Such as a sweep's file, a text, a picture that the user keeps in the clone."""
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    (tmp_path / "code.py").touch()
    who = "-c user.name=a -c user.email=a@b"
    for command in ("init -q", "add .", f"{who} commit -qm one"):
        subprocess.run(["git", "-C", tmp_path, *command.split()], check=True)
    (tmp_path / "mine.toml").touch()
    assert versions.code()["changed"] is False
    (tmp_path / "code.py").write_text("changed")
    assert versions.code()["changed"] is True


def test_steps_are_of_the_providers_that_were_measured():
    assert measured_step("NVIDIA H200", 16, "te", "fa4") == (1113.3, "2026-11-28-house")
    assert measured_step("NVIDIA H200", 16, "te", "flex") is None
    assert measured_step("NVIDIA H200", 12, "te", "fa4") is None
    assert measured_step("NVIDIA A100-SXM4-80GB", 16, "off", "fa4") is None


@pytest.mark.cuda
def test_this_gpu(work_dir, capsys):
    found = as_json(capsys)
    assert found["capability"] and found["driver"]
    assert {each["name"] for each in found["attention"] if each["works"]} >= {"sdpa"}
    assert {each["name"] for each in found["fp8"] if each["works"]} >= {"off"}
    assert found["rates"]["copy"]["measured"] > 1e11
    assert found["rates"]["bf16"]["measured"] > 1e13
    assert found["advice"]["rows"] > 0
    assert doctor.RATES.keys() == found["rates"].keys()
