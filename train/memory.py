"""Whether what is asked for fits in the memory of the machine, before any of it is allocated."""

import os
from pathlib import Path

import torch

from nanofuse.model.config import ROTARY_LENGTHS
from nanofuse.model.providers import in_fp8
from nanofuse.train.device import device_name
from nanofuse.train.disk import in_units
from nanofuse.train.errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

GIB = 2**30
MOST_ROWS = 2**12  # that are proposed
CPU_SHARE = 0.75  # of the machine's free memory
_part = 1.0  # of a device's memory that is this process's, by `take_part`
CGROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # versions 2 and 1


def cgroup_limits():
    """Bytes that the control groups of this process allow, where they set a limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for group in {"/", *(line.rpartition(":")[2] for line in lines)}:
        for name in CGROUP_LIMITS:
            folder, _, file = name.rpartition("/")
            try:
                text = (Path("/sys/fs/cgroup") / folder / group.lstrip("/") / file).read_text()
            except OSError:
                continue
            if text.strip().isdigit():
                yield int(text)


def memory_of(device):
    """Bytes of a device's memory, of the machine's under its limits for the CPU; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = list(cgroup_limits())
    if resource is not None:
        limits = [
            resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA)
        ]
        found += [soft for soft in limits if soft != resource.RLIM_INFINITY]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def check_memory(needed, device, what, hint):
    """Refuse what needs more memory than the device has; returns both in words.

    Args:
        needed: bytes.
        what: words for what needs it, such as "a model of 3 parameters".
        hint: flags to lower.

    Raises:
        UserError: it does not fit.
    """
    memory = memory_of(device)
    of = "" if memory is None else f" of {in_units(memory)}"
    if memory is not None and needed > memory:
        raise UserError(
            f"{what} needs about {needed / GIB:,.1f} GiB of memory, and there are "
            f"{memory / GIB:.1f}; lower {hint}"
        )
    return f"about {in_units(needed)}{of}"


def free_memory(device):
    """Bytes of a device's memory that nobody has, as far as this process may take them
    (`take_part`); None: unknown. On a CPU under the machine's limits, and less a share for what
    else may want some."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return min(free, int(_part * total))
    found = [memory_of(device)]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):  # another system
        pass
    known = [count for count in found if count is not None]
    return int(_part * CPU_SHARE * min(known)) if known else None


def take_part(part, device):
    """Let this process, one of several on a device, take a part (0 to 1) of its memory at most."""
    global _part
    _part = part
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(part, device)


def training_estimate(config, machine, fp8):
    """The function rows -> bytes that a training run is expected to take.

    Args:
        config: GPTConfig.
        machine: train.device.Machine.
        fp8: name of the FP8 provider.
    """
    size, backend = machine.dtype.itemsize, machine.backend
    return lambda rows: config.memory_estimate(rows, size, in_fp8(fp8), backend)


def fitting_rows(estimate, length, total, free, world=1):
    """Largest power of two of rows per forward pass that splits a step's tokens and is expected to
    fit; 0: none.

    Args:
        estimate: rows -> bytes.
        length: tokens of a row.
        total: tokens of a step, of which all ranks take the same number of passes.
        free: bytes of memory; None: not known.
        world: number of ranks.
    """
    rows, fits = 1, 0
    while rows <= MOST_ROWS and total % (rows * length * world) == 0:
        if free is not None and estimate(rows) > free:
            break
        rows, fits = 2 * rows, rows
    return fits


def out_of_memory(rows, estimate, device):
    """Words for rows that do not fit: what was expected, on a GPU the peak, and what should fit:
    half of them or less, as far as the estimate goes.

    Args:
        estimate: rows -> bytes.
    """
    memory = memory_of(device)
    text = (
        f"--device-batch-size {rows} does not fit in the memory of {device_name(device)}: "
        f"{estimate(rows) / GIB:,.1f} GiB were expected"
    )
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
        text += f", {peak / GIB:,.1f} were taken at most, and there are {memory / GIB:,.1f}"
    for fewer in range(rows // 2, 0, -1):
        if rows % fewer == 0 and (memory is None or estimate(fewer) <= memory):
            return f"{text}; {fewer} should fit (the total batch stays the same)"
    return f"{text}; lower --depth or --max-seq-len"


def check_training_memory(settings, config, machine, fp8):
    """As check_memory, for a training run.

    Args:
        config: GPTConfig.
        machine: train.device.Machine.
        fp8: name of the FP8 provider.

    Raises:
        UserError: it does not fit.
    """
    rows, estimate = settings.horizon.device_batch_size, training_estimate(config, machine, fp8)
    state = estimate(0)
    if 2 * state > estimate(rows):  # most of it are weights and optimiser state
        counts = config.param_counts()
        hint = "--depth or --aspect-ratio"
        if 2 * counts["matrices"] < config.num_params:
            hint = "--vocab-size or --bigram-embed-factor"
    else:
        hint = "--device-batch-size or --max-seq-len"
    what = (
        f"training {config.num_params:,} parameters with {rows:,} rows of {config.sequence_len:,}"
    )
    return check_memory(estimate(rows), machine.device, what, hint)


def check_inference_memory(config, itemsize, device, rows=1, positions=0, hint="the model's size"):
    """As check_memory, for a model that generates, or is only held.

    Args:
        itemsize: bytes of a weight, and of a value in the KV cache.
        rows, positions: of the KV cache.

    Raises:
        UserError: it does not fit.
    """
    cache = 2 * rows * positions * config.n_layer * config.kv_dim * itemsize
    logits = 4 * 4 * rows * config.padded_vocab_size if positions else 0
    rotary = 4 * 2 * ROTARY_LENGTHS * config.sequence_len * config.head_dim
    # a cache that grows is there twice
    needed = itemsize * config.num_params + 2 * rotary + 2 * cache + logits
    what = f"a model of {config.num_params:,} parameters"
    if rows > 1:
        what += f" with {rows:,} rows of {positions:,} tokens"
    return check_memory(needed, device, what, hint)
