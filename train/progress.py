"""What a checkpoint carries of the loop beside the tensors."""

from dataclasses import dataclass

EMA_DECAY = 0.9  # of the smoothed loss, a step
UNCOUNTED_STEPS = 11  # of nanochat's training time: its first ones


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    train_seconds: float = 0.0  # in training steps only: no evaluation, no saving
    counted_seconds: float = 0.0  # of these, those after UNCOUNTED_STEPS
    val_bpb: float | None = None  # of the latest evaluation
    val_step: int | None = None  # which was at this step
    best_bpb: float | None = None
    loss: float | None = None
    loss_ema: float = 0.0  # sum of the losses so far, weighted with powers of EMA_DECAY
    loss_ema_steps: int = 0

    @property
    def smoothed_loss(self):
        """Mean of the losses so far, weighted with powers of EMA_DECAY; None before the first."""
        weight = 1 - EMA_DECAY**self.loss_ema_steps
        return self.loss_ema / weight if weight else None

    def count_seconds(self, seconds, steps):
        """Take up the time of the last `steps` steps, spread evenly over them."""
        self.train_seconds += seconds
        counted = min(max(self.step - UNCOUNTED_STEPS, 0), steps)
        self.counted_seconds += seconds * counted / steps

    @property
    def own_bpb(self):
        """Validation BPB of the weights of this step, or None."""
        return self.val_bpb if self.val_step == self.step else None

    def note_bpb(self, bpb):
        """Take up an evaluation of the weights of this step."""
        self.val_bpb, self.val_step = bpb, self.step
        self.best_bpb = bpb if self.best_bpb is None else min(bpb, self.best_bpb)
