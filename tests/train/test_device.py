"""What runs on which machine, and what the user is told about it."""

import sys
from dataclasses import replace

import pytest
import torch

from nanofuse.model.config import GPTConfig
from nanofuse.model.fp8.products import TorchGemm, TransformerEngineGemm
from nanofuse.train import device, start
from nanofuse.train.device import (
    BF16_PEAKS,
    Machine,
    bf16_peak,
    select_fp8,
    select_machine,
    select_products,
)
from nanofuse.train.errors import UserError
from nanofuse.train.settings import Settings

CONFIG = GPTConfig.from_depth(4)


class OnGPU(Machine):
    """A machine with a GPU of a compute capability that is set."""

    capability = (9, 0)


def machine(backend, capability=(9, 0)):
    made = type("OnGPU", (OnGPU,), {"capability": capability})
    return made(torch.device("cuda", 0), "NVIDIA H200", backend, "asked for", torch.bfloat16)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (9, 0))


@pytest.fixture
def without_libraries(monkeypatch):
    """Neither Transformer Engine nor nvmath-python."""
    hide(monkeypatch, "transformer_engine", "nvmath")


def hide(monkeypatch, *packages):
    for package in packages:
        for name in [n for n in sys.modules if n.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)


def test_auto_takes_the_kernels_on_hopper_only(hopper, monkeypatch):
    monkeypatch.setattr(device, "kernels_are_interpreted", lambda: False)
    chosen = select_machine("auto", "auto")
    assert (chosen.backend, chosen.why) == ("fused", "auto on Hopper")
    assert select_machine("auto", "compile").backend == "compile"
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        chosen = select_machine("auto", "auto")
        assert chosen.backend == "compile" and "made for Hopper" in chosen.why
    assert select_machine("cpu", "auto").backend == "eager"


def test_fused_needs_hopper_or_the_interpreter(hopper, monkeypatch):
    monkeypatch.setattr(device, "kernels_are_interpreted", lambda: True)
    assert select_machine("cpu", "fused").backend == "fused"
    monkeypatch.setattr(device, "kernels_are_interpreted", lambda: False)
    assert select_machine("cuda", "fused").backend == "fused"
    with pytest.raises(UserError, match="--backend fused needs a Hopper GPU"):
        select_machine("cpu", "fused")
    for capability in ((8, 9), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, found=capability: found)
        with pytest.raises(UserError, match="--backend fused needs a Hopper GPU"):
            select_machine("cuda", "fused")


def test_a_ranks_gpu_is_the_current_one_before_libraries_make_handles(monkeypatch):
    events, second = [], replace(machine("eager"), device=torch.device("cuda", 1))

    def products(settings, machine, config, given):
        events.append("products")
        raise UserError("enough")

    monkeypatch.setattr(device, "select_machine", lambda *args: second)
    monkeypatch.setattr(torch.cuda, "set_device", events.append)
    monkeypatch.setattr(start, "select_products", products)
    with pytest.raises(UserError, match="enough"):
        start.start_new({"depth": 1}, None)
    assert events == [second.device, "products"]


def test_missing_libraries_are_announced(without_libraries):
    chosen = select_fp8("auto", machine("fused"), CONFIG, 32)
    assert chosen.name == "torch" and isinstance(chosen.made, TorchGemm)
    assert chosen.why == (
        "auto on cuda: nvmath is not installed: pip install 'nanofuse[products]'; "
        "te is not installed: pip install 'nanofuse[fp8]'"
    )
    with pytest.raises(UserError, match="--fp8 te needs Transformer Engine: pip .*; or use --fp8"):
        select_fp8("te", machine("fused"), CONFIG, 32)


@pytest.mark.parametrize(
    ("name", "backend", "capability", "provider", "why"),
    [
        ("off", "fused", (9, 0), "off", "asked for"),
        ("auto", "eager", (9, 0), "off", "torch is for eager by name only"),
        ("auto", "compile", (9, 0), "torch", "cuda: nvmath serves fused, not compile; te serves"),
        ("auto", "compile", (8, 0), "off", "torch needs compute capability 8.9 or later, this GPU"),
        ("torch", "eager", (9, 0), "torch", "asked for"),
    ],
)
def test_choice_of_fp8(name, backend, capability, provider, why):
    chosen = select_fp8(name, machine(backend, capability), CONFIG, 32)
    assert chosen.name == provider and why in chosen.why


def test_a_format_of_gradients_is_set_or_refused():
    for name, dtype in (("e5m2", torch.float8_e5m2), ("e4m3", torch.float8_e4m3fn)):
        assert select_fp8("torch", machine("fused"), CONFIG, 32, name).made.gradients == dtype
    given = {"fp8_gradients": "e4m3", "fp8": "off"}
    settings = Settings().replace(given)
    with pytest.raises(UserError, match="^--fp8-gradients e4m3 needs .* has --fp8 off; drop it$"):
        select_products(settings, machine("fused"), CONFIG, given)
    assert select_products(settings, machine("fused"), CONFIG).name == "off"  # of the run resumed
    same = Settings().replace({"fp8": "off"}), machine("fused"), CONFIG, {"fp8_gradients": "e5m2"}
    assert select_products(*same).name == "off"


def test_sizes_that_fp8_kernels_do_not_take(without_libraries):
    odd = GPTConfig.from_depth(4, head_dim=24)
    chosen = select_fp8("auto", machine("fused"), odd, 32)
    assert chosen.name == "off" and "multiples of 16" in chosen.why
    with pytest.raises(UserError, match="--fp8 torch needs widths .*use --fp8 auto"):
        select_fp8("torch", machine("fused"), odd, 32)
    short = GPTConfig.from_depth(4, sequence_len=100)
    assert select_fp8("auto", machine("fused"), short, 1).name == "off"
    with pytest.raises(UserError, match="--fp8 te serves fused, not compile; or use --fp8 auto"):
        select_fp8("te", machine("compile"), CONFIG, 32)


def test_a_damaged_library_is_told_in_one_line(monkeypatch):
    def damaged(self):
        raise FileNotFoundError("no shared object\nand a page of text")

    hide(monkeypatch, "nvmath")
    monkeypatch.setattr(TransformerEngineGemm, "__init__", damaged)
    chosen = select_fp8("auto", machine("fused"), CONFIG, 32)
    assert chosen.name == "torch" and chosen.why.endswith("; te: no shared object")
    with pytest.raises(UserError, match="Engine: pip install .* .no shared object.; or use"):
        select_fp8("te", machine("fused"), CONFIG, 32)


def test_the_peak_is_that_of_the_product_or_none():
    assert bf16_peak("NVIDIA H100 80GB HBM3") == bf16_peak("NVIDIA H200") == 989e12
    for name in BF16_PEAKS:
        for other in (" NVL", " MIG 1g.10gb", " Laptop GPU", " D", "X"):
            assert bf16_peak(name + other) is None
    assert bf16_peak("NVIDIA H100 NVL") is bf16_peak("NVIDIA H100") is bf16_peak("CPU") is None
