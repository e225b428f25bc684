"""A product, the stream and its norm: on a Hopper GPU alone, what is refused everywhere."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from nanofuse.bench.cases.tiles import CASES
from nanofuse.bench.checks import relative_error, same_bits
from nanofuse.kernels.common import panel
from nanofuse.kernels.common.fp8 import E4M3, E5M2, FP8Operand, Scaling
from nanofuse.kernels.common.panel import PanelTile
from nanofuse.kernels.common.parts import rooms_beside
from nanofuse.kernels.common.rms_norm import RMS_NORM_EPS, rms_norm_ref
from nanofuse.kernels.common.tuning import Gpu, aimed_at, forced
from nanofuse.kernels.linear_residual_norm import (
    OP,
    linear_residual_norm_fwd,
    linear_residual_norm_ref,
    takes,
)
from nanofuse.kernels.quantize import quantize
from nanofuse.kernels.residual_mix import residual_mix_fwd
from nanofuse.model.fp8.products import TorchGemm

HOPPER = Gpu("NVIDIA H200", (9, 0), 132)
# N, C, K: each K is a kernel of its own; one panel; shares that differ, more columns than terms and
# fewer; several odd rows of tiles to a program; as trained
SHAPES = [
    *((4224, width, width) for width in range(256, 1025, 128)),
    (128, 256, 256), (33024, 256, 512), (8320, 1024, 256), (33024, 384, 512), (33024, 896, 1024),
    (65536, 1024, 1024), (33024, 1536, 1536), (8320, 1280, 1280), (4224, 512, 1408),
    (4224, 384, 1664),
]  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_the_reference_is_the_product_the_sum_and_the_norm():
    a, w, x = torch.randn(2, 3, 8), torch.randn(16, 8), torch.randn(2, 3, 16)
    y, normed = linear_residual_norm_ref(a, w, x)
    torch.testing.assert_close(y, x + torch.nn.functional.linear(a, w))
    torch.testing.assert_close(
        normed, torch.nn.functional.rms_norm(y, y.shape[-1:], eps=RMS_NORM_EPS)
    )


def zeros(rows, cols, dtype=E4M3, device="cpu"):
    data = torch.zeros(rows, cols, dtype=dtype, device=device)
    return FP8Operand(data, data.t().contiguous(), torch.ones(1, device=device))


@pytest.mark.skipif(not panel.HAS_GLUON, reason="needs Triton")
def test_what_it_takes(monkeypatch):
    monkeypatch.setattr(panel, "INTERPRETED", SimpleNamespace(value=False))
    a, w, x = zeros(256, 512), zeros(384, 512), torch.zeros(256, 384).bfloat16()
    with aimed_at(HOPPER):
        assert takes(a, w, x)
        assert not takes(a.data, w.data, x)  # no FP8Operands: evaluation
        assert not takes(a, w, x.float())
        assert not takes(zeros(256, 512, E5M2), w, x)
        assert not takes(zeros(200, 512), w, x) and not takes(zeros(256, 640), w, x)
        assert not takes(zeros(256, 1792), zeros(384, 1792), x)
        with forced("residual_norm_fwd", None):
            assert not takes(a, w, x)
    with aimed_at(replace(HOPPER, capability=(10, 0))):
        assert not takes(a, w, x)


@pytest.mark.parametrize(
    "terms, stages, held, rooms",
    [(256, 6, 2, 3), (768, 6, 6, 2), (1024, 3, 8, 3), (1024, 4, 8, 2), (1024, 6, 6, 2),
     (1152, 3, 9, 2), (1536, 4, 8, 2), (1536, 8, 4, 2)],
)  # fmt: skip
def test_panel_stages_and_at_least_two_rooms_fit(terms, stages, held, rooms):
    tile = PanelTile(8, stages)
    args = panel.launch_args(tile, terms)
    assert (args["CHUNKS"], args["HELD"], args["STAGES"]) == (terms // 128, held, stages)
    assert rooms_beside(tile, terms) == rooms
    assert (held + stages + rooms) * 2**14 <= 226 * 2**10


def test_what_it_does_not_take_is_refused():
    x = torch.zeros(256, 256).bfloat16()
    with pytest.raises(ValueError, match="takes"):  # of a CPU
        linear_residual_norm_fwd(zeros(256, 256), zeros(256, 256), x, None)


class Layer:
    """Operands of a layer of N positions, of width C, with K terms."""

    def __init__(self, shape, device, dtype=E4M3):
        n, c, k = shape
        scaling = partial(Scaling.from_bound, dtype=E4M3, device=device)
        self.a = quantize(torch.randn(n, k, device=device), scaling(6.0))
        w = torch.randn(c, k, device=device) * k**-0.5
        self.w = quantize(w, scaling(6 * k**-0.5))
        self.x = torch.randn(n, c, device=device).bfloat16()
        self.bound, self.dtype, self.device = c**0.5, dtype, device

    def scaling(self):
        return Scaling.from_bound(self.bound, self.dtype, self.device)

    def run(self):
        """y, rstd, both layouts as bytes, and amax."""
        scaling = self.scaling()
        y, rstd, normed = linear_residual_norm_fwd(self.a, self.w, self.x, scaling)
        layouts = (t.view(torch.uint8) for t in (normed.data, normed.transposed))
        return y, rstd, *layouts, scaling.amax

    def check(self):
        """y no less accurate than by product and sum apart; the norm that of this y to the last
        bit but for ties; of two runs the same bits."""
        found = same_bits(self.run)
        y, rstd, data, transposed, amax = found
        branch = TorchGemm().forward(self.a, self.w)
        factors = (each.dequantize().double() for each in (self.a, self.w))
        exact, of_exact = linear_residual_norm_ref(*factors, self.x.double())
        apart = residual_mix_fwd(self.x, branch, scaling=self.scaling())[0]
        assert relative_error(y, exact) <= 1.02 * relative_error(apart, exact)
        scaling = self.scaling()
        values = data.view(self.dtype).double() * scaling.inverse_scale
        # half a unit is 0.0625; the rest is of fast accumulation, where the sum is small
        torch.testing.assert_close(values, of_exact, rtol=0.07, atol=0.02)
        none = torch.zeros_like(y)
        wanted, of_y, normed = residual_mix_fwd(y, none, scaling=scaling)
        assert torch.equal(wanted, y)
        torch.testing.assert_close(rstd, of_y, rtol=2e-6, atol=0)
        torch.testing.assert_close(amax, scaling.amax, rtol=2e-6, atol=0)
        differs = data != normed.data.view(torch.uint8)
        assert differs.sum() <= max(4, 1e-4 * differs.numel())
        assert torch.equal(transposed, data.t())


@pytest.mark.cuda
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stream_and_norm(shape, hopper):
    Layer(shape, hopper).check()


@pytest.mark.cuda
@pytest.mark.parametrize("tile", CASES[OP][1], ids=str)
@pytest.mark.parametrize("width", [256, 768, 1024, 1536])
def test_every_configuration(width, tile, hopper):
    with forced(OP, tile) as asked:
        Layer((33024, width, width), hopper).check()
    assert asked


@pytest.mark.cuda
def test_a_norm_in_the_other_format(hopper):
    layer = Layer((256, 512, 512), hopper, E5M2)
    _, _, data, transposed, _ = layer.run()
    assert torch.equal(transposed, data.t())
    normed = rms_norm_ref(layer.run()[0].float())
    found = data.view(E5M2).float() * layer.scaling().inverse_scale
    torch.testing.assert_close(found, normed, rtol=0.13, atol=1e-3)  # half a unit is 0.125


@pytest.mark.cuda
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_shows(value, hopper):
    layer = Layer((256, 384, 256), hopper)
    whole = layer.run()
    layer.x[77, 300] = value
    y, rstd, data, transposed, amax = layer.run()
    assert not amax.isfinite() and not y[77, 300].isfinite()
    others = torch.arange(256, device=hopper) != 77
    assert torch.equal(y[others], whole[0][others])
    assert torch.equal(rstd[others], whole[1][others])
    assert torch.equal(data[others], whole[2][others])
    assert torch.equal(transposed[:, others], whole[3][:, others])


@pytest.mark.cuda
@pytest.mark.parametrize("what", ["a", "w", "x", "shape"])
def test_what_does_not_fit_is_refused(what, hopper):
    layer = Layer((256, 256, 256), hopper)
    a, w, x = layer.a, layer.w, layer.x
    if what == "x":
        x = torch.cat([x, x], dim=1)[:, :256]
    elif what == "shape":
        x = x[:128]
    else:
        old = getattr(layer, what)
        wide = torch.cat([old.data, old.data], dim=1)[:, :256]
        new = FP8Operand(wide, old.transposed, old.inverse_scale)
        a, w = (new, w) if what == "a" else (a, new)
    with pytest.raises(ValueError, match=OP) as caught:
        linear_residual_norm_fwd(a, w, x, layer.scaling())
    assert "\n" not in str(caught.value)


@pytest.mark.cuda
@pytest.mark.large
def test_more_than_two_to_the_31_elements(hopper):
    """The last rows are those of these rows alone."""
    rows, last = 2**23 + 256, 256
    layer = Layer((rows, 256, 256), hopper)
    found = layer.run()
    y, rstd, data, transposed, _ = found
    assert y.numel() > 2**31
    layer.a = FP8Operand(layer.a.data[-last:].contiguous(), None, layer.a.inverse_scale)
    layer.x = layer.x[-last:].clone()
    wanted = layer.run()
    assert torch.equal(y[-last:], wanted[0]) and torch.equal(rstd[-last:], wanted[1])
    assert torch.equal(data[-last:], wanted[2]) and torch.equal(transposed[:, -last:], wanted[3])
    assert found[4] >= wanted[4]
