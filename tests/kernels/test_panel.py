"""Products on a panel: squared ReLU and the loss in Gluon, on a Hopper GPU alone."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from nanofuse.bench.cases.tiles import CASES
from nanofuse.bench.checks import fp8_steps, relative_error, same_bits
from nanofuse.kernels import linear_relu_squared, linear_softcap_cross_entropy
from nanofuse.kernels.common import panel
from nanofuse.kernels.common.fp8 import E4M3, E5M2, FP8Operand, Scaling
from nanofuse.kernels.common.tuning import Gpu, aimed_at, forced
from nanofuse.kernels.linear_relu_squared import linear_relu_squared_bwd, linear_relu_squared_fwd
from nanofuse.kernels.linear_softcap_cross_entropy import linear_softcap_cross_entropy_fwd
from nanofuse.kernels.quantize import quantize

FORWARD, BACKWARD = "linear_relu_squared", "linear_relu_squared_bwd"
LOSS = "linear_softcap_cross_entropy"
PANELS = CASES["linear_relu_squared_panel"][1]
HOPPER = Gpu("NVIDIA H200", (9, 0), 132)
# each is a kernel of its own; of the longest, parts of the left factor come with the right one's
DEPTHS = range(256, linear_relu_squared.PANEL_TERMS + 1, 128)
DEPTHS_OF_LOSS = range(256, linear_softcap_cross_entropy.PANEL_TERMS + 1, 128)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.skipif(not panel.HAS_GLUON, reason="needs Triton")
def test_what_a_panel_takes(monkeypatch):
    monkeypatch.setattr(panel, "INTERPRETED", SimpleNamespace(value=False))
    takes = partial(panel.takes, FORWARD, torch.device("meta"))
    with aimed_at(HOPPER):
        assert takes(128, 256, 256) and takes(65536, 4096, 1024) and takes(128, 256, 2048)
        assert takes(128, 256, 1280, most=1280) and not takes(128, 256, 1408, most=1280)
        for sizes in ((120, 256, 256), (128, 128, 256), (128, 320, 256), (128, 256, 128),
                      (128, 256, 320), (128, 256, 2176)):  # fmt: skip
            assert not takes(*sizes)
        with forced(FORWARD, None):
            assert not takes(128, 256, 256)
        assert takes(128, 256, 256)
    for capability in ((8, 9), (10, 0)):
        with aimed_at(replace(HOPPER, capability=capability)):
            assert not takes(128, 256, 256)


@pytest.mark.skipif(not panel.HAS_GLUON, reason="needs Triton")
def test_by_default_a_long_panel_has_more_stages():
    """What a GPU without entries of its own takes, other than what tuned.json may say of one."""
    for name, stages in (("NVIDIA H100 PCIe", {1024: 4, 1152: 6, 1536: 6}), ("NVIDIA H200", {})):
        with aimed_at(replace(HOPPER, name=name)):
            for terms, wanted in stages.items():
                tile = panel.tile_of("linear_relu_squared_panel", panel.PanelTile(4), terms)
                assert tile == panel.PanelTile(4, wanted)
            assert panel.tile_of("linear_relu_squared_panel", panel.PanelTile(8), 1536).stages == 6


def scaling_of(bound, dtype, device):
    return Scaling.from_bound(bound, dtype, device)


def operand(rows, cols, bound, dtype, device, std=1.0):
    return quantize(torch.randn(rows, cols, device=device) * std, scaling_of(bound, dtype, device))


class Relu:
    """Operands of a pass of squared ReLU of (rows, terms) x (cols, terms)."""

    def __init__(self, op, shape, device):
        rows, terms, cols = shape
        self.op, self.device, self.y = op, device, None
        low = E4M3 if op == FORWARD else E5M2
        self.x = operand(rows, terms, 6.0, low, device)
        sizes = (cols, terms) if op == FORWARD else (terms, cols)
        self.w = operand(*sizes, 6 * terms**-0.5, E4M3, device, terms**-0.5)
        if op == BACKWARD:
            y = torch.randn(rows, cols, device=device).relu().square()
            self.y = quantize(y, scaling_of(16.0, E4M3, device))
        self.bound, self.dtype = 25.0, low

    def run(self):
        """The result, and the amax that was recorded."""
        scaling = scaling_of(self.bound, self.dtype, self.device)
        if self.op == FORWARD:
            return linear_relu_squared_fwd(self.x, self.w, scaling), scaling
        return linear_relu_squared_bwd(self.x, self.w, self.y, scaling), scaling

    def exact(self):
        """The result in fp64."""
        b = self.w.data if self.op == FORWARD else self.w.transposed
        scales = (self.x.inverse_scale * self.w.inverse_scale).double()
        product = self.x.data.double() @ b.double().t() * scales
        if self.op == FORWARD:
            return product.relu().square()
        return 2 * self.y.dequantize().double().sqrt() * product

    def check(self):
        """Both layouts, amax, and every number within a step of the exact one; of two runs the same
        bits."""

        def run():
            result, scaling = self.run()
            return result.data.view(torch.uint8), result.transposed.view(torch.uint8), scaling.amax

        data, transposed, amax = same_bits(run)
        assert torch.equal(transposed, data.t())
        exact, scaling = self.exact(), self.run()[1]
        limit = torch.finfo(self.dtype).max
        wanted = (exact * scaling.scale).float().clamp(-limit, limit).to(self.dtype)
        steps = fp8_steps(data.view(self.dtype), wanted)
        # fast accumulation has 14 bits: small sums of large terms are further off
        large = wanted.float().abs() > 2.0**-4 * wanted.float().abs().max()
        assert steps[large].max() <= 1 and (steps[large] > 0).float().mean() < 0.05
        values = FP8Operand(data.view(self.dtype), None, scaling.inverse_scale).dequantize()
        rounded = wanted.double() * scaling.inverse_scale
        assert relative_error(values, exact) < 1.02 * relative_error(rounded, exact) + 1e-3
        torch.testing.assert_close(amax[0].double(), exact.abs().max(), rtol=1e-2, atol=0)


@pytest.mark.cuda
@pytest.mark.parametrize("terms", DEPTHS)
@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_squared_relu_of_every_depth(op, terms, hopper):
    Relu(op, (384, terms, 640), hopper).check()


@pytest.mark.cuda
@pytest.mark.parametrize(
    "shape", [(128, 256, 256), (65536, 256, 256), (17024, 1024, 4096), (17024, 1536, 3072)], ids=str
)
@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_squared_relu_of_every_share(op, shape, hopper):
    """A tile a program, panels of two tiles, panels that two programs share."""
    Relu(op, shape, hopper).check()


@pytest.mark.cuda
@pytest.mark.parametrize("tile", PANELS, ids=str)
@pytest.mark.parametrize("terms", [256, 1024, 1536])
@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_squared_relu_of_every_configuration(op, terms, tile, hopper):
    name = f"linear_relu_squared_panel{op.removeprefix(FORWARD)}"
    with forced(name, tile) as asked:
        Relu(op, (8576, terms, 1408), hopper).check()  # several turns, panels shared by programs
    assert asked


@pytest.mark.cuda
@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("place", [(5, 3), (70, 130), (200, 511), (383, 639)], ids=str)
@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_a_peak_and_a_nan_show_in_amax(op, place, nan, hopper):
    """Of one element, in tiles of either group, of the first and of the last panel. A NaN of x is
    one of its row, one of y that element's alone."""
    case, (row, col) = Relu(op, (384, 256, 640), hopper), place

    def alone(matrix, row, col, value):
        data = torch.zeros_like(matrix, dtype=torch.float32)
        data[row, col] = value
        return data.to(matrix.dtype)

    odd = float("nan") if nan else 448.0
    x = alone(case.x.data, row, 7, odd if op == FORWARD else 448.0)
    w = alone(case.w.data if op == FORWARD else case.w.transposed, col, 7, 448.0)
    case.x = FP8Operand(x, None, case.x.inverse_scale)
    case.w = FP8Operand(w, w, case.w.inverse_scale)
    if op == BACKWARD:
        case.y = FP8Operand(alone(case.y.data, row, col, odd), None, case.y.inverse_scale)
    result, scaling = case.run()
    data, transposed = result.data.float(), result.transposed.float()
    if nan:
        assert scaling.amax.isnan()
        found = data.isnan()
        assert found[row].all() if op == FORWARD else found[row, col] and found.sum() == 1
        assert torch.equal(transposed.isnan(), found.t())
    else:
        exact = case.exact()[row, col]
        torch.testing.assert_close(scaling.amax[0].double(), exact, rtol=1e-3, atol=0)
        assert data[row, col] > 0 and data.count_nonzero() == 1
        assert transposed[col, row] == data[row, col] and transposed.count_nonzero() == 1


@pytest.mark.cuda
def test_roots_of_other_numbers_than_e4m3_are_not_a_panels(hopper, monkeypatch):
    case = Relu(BACKWARD, (128, 256, 256), hopper)
    case.y = quantize(case.y.dequantize(), scaling_of(16.0, E5M2, hopper))
    result, _ = case.run()
    monkeypatch.setattr(panel, "takes", lambda *sizes: False)
    assert torch.equal(result.data.view(torch.uint8), case.run()[0].data.view(torch.uint8))


class Loss:
    """Operands x (rows, terms) and w (cols, terms), and targets: some ignored, some no token."""

    def __init__(self, shape, vocab, device, dtype=torch.int64):
        rows, terms, cols = shape
        self.vocab = vocab
        self.x = operand(rows, terms, 6.0, E4M3, device)
        self.w = operand(cols, terms, 18 * terms**-0.5, E4M3, device, 3 * terms**-0.5)
        self.targets = torch.randint(vocab, (rows,), device=device, dtype=dtype)
        self.targets[1::8] = -1
        self.targets[5], self.targets[9] = -100, vocab
        self.targets[6], self.targets[7] = 0, vocab - 1

    def run(self):
        return linear_softcap_cross_entropy_fwd(self.x, self.w, self.targets, self.vocab)

    def check(self, monkeypatch):
        """As the other kernel: u but for bf16 in between, losses but for the order of sums; of two
        runs the same bits."""

        def run():
            losses, lse, grad = self.run()
            u = grad.u.data.view(torch.uint8), grad.u.transposed.view(torch.uint8)
            return losses, lse, *u, grad.weights, grad.at_target

        sizes = *self.x.data.shape[:1], *self.w.data.shape
        most = linear_softcap_cross_entropy.PANEL_TERMS
        assert panel.takes(LOSS, self.x.data.device, *sizes, most)
        losses, lse, data, transposed, weights, at_target = same_bits(run)
        assert torch.equal(transposed, data.t())
        with monkeypatch.context() as patch:
            patch.setattr(panel, "takes", lambda *sizes: False)
            wanted_losses, wanted_lse, wanted = self.run()
        steps = fp8_steps(data.view(E5M2), wanted.u.data)
        assert steps.max() <= 1 and (steps > 0).float().mean() < 0.05
        assert not data[:, self.vocab :].any()
        for name, found, other in (
            ("losses", losses, wanted_losses),
            ("lse", lse, wanted_lse),
            ("weights", weights, wanted.weights),
            ("at_target", at_target, wanted.at_target),
        ):
            torch.testing.assert_close(
                found,
                other,
                rtol=1e-5,
                atol=1e-6,
                equal_nan=True,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.mark.cuda
@pytest.mark.parametrize("terms", DEPTHS_OF_LOSS)
@pytest.mark.parametrize("vocab", [640, 523])
def test_losses_of_every_depth(vocab, terms, hopper, monkeypatch):
    Loss((384, terms, 640), vocab, hopper).check(monkeypatch)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "shape", [(128, 256, 256), (33024, 256, 256), (4096, 1024, 32768), (8576, 1536, 1408)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_losses_of_every_share(dtype, shape, hopper, monkeypatch):
    Loss(shape, shape[2] - 19, hopper, dtype).check(monkeypatch)


@pytest.mark.cuda
@pytest.mark.parametrize("tile", PANELS, ids=str)
@pytest.mark.parametrize("terms", [256, 1024, 1536])
def test_losses_of_every_configuration(terms, tile, hopper, monkeypatch):
    with forced("linear_softcap_cross_entropy_panel", tile) as asked:
        Loss((8576, terms, 1408), 1408, hopper).check(monkeypatch)
    assert asked


@pytest.mark.cuda
def test_where_all_are_ignored(hopper, monkeypatch):
    case = Loss((256, 256, 512), 500, hopper)
    case.targets.fill_(-1)
    case.check(monkeypatch)
    assert not case.run()[0].any()


@pytest.mark.cuda
@pytest.mark.large
def test_more_than_two_to_the_31_elements_of_losses(hopper):
    """The last rows of u, in both layouts, are those of these rows alone."""
    rows, terms, cols, last = 65536 + 128, 256, 32768, 128
    case = Loss((rows, terms, cols), cols, hopper)
    losses, _, grad = case.run()
    part = case.x.data[-last:].contiguous()
    case.x, case.targets = FP8Operand(part, None, case.x.inverse_scale), case.targets[-last:]
    wanted_losses, _, wanted = case.run()
    assert torch.equal(losses[-last:], wanted_losses)
    for found, other in (
        (grad.u.data[-last:], wanted.u.data),
        (grad.u.transposed[:, -last:], wanted.u.transposed),
    ):
        assert torch.equal(found.view(torch.uint8), other.view(torch.uint8))
