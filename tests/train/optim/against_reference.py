"""Steps of an optimiser beside those of reference.py, with gradients of every size."""

import torch

from nanofuse.train.schedules import Schedule, batch_lr_scale, scaled_weight_decay
from tests.train.optim.reference import Reference

BATCH, RATIO, STEPS = 2**17, 0.5, 100
FIRST_STEPS = (0, 1, 2, 3, 4)
LR_SCALE = batch_lr_scale(BATCH)
SIZES = (1.0, 1e-8, 1e-12, 0.0, 1e4, "uneven")
EPS = torch.finfo(torch.float32).eps


def gradient(shape, size, generator):
    """Normal values times `size`; "uneven": rows and columns from 1e-14 to 1, of which one is 0."""
    g = torch.randn(shape, generator=generator)
    if size != "uneven":
        return g * size
    for dim, count in enumerate(shape):
        share = torch.logspace(-7, 0, count)
        share[count // 2] = 0.0
        g = g * share.view([-1 if i == dim else 1 for i in range(g.dim())])
    return g


def gradients(model, seed, shift):
    """{name: gradient}; the sizes take turns, so that `shift` gives every tensor another one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: gradient(p.shape, SIZES[(i + shift) % len(SIZES)], generator)
        for i, (name, p) in enumerate(model.named_parameters())
    }


def assert_steps_of_the_reference(model, optimizer, shift, positions, tolerance, device):
    """Take steps at `positions` of the schedule and compare every tensor's change.

    The error's norm may be `tolerance` of the change's, and fp32's rounding of the parameter.
    """
    start = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    options = optimizer.config.muon_eq, optimizer.config.muon_plus
    arrays = {name: x.numpy() for name, x in start.items()}
    reference = Reference(arrays, BATCH, RATIO, STEPS, *options)
    schedule, decay = Schedule(STEPS), scaled_weight_decay(0.28, BATCH, 1.0, RATIO)
    for position in positions:
        grads = gradients(model, position, shift)
        for name, p in model.named_parameters():
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(grads[name].to(device))
        numbers = schedule.lr(position), schedule.momentum(position)
        optimizer.step(*numbers, decay * schedule.weight_decay(position))
        optimizer.zero_grad()
        reference.step({name: g.numpy() for name, g in grads.items()}, position)
    worst = {}
    for name, p in model.named_parameters():
        before = start[name].double()
        expected = torch.from_numpy(reference.tensors[name])
        change = (expected - before).norm()
        error = (p.detach().cpu().double() - expected).norm()
        rounding = len(positions) * EPS / 2 * before.norm()
        worst[name] = ((error - rounding) / change.clamp_min(1e-300)).item()
        assert error <= tolerance * change + rounding, f"{name}: {error:.2e} of {change:.2e}"
    print(f"largest error: {max(worst.values()):.2e} of the change ({max(worst, key=worst.get)})")
