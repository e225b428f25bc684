"""Kernels in which warps have roles give no shared memory back while it is read (tests/sass.py).

Triton's compiler runs in a process of its own, as its interpreter takes the kernels here.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from nanofuse.kernels.common.jit import HAS_GLUON
from tests.test_ops import ROOT

COMPILES = """
import json, sys
from dataclasses import asdict
import torch
from triton import compiler
from nanofuse.kernels.common.ahead import recorded
from nanofuse.kernels.common.jit import GluonDescriptor, gl, gluon, hopper, load_block
from nanofuse.kernels.common.panel import barriers
from nanofuse.kernels.common.tuning import Gpu
from nanofuse.model.config import GPTConfig
from nanofuse.train.optim.config import OptimConfig
from nanofuse.train.rehearsal import rehearse
from tests.sass import scan

mbarrier = hopper.mbarrier

@gluon.jit
def load(desc, bufs, full, empty, count):
    for i in range(count):
        mbarrier.wait(empty.index(i % 2), ((i // 2) & 1) ^ 1)
        mbarrier.expect(full.index(i % 2), 8192)
        load_block(desc, [i * 64, 0], full.index(i % 2), bufs.index(i % 2))

@gluon.jit
def copy(out, bufs, full, empty, count, LATE: gl.constexpr, WARPS: gl.constexpr):
    part: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    m = gl.arange(0, 64, layout=gl.SliceLayout(1, part))
    n = gl.arange(0, 64, layout=gl.SliceLayout(0, part))
    for i in range(count):
        mbarrier.wait(full.index(i % 2), (i // 2) & 1)
        x = bufs.index(i % 2).load(part)
        if not LATE:
            mbarrier.arrive(empty.index(i % 2), count=1)
        gl.store(out + (i * 64 + m[:, None]) * 64 + n[None, :], x)
        if LATE:
            mbarrier.arrive(empty.index(i % 2), count=1)

@gluon.jit
def idle():
    pass

@gluon.jit
def copy_kernel(desc, out, count, LATE: gl.constexpr, WARPS: gl.constexpr):
    bufs = gl.allocate_shared_memory(desc.dtype, [2, 64, 64], desc.layout)
    full, empty = barriers(2), barriers(2)
    hopper.fence_async_shared()
    if WARPS == 4:
        gl.warp_specialize(
            [(copy, (out, bufs, full, empty, count, LATE, 4)),
             (load, (desc, bufs, full, empty, count))],
            [1], [24],
        )
    else:
        gl.warp_specialize(
            [(idle, ()), (copy, (out, bufs, full, empty, count, LATE, 1)),
             (load, (desc, bufs, full, empty, count))],
            [1, 1], [128, 24],
        )

def scanned(launch):
    made = compiler.compile(launch.source, target=launch.target, options=launch.options)
    return launch.name, asdict(scan(made.asm["cubin"]))

gpu, launches = Gpu("NVIDIA H200", (9, 0), 132), {}
with recorded(gpu.capability) as copies:
    for late in (False, True):
        for warps in (4, 1):
            x = torch.empty(640, 64, dtype=torch.bfloat16, device="meta")
            desc = GluonDescriptor.from_tensor(x, [64, 64], gl.NVMMASharedLayout(128, 16, 2))
            out = torch.empty_like(x)
            copy_kernel[(1,)](desc, out, 10, late, warps, num_warps=4, maxnreg=128)
for depth in map(int, sys.argv[1:]):
    args = GPTConfig.from_depth(depth), OptimConfig(), 2, True, gpu
    for launch in rehearse(*args, sums=True):
        if type(launch.source).__name__ == "GluonASTSource":
            launches[f"{launch.name} {launch.source.constants} {launch.source.signature}"] = launch
def names(depth):
    args = GPTConfig.from_depth(depth), OptimConfig(), 2, True, gpu
    return sorted({launch.name for launch in rehearse(*args, sums=True)})

scans = [scanned(launch) for launch in copies], [scanned(each) for each in launches.values()]
print(json.dumps([*scans, {depth: names(depth) for depth in (24, 26, 32, 34)}]))
"""
# of models of three depths: of width 128, where panels take no product, of 256, and of 1,280, more
# than a panel holds
DEPTHS = ("2", "4", "20")
# products on panels of up to 2,048 terms, and those that end earlier
WIDE = {"rotary_panel_kernel"}
MIDDLE, OF_LOSS = {"relu_panel_kernel", "add_panel_kernel"}, {"loss_panel_kernel"}
BY_TENSOR_CORES = {"rotary_panel_kernel"}  # no warp reads a slot of it


@pytest.mark.skipif(not HAS_GLUON, reason="needs Triton with Gluon")
def test_no_slot_is_given_back_while_it_is_read(tmp_path):
    """A copy that gives its slots back right behind the read is found, and no kernel of ours. The
    same process says which products run on panels at which depth."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    file = tmp_path / "compiles.py"  # whose source Triton reads
    file.write_text(COMPILES)
    command = [sys.executable, str(file), *DEPTHS]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
    copies, kernels, launched = json.loads(done.stdout)
    assert [bool(found["early"]) for _, found in copies] == [True, True, False, False]
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    roles = set(re.findall(r"^@gluon\.jit.*\ndef (\w+_kernel)\(", sources, re.MULTILINE))
    assert len(roles) > 5 and {name for name, _ in kernels} == roles
    for name, found in kernels:
        assert found["arrivals"] and not found["early"], (name, found)
        assert found["reads"] or name in BY_TENSOR_CORES, (name, found)
    for depth, panels in (("24", WIDE | MIDDLE | OF_LOSS), ("26", WIDE | MIDDLE), ("32", WIDE),
                          ("34", set())):  # fmt: skip
        assert {name for name in launched[depth] if name.endswith("_panel_kernel")} == panels
