"""What a machine has and can do: backends, providers, rates, data, and the run that suits it."""

import shlex
import time
import warnings
from dataclasses import asdict

import torch

from nanofuse.kernels.common.fp8 import E4M3, FP8Operand
from nanofuse.kernels.quantize import quantize_ref
from nanofuse.model import providers
from nanofuse.model.backends.choice import self_check
from nanofuse.model.config import GPTConfig
from nanofuse.train.data.corpus import ParquetCorpus, open_corpus
from nanofuse.train.data.tokenizer import Tokenizer
from nanofuse.train.data.tokens import SUFFIX, open_cache
from nanofuse.train.device import FORMATS, select_machine
from nanofuse.train.errors import UserError, first_line
from nanofuse.train.gpu import copy_ceiling, fp8_matmul_ceiling, matmul_ceiling
from nanofuse.train.measured import CEILINGS, STEP_TOKENS, measured_step
from nanofuse.train.memory import fitting_rows, free_memory, memory_of, training_estimate
from nanofuse.train.plan import make_plan
from nanofuse.train.settings import resolve

PRODUCT = 128, 256, 64  # M, N, K of the check
PRODUCT_ERROR = 0.01  # relative, allowed: bf16 rounds to 0.002, FP8's fast accumulation adds to it
DEPTHS = 16, 12, 8, 4  # that are proposed, the first of which FEW_ROWS fit
FEW_ROWS = 8


def check_products(gemm, device, dtype):
    """Try a provider's three products on small operands, with gradients in both formats.

    Returns:
        how near they come to the same products in fp32, in words.

    Raises:
        RuntimeError: not near enough.
    """
    m, n, k = PRODUCT
    generator = torch.Generator(device).manual_seed(0)

    def operand(rows, cols, fp8_dtype):
        x = torch.randn(rows, cols, device=device, generator=generator).to(dtype)
        if not gemm.fp8:
            return x, x.float()
        data, inverse_scale = quantize_ref(x, fp8_dtype)
        made = FP8Operand(data, data.t().contiguous(), inverse_scale.reshape(1))
        return made, made.dequantize()

    (x, x_exact), (w, w_exact) = operand(m, k, E4M3), operand(n, k, E4M3)
    pairs = {"forward": (gemm.forward(x, w), x_exact @ w_exact.t())}
    for name, fp8_dtype in FORMATS.items() if gemm.fp8 else [("", None)]:
        g, g_exact = operand(m, n, fp8_dtype)
        weight_grad = torch.zeros(n, k, device=device)
        gemm.weight_grad(g, gemm.keep(x), weight_grad)
        of = f" of {name}" * bool(name)
        pairs[f"input_grad{of}"] = gemm.input_grad(g, w), g_exact @ w_exact
        pairs[f"weight_grad{of}"] = weight_grad, g_exact.t() @ x_exact
    worst = 0.0
    for name, (got, exact) in pairs.items():
        error = ((got.float() - exact).norm() / exact.norm()).item()
        if not error <= PRODUCT_ERROR:
            raise RuntimeError(f"{name} is off by {error:.3g}, {PRODUCT_ERROR} is allowed")
        worst = max(worst, error)
    return f"agrees with fp32 to {worst:.1g}"


def tried(record, need, check, *args):
    """{"name", "works", "why", "seconds"} of a providers.Provider: whether it serves `need`, loads
    and passes; what its library warns of while it compiles is not shown.

    Args:
        check: of an object of its class; says how well it did, or raises.
        args: what the class is called with.
    """
    began = time.perf_counter()
    works, reason = False, record.refusal(need)
    why = reason and f"{record.name} {reason}"
    if not reason:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                works, why = True, f"{record.name} {check(record.make(*args))}"
        except Exception as error:  # a third-party library may raise anything
            works, why = False, record.explain(error)
            if record.install and record.install not in why:
                why += f" (to install: {record.install})"
    seconds = round(time.perf_counter() - began, 1)
    return {"name": record.name, "works": works, "why": why, "seconds": seconds}


def try_attention(machine):
    """Yields `tried` of each attention backend; they are compared with SDPA on a GPU only."""
    config = GPTConfig.from_depth(4)

    def check(backend):
        if machine.device.type != "cuda":
            return "loads"
        return f"agrees with SDPA to {self_check(backend, machine.device.type, config):.1g}"

    for record in providers.ATTENTION:
        yield tried(record, machine.need(), check, False)


def try_products(machine):
    """Yields `tried` of each provider of products."""

    def check(gemm):
        return check_products(gemm, machine.device, machine.dtype)

    for record in providers.PRODUCTS:
        yield tried(record, machine.need("fp8"), check)


def try_backends(machine):
    """{"name", "works", "why"} of the ways to run the model on this device."""
    found = []
    for name in providers.BACKENDS:
        chosen = name == machine.backend
        works, why = True, f"{name} {'is the default' if chosen else 'by name'} ({machine.why})"
        if not chosen:
            why = f"{name} by name"
            try:
                select_machine(machine.device.type, name)
            except UserError as error:
                works, why = False, str(error)
        found.append({"name": name, "works": works, "why": why})
    return found


def first_working(found, records, backend):
    """The name that "auto" comes to on a backend; None where nothing works."""
    by_name = {record.name for record in records if backend in record.by_name}
    names = (each["name"] for each in found if each["works"] and each["name"] not in by_name)
    return next(names, None)


def rates(machine):
    """Measured rates beside the known ceilings, {name: {"measured", "known"}} in bytes/s and
    FLOP/s; None without a GPU. A rate that cannot be measured is its reason, in words."""
    if machine.device.type != "cuda":
        return None
    known = CEILINGS.get(machine.name)
    known = asdict(known) if known else {}
    measured = {"copy": copy_ceiling, "bf16": matmul_ceiling, "fp8": fp8_matmul_ceiling}
    found = {}
    for name, measure in measured.items():
        try:
            value = measure()
        except RuntimeError as error:  # no FP8 on this GPU, or its memory is taken
            value = first_line(error)
        found[name] = {"measured": value, "known": known.get(name)}
    return found


def memory(device):
    """(free, all) bytes of a GPU's memory, of the machine's under its limits on a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    return free_memory(device), memory_of(device)


def data_facts(flag):
    """What --data, $NANOFUSE_DIR or the default folder has; what is wrong with it is its "error".

    Args:
        flag: --data, or None.

    Raises:
        UserError: something is wrong with what the flag names.
    """
    try:
        corpus = open_corpus(flag)
        facts = {"name": corpus.name, "shards": None, "tokenizer": None, "cached": None}
        path = corpus.tokenizer_path
        tokenizer = Tokenizer.load(path) if path and path.exists() else None
    except UserError as error:
        if flag:
            raise
        return {"error": str(error)}
    facts["tokenizer"] = tokenizer and tokenizer.vocab_size
    if isinstance(corpus, ParquetCorpus):
        facts["shards"] = len(corpus.shards)
        cache = tokenizer and open_cache(corpus, tokenizer)
        facts["cached"] = sum(map(has_tokens, [cache] * facts["shards"], range(facts["shards"])))
    return facts


def has_tokens(cache, shard):
    """Whether there is a file of tokens of a shard, which may be those of another tokenizer."""
    if cache is None:
        return False
    name = cache.corpus.shard_path(shard).name
    try:
        return any(
            path.name.startswith(f"{name}.") and path.name.endswith(SUFFIX)
            for path in cache.where(shard).iterdir()
        )
    except OSError:
        return False


def advice(machine, attention, products, free, data, given=None):
    """The run that suits a machine.

    Args:
        machine: train.device.Machine.
        attention, products: names of what "auto" comes to.
        free: bytes of memory; None: not known.
        data: of data_facts.
        given: the --data flag.

    Returns:
        {"commands", "depth", "rows", "steps", "tokens_per_step", "ms_per_step", "record"}; rows are
        the most that the memory estimate lets through, ms_per_step is None where not measured.
    """
    gpu = machine.device.type == "cuda"
    for depth in DEPTHS if gpu else (resolve({}, "cpu").model.depth,):
        settings = resolve({"depth": depth} if gpu else {}, machine.device.type)
        config = settings.model.config()
        total = make_plan(settings.replace({"device_batch_size": 1}), config).total_batch_size
        estimate = training_estimate(config, machine, products)
        rows = fitting_rows(estimate, config.sequence_len, total, free)
        if rows >= FEW_ROWS:
            break
    used = min(rows, settings.horizon.device_batch_size) or 1
    plan = make_plan(settings.replace({"device_batch_size": used}), config)
    run = "python -m train.run"
    if gpu:
        run += f" --depth {depth} --save-every 500 --keep 2"
        if used != settings.horizon.device_batch_size:
            run += " --device-batch-size auto"
    if given:
        run += f" --data {shlex.quote(given)}"
    commands = [run]
    if gpu and not given and not data.get("shards"):
        commands.insert(0, "python -m train.data download -n 8")
    step = measured_step(machine.name, depth, products, attention)
    if machine.backend != "fused":
        step = None
    return {
        "commands": commands,
        "depth": depth,
        "rows": rows,
        "steps": plan.num_iterations,
        "tokens_per_step": plan.total_batch_size,
        "ms_per_step": step and step[0] * plan.total_batch_size / STEP_TOKENS,
        "record": step and step[1],
    }
