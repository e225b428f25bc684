"""Kernels in which warps have roles give no shared memory back while it is read (tests/sass.py).

Triton's compiler runs in a process of its own, as its interpreter takes the kernels here.
"""

import json
import os
import subprocess
import sys

import pytest

from nanofuse.kernels.common.jit import HAS_GLUON
from tests.test_ops import ROOT

COMPILES = """
import json, sys
from triton import compiler
from nanofuse.kernels.common.jit import GluonDescriptor, gl, gluon, hopper, load_block
from nanofuse.kernels.common.panel import barriers
from nanofuse.kernels.common.ahead import recorded
from nanofuse.kernels.common.tuning import Gpu
from nanofuse.model.config import GPTConfig
from nanofuse.train.optim.config import OptimConfig
from nanofuse.train.rehearsal import rehearse
from tests.sass import given_back_too_early
import torch

mbarrier = hopper.mbarrier
PART = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))

@gluon.jit
def load(desc, bufs, full, empty, count):
    for i in range(count):
        mbarrier.wait(empty.index(i % 2), ((i // 2) & 1) ^ 1)
        mbarrier.expect(full.index(i % 2), 8192)
        load_block(desc, [i * 64, 0], full.index(i % 2), bufs.index(i % 2))

@gluon.jit
def copy(out, bufs, full, empty, count, LATE: gl.constexpr):
    m = gl.arange(0, 64, layout=gl.SliceLayout(1, PART))
    n = gl.arange(0, 64, layout=gl.SliceLayout(0, PART))
    for i in range(count):
        mbarrier.wait(full.index(i % 2), (i // 2) & 1)
        x = bufs.index(i % 2).load(PART)
        if not LATE:
            mbarrier.arrive(empty.index(i % 2), count=1)
        gl.store(out + (i * 64 + m[:, None]) * 64 + n[None, :], x)
        if LATE:
            mbarrier.arrive(empty.index(i % 2), count=1)

@gluon.jit
def copy_kernel(desc, out, count, LATE: gl.constexpr):
    bufs = gl.allocate_shared_memory(desc.dtype, [2, 64, 64], desc.layout)
    full, empty = barriers(2), barriers(2)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [(copy, (out, bufs, full, empty, count, LATE)), (load, (desc, bufs, full, empty, count))],
        [1], [24],
    )

def cubin(launch):
    made = compiler.compile(launch.source, target=launch.target, options=launch.options)
    return made.asm["cubin"]

gpu = Gpu("NVIDIA H200", (9, 0), 132)
with recorded(gpu.capability) as copies:
    for late in (False, True):
        x = torch.empty(640, 64, dtype=torch.bfloat16, device="meta")
        desc = GluonDescriptor.from_tensor(x, [64, 64], gl.NVMMASharedLayout(128, 16, 2))
        copy_kernel[(1,)](desc, torch.empty_like(x), 10, late, num_warps=4, maxnreg=128)
result = {"copies": [given_back_too_early(cubin(launch)) for launch in copies]}
launches = {}
for depth in map(int, sys.argv[1:]):
    args = GPTConfig.from_depth(depth), OptimConfig(), 2, True, gpu
    for launch in rehearse(*args, sums=True):
        if launch.name.endswith(("panel_kernel", "tma_kernel", "norm_kernel")):
            launches.setdefault(f"d{depth} {launch.name} {launch.source.constants}", launch)
result["kernels"] = {
    name: given_back_too_early(cubin(each))
    for name, each in launches.items() if type(each.source).__name__ == "GluonASTSource"
}
print(json.dumps(result))
"""


@pytest.mark.skipif(not HAS_GLUON, reason="needs Triton with Gluon")
def test_no_slot_is_given_back_while_it_is_read(tmp_path):
    """A copy that gives its slots back right behind the read is found, and no kernel of ours."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    file = tmp_path / "compiles.py"  # whose source Triton reads
    file.write_text(COMPILES)
    done = subprocess.run(
        [sys.executable, str(file), "4"], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    early, late = result["copies"]
    assert early and not late
    assert len(result["kernels"]) > 8
    assert not {name: found for name, found in result["kernels"].items() if found}
