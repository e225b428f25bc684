"""The energy that a GPU has used, from the counter of its driver (NVML).

The counter moves every 20 to 100 ms: a difference says something from about a second on. Reading
it needs nvidia-ml-py, which is optional: `pip install 'nanofuse[energy]'`.
"""

import torch

MILLION = 1e6


class EnergyMeter:
    """Reads the counter of one device.

    Args:
        device: torch.device; one that is no GPU has no counter, which is no fault.

    Attributes:
        missing: in one line why a GPU's energy is not read; None: it is, or there is no GPU.
    """

    def __init__(self, device):
        self._read, self.missing = None, None
        if device.type != "cuda":
            return
        try:
            import pynvml
        except ImportError:
            self.missing = "energy: not read; pip install 'nanofuse[energy]'"
            return
        try:
            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except (pynvml.NVMLError, AttributeError) as error:  # a MIG slice, an old driver or torch
            self.missing = f"energy: not read; the driver does not tell it ({error})"
            return
        self._read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)

    def joules(self):
        """What the GPU has used since its driver was loaded; None where it is not read."""
        return None if self._read is None else 1e-3 * self._read()


def joules_per_million_tokens(joules, tokens):
    """None where there are no joules, or no tokens."""
    return MILLION * joules / tokens if joules is not None and tokens else None
