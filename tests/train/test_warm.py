"""Kernels compiled ahead: what is recorded is what a launch looks up, and files are checked.

Triton's compiler runs in one process of its own, as its interpreter takes the kernels here.
"""

import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanofuse.kernels.common.tuning import Gpu, aimed_at, gpu_name, sm_count
from nanofuse.model.config import GPTConfig
from nanofuse.model.providers import PRODUCTS, Choice, Need
from nanofuse.train import building, compiler, kernel_cache, warm
from nanofuse.train.ahead import Ahead
from nanofuse.train.compiling import Compiling, Request, on_gpu, wanted
from nanofuse.train.device import Machine
from nanofuse.train.errors import UserError
from nanofuse.train.kernel_cache import HEADER, Needed, conditions, measured_products, pack, unpack
from nanofuse.train.optim.config import OptimConfig
from nanofuse.train.run import main
from nanofuse.train.settings import resolve
from tests.test_ops import ROOT
from tests.train.tiny import TINY

pytest.importorskip("triton")
HOPPER = (9, 0)
HERE = {"GPUs": "sm_90", "Triton": "3.6.0", "FlashAttention 4": None}
KERNEL = "triton/ABC234/k.cubin"
LARGEST_KERNEL = 200_000  # bytes in the file
COMPILES = """
import json, os, sys
from pathlib import Path
import torch
from nanofuse.kernels.common import ahead
from nanofuse.kernels import linear_softcap_cross_entropy_kernels as head, quantize
from nanofuse.kernels.common import ahead, ptx
from nanofuse.kernels.common.tuning import Gpu, aimed_at
from nanofuse.model.config import GPTConfig
from nanofuse.model.fp8.products import PlainGemm
from nanofuse.model.fused import FusedGPT
from nanofuse.model.gpt import GPT
from nanofuse.train.compiling import Request
from nanofuse.train.kernel_cache import Needed, conditions, pack, triton_entry, unpack
from nanofuse.train.optim.config import OptimConfig
from nanofuse.train.rehearsal import rehearse

def caches(name):
    os.environ["TRITON_CACHE_DIR"] = str(Path(sys.argv[1], name))

config, gpu = GPTConfig.from_depth(2, vocab_size=1024), Gpu("NVIDIA H200", (9, 0), 132)
kernels = [head.rows_kernel, quantize._quantize_kernel, ptx.fast_tanh]
named = [[kernel.hash is not None for kernel in kernels]]
with ahead.recorded(gpu.capability), aimed_at(gpu):
    FusedGPT(GPT(config, device="meta"), PlainGemm())
named.append([kernel.hash is not None for kernel in kernels])
launches = rehearse(config, OptimConfig(), 2, True, gpu)
found = [(launch.name, str(launch.source.constants)) for launch in launches]
launch = next(each for each in launches if each.name == "_bigram_rows_kernel")
caches("first")
there = [launch.compile(), launch.compile()]
entries = [triton_entry(key) for key in launch.entries]
request = Request.of(config, OptimConfig(), 2, True, False, False, *vars(gpu).values())
out = Path(sys.argv[1], "kernels.zip")
size = pack(out, conditions(gpu.capability), request, entries)
caches("second")
known = [Needed(gpu.capability).there(request)]
unpack(out, gpu.capability)
known.append(Needed(gpu.capability).there(request))
# a launch as the GPU's would be: the same kernel, recorded anew, finds it
again = next(e for e in rehearse(config, OptimConfig(), 2, True, gpu) if e.name == launch.name)
there.append(again.compile())
others = rehearse(config, OptimConfig(), 2, False, gpu, world=2, sums=True)
ranks = {e.name for e in others}
types = [{e.source.signature["gq_ptr"] for e in each if e.name == "rotary_qk_norm_bwd_kernel"}
    for each in (launches, others)]
print(json.dumps({"found": found, "there": there, "known": known, "size": size, "n": len(entries),
    "ranks": sorted(ranks), "named": named, "types": [sorted(each) for each in types]}))
"""


def request(**changes):
    fields = [GPTConfig.from_depth(4), OptimConfig(), 32, True, False, False]
    return Request.of(*fields, *(changes.get("gpu", ("NVIDIA H200", HOPPER, 132))))


def test_what_is_compiled_here_is_found_elsewhere(tmp_path):
    env = dict(os.environ, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    env |= {"NANOFUSE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILES, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.splitlines()[-1])
    assert told["there"] == [False, True, True]
    assert told["named"] == [[False] * 3, [True] * 3]  # whatever launches first
    assert told["known"] == [None, told["n"]]
    assert told["types"] == [["*bf16"], ["*fp32"]]  # attention's gradient of q, and its sums
    assert 500 < told["size"] < LARGEST_KERNEL
    names = {name for name, _ in told["found"]}
    ops = ("embed_smear", "residual_mix", "rotary_qk_norm", "residual_gradients", "quantize")
    assert all(any(op in name for name in names) for op in (*ops, "adamw", "symmetric_matmul"))
    assert 40 < len(told["found"]) < 120
    assert "_quantize_kernel" in names and "_quantize_kernel" not in told["ranks"]  # in bf16
    assert {"_adamw_kernel", "_momentum_kernel", "_apply_kernel"} <= set(told["ranks"])


def test_kernels_are_aimed_at_a_gpu():
    with aimed_at(Gpu("of no machine", HOPPER, 77)):
        assert (gpu_name(), sm_count(None)) == ("of no machine", 77)
    assert gpu_name() != "of no machine"


def test_a_request_is_named_by_all_it_says():
    assert request().digest() == request().digest()
    assert request().digest() != request(gpu=("NVIDIA H200", HOPPER, 114)).digest()
    again = Request(**json.loads(request().text()))
    assert GPTConfig(**again.config) == GPTConfig.from_depth(4)
    assert OptimConfig(**again.optim) == OptimConfig()


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Caches of this test; conditions are HERE."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("NANOFUSE_DIR", str(tmp_path))
    monkeypatch.setattr(kernel_cache, "conditions", lambda capability: dict(HERE))
    return tmp_path


def write(path, conditions=HERE, names=(KERNEL,), format=1, requests=None, **more):
    with zipfile.ZipFile(path, "w") as archive:
        header = {"format": format, "conditions": conditions, "requests": requests or {}, **more}
        archive.writestr(HEADER, json.dumps(header))
        for name in names:
            archive.writestr(name, b"1")
    return path


def test_a_file_goes_into_the_caches_once(caches):
    path = write(caches / "a.zip", names=(KERNEL, "triton/ABC234/__grp__k.json"))
    assert unpack(path, HOPPER) == unpack(path, HOPPER) == 1
    group = json.loads((caches / "triton/ABC234/__grp__k.json").read_text())
    assert group == {"child_paths": {"k.cubin": str(caches / KERNEL)}}  # as this machine's paths
    assert sorted(p.name for p in (caches / "triton").iterdir()) == ["ABC234"]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"conditions": HERE | {"Triton": "3.9.0"}}, "it is for Triton 3.9.0, here: 3.6.0"),
        ({"conditions": HERE | {"GPUs": "sm_100"}}, "it is for GPUs sm_100, here: sm_90"),
        ({"format": 2}, "its format is 2, not 1"),
        ({"conditions": None}, "it is not of compiled kernels"),
        ({"products": [1]}, "it is not of compiled kernels"),
        ({"products": {"NVIDIA H200, v1": 1}}, "it is not of compiled kernels"),
        ({"names": ("triton/../../evil.so",)}, "it has a file that is no kernel's"),
        ({"names": ("/etc/passwd",)}, "it has a file that is no kernel's"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(caches, changes, said):
    with pytest.raises(UserError, match="--kernel-cache .*make it anew with .*train.warm") as error:
        unpack(write(caches / "a.zip", **changes), HOPPER)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (caches / "triton").exists()


def test_damaged_and_missing_files(caches):
    path = write(caches / "a.zip")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="it is damaged, or no file of compiled kernels"):
        unpack(path, HOPPER)
    with pytest.raises(UserError, match="--kernel-cache .*none.zip: No such file"):
        unpack(caches / "none.zip", HOPPER)


def test_another_version_of_flash_attention_is_refused_where_both_have_one(caches, monkeypatch):
    path = write(caches / "a.zip", HERE | {"FlashAttention 4": "flash-attn-4 4.0"})
    assert unpack(path, HOPPER) == 1  # none here: the run does without
    monkeypatch.setattr(
        kernel_cache, "conditions", lambda capability: HERE | {"FlashAttention 4": "5.0"}
    )
    with pytest.raises(UserError, match="for FlashAttention 4 flash-attn-4 4.0, here: 5.0"):
        unpack(path, HOPPER)


def test_measured_products_travel_along_and_replace_none(caches, monkeypatch):
    here, there = ({"a": {"seconds": 1.0}}, {"a": {"seconds": 2.0}, "b": {"seconds": 3.0}})
    products = {
        "NVIDIA H200, v1": there,
        "NVIDIA H200, v2": there,
        "NVIDIA H200x, v1": there,
        "x": 1,
    }
    (caches / "products.json").write_text(json.dumps(products))
    found = measured_products("NVIDIA H200")
    assert set(found) == {"NVIDIA H200, v1", "NVIDIA H200, v2"}
    pack(caches / "b.zip", HERE, request(), [], found)
    (caches / "products.json").write_text(json.dumps({"NVIDIA H200, v1": here}))
    assert unpack(caches / "b.zip", HOPPER) == 0
    kept = json.loads((caches / "products.json").read_text())
    assert kept == {"NVIDIA H200, v1": {**there, **here}, "NVIDIA H200, v2": there}


def test_what_runs_needed_is_known_until_it_is_gone(caches):
    (caches / "triton/ABC234").mkdir(parents=True)
    (caches / KERNEL).write_bytes(b"cubin")
    needed = Needed(HOPPER)
    assert needed.there(request()) is None
    needed.add({request().digest(): ["triton/ABC234"]})
    assert Needed(HOPPER).there(request()) == 1
    size = pack(caches / "b.zip", HERE, request(), ["triton/ABC234"])
    assert size == (caches / "b.zip").stat().st_size
    with zipfile.ZipFile(caches / "b.zip") as archive:
        assert archive.namelist() == [HEADER, KERNEL]
    (caches / KERNEL).unlink()
    (caches / "triton/ABC234").rmdir()
    assert Needed(HOPPER).there(request()) is None


def process(code):
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize("ending", ["whole", "early", "failed"])
def test_what_compiled_is_said(ending):
    events = [{"event": "found", "count": 2}]
    for name, there in (("a", False), ("b", True)):
        done = {"seconds": 1.5, "there": there, "entries": [f"triton/{name}"]}
        events.append({"event": "kernel", "name": name, **done})
    if ending == "failed":
        events[-1] = {"event": "failed", "name": "b", "why": "no registers"}
    events += [{"event": "end"}] if ending != "early" else []
    code = f"input()\nfor line in {[json.dumps(e) for e in events]!r}: print(line)"
    compiling, lines = Compiling(process(code)), []
    compiling.ask(request())
    compiling.wait(lines.append)
    assert (
        lines[1].startswith("kernels: 1 of 2 compiled in ")
        and "the slowest (a) in 1.5 s" in lines[1]
    )
    reasons = {"whole": [], "early": ["ended early"], "failed": ["b: no registers"]}[ending]
    assert len(lines) == 2 + len(reasons) and all(r in lines[-1] for r in reasons)
    assert compiling.entries[0] == "triton/a" and compiling.process is None


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("print('{', flush=True); time.sleep(100)", "ended early"),
        ("time.sleep(100)", "says nothing for 0.3 s"),
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)", "says nothing"),
        # one that it started stays, and may still write
        ("os.fork() or signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)", "says no"),
    ],
)
def test_a_process_that_hangs_holds_up_no_run(monkeypatch, code, why):
    monkeypatch.setattr("nanofuse.train.compiling.SILENT_SECONDS", 0.3)
    monkeypatch.setattr("nanofuse.train.compiling.GOING_SECONDS", 0.3)
    compiling, lines = Compiling(process(f"import os, signal, time; input(); {code}")), []
    child, began = compiling.process, time.monotonic()
    compiling.ask(request())
    compiling.wait(lines.append)
    assert time.monotonic() - began < 30
    assert "compile when they are launched" in lines[-1] and why in lines[-1]
    assert child.poll() is not None


def test_a_kernel_that_does_not_compile_is_reported_in_a_line():
    told = []

    def report(event, **values):
        told.append((event, values))

    def refuse():
        raise RuntimeError("no registers\n" + 9 * "line\n")

    compiler._compiled(report, "a", lambda: True, lambda: ["triton/A"])
    compiler._compiled(report, "b", refuse, list)
    compiler._compiled(report, "c", lambda: 1 // 0, list)
    (_, first), *failed = told
    assert first.pop("seconds") >= 0
    assert first == {"name": "a", "there": True, "entries": ["triton/A"]}
    assert failed == [
        ("failed", {"name": "b", "why": "no registers"}),
        ("failed", {"name": "c", "why": "integer division or modulo by zero"}),
    ]


def test_a_process_that_was_not_asked_ends():
    compiling = Compiling(process("import time; time.sleep(100)"))
    child = compiling.process
    Ahead(compiling).close()
    assert child.poll() is not None


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU as far as a start asks for it."""

    class OnGPU(Machine):
        capability = HOPPER

    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    monkeypatch.setattr("nanofuse.train.ahead.kernels_are_interpreted", lambda: False)
    return OnGPU(torch.device("cuda", 0), "NVIDIA H200", "fused", "asked for", torch.bfloat16)


def test_a_start_asks_for_what_is_not_there(caches, hopper, capsys):
    fp8 = Choice(PRODUCTS[0], SimpleNamespace(fp8=True), "asked for")
    known = resolve({"attention": "sdpa", "depth": 4}, "cuda"), hopper, GPTConfig.from_depth(4), fp8
    asked = request()
    events = [{"event": "found", "count": 1}]
    kernel = {"event": "kernel", "name": "k", "seconds": 1.0, "there": False}
    events += [kernel | {"entries": ["triton/ABC234"]}, {"event": "end"}]
    code = f"print(input())\nfor line in {[json.dumps(e) for e in events]!r}: print(line)"
    ahead = Ahead(Compiling(process(code)))
    ahead.begin(*known)
    assert json.loads(ahead.compiling.process.stdout.readline()) == json.loads(asked.text())
    ahead.begin(*known)
    ahead.ready()
    assert "kernels: 1 of 1 compiled in" in capsys.readouterr().out
    write(caches / "a.zip")  # a file brings what was said to be needed, and nothing is waited for
    ahead = Ahead(Compiling(process("import time; time.sleep(100)")), caches / "a.zip")
    ahead.begin(*known)
    ahead.ready()
    assert "kernels: all in the caches, 1 entries" in capsys.readouterr().out


def test_nothing_compiles_where_nothing_is_launched(monkeypatch):
    monkeypatch.setattr("nanofuse.train.compiling.DRIVER", Path(__file__))
    assert wanted({}) and wanted({"backend": "fused"})
    assert not wanted({"backend": "eager"}) and not wanted({"device_type": "cpu"})
    assert on_gpu({"backend": "eager"}) and not on_gpu({"device_type": "cpu"})
    monkeypatch.setattr("nanofuse.train.compiling.DRIVER", Path("/nowhere"))
    assert not wanted({}) and not on_gpu({})


@pytest.mark.parametrize(
    ("device", "capability", "asked", "loads"),
    [
        ("cuda", (9, 0), "fa4", True),
        ("cuda", (9, 0), "sdpa", False),
        ("cuda", (8, 0), "fa4", False),
        ("cpu", (0, 0), "fa4", False),
    ],
)
def test_attention_is_imported_beside_the_start_where_it_is_taken(
    monkeypatch, device, capability, asked, loads
):
    loaded = threading.Event()

    def load():
        loaded.set()
        raise ImportError("told later")

    monkeypatch.setattr(building.flash_loading, "load", load)
    monkeypatch.setattr(building.flash_ahead, "expected", lambda name: name == "fa4")
    settings = resolve({"attention": asked}, device)
    need = Need("compile", device, capability, ("bf16",))
    machine = SimpleNamespace(device=torch.device(device), need=lambda: need)
    building.load_attention(SimpleNamespace(settings=settings, machine=machine))
    for thread in threading.enumerate():
        if thread.name == "attention":
            thread.join()
    assert loaded.is_set() == loads


def test_attention_is_not_imported_while_products_are_measured(data_dir, work_dir, monkeypatch):
    """A thread that keeps Python's lock moves the times that they are chosen by."""
    events = []

    def assemble(*args):
        events.append("products")
        set_weights = args[9]
        set_weights(SimpleNamespace(init_weights=lambda seed: events.append("weights")))
        raise UserError("enough")

    monkeypatch.setattr(building, "assemble", assemble)
    monkeypatch.setattr(building, "load_attention", lambda start: events.append("attention"))
    with pytest.raises(UserError, match="enough"):
        main([*TINY, "--data", str(data_dir)])
    assert events == ["products", "attention", "weights"]


def test_flags_of_the_command(monkeypatch):
    own, given = warm.parse(["--arch", "sm_90", "--depth", "4", "--out", "x.zip"])
    assert given == {"depth": 4} and own == {"arch": "sm_90", "gpu": None, "out": "x.zip"}
    with pytest.raises(UserError, match="--gpu H7 is not known; choose from NVIDIA H200"):
        warm.main(["--gpu", "H7"])
    with pytest.raises(UserError, match="--out nowhere/x.zip: no such folder"):
        warm.main(["--out", "nowhere/x.zip"])
    monkeypatch.setattr("os.access", lambda *args: False)
    with pytest.raises(UserError, match="--out x.zip: its folder cannot be written to"):
        warm.main(["--out", "x.zip"])
    assert conditions(HOPPER)["GPUs"] == "sm_90"
