"""One AdamW step in place (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101).

    p <- p * (1 - lr*wd);  m <- lerp(m, g, 1 - b1);  v <- lerp(v, g^2, 1 - b2)
    p <- p - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Arithmetic is fp32 or wider whatever the storage dtype. Bytes, n elements of s bytes: 7*n*s
(p, m, v read and written, g read), 8*n*s if the gradient is cleared too. FLOPs: 16 per element.

`adamw` updates a whole list of tensors with one launch per pair of parameter and gradient dtype.
The launch reads a table, built once, with a row per block of elements that holds the addresses of
the block's p, g, m and v. A tensor may be rows that lie apart, such as every second one of a table:
blocks then end with the rows. What changes from step to step (learning-rate multiplier and step
count) is read from device memory, so that a CUDA graph can be replayed with new values: a launch of
a single program first computes the step's scalars of every tensor from it, with 1 - b^t in fp64,
where the subtraction does not cancel.
"""

from dataclasses import astuple, dataclass

import torch

from nanofuse.kernels.common.checks import check_tensor
from nanofuse.kernels.common.jit import tl, triton
from nanofuse.kernels.common.tuning import tuned

STORAGE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
VECTOR_BYTES = 16  # widest load or store of a lane


@dataclass(frozen=True)
class AdamWHyper:
    """Hyperparameters of one tensor; the schedule's lr_mult multiplies `lr`."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class AdamWConfig:
    """Bytes of a parameter that one program updates, and the program's warps."""

    block_bytes: int = 8192
    warps: int = 8


def adamw_ref(
    param,  # any shape, updated in place
    grad,  # param's shape
    exp_avg,  # param's shape, updated in place
    exp_avg_sq,  # param's shape, updated in place
    lr,  # ()
    beta1,  # ()
    beta2,  # ()
    eps,  # ()
    weight_decay,  # ()
    step,  # (), 1 at the first update
):
    """AdamW step of one tensor: updates it and its two moments in place."""
    wide = torch.promote_types(param.dtype, torch.float32)
    g = grad.to(wide)
    m = exp_avg.to(wide).lerp(g, 1 - beta1)
    v = exp_avg_sq.to(wide).lerp(g.square(), 1 - beta2)
    denominator = (v / (1 - beta2**step)).sqrt() + eps
    p = param.to(wide) * (1 - lr * weight_decay) - lr * (m / (1 - beta1**step)) / denominator
    param.copy_(p)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)


@triton.jit
def _adamw_scalars_kernel(
    hyper_ptr,  # (T, 5) fp64: lr, beta1, beta2, eps, weight_decay
    schedule_ptr,  # (2,) fp32: lr_mult, step
    scalars_ptr,  # (T, 6) fp32
    T,
    BT: tl.constexpr,
):
    """Compute each tensor's scalars of this step: 1 - beta1, 1 - beta2, lr / bias1,
    1 / sqrt(bias2), eps, lr * weight_decay, where bias = 1 - beta^step."""
    t = tl.arange(0, BT)
    ok = t < T
    lr_mult = tl.load(schedule_ptr).to(tl.float64)
    step = tl.load(schedule_ptr + 1).to(tl.float64)
    row = hyper_ptr + t * 5
    lr = tl.load(row, mask=ok, other=0.0) * lr_mult
    beta1 = tl.load(row + 1, mask=ok, other=0.5)
    beta2 = tl.load(row + 2, mask=ok, other=0.5)
    bias1 = 1 - tl.exp(step * tl.log(beta1))
    bias2 = 1 - tl.exp(step * tl.log(beta2))
    out = scalars_ptr + t * 6
    tl.store(out, 1 - beta1, mask=ok)
    tl.store(out + 1, 1 - beta2, mask=ok)
    tl.store(out + 2, lr / bias1, mask=ok)
    tl.store(out + 3, 1 / tl.sqrt(bias2), mask=ok)
    tl.store(out + 4, tl.load(row + 3, mask=ok, other=0.0), mask=ok)
    tl.store(out + 5, lr * tl.load(row + 4, mask=ok, other=0.0), mask=ok)


@triton.jit
def _adamw_block(
    p_ptr,  # (BLOCK,)
    g_ptr,  # (BLOCK,)
    m_ptr,  # (BLOCK,)
    v_ptr,  # (BLOCK,)
    scalars_ptr,  # (6,) fp32, a row of _adamw_scalars_kernel's output
    mask,  # (BLOCK,), or None for a full block, whose loads then stay 16 bytes wide
    take,
    CLEAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """AdamW step of one block, in place, where `take` holds; with CLEAR its gradient becomes 0."""
    i = tl.arange(0, BLOCK)
    g = tl.load(g_ptr + i, mask=mask).to(tl.float32)
    m = tl.load(m_ptr + i, mask=mask).to(tl.float32)
    v = tl.load(v_ptr + i, mask=mask).to(tl.float32)
    p = tl.load(p_ptr + i, mask=mask).to(tl.float32)
    w1, w2 = tl.load(scalars_ptr), tl.load(scalars_ptr + 1)
    m = (m - w1 * m) + w1 * g  # in m + w1 * (g - m), g - m would cancel where w1 is near 1
    v = (v - w2 * v) + w2 * (g * g)
    denominator = tl.sqrt(v) * tl.load(scalars_ptr + 3) + tl.load(scalars_ptr + 4)
    update = tl.load(scalars_ptr + 2) * m / denominator
    p -= update + tl.load(scalars_ptr + 5) * p
    if take:
        tl.store(m_ptr + i, m.to(m_ptr.dtype.element_ty), mask=mask)
        tl.store(v_ptr + i, v.to(v_ptr.dtype.element_ty), mask=mask)
        tl.store(p_ptr + i, p.to(p_ptr.dtype.element_ty), mask=mask)
    if CLEAR:
        tl.store(g_ptr + i, tl.zeros((BLOCK,), g_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _adamw_kernel(
    blocks_ptr,  # (B, 6) int64: addresses of p, g, m and v, elements, index of the tensor
    scalars_ptr,  # (T, 6) fp32
    take_ptr,  # (1,) fp32, or None
    DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # in bytes, of every address
    CLEAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = blocks_ptr + tl.program_id(0).to(tl.int64) * 6
    p = tl.multiple_of(tl.load(row).to(tl.pointer_type(DTYPE)), ALIGNMENT)
    g = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(GRAD_DTYPE)), ALIGNMENT)
    m = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(DTYPE)), ALIGNMENT)
    v = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(DTYPE)), ALIGNMENT)
    count = tl.load(row + 4).to(tl.int32)
    scalars = scalars_ptr + tl.load(row + 5) * 6
    take = True
    if take_ptr is not None:
        take = tl.load(take_ptr) != 0.0
    if count == BLOCK:
        _adamw_block(p, g, m, v, scalars, None, take, CLEAR, BLOCK)
    else:
        _adamw_block(p, g, m, v, scalars, tl.arange(0, BLOCK) < count, take, CLEAR, BLOCK)


def in_rows(x):
    """Whether a tensor is contiguous, or a matrix (R, C) of contiguous rows that lie apart."""
    return x.is_contiguous() or (x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= x.size(1))


@dataclass(frozen=True)
class Blocks:
    """How tensors of one shape are cut: elements of a block, a power of two; the bytes that every
    address is a multiple of; and the warps for a block."""

    elements: int
    alignment: int
    warps: int


def _lines(tensors):
    """(lines, elements of each) in whose order all of them lie: one line, or the rows."""
    if all(x.is_contiguous() for x in tensors):
        return 1, tensors[0].numel()
    return tuple(tensors[0].shape)


def blocks_of(tensors, config):
    """The Blocks of tensors of one shape, each `in_rows`: those of a config, and of rows that lie
    apart whole ones of the largest size that divides a row, with as many warps as read them 16
    bytes at a time.

    Args:
        config: AdamWConfig, or whatever has its fields.
    """
    size = tensors[0].element_size()
    elements, warps = config.block_bytes // size, config.warps
    lines, length = _lines(tensors)
    if lines > 1:
        elements = min(elements, length & -length)
        warps = min(warps, max(1, elements * size // (32 * VECTOR_BYTES)))
    steps = [elements * x.element_size() for x in tensors]
    if lines > 1:
        steps += [x.stride(0) * x.element_size() for x in tensors]
    aligned = all(n % VECTOR_BYTES == 0 for n in (*(x.data_ptr() for x in tensors), *steps))
    return Blocks(elements, VECTOR_BYTES if aligned else 1, warps)


def block_table(tuples, block):
    """A table of the blocks of tensors, (B, K + 2) int64 on the CPU: a row holds the addresses of
    one block in K tensors of one shape, its elements, and the index of the tuple.

    Args:
        tuples: [(index, (K tensors))], each tensor `in_rows`.
        block: elements of a block.
    """
    rows = []
    for index, tensors in tuples:
        lines, length = _lines(tensors)
        line = torch.arange(lines)[:, None]
        starts = torch.arange(0, length, block).expand(lines, -1)
        addresses = [
            x.data_ptr() + (line * (x.stride(0) if lines > 1 else 0) + starts) * x.element_size()
            for x in tensors
        ]
        columns = [*addresses, (length - starts).clamp_max(block), torch.full_like(starts, index)]
        rows.append(torch.stack([x.flatten() for x in columns], dim=1))
    return torch.cat(rows)


class AdamWTensors:
    """Tensors that `adamw` updates together, and the tables of addresses that its launches read.

    The tensors' storage must not move as long as this object is used; it keeps them alive.

    Args:
        params: parameters of any shape, fp32 or bf16, all on one device; like all tensors here
            contiguous, or matrices of contiguous rows that lie apart.
        grads: the gradient of each parameter, of its shape, fp32 or bf16.
        exp_avgs, exp_avg_sqs: first and second moment of each, of its shape and dtype.
        hypers: the AdamWHyper of each.

    Raises:
        ValueError: lists of different lengths or empty; a shape, dtype, device, layout or
            hyperparameter that is not as above.
    """

    def __init__(self, params, grads, exp_avgs, exp_avg_sqs, hypers):
        if not params:
            raise ValueError("adamw needs at least one tensor")
        if len({len(x) for x in (params, grads, exp_avgs, exp_avg_sqs, hypers)}) > 1:
            raise ValueError("adamw needs a gradient, two moments and an AdamWHyper per parameter")
        self.tensors = list(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True))
        for index, (tensors, hyper) in enumerate(zip(self.tensors, hypers, strict=True)):
            self._check(index, tensors, hyper)
        self._addresses = [tuple(x.data_ptr() for x in tensors) for tensors in self.tensors]
        device = params[0].device
        self.hyper = torch.tensor([astuple(x) for x in hypers], dtype=torch.float64, device=device)
        self.scalars = torch.empty(len(params), 6, dtype=torch.float32, device=device)
        self.config = tuned("adamw", AdamWConfig())
        groups = {}
        for index, tensors in enumerate(self.tensors):
            if tensors[0].numel():
                key = tensors[0].dtype, tensors[1].dtype, blocks_of(tensors, self.config)
                groups.setdefault(key, []).append((index, tensors))
        self.launches = [  # (block table, DTYPE, GRAD_DTYPE, Blocks)
            (
                block_table(group, blocks.elements).to(device),
                STORAGE[dtype],
                STORAGE[grad_dtype],
                blocks,
            )
            for (dtype, grad_dtype, blocks), group in groups.items()
        ]

    def _check(self, index, tensors, hyper):
        param, grad, exp_avg, exp_avg_sq = tensors
        if any(x.shape != param.shape for x in tensors):
            raise ValueError(f"tensor {index}: gradient or moments of another shape")
        if any(x.device != self.tensors[0][0].device for x in tensors):
            raise ValueError(f"tensor {index}: all tensors must be on one device")
        if not all(map(in_rows, tensors)):
            raise ValueError(f"tensor {index}: adamw takes contiguous tensors or rows only")
        if param.dtype not in STORAGE or grad.dtype not in STORAGE:
            raise ValueError(f"tensor {index}: parameters and gradients are fp32 or bf16")
        if exp_avg.dtype != param.dtype or exp_avg_sq.dtype != param.dtype:
            raise ValueError(f"tensor {index}: moments must have the parameter's dtype")
        if not (0 <= hyper.beta1 < 1 and 0 <= hyper.beta2 < 1):
            raise ValueError(f"tensor {index}: betas must be in [0, 1), got {hyper}")

    def check_addresses(self):
        """Check on the host that the tables still hold the tensors' addresses.

        Raises:
            ValueError: a tensor's storage moved, or a parameter's .grad is not the registered one.
        """
        for index, (tensors, known) in enumerate(zip(self.tensors, self._addresses, strict=True)):
            if tuple(x.data_ptr() for x in tensors) != known:
                raise ValueError(f"tensor {index}: its storage moved; build AdamWTensors again")
            grad = tensors[0].grad
            if grad is not None and grad.data_ptr() != known[1]:
                raise ValueError(
                    f"tensor {index}: .grad is not the registered gradient; "
                    "clear gradients in place, not by dropping them"
                )


def adamw_schedule(lr_mult, step, device):
    """The (2,) fp32 tensor that `adamw` reads: multiplier of every lr, and step (the first is 1).

    It is copied to a GPU from pinned memory, asynchronously.
    """
    pinned = torch.device(device).type == "cuda"
    schedule = torch.tensor([lr_mult, step], dtype=torch.float32, pin_memory=pinned)
    return schedule.to(device, non_blocking=True)


def adamw(
    tensors,
    schedule,  # (2,) fp32: lr_mult, step
    clear_grad=False,
    take=None,  # (1,) fp32
):
    """One AdamW step of all tensors of an AdamWTensors, in place.

    A CUDA graph of this call reads `schedule` and `tensors.hyper` anew at every replay.

    Args:
        clear_grad: set every gradient to zero after it is read.
        take: where it is 0, parameters and moments stay as they are, and gradients are cleared
            all the same; None: always take the step. Read on the device.

    Raises:
        ValueError: schedule or take is not contiguous fp32 of its shape; a tensor moved
            (AdamWTensors.check_addresses).
    """
    check_tensor("adamw", "schedule", schedule, (2,), torch.float32)
    if take is not None:
        check_tensor("adamw", "take", take, (1,), torch.float32)
    tensors.check_addresses()
    count = len(tensors.tensors)
    _adamw_scalars_kernel[(1,)](
        tensors.hyper, schedule, tensors.scalars, count, BT=triton.next_power_of_2(count)
    )
    for table, dtype, grad_dtype, blocks in tensors.launches:
        _adamw_kernel[(len(table),)](
            table,
            tensors.scalars,
            take,
            DTYPE=dtype,
            GRAD_DTYPE=grad_dtype,
            ALIGNMENT=blocks.alignment,
            CLEAR=clear_grad,
            BLOCK=blocks.elements,
            num_warps=blocks.warps,
        )
