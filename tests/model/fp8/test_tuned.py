"""The tuned provider: on a CPU with a fake cuBLASLt and given times, on a GPU with the real one."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from nanofuse.bench.checks import assert_accurate, relative_error
from nanofuse.kernels.common.fp8 import E4M3, E5M2, FP8Operand
from nanofuse.kernels.common.store import Store
from nanofuse.kernels.quantize import quantize_ref
from nanofuse.model.config import GPTConfig
from nanofuse.model.fp8 import tuned
from nanofuse.model.fp8.products import PlainGemm, TorchGemm
from nanofuse.model.fp8.shapes import Shape, product_shapes
from nanofuse.model.fp8.tuned import Beside, NvmathGemm, NvmathPlainGemm
from nanofuse.model.fused import FusedGPT
from nanofuse.train import assemble as assemble_module
from nanofuse.train.device import Machine
from nanofuse.train.optim.config import OptimConfig
from tests.helpers import random_model

FP8_AND_PLAIN = pytest.mark.parametrize("made_of", [NvmathGemm, NvmathPlainGemm])
SHAPES = [
    Shape("qkv", "forward", 64, 96, 32),
    Shape("qkv", "input_grad", 64, 96, 32),
    Shape("lm_head", "forward", 64, 128, 32),
]


WHY = " (te: does not load)"


class FakeLt:
    """cuBLASLt by torch, with one algorithm "best" among three."""

    version = "cuBLASLt 0"

    def __init__(self):
        self.ran, self.listed = [], 0

    def candidates(self, product, count=8):
        self.listed += 1
        names = ["first", "slow", "best"][:count]
        return [SimpleNamespace(product=product, text=text) for text in names]

    def restore(self, product, text):
        return SimpleNamespace(product=product, text=text)

    def run(self, plan, x, w, scales):
        self.ran.append(plan.text)
        out = x.float() @ (w.float().t() if plan.product.transposed else w.float())
        assert out.shape == (plan.product.rows, plan.product.cols)
        for scale in scales or ():
            out *= scale
        return out.bfloat16()


def times(calls, best=8.0):
    """Seconds of the other library, "first", "slow" and "best"; or of the first and the last."""
    for call in calls:
        call()
    return [10.0, 10.0, 12.0, best] if len(calls) == 4 else [10.0, best]


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(tuned, "CublasLt", FakeLt)
    monkeypatch.setattr(tuned, "graph_seconds", times)
    monkeypatch.setattr(NvmathGemm, "device", "cpu")
    monkeypatch.setattr(tuned, "fp8_beside", lambda: Beside("torch", "0", TorchGemm(), WHY))
    monkeypatch.setattr(NvmathGemm, "_beside", staticmethod(tuned.fp8_beside))
    monkeypatch.setattr(tuned, "ALIGNMENT", 1)  # torch's of a CPU is less


def operands(fp8, m=64, n=96, k=32, device="cpu"):
    """x (m, k), w (n, k), g (m, n) as the products take them, and in fp64."""
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for rows, cols, dtype in ((m, k, E4M3), (n, k, E4M3), (m, n, E5M2)):
        x = torch.randn(rows, cols, device=device, generator=generator)
        if fp8:
            data, inverse = quantize_ref(x, dtype)
            operand = FP8Operand(data, data.t().contiguous(), inverse.reshape(1))
            made.append((operand, operand.dequantize().double()))
        else:
            made.append((x.bfloat16(), x.bfloat16().double()))
    return zip(*made, strict=True)


@FP8_AND_PLAIN
def test_the_best_is_measured_taken_and_kept(fake, tmp_path, made_of):
    said, store = [], Store(tmp_path / "products.json", "GPU")
    gemm, random = made_of(store), torch.get_rng_state()
    line = gemm.prepare(SHAPES, said.append)
    assert torch.equal(torch.get_rng_state(), random)
    assert said == ["products: measuring algorithms for 3 shapes, once on this machine"]
    why = WHY if gemm.fp8 else ""
    beginning = f"products: 3 of 3 shapes by nvmath, weight gradients by torch{why}; "
    assert line.startswith(beginning + "3 measured in ") and line.endswith(f"kept in {store.path}")
    gemm.library.ran.clear()
    (x, w, g), (x64, w64, g64) = operands(gemm.fp8)
    assert relative_error(gemm.forward(x, w), x64 @ w64.t()) < 0.01
    assert relative_error(gemm.input_grad(g, w), g64 @ w64) < 0.01
    assert gemm.library.ran == ["best"] * 2
    out = torch.ones(96, 32)
    if gemm.fp8:
        gemm.weight_grad(g, gemm.keep(x), out)
        assert relative_error(out, 1 + g64.t() @ x64) < 0.01
    again = made_of(store)
    assert again.prepare(SHAPES, said.append) == f"{beginning}as in {store.path}"
    assert len(said) == 1 and not again.library.ran and not again.library.listed
    again.forward(x, w)
    assert again.library.ran == ["best"]


@FP8_AND_PLAIN
def test_where_the_other_library_wins_it_computes(fake, tmp_path, made_of, monkeypatch):
    monkeypatch.setattr(tuned, "graph_seconds", partial(times, best=9.99))
    gemm = made_of(Store(tmp_path / "file" / "x.json", "GPU"))
    (tmp_path / "file").write_text("")
    line = gemm.prepare(SHAPES[:2], print)
    assert line.startswith("products: 0 of 2 shapes by nvmath, 2 by torch, weight gradients by tor")
    assert line.endswith(f"not kept (File exists: {tmp_path / 'file' / 'x.json'})")
    gemm.library.ran.clear()
    (x, w, g), (x64, w64, g64) = operands(gemm.fp8)
    assert relative_error(gemm.forward(x, w), x64 @ w64.t()) < 0.01
    assert relative_error(gemm.input_grad(g, w), g64 @ w64) < 0.01
    assert not gemm.library.ran


@FP8_AND_PLAIN
def test_a_shape_that_was_not_prepared_takes_the_first_choice(fake, tmp_path, made_of):
    gemm = made_of(Store(None, ""))
    (x, w, _), _ = operands(gemm.fp8)
    for _ in range(2):
        gemm.forward(x, w)
    assert gemm.library.ran == ["first"] * 2 and gemm.library.listed == 1


def test_views_with_gaps_are_computed_by_the_other_library(fake):
    gemm = NvmathPlainGemm(Store(None, ""))
    (x, w, _), (x64, w64, _) = operands(False)
    wide = torch.cat([x, x], dim=1)[:, :32]
    assert relative_error(gemm.forward(wide, w), x64 @ w64.t()) < 0.01
    assert not gemm.library.ran


def test_the_section_names_all_that_a_choice_depends_on(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOFUSE_DIR", str(tmp_path))
    monkeypatch.setattr(tuned, "gpu_name", lambda: "NVIDIA Tesla")
    store = NvmathGemm().winners.store
    assert store.path == tmp_path / "products.json"
    assert store.section == "NVIDIA Tesla, cuBLASLt 0, torch 0"
    product = NvmathGemm()._product(SHAPES[1])
    assert str(product) == "64x32x96 e5m2 e4m3 bf16 TN beta 0"
    assert str(NvmathPlainGemm()._product(SHAPES[1])) == "64x32x96 bf16 bf16 bf16 NN beta 0"


CONFIG = GPTConfig.from_depth(2, 32, 32, sequence_len=16, vocab_size=96, n_kv_head=1)


def test_a_run_prepares_before_its_model_is_built(monkeypatch):
    order = []

    class Prepared(PlainGemm):
        def prepare(self, shapes, say=print):
            order.append(shapes)
            return "products: as told"

    def build(*args, **kwargs):
        order.append("model")
        raise InterruptedError

    monkeypatch.setattr(assemble_module, "GPT", build)
    choice = SimpleNamespace(made=Prepared())
    cpu = Machine(torch.device("cpu"), "CPU", "fused", "asked for", torch.float32)
    with pytest.raises(InterruptedError):
        assemble_module.assemble(CONFIG, cpu, OptimConfig(), choice, rows=3)
    shapes, model = order
    assert model == "model" and {shape.positions for shape in shapes} == {48}
    assert {(shape.weight, shape.kind) for shape in shapes} == {
        ("qkv", "forward"), ("attn_proj", "forward"), ("mlp_proj", "forward"),
        ("qkv", "input_grad"), ("attn_proj", "input_grad"),
        ("fc", "input_grad"), ("lm_head", "input_grad"),
    }  # fmt: skip


GPU_SHAPES = [(4096, 1536, 512), (2048, 512, 2048), (256, 96, 160)]  # positions, n, k


@pytest.fixture
def real(tmp_path):
    """real(class) makes a provider with an empty store."""

    def make(made_of):
        try:
            return made_of(Store(tmp_path / "products.json", "this GPU"))
        except ImportError as error:
            pytest.skip(f"needs nvmath-python: {error}")

    return make


@pytest.mark.cuda
@FP8_AND_PLAIN
@pytest.mark.parametrize("sizes", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["forward", "input_grad"])
def test_every_algorithm_is_as_accurate_as_the_other_library(real, made_of, sizes, kind):
    gemm = real(made_of)
    (x, w, g), (x64, w64, g64) = operands(gemm.fp8, *sizes, device="cuda")
    x, exact = (x, x64 @ w64.t()) if kind == "forward" else (g, g64 @ w64)
    theirs = getattr(gemm.other, kind)(x, w)
    a, b, _, scales = gemm._views(kind, x, w)
    plans = gemm.library.candidates(gemm._product(Shape("fc", kind, *sizes)))
    assert len({plan.text for plan in plans}) == len(plans) > 0
    equal = 0
    for number, plan in enumerate(plans):
        ours = gemm.library.run(plan, a, b, scales)
        assert_accurate(f"algorithm {number}", ours, theirs, exact)
        equal += torch.equal(ours, theirs)
        kept = gemm.library.restore(plan.product, plan.text)
        assert torch.equal(gemm.library.run(kept, a, b, scales), ours)
    print(f"{equal} of {len(plans)} algorithms have {gemm.other_name}'s bits")
    assert gemm.library.restore(plans[0].product, "00" * 63) is None
    assert gemm.library.restore(plans[0].product, "ff" * 64) is None


@pytest.mark.cuda
@FP8_AND_PLAIN
def test_what_is_measured_is_never_slower_and_found_again(real, made_of):
    gemm, said = real(made_of), []
    shapes = [Shape("qkv", kind, *GPU_SHAPES[0]) for kind in ("forward", "input_grad")]
    random = torch.cuda.get_rng_state()
    print(gemm.prepare(shapes, said.append))
    assert len(said) == 1 and torch.equal(torch.cuda.get_rng_state(), random)
    again = real(made_of)
    assert again.prepare(shapes, said.append).endswith(f"as in {again.winners.store.path}")
    assert len(said) == 1
    for shape in shapes:
        winner = again.winners.recall(again._product(shape))
        assert 0 < winner.seconds <= winner.other_seconds < 1
        assert (winner.plan and winner.plan.text) == (
            gemm._plans[gemm._product(shape)] and gemm._plans[gemm._product(shape)].text
        )


@pytest.mark.cuda
@FP8_AND_PLAIN
def test_a_recorded_product_reads_operands_and_scales_anew(real, made_of):
    gemm, sizes = real(made_of), GPU_SHAPES[1]
    (x, w, _), _ = operands(gemm.fp8, *sizes, device="cuda")
    gemm.forward(x, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gemm.forward(x, w)
    if gemm.fp8:
        x.inverse_scale.mul_(3)
        w.data.copy_(w.data.flip(0))
    else:
        x.mul_(3)
        w.copy_(w.flip(0))
    graph.replay()
    assert torch.equal(out, gemm.forward(x, w))
    theirs = gemm.other.forward(x, w)
    assert relative_error(out, theirs) < 0.005


@pytest.mark.cuda
@FP8_AND_PLAIN
def test_a_training_pass_leaves_no_product_to_the_other_library(real, made_of):
    """Every operand is aligned and without gaps."""
    gemm = real(made_of)
    gemm.other = SimpleNamespace(weight_grad=gemm.other.weight_grad, keep=gemm.other.keep)
    config = GPTConfig.from_depth(2, 64, 64, sequence_len=64, vocab_size=128)
    model = random_model(config, torch.bfloat16, device="cuda")
    fused = FusedGPT(model, gemm).train()
    tokens = torch.randint(128, (2, 64), device="cuda")
    for _ in range(2):
        fused(tokens, tokens).backward()
    shapes = [shape for shape in product_shapes(config, 128) if shape.tunable]
    assert gemm._plans.keys() == {gemm._product(shape) for shape in shapes}
