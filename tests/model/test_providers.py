"""A provider is a record and a class: a new one is chosen, refused, announced, and made once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanofuse.model import providers
from nanofuse.model.backends.torch_backends import SDPAttention
from nanofuse.model.config import GPTConfig
from nanofuse.model.fp8.linear import ScaledMatmul
from nanofuse.model.fp8.products import TorchGemm
from nanofuse.model.fused import kernels_are_interpreted
from nanofuse.model.providers import ATTENTION, BACKENDS, PRODUCTS, Need, Provider
from nanofuse.train.assemble import assemble
from nanofuse.train.device import Machine, select_fp8, select_machine
from nanofuse.train.errors import UserError
from nanofuse.train.optim.config import OptimConfig
from tests.train.thread_ranks import run_ranks

CONFIG = GPTConfig.from_depth(1, aspect_ratio=128, head_dim=64, sequence_len=32, vocab_size=256)
made = []


class NewProduct(ScaledMatmul):
    """What its Linear layers apply."""


class NewGemm(TorchGemm):
    linear = NewProduct

    def __init__(self):
        made.append(self)


class NewAttention(SDPAttention):
    def __init__(self, deterministic=False):
        super().__init__(deterministic)
        made.append(self)


def new(kind, **fields):
    title, made_by = f"A New {kind}", f"{__name__}:New{kind}"
    return Provider("new", title, made_by, cuda_only=False, **fields)


@pytest.fixture
def add(monkeypatch):
    """add(registry, record) puts it before the others."""

    def insert(registry, record):
        monkeypatch.setattr(providers, registry, (record, *getattr(providers, registry)))

    made.clear()
    yield insert
    made.clear()


def machine(backend):
    """A CPU, whatever the backend."""
    return Machine(torch.device("cpu"), "CPU", backend, "asked for", torch.float32)


@pytest.mark.parametrize("name", ["new", "auto"])
@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_new_products_are_chosen_and_made_once(add, name, backend):
    if backend == "fused" and not kernels_are_interpreted():
        pytest.skip("the fused pass on a CPU needs the interpreter")
    add("PRODUCTS", new("Gemm", dtypes=("fp8",)))
    on = select_machine("cpu", backend)
    chosen = select_fp8(name, on, CONFIG, 1)
    built = assemble(CONFIG, on, OptimConfig(), chosen)
    count = 7 if backend == "eager" else 5  # the fused pass has one product for q, k and v
    assert built.facts[-1].startswith(f"fp8: new, A New Gemm ({count} linears in training; ")
    assert made == [chosen.made]
    if backend == "eager":
        assert built.raw_model.lm_head.fp8 is NewProduct
    else:
        assert built.model.precision.gemm is chosen.made


def test_new_products_are_refused_where_they_do_not_serve(add):
    add("PRODUCTS", new("Gemm", dtypes=("fp8",), backends=("fused",)))
    with pytest.raises(UserError) as caught:
        select_fp8("new", machine("compile"), CONFIG, 1)
    assert str(caught.value) == "--fp8 new serves fused, not compile; or use --fp8 auto"
    chosen = select_fp8("auto", machine("compile"), CONFIG, 1)
    assert (chosen.name, chosen.why) == ("off", "auto on cpu: new serves fused, not compile")
    assert not made


def test_new_attention_is_chosen_refused_and_made_once(add):
    add("ATTENTION", new("Attention", backends=("eager",)))
    off = select_fp8("off", machine("eager"), CONFIG, 1)
    built = assemble(CONFIG, machine("eager"), OptimConfig(), off)
    assert built.facts[0] == "attention: new, A New Attention (auto on cpu)"
    assert made == [built.raw_model.attention]
    with pytest.raises(UserError) as caught:
        assemble(CONFIG, machine("compile"), OptimConfig(), off, "new")
    assert str(caught.value) == "--attention new serves eager, not compile; or use --attention auto"
    assert len(made) == 1


@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_ranks_know_which_rows_of_tables_to_send(backend):
    if backend == "fused" and not kernels_are_interpreted():
        pytest.skip("the fused pass on a CPU needs the interpreter")

    def tables(ranks):
        off = select_fp8("off", machine(backend), CONFIG, 1)
        built = assemble(CONFIG, machine(backend), OptimConfig(), off, ranks=ranks)
        built.optimizer.note(torch.zeros(1, 4, dtype=torch.int64))
        found = built.optimizer.sharing.lookups.routes()
        return found.keys() == {embedding.weight for embedding in built.raw_model.tables()}

    assert run_ranks(2, tables) == [True, True]


def test_a_new_record_is_a_choice_of_its_flag_without_torch():
    code = f"""
import sys
from nanofuse.model import providers
record = providers.Provider("new", "A New Gemm", "{__name__}:NewGemm")
providers.PRODUCTS = (record, *providers.PRODUCTS)
from nanofuse.train.settings import FLAGS, build_parser
build_parser().parse_args(["--fp8", "new"])
print(FLAGS["fp8"][1].metadata["choices"][:2], "torch" in sys.modules)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == "('auto', 'new') False\n"


def test_a_library_that_is_missing_or_damaged():
    needs = Need("eager", "cpu", (0, 0), ("fp32",))
    gone = new("Attention", library="no_such_library.part", install="pip install it")
    with pytest.raises(ValueError, match="^new needs A New Attention: pip install it .No module"):
        providers.choose((gone,), "new", needs)
    with pytest.raises(ValueError, match="nothing works here: new is not installed: pip install"):
        providers.choose((gone,), "auto", needs)
    damaged = Provider("new", "A New One", f"{__name__}:gone", cuda_only=False)
    with pytest.raises(ValueError, match="nothing works here: new: .*has no attribute 'gone'$"):
        providers.choose((damaged,), "auto", needs)


@pytest.mark.parametrize("record", [*ATTENTION, *PRODUCTS], ids=lambda record: record.title)
def test_records_say_what_there_is(record):
    assert set(record.backends) | set(record.by_name) <= set(BACKENDS)
    assert set(record.dtypes) <= {"fp8", "bf16", "fp32"}
    assert bool(record.library) == bool(record.install)
    if not record.library:
        built = record.build()
        assert record not in PRODUCTS or built.fp8 == ("fp8" in record.dtypes)
        assert record not in PRODUCTS or "eager" not in record.backends or hasattr(built, "linear")
