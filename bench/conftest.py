"""Options of the benchmarks; GPU, versions, commit and clocks recorded in every result; tables."""

import re
import subprocess

import pytest
import torch

from nanofuse.bench.harness import MAX_ROUNDS, ON_GPU, listed
from nanofuse.bench.report import step_table, table_lines
from nanofuse.bench.scaling import SCHEMES, WORLDS, scaling_table
from nanofuse.bench.training import STEP_ROWS
from nanofuse.model.providers import PRODUCTS, choices
from nanofuse.train.device import device_name, select_device
from nanofuse.train.gpu import copy_ceiling, matmul_ceiling, nvidia_smi


def pytest_addoption(parser):
    group = parser.getgroup("bench_step")
    group.addoption("--depth", default="", help="depths, comma-separated; default 16 on a GPU")
    group.addoption("--rounds", type=int, default=20, help="timed steps of every contender")
    group.addoption("--fp8", default="auto", help="as train.run's, comma-separated; off is bf16")
    group.addoption("--baselines", default="auto,flex", help="attention backends under compile")
    group.addoption("--bigram-factor", type=int, default=5, help="0 makes a dense model")
    group.addoption("--device-batch-size", type=int, default=32, help="rows of a micro-step")
    group.addoption(
        "--no-cuda-graphs",
        action="store_true",
        help="the fused path without graphs, whose memory no baseline can use: d16 on 80 GB",
    )
    group = parser.getgroup("bench_scaling")
    group.addoption("--worlds", default="", help="numbers of ranks; default 1,2,4,8 as GPUs allow")
    group.addoption("--schemes", default=",".join(SCHEMES), help="ways to share a step")


def pytest_configure(config):
    """Refuses options of bench_step and bench_scaling before anything is collected."""
    depths, providers = (listed(config.getoption(name)) for name in ("--depth", "--fp8"))
    for depth in depths:
        if not re.fullmatch(r"[1-9]\d{0,2}", depth):
            raise pytest.UsageError(f"--depth {depth}: give depths such as 4,8,16")
    if not 1 <= config.getoption("--rounds") <= MAX_ROUNDS:
        raise pytest.UsageError(f"--rounds: give a number from 1 to {MAX_ROUNDS:,}")
    if not 0 <= config.getoption("--bigram-factor") <= 1000:
        raise pytest.UsageError("--bigram-factor: give a number from 0 to 1000")
    rows = config.getoption("--device-batch-size")
    if rows < 1 or STEP_ROWS % rows:
        raise pytest.UsageError(f"--device-batch-size {rows}: give a divisor of {STEP_ROWS}")
    for world in listed(config.getoption("--worlds")):
        if world not in map(str, WORLDS):
            raise pytest.UsageError(f"--worlds {world}: choose from {', '.join(map(str, WORLDS))}")
        if ON_GPU and int(world) > torch.cuda.device_count():
            gpus = torch.cuda.device_count()
            raise pytest.UsageError(f"--worlds {world}: GPUs here are {gpus}")
    for scheme in listed(config.getoption("--schemes")):
        if scheme not in SCHEMES:
            raise pytest.UsageError(f"--schemes {scheme}: choose from {', '.join(SCHEMES)}")
    for fp8 in providers:
        if fp8 not in choices(PRODUCTS):
            raise pytest.UsageError(f"--fp8 {fp8}: choose from {', '.join(choices(PRODUCTS))}")


def _commit():
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@pytest.fixture(scope="session")
def rounds(request):
    return request.config.getoption("--rounds")


@pytest.fixture(scope="session")
def device():
    return select_device("auto")


@pytest.fixture(scope="session")
def machine_info(device):
    """GPU, versions and commit for extra_info."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": _commit(),
    }


@pytest.fixture(autouse=True)
def same_inputs():
    """The same random inputs in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def record_machine(benchmark, machine_info):
    benchmark.extra_info.update(machine_info)
    yield
    benchmark.extra_info["clocks"] = nvidia_smi("clocks.sm", "clocks.mem", "power.limit")


def _row(bench):
    info = bench.extra_info
    speedups = {k[8:]: v for k, v in info.items() if k.startswith("speedup_")}
    return [
        bench.name.removeprefix("bench_"),
        info["shape"],
        f"{info['us']:.1f}",
        f"{info['gb_per_s']:.0f}",
        f"{100 * info['copy_share']:.0f} %" if "copy_share" in info else "",
        f"{info['tflop_per_s']:.0f}" if "tflop_per_s" in info else "",
        f"{100 * info['matmul_share']:.0f} %" if "matmul_share" in info else "",
        ", ".join(f"{name} {ratio:.2f}" for name, ratio in speedups.items()),
    ]


def _ops_table(ops):
    head = ["op", "shape", "us", "GB/s", "of copy", "TFLOP/s", "of cuBLAS", "times faster than"]
    for cells in [head, ["---"] * len(head), *map(_row, ops)]:
        yield f"| {' | '.join(cells)} |"
    if copy_ceiling():
        yield (
            f"ceilings: copy {copy_ceiling() / 1e9:.0f} GB/s, "
            f"bf16 {matmul_ceiling() / 1e12:.0f} TFLOP/s"
        )


def _cell(product, name):
    """Microseconds, TFLOP/s and share of the ceiling of a product by one provider."""
    seconds = product["seconds"].get(name)
    if seconds is None:
        return ""
    rate, by = product["flops"] / seconds, f" {product['tuned']}" if "tuned" in name else ""
    return f"{1e6 * seconds:.0f} ({rate / 1e12:.0f}, {rate / product['ceiling']:.0%}){by}"


def _products_table(products):
    """A row for each product: us (TFLOP/s, share of an 8192^3 product's rate) by provider."""
    names = list(dict.fromkeys(name for product in products for name in product["seconds"]))
    head = ["us (TFLOP/s, of ceiling)", "positions, n, k", *names]
    rows = [
        [each["name"], str(each["shape"]), *(_cell(each, name) for name in names)]
        for each in products
    ]
    yield from table_lines(head, rows)
    yield from dict.fromkeys(line for each in products for line in each["left_out"])


def _loader(benchmarks):
    for bench in benchmarks:
        name = bench.name.removeprefix("bench_")
        yield f"{name:>16}  {bench.extra_info['m_tok_per_s']:6.1f} M tokens/s"


def pytest_terminal_summary(terminalreporter, config):
    """Print Markdown tables: ops, with their rates and the share of this GPU's measured ceilings,
    and training steps."""
    session = getattr(config, "_benchmarksession", None)
    benchmarks = getattr(session, "benchmarks", [])
    ops = [b for b in benchmarks if "us" in b.extra_info]
    steps = [b.extra_info for b in benchmarks if "contenders" in b.extra_info]
    loader = [b for b in benchmarks if "m_tok_per_s" in b.extra_info]
    products = [b.extra_info["product"] for b in benchmarks if "product" in b.extra_info]
    scaling = [b.extra_info for b in benchmarks if "schemes" in b.extra_info]
    sections = (
        ("ops", ops, _ops_table),
        ("products", products, _products_table),
        ("steps", steps, step_table),
        ("scaling", scaling, scaling_table),
        ("loader", loader, _loader),
    )
    for title, rows, table in sections:
        if rows:
            terminalreporter.section(title)
            for line in table(rows):
                terminalreporter.write_line(line)
