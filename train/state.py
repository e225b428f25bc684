"""What optim.safetensors of a checkpoint holds: the optimiser's state and the fused pass's scales.

The optimiser's tensors go by its names, the FP8 scales by theirs behind "fp8.". Every backend reads
what every other one wrote: without scales a fused pass starts with fresh ones, and the others leave
them out.
"""

from nanofuse.model.fused import FusedGPT
from nanofuse.train.errors import UserError

FP8_PREFIX = "fp8."


def training_state(model, optimizer):
    """State beside the weights, a flat {name: tensor}; of several ranks, what this one is to save.

    Args:
        model: what is called for losses, a FusedGPT or another one.
        optimizer: train.optim.muon_adamw.MuonAdamW.
    """
    # on every rank, as making scales anew may take a word of all; they are the same on all
    scales = model.operands.state_dict() if isinstance(model, FusedGPT) else {}
    if not optimizer.ranks.main:
        scales = {}
    return optimizer.state_dict() | {FP8_PREFIX + name: x for name, x in scales.items()}


def load_training_state(model, optimizer, tensors, step_count):
    """Restore what `training_state` gave, of any backend, before or after the weights.

    Args:
        tensors: {name: whole tensor}, of all ranks that trained.

    Raises:
        UserError: names or shapes of another model; nothing has changed.
    """
    prefix = len(FP8_PREFIX)
    scales = {n[prefix:]: tensors[n] for n in tensors if n.startswith(FP8_PREFIX)}
    fused = isinstance(model, FusedGPT)
    if fused:
        try:
            model.operands.check(scales)
        except ValueError as error:
            raise UserError(str(error)) from None
    optimizer.load_state_dict(tensors, step_count)
    if fused:
        model.operands.load_state_dict(scales)
