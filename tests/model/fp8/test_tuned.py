"""The tuned provider: on a CPU with a fake cuBLASLt and given times, on a GPU with the real one."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nanofuse.bench.checks import assert_accurate, relative_error
from nanofuse.kernels.common.fp8 import E4M3, E5M2, FP8Operand
from nanofuse.kernels.common.store import Store
from nanofuse.kernels.quantize import quantize_ref
from nanofuse.model.config import GPTConfig
from nanofuse.model.fp8 import tuned
from nanofuse.model.fp8.products import PlainGemm, TransformerEngineGemm
from nanofuse.model.fp8.shapes import KINDS, Shape, product_shapes
from nanofuse.model.fp8.tuned import NvmathGemm, NvmathPlainGemm
from nanofuse.model.fused import FusedGPT
from nanofuse.train import assemble as assemble_module
from nanofuse.train.assemble import prepare_products
from nanofuse.train.device import Machine
from nanofuse.train.optim.config import OptimConfig
from tests.helpers import random_model
from tests.train.thread_ranks import run_ranks

FP8_AND_PLAIN = pytest.mark.parametrize("made_of", [NvmathGemm, NvmathPlainGemm])
SHAPES = [
    Shape("qkv", "forward", 64, 96, 32),
    Shape("qkv", "input_grad", 64, 96, 32),
    Shape("qkv", "weight_grad", 64, 96, 32),
]

CONFIG = GPTConfig.from_depth(2, 32, 32, sequence_len=16, vocab_size=96, n_kv_head=1)


class FakeLt:
    """cuBLASLt by torch, with one algorithm "best" among three, of which it takes "first"."""

    version = "cuBLASLt 0"

    def __init__(self):
        self.ran, self.listed = [], 0

    def first(self, product):
        return SimpleNamespace(product=product, text="first")

    def candidates(self, product, count=16):
        self.listed += 1
        names = ["first", "slow", "best"][:count]
        return [SimpleNamespace(product=product, text=text) for text in names]

    def restore(self, product, text):
        return SimpleNamespace(product=product, text=text)

    def run(self, plan, x, w, scales, out=None):
        self.ran.append(plan.text)
        of_w, of_x = plan.product.layout
        x, w = (x if of_x == "N" else x.t()).float(), (w.t() if of_w == "T" else w).float()
        y = x @ w
        assert y.shape == (plan.product.rows, plan.product.cols)
        for scale in scales or ():
            y *= scale
        assert (out is not None) == plan.product.adds
        return y.bfloat16() if out is None else out.add_(y)


class Times:
    """Measures: "best" takes `best` seconds, "slow" 12, all others 10."""

    def __init__(self, best=8.0):
        self.best, self.library = best, None

    def __call__(self, calls, rounds=None):
        seconds = []
        for call in calls:
            self.library.ran.clear()
            call()
            seconds.append({"best": self.best, "slow": 12.0}.get("".join(self.library.ran), 10.0))
        return seconds


class PlainOnCpu(PlainGemm):
    """PlainGemm, whose weight gradients torch computes on a GPU only."""

    def weight_grad(self, g, x, out):
        out += g.float().t() @ x.float()


@pytest.fixture
def fake(monkeypatch):
    """fake(class, store, seconds of the best algorithm) makes a provider."""
    monkeypatch.setattr(tuned, "CublasLt", FakeLt)
    monkeypatch.setattr(NvmathGemm, "device", "cpu")
    monkeypatch.setattr(NvmathPlainGemm, "other_of", PlainOnCpu)
    monkeypatch.setattr(tuned, "ALIGNMENT", 1)  # torch's of a CPU is less

    def make(made_of, store=None, best=8.0):
        gemm = made_of(store or Store(None, ""))
        gemm.winners.measure = Times(best)
        gemm.winners.measure.library = gemm.library
        return gemm

    return make


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


def check_products(gemm):
    """All three products of a provider against fp64."""
    (x, w, g), (x64, w64, g64) = operands(gemm.fp8)
    assert relative_error(gemm.forward(x, w), x64 @ w64.t()) < 0.01
    assert relative_error(gemm.input_grad(g, w), g64 @ w64) < 0.01
    out = torch.full((96, 32), 10.0)
    gemm.weight_grad(g, gemm.keep(x), out)
    assert relative_error(out, 10 + g64.t() @ x64) < 1e-5


@FP8_AND_PLAIN
def test_the_best_is_measured_taken_and_kept(fake, tmp_path, made_of):
    said, store = [], Store(tmp_path / "products.json", "GPU")
    gemm, random = fake(made_of, store), torch.get_rng_state()
    line = gemm.prepare(SHAPES, said.append)
    assert torch.equal(torch.get_rng_state(), random)
    assert said == ["products: measuring algorithms for 3 shapes, once on this machine"]
    beginning = "products: 3 of 3 shapes by nvmath; "
    assert line.startswith(beginning + "3 measured in ") and line.endswith(f"kept in {store.path}")
    gemm.library.ran.clear()
    check_products(gemm)
    assert gemm.library.ran == ["best"] * 3
    again = fake(made_of, store)
    assert again.prepare(SHAPES, said.append) == f"{beginning}as in {store.path}"
    assert len(said) == 1 and not again.library.ran and not again.library.listed
    check_products(again)
    assert again.library.ran == ["best"] * 3


@FP8_AND_PLAIN
def test_all_ranks_take_rank_0s_choices(fake, tmp_path, made_of, capsys):
    """Though each finds other algorithms the fastest, and no file is shared."""
    stores = [Store(tmp_path / name, "GPU") for name in "abc"]
    gemms = [
        fake(made_of, store, best) for store, best in zip(stores, (8.0, 9.99, 9.99), strict=True)
    ]
    shared = CONFIG, 4, torch.device("cpu")
    prepare_products(fake(made_of, stores[2], 9.99), *shared)  # an earlier run
    capsys.readouterr()
    lines = run_ranks(3, lambda ranks: prepare_products(gemms[ranks.rank], *shared, ranks))
    assert len(set(lines)) == 1 and f"kept in {stores[0].path}" in lines[0]
    assert len(capsys.readouterr().out.splitlines()) == 1
    for gemm in gemms:
        assert gemm.choices == gemms[0].choices
        assert bool(gemm.library.listed) == (gemm is gemms[0])
        assert {plan.text for plan in gemm._plans.values()} == {"best"}
    listed = gemms[0].library.listed
    prepare_products(gemms[0], *shared)
    assert gemms[0].library.listed == listed  # what was measured is known


@FP8_AND_PLAIN
def test_choices_of_another_gpu_are_not_taken(fake, tmp_path, made_of):
    one, other = (fake(made_of, Store(tmp_path / name, f"GPU {name}")) for name in "ab")
    one.prepare(SHAPES)
    assert f"kept in {tmp_path / 'b'}" in other.prepare(SHAPES, choices=one.choices)
    assert other.library.listed == 3


@FP8_AND_PLAIN
def test_where_torch_wins_it_computes(fake, tmp_path, made_of):
    gemm = fake(made_of, Store(tmp_path / "file" / "x.json", "GPU"), best=9.99)
    (tmp_path / "file").write_text("")
    line = gemm.prepare(SHAPES, print)
    assert line.startswith("products: 0 of 3 shapes by nvmath, 3 by torch; 3 measured in ")
    assert line.endswith(f"not kept (File exists: {tmp_path / 'file' / 'x.json'})")
    assert {gemm.chosen(shape) for shape in SHAPES} == {"torch"}
    gemm.library.ran.clear()
    check_products(gemm)
    assert not gemm.library.ran


@FP8_AND_PLAIN
def test_a_shape_that_was_not_prepared_takes_the_first_choice(fake, made_of):
    gemm = fake(made_of)
    for _ in range(2):
        check_products(gemm)
    assert gemm.library.ran == ["first"] * 6 and gemm.library.listed == 3
    assert {gemm.chosen(shape) for shape in SHAPES} == {"nvmath"}


def test_what_has_gaps_is_computed_by_torch(fake):
    gemm = fake(NvmathPlainGemm)
    (x, w, g), (x64, w64, g64) = operands(False)
    wide = torch.cat([x, x], dim=1)[:, :32]
    assert relative_error(gemm.forward(wide, w), x64 @ w64.t()) < 0.01
    out = torch.zeros(96, 64)[:, :32]
    gemm.weight_grad(g, x, out)
    assert relative_error(out, g64.t() @ x64) < 1e-5
    assert not gemm.library.ran


def test_the_section_names_all_that_a_choice_depends_on(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOFUSE_DIR", str(tmp_path))
    monkeypatch.setattr(tuned, "gpu_name", lambda: "NVIDIA Tesla")
    store = NvmathGemm().winners.store
    assert store.path == tmp_path / "products.json"
    assert store.section == f"NVIDIA Tesla, cuBLASLt 0, torch {torch.__version__}"


@pytest.mark.parametrize(
    ("made_of", "names"),
    [
        (NvmathGemm, ["64x32x96 e5m2 e4m3 bf16 TN beta 0", "96x32x64 e5m2 e4m3 fp32 TN beta 1"]),
        (
            NvmathPlainGemm,
            ["64x32x96 bf16 bf16 bf16 NN beta 0", "96x32x64 bf16 bf16 fp32 NT beta 1"],
        ),
    ],
)
def test_a_product_has_the_name_of_what_cublaslt_is_asked_for(fake, made_of, names):
    gemm = fake(made_of)
    assert [str(gemm._product(shape)) for shape in SHAPES[1:]] == names
    gemm.gradients = E4M3
    finer = [name.replace("e5m2", "e4m3") for name in names]
    assert [str(gemm._product(shape)) for shape in SHAPES[1:]] == finer
    of_head = replace(SHAPES[1], weight="lm_head")  # its gradient comes from a kernel
    assert str(gemm._product(of_head)) == names[0]


def test_a_run_prepares_before_its_model_is_built(monkeypatch):
    order = []

    class Prepared(PlainGemm):
        def prepare(self, shapes, say=print, choices=None):
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
        ("qkv", "weight_grad"), ("attn_proj", "weight_grad"), ("fc", "weight_grad"),
        ("mlp_proj", "weight_grad"), ("lm_head", "weight_grad"),
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


def computed(gemm, kind, first, second):
    """The result of a provider's method; a weight gradient is added to ones."""
    if kind != "weight_grad":
        return getattr(gemm, kind)(first, second)
    n, k = (x.transposed.size(0) if gemm.fp8 else x.size(1) for x in (first, second))  # of g and x
    out = torch.ones(n, k, device="cuda")
    gemm.weight_grad(first, gemm.keep(second), out)
    return out


@pytest.mark.cuda
@FP8_AND_PLAIN
@pytest.mark.parametrize("sizes", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_algorithm_is_as_accurate_as_torch(real, made_of, sizes, kind):
    gemm = real(made_of)
    (x, w, g), (x64, w64, g64) = operands(gemm.fp8, *sizes, device="cuda")
    pair, exact = {
        "forward": ((x, w), x64 @ w64.t()),
        "input_grad": ((g, w), g64 @ w64),
        "weight_grad": ((g, x), 1 + g64.t() @ x64),
    }[kind]
    theirs = computed(gemm.other, kind, *pair)
    product = gemm._product(Shape("fc", kind, *sizes))
    plans, equal = [gemm.library.first(product), *gemm.library.candidates(product)], 0
    assert len({plan.text for plan in plans[1:]}) == len(plans) - 1 > 0
    for number, plan in enumerate(plans):
        gemm._plans = {product: plan}
        ours = computed(gemm, kind, *pair)
        assert_accurate(f"algorithm {number}", ours, theirs, exact)
        equal += torch.equal(ours, theirs)
        assert torch.equal(computed(gemm, kind, *pair), ours)
        gemm._plans = {product: gemm.library.restore(product, plan.text)}
        assert torch.equal(computed(gemm, kind, *pair), ours)
    assert gemm._plans.keys() == {product}
    print(f"{equal} of {len(plans)} algorithms have torch's bits")
    assert gemm.library.restore(product, "00" * 63) is None
    assert gemm.library.restore(product, "ff" * 64) is None


@pytest.mark.cuda
@pytest.mark.parametrize("sizes", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_choice_is_what_transformer_engine_computes(real, sizes, kind):
    """To the bit, so that it stands for its time."""
    gemm = real(NvmathGemm)
    try:
        theirs = TransformerEngineGemm()
    except ImportError as error:
        pytest.skip(f"needs Transformer Engine: {error}")
    (x, w, g), _ = operands(True, *sizes, device="cuda")
    pair = {"forward": (x, w), "input_grad": (g, w), "weight_grad": (g, x)}[kind]
    product = gemm._product(Shape("fc", kind, *sizes))
    gemm._plans = {product: gemm.library.first(product)}
    assert torch.equal(computed(gemm, kind, *pair), computed(theirs, kind, *pair))


@pytest.mark.cuda
def test_measurements_leave_no_memory_behind():
    """A workspace of cuBLAS stays after the first one; the next ones share it."""
    a = torch.randn(256, 256, device="cuda").bfloat16()
    after = []
    for _ in range(3):
        tuned.graph_seconds([lambda: a @ a], rounds=1)
        after.append(torch.cuda.memory_allocated())
    assert after[0] == after[1] == after[2]


@pytest.mark.cuda
@FP8_AND_PLAIN
def test_what_is_measured_is_never_slower_and_found_again(real, made_of):
    gemm, said = real(made_of), []
    shapes = [Shape("qkv", kind, *GPU_SHAPES[0]) for kind in KINDS]
    random = torch.cuda.get_rng_state()
    print(gemm.prepare(shapes, said.append))
    assert len(said) == 1 and torch.equal(torch.cuda.get_rng_state(), random)
    again = real(made_of)
    assert again.prepare(shapes, said.append).endswith(f"as in {again.winners.store.path}")
    assert len(said) == 1
    for shape in shapes:
        winner = again.winners.recall(again._product(shape))
        assert 0 < winner.seconds <= winner.default_seconds < 1
        assert (winner.plan and winner.plan.text) == (
            gemm._plans[gemm._product(shape)] and gemm._plans[gemm._product(shape)].text
        )


@pytest.mark.cuda
@FP8_AND_PLAIN
@pytest.mark.parametrize("kind", ["forward", "weight_grad"])
def test_a_recorded_product_reads_operands_and_scales_anew(real, made_of, kind):
    gemm, sizes = real(made_of), GPU_SHAPES[1]
    (x, w, g), _ = operands(gemm.fp8, *sizes, device="cuda")
    pair = (x, w) if kind == "forward" else (g, x)
    computed(gemm, kind, *pair)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = computed(gemm, kind, *pair)
    if gemm.fp8:
        x.inverse_scale.mul_(3)
        for data in (x.data, x.transposed):
            data.copy_(data.flip(0))
    else:
        x.mul_(3)
        x.copy_(x.flip(0))
    graph.replay()
    assert torch.equal(out, computed(gemm, kind, *pair))
    assert relative_error(out, computed(gemm.other, kind, *pair)) < 0.005


@pytest.mark.cuda
@FP8_AND_PLAIN
def test_a_training_pass_leaves_no_product_to_torch(real, made_of):
    """Every operand, and what is added to, is aligned and without gaps."""
    gemm = real(made_of)
    gemm.other = SimpleNamespace(keep=gemm.other.keep)
    config = GPTConfig.from_depth(2, 64, 64, sequence_len=64, vocab_size=128)
    model = random_model(config, torch.bfloat16, device="cuda")
    fused = FusedGPT(model, gemm).train()
    tokens = torch.randint(128, (2, 64), device="cuda")
    for _ in range(2):
        fused(tokens, tokens).backward()
    shapes = [shape for shape in product_shapes(config, 128) if shape.by_provider]
    assert gemm._plans.keys() == {gemm._product(shape) for shape in shapes}
