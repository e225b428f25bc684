"""Triton's interpreter with floating-point casts that round as a GPU's do."""

from contextlib import contextmanager
from unittest import mock

import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

DTYPES = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
}
BITS = {torch.bfloat16: torch.int16}  # integer views of dtypes that NumPy lacks
BITS |= {dtype: torch.uint8 for dtype in DTYPES.values() if dtype.itemsize == 1}


@contextmanager
def interpreter_casts_exactly():
    """Context in which the interpreter casts between floating-point formats as a GPU does: rounding
    to nearest, saturating in FP8, keeping NaN and denormals.

    Without it the interpreter truncates, and loses NaN and denormals.
    """
    convert = interpreter._convert_float

    def exact(data, source, target, rounding_mode):
        if source not in DTYPES or target not in DTYPES:
            return convert(data, source, target, rounding_mode)
        values, dtype = torch.tensor(data).view(DTYPES[source]), DTYPES[target]
        if dtype.itemsize == 1:
            values = values.float().clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
        return values.to(dtype).view(BITS.get(dtype, dtype)).numpy()

    with mock.patch.object(interpreter, "_convert_float", exact):
        yield
