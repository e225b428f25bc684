"""What launchers check of the tensors whose strides a kernel does not take."""

import torch


def check_tensor(op, name, x, shape, dtype=None):
    """Check one tensor on the host, without a look at its values; None is skipped.

    Raises:
        ValueError: x is not contiguous, not of `shape` (None: any), or not of `dtype` (None: any).
    """
    if x is None:
        return
    if not x.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous; call .contiguous() on it")
    if shape is not None and x.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, not {tuple(x.shape)}")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{op}: {name} must be {dtype}, not {x.dtype}")


def check_scalars(op, **scalars):
    """Check that every given tensor has one element, whatever its strides; None is skipped.

    Raises:
        ValueError: a tensor of another size.
    """
    for name, x in scalars.items():
        if x is not None and x.numel() != 1:
            raise ValueError(f"{op}: {name} must have one element, not {tuple(x.shape)}")


def check_lookups(op, lookups, positions, width, lambdas=1):
    """Check the tables that an op looks up: ((rows, table, lambda), ...), with rows (positions,)
    int32, table (R, width) and lambda (lambdas,), of any strides if it is one number.

    Raises:
        ValueError: a tensor that is not contiguous or of another shape, or rows of another dtype.
    """
    for rows, table, scale in lookups:
        check_tensor(op, "rows", rows, (positions,), torch.int32)
        check_tensor(op, "table", table, (table.size(0), width))
        if lambdas == 1:
            check_scalars(op, table_lambda=scale)
        else:
            check_tensor(op, "table_lambdas", scale, (lambdas,))
