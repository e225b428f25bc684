"""Whether what is asked for fits in the memory of the machine, before any of it is allocated."""

import os
from pathlib import Path

import torch

from nanofuse.model.config import ROTARY_LENGTHS
from nanofuse.model.providers import in_fp8
from nanofuse.train.errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

GIB = 2**30
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
    of = "" if memory is None else f" of {memory / GIB:.1f} GiB"
    if memory is not None and needed > memory:
        raise UserError(
            f"{what} needs about {needed / GIB:,.1f} GiB of memory, and there are "
            f"{memory / GIB:.1f}; lower {hint}"
        )
    return f"about {needed / GIB:.1f} GiB{of}"


def check_training_memory(settings, config, machine, fp8):
    """As check_memory, for a training run.

    Args:
        config: GPTConfig.
        machine: train.device.Machine.
        fp8: name of the FP8 provider.

    Raises:
        UserError: it does not fit.
    """
    rows = settings.horizon.device_batch_size

    def estimate(rows):
        return config.memory_estimate(
            rows, machine.dtype.itemsize, fp8=in_fp8(fp8), fused=machine.backend == "fused"
        )

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
