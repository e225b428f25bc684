"""Which device, backend and precision a run uses, and why."""

from dataclasses import dataclass

import torch

from model.errors import UserError
from model.linear import FP8_CAPABILITY

# Dense bf16 peaks in FLOP/s by name prefix, without sparsity, from NVIDIA's datasheets.
BF16_PEAKS = {
    "NVIDIA B200": 2.25e15,
    "NVIDIA GH200": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def select_device(device_type):
    """torch.device for --device-type; "auto" takes the GPU if there is one.

    Raises:
        UserError: cuda is asked for and absent.
    """
    if device_type == "auto":
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device-type cuda: no CUDA GPU is visible; use --device-type cpu")
    return torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def bf16_peak(name):
    """Dense bf16 peak of a device in FLOP/s, or None where it is not listed."""
    return next((peak for prefix, peak in BF16_PEAKS.items() if name.startswith(prefix)), None)


@dataclass(frozen=True)
class Machine:
    """What was chosen: device, its name, backend, dtype of activations; `why` for the backend."""

    device: torch.device
    name: str
    backend: str
    why: str
    dtype: torch.dtype


def select_machine(settings):
    """Machine of a run.

    Raises:
        UserError: a choice that this machine cannot serve; the message names the flag.
    """
    device = select_device(settings.device_type)
    backend, why = settings.backend, "asked for"
    if backend == "auto":
        backend = "compile" if device.type == "cuda" else "eager"
        why = f"auto on {device.type}"
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if settings.fp8 != "off" and capability < FP8_CAPABILITY:
        raise UserError(f"--fp8 {settings.fp8} needs a GPU of compute capability 8.9 or newer")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Machine(device, device_name(device), backend, why, dtype)
