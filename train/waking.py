"""The GPU's context is made while the imports run, as both take a second.

The driver does it in a thread, without Python's lock; torch then finds the context that it would
make itself. Nothing here loads torch.
"""

import ctypes
import os
import threading
from contextlib import suppress

LIBRARY = "libcuda.so.1"  # of NVIDIA's driver


def make_context(index):
    """Have the driver make the context of a GPU; one that it does not make is left to torch.

    Args:
        index: of the GPU among those that CUDA shows.
    """
    with suppress(OSError, AttributeError):  # no driver, or a strange one
        driver = ctypes.CDLL(LIBRARY)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), index) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def wake_gpu():
    """make_context in a thread, for this process's rank. The process does not end before it has."""
    index = os.environ.get("LOCAL_RANK", "0")
    if index.isdecimal():
        threading.Thread(target=make_context, args=(int(index),), name="waking").start()
