"""Which device, backend and precision a run uses, and why."""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from nanofuse.kernels.common.fp8 import E4M3, E5M2
from nanofuse.kernels.common.jit import HAS_TRITON
from nanofuse.model import providers
from nanofuse.model.fused import fp8_fits, kernels_are_interpreted
from nanofuse.train.errors import UserError

HOPPER = (9, 0)  # compute capability
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}  # words of providers.Need
FORMATS = {"e5m2": E5M2, "e4m3": E4M3}
FP8_SIZES = "needs widths and tokens in multiples of 16 and heads of 32, 64, 128, ..."

# Dense bf16 peaks in FLOP/s, without sparsity, from NVIDIA's datasheets, by the whole name that the
# driver gives a product: NVL modules, MIG slices and laptops' chips have others.
BF16_PEAKS = {
    "NVIDIA B200": 2.25e15,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA GH200 120GB": 989e12,
    "NVIDIA GH200 144G HBM3e": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def select_device(device_type, local=0):
    """torch.device for --device-type; "auto" takes the GPU if there is one.

    Args:
        local: which GPU of the machine, for a process that is one of several.

    Raises:
        UserError: cuda is asked for and absent, or it has fewer GPUs.
    """
    if device_type == "auto":
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device-type cuda: no CUDA GPU is visible; use --device-type cpu")
    if device_type == "cpu":
        return torch.device("cpu")
    if local and local >= torch.cuda.device_count():
        raise UserError(
            f"{local + 1} processes or more on {torch.cuda.device_count()} GPUs; start one a GPU"
        )
    return torch.device("cuda", local)


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def bf16_peak(name):
    """Dense bf16 peak of a product in FLOP/s, or None where it is not listed."""
    return BF16_PEAKS.get(name)


@dataclass(frozen=True)
class Machine:
    """What was chosen: device, its name, backend, dtype of activations; `why` for the backend."""

    device: torch.device
    name: str
    backend: str
    why: str
    dtype: torch.dtype

    @property
    def capability(self):
        """Compute capability, (0, 0) without a GPU."""
        cuda = self.device.type == "cuda"
        return torch.cuda.get_device_capability(self.device) if cuda else (0, 0)

    def need(self, *dtypes):
        """providers.Need of what takes activations, or one of the given dtypes, here."""
        words = (*dtypes, DTYPES[self.dtype])
        return providers.Need(self.backend, self.device.type, self.capability, words)


def select_machine(device_type, backend, local=0):
    """Machine for --device-type and --backend; auto takes the kernels on Hopper.

    Args:
        local: as of select_device.

    Raises:
        UserError: a choice that this machine cannot serve; the message names the flag.
    """
    device = select_device(device_type, local)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    machine = Machine(device, device_name(device), backend, "asked for", dtype)
    if backend == "auto":
        backend, why = "eager", f"auto on {device.type}"
        if cuda and not HAS_TRITON:
            why = f"auto on {device.type} without Triton"
        elif machine.capability == HOPPER:
            backend, why = "fused", "auto on Hopper"
        elif cuda:
            backend, why = "compile", "auto: the kernels are made for Hopper"
        return replace(machine, backend=backend, why=why)
    if backend == "fused" and not HAS_TRITON:
        raise UserError("--backend fused needs Triton, which is not installed; use --backend eager")
    if backend == "fused" and machine.capability != HOPPER and not kernels_are_interpreted():
        raise UserError("--backend fused needs a Hopper GPU; use --backend auto")
    return machine


def own_machine(options, local):
    """As select_machine, for the MachineOptions of Settings. Its GPU becomes the current one, on
    which libraries make their handles and workspaces.

    Args:
        local: as of select_device.
    """
    machine = select_machine(options.device_type, options.backend, local)
    if machine.device.type == "cuda":
        torch.cuda.set_device(machine.device)
    return machine


@contextmanager
def choosing(flag, name):
    """Within the context the ValueError of a choice becomes a UserError that names the flag and,
    unless it was that, "auto" as the way out."""
    try:
        yield
    except ValueError as error:
        hint = "" if name == "auto" else f"; or use --{flag} auto"
        raise UserError(f"--{flag} {error}{hint}") from error


def select_fp8(name, machine, config, rows, gradients="e5m2"):
    """providers.Choice for --fp8.

    Args:
        rows: of a micro-step.
        gradients: of FORMATS, for those of the layers where products are in FP8.

    Raises:
        UserError: a provider that cannot serve this machine, backend or model.
    """
    fits = machine.backend != "fused" or fp8_fits(config, rows * config.sequence_len)

    def refuse(record):
        return None if fits or "fp8" not in record.dtypes else FP8_SIZES

    with choosing("fp8", name):
        found = providers.choose(providers.PRODUCTS, name, machine.need("fp8"), refuse=refuse)
    if found.made.fp8:
        found.made.gradients = FORMATS[gradients]
    return found


def select_products(settings, machine, config, given=()):
    """As select_fp8, for the flags of Settings.

    Args:
        given: names of those that were given now, and not by the run that goes on.

    Raises:
        UserError: as select_fp8; or a format of gradients was given, and there is no FP8.
    """
    options, rows = settings.machine, settings.horizon.device_batch_size
    gradients = options.fp8_gradients
    found = select_fp8(options.fp8, machine, config, rows, gradients)
    if "fp8_gradients" in given and gradients != "e5m2" and not found.made.fp8:
        raise UserError(
            f"--fp8-gradients {gradients} needs products in FP8, and this run has --fp8 "
            f"{found.name}; drop it"
        )
    return found
