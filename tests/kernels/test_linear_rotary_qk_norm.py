"""q, k and v in one kernel: on a Hopper GPU alone, what it takes and refuses everywhere."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from nanofuse.bench.cases.tiles import CASES
from nanofuse.bench.checks import relative_error, same_bits
from nanofuse.kernels.common import panel
from nanofuse.kernels.common.fp8 import E4M3, E5M2, FP8Operand, Scaling
from nanofuse.kernels.common.tuning import Gpu, aimed_at, forced
from nanofuse.kernels.linear_rotary_qk_norm import (
    OP,
    linear_rotary_qk_norm_fwd,
    linear_rotary_qk_norm_ref,
    pack_angles,
    takes,
)
from nanofuse.kernels.quantize import quantize
from nanofuse.kernels.rotary_qk_norm import (
    rotary_qk_norm_fwd,
    rotary_qk_norm_ref,
    rotary_table,
    value_gate_ref,
)
from nanofuse.model.fp8.products import TorchGemm

HOPPER = Gpu("NVIDIA H200", (9, 0), 132)
VOCAB, D = 97, 128
PANELS = CASES[OP][1]
# N, C, H, K, T: each width is a kernel of its own; grouped heads, short rows, one row to a program
SHAPES = [
    *((256, width, width // D, width // D, 64) for width in range(256, 1025, 128)),
    (384, 256, 2, 1, 128),
    (640, 512, 4, 2, 320),
    (33024, 384, 3, 3, 96),
    *((640, width, width // D, width // D, 64) for width in (1152, 1280, 1408, 1792, 2048)),
    (33024, 1536, 12, 12, 256),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_the_reference_is_the_product_and_what_follows():
    x, w = torch.randn(2, 6, 32), torch.randn((3 + 2 * 1) * 8, 32)
    cos, sin = rotary_table(6, 8, 1e4)
    gate, e = torch.randn(2, 6, 1), torch.randn(2, 6, 1, 8)
    found = linear_rotary_qk_norm_ref(x, w, cos, sin, 3, gate, e)
    q, k, v = (x @ w.t()).view(2, 6, 5, 8).split([3, 1, 1], dim=2)
    wanted = *rotary_qk_norm_ref(q, k, cos, sin), value_gate_ref(v, gate, e)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    plain = linear_rotary_qk_norm_ref(x, w, cos, sin, 3)
    assert torch.equal(plain[2], v) and torch.equal(plain[0], found[0])


def test_packed_angles_are_cosines_and_sines_to_twelve_bits():
    cos, sin = rotary_table(2048, D, 1e5)
    packed = pack_angles(cos, sin)
    assert packed.shape == (2048, D // 2) and packed.dtype == torch.int32
    low, high = packed.view(torch.float16).view(2048, -1, 2).unbind(-1)
    for found, wanted in ((low, cos), (high, sin)):
        assert (found.float() - wanted[:, : D // 2]).abs().max() <= 2.0**-12


def zeros(rows, cols, dtype=E4M3):
    data = torch.zeros(rows, cols, dtype=dtype)
    return FP8Operand(data, data.t().contiguous(), torch.ones(1))


@pytest.mark.skipif(not panel.HAS_GLUON, reason="needs Triton")
def test_what_it_takes(monkeypatch):
    monkeypatch.setattr(panel, "INTERPRETED", SimpleNamespace(value=False))
    x, w = zeros(256, 512), zeros(1536, 512)
    with aimed_at(HOPPER):
        assert takes(x, w, D)
        assert not takes(x, w, 64)
        assert not takes(x.data, w.data, D)  # no FP8Operands: evaluation
        assert not takes(zeros(256, 512, E5M2), w, D)
        assert not takes(zeros(200, 512), w, D) and not takes(zeros(256, 640), w, D)
        assert not takes(zeros(0, 512), w, D)
        assert not takes(zeros(256, 2176), zeros(6528, 2176), D)
    with aimed_at(replace(HOPPER, capability=(10, 0))):
        assert not takes(x, w, D)


def test_what_it_does_not_take_is_refused():
    x, w = zeros(256, 256), zeros(768, 256)  # of a CPU
    with pytest.raises(ValueError, match="takes"):
        linear_rotary_qk_norm_fwd(x, w, None, None, None, torch.zeros(64, 64).int(), 2)


class Layer:
    """Operands of a layer of N positions in rows of T, of width C, H and K heads."""

    def __init__(self, shape, value, device):
        n, c, self.heads, kv_heads, self.length = shape
        self.device, self.kv_heads = device, kv_heads
        cols = (self.heads + 2 * kv_heads) * D
        scaling = partial(Scaling.from_bound, dtype=E4M3, device=device)
        self.x = quantize(torch.randn(n, c, device=device), scaling(6.0))
        w = torch.randn(cols, c, device=device) * c**-0.5
        self.w = quantize(w, scaling(6 * c**-0.5))
        self.cos, self.sin = rotary_table(self.length, D, 1e4, device)
        self.values = None, None, None
        if value:
            tokens = torch.randint(VOCAB, (n,), device=device)
            table = torch.randn(VOCAB, kv_heads * D, device=device).bfloat16()
            self.values = tokens, table, torch.randn(n, kv_heads, device=device).bfloat16()

    def run(self):
        angles = pack_angles(self.cos, self.sin)
        return linear_rotary_qk_norm_fwd(self.x, self.w, *self.values, angles, self.heads)

    def apart(self):
        """By a library's product and kernels/rotary_qk_norm.py."""
        qkv = TorchGemm().forward(self.x, self.w)
        args = *self.values, self.cos, self.sin, self.length, self.heads
        return qkv, rotary_qk_norm_fwd(qkv, *args)

    def exact(self):
        """qkv (N, (H + 2K)*D) and rstd (H + K, N) in fp64."""
        x = self.x.dequantize().double().view(-1, self.length, self.x.data.size(1))
        w = self.w.dequantize().double()
        gate = e = None
        if self.values[0] is not None:
            tokens, table, gate = self.values
            shape = *x.shape[:2], self.kv_heads
            gate, e = gate.double().view(shape), table.double()[tokens].view(*shape, D)
        angles = self.cos.double(), self.sin.double()
        q, k, v = linear_rotary_qk_norm_ref(x, w, *angles, self.heads, gate, e)
        qk = (x @ w.t()).view(len(self.x.data), -1, D)[:, : self.heads + self.kv_heads]
        qkv = torch.cat([t.reshape(len(self.x.data), -1) for t in (q, k, v)], dim=1)
        return qkv, qk.square().mean(dim=-1).rsqrt().t()

    def check(self):
        """No less accurate than product and rotation apart; of two runs the same bits."""
        qkv, rstd = same_bits(self.run)
        others, truth = self.apart(), self.exact()
        assert relative_error(rstd, truth[1]) < 5e-4
        cuts = [self.heads * D, self.kv_heads * D, self.kv_heads * D]
        for found, other, wanted in zip(
            qkv.split(cuts, dim=1), others[0].split(cuts, dim=1), truth[0].split(cuts, dim=1),
            strict=True,
        ):  # fmt: skip
            assert relative_error(found, wanted) <= 1.02 * relative_error(other, wanted)
            # of a number no bf16 is further away than 2^-8, and fast accumulation adds to it
            torch.testing.assert_close(found.double(), wanted, rtol=2.0**-7, atol=0.03)


@pytest.mark.cuda
@pytest.mark.parametrize("value", [False, True], ids=["plain", "value"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_q_k_and_v(shape, value, hopper):
    Layer(shape, value, hopper).check()


@pytest.mark.cuda
@pytest.mark.parametrize("tile", PANELS, ids=str)
@pytest.mark.parametrize("width", [256, 1024, 1536])
def test_every_configuration(width, tile, hopper):
    with forced(OP, tile) as asked:
        Layer((8576, width, width // D, width // D, 64), True, hopper).check()
    assert asked


@pytest.mark.cuda
@pytest.mark.parametrize("token", [-1, VOCAB, 2**40])
def test_a_token_outside_of_the_table_makes_v_nan(token, hopper):
    layer = Layer((256, 256, 2, 2, 128), True, hopper)
    wanted, _ = layer.run()
    layer.values[0][77] = token
    found, _ = layer.run()
    assert found[77, 4 * D :].isnan().all()
    found[77, 4 * D :] = wanted[77, 4 * D :]
    assert torch.equal(found, wanted)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "what", ["x", "w", "terms", "angles", "table", "tokens", "rows", "none", "kind"]
)
def test_what_does_not_fit_is_refused(what, hopper):
    layer = Layer((256, 256, 2, 2, 128), True, hopper)
    angles = pack_angles(layer.cos, layer.sin)
    tokens, table, gate = layer.values
    x, w = layer.x, layer.w
    if what in ("x", "w"):
        old = getattr(layer, what)
        wide = torch.cat([old.data, old.data], dim=1)[:, : old.data.size(1)]
        new = FP8Operand(wide, old.transposed, old.inverse_scale)
        x, w = (new, w) if what == "x" else (x, new)
    elif what == "terms":
        x = zeros(256, 512)
        x = FP8Operand(x.data.to(hopper), x.transposed.to(hopper), x.inverse_scale.to(hopper))
    elif what == "angles":
        angles = torch.cat([angles, angles], dim=1)[:, : D // 2]
    elif what == "table":
        table = table[:, :D]
    elif what == "tokens":
        tokens = None
    elif what == "rows":
        angles = angles[:100]
    elif what == "none":
        angles = angles[:0]
    else:
        angles = angles.float()
    with pytest.raises(ValueError, match=OP) as caught:
        linear_rotary_qk_norm_fwd(x, w, tokens, table, gate, angles, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.cuda
@pytest.mark.large
def test_more_than_two_to_the_31_elements(hopper):
    """The last rows are those of these rows alone."""
    layer = Layer((2**22, 256, 2, 2, 128), True, hopper)
    qkv, rstd = layer.run()
    assert qkv.numel() > 2**31
    layer.x = FP8Operand(layer.x.data[-256:].contiguous(), None, layer.x.inverse_scale)
    tokens, table, gate = layer.values
    layer.values = tokens[-256:], table, gate[-256:]
    wanted, wanted_rstd = layer.run()
    assert torch.equal(qkv[-256:], wanted) and torch.equal(rstd[:, -256:], wanted_rstd)
