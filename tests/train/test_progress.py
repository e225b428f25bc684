import pytest

from nanofuse.train.progress import Progress


def test_a_run_begins_with_nothing():
    assert set(vars(Progress()).values()) == {0, None}
    assert Progress().smoothed_loss is None


def test_the_smoothed_loss_is_a_weighted_mean():
    """As the loop keeps its sum, `ema.lerp(loss, 0.1)`."""
    progress, losses = Progress(), [4.0, 2.0, 3.0]
    for loss in losses:
        progress.loss_ema += 0.1 * (loss - progress.loss_ema)
        progress.loss_ema_steps += 1
    weights = [0.9**2, 0.9, 1]
    expected = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    assert progress.smoothed_loss == pytest.approx(expected)


def test_the_first_eleven_steps_are_not_counted_as_nanochat_has_it():
    progress = Progress()
    for steps in (5, 4, 4, 3):  # windows; the third goes from step 10 to 13
        progress.step += steps
        progress.count_seconds(8.0, steps)
    assert progress.train_seconds == 32.0
    assert progress.counted_seconds == 8.0 * 2 / 4 + 8.0


def test_bpb_belongs_to_a_step():
    progress = Progress(step=3)
    assert progress.own_bpb is None
    for step, bpb in ((3, 1.5), (4, 1.25), (5, 1.75)):
        progress.step = step
        progress.note_bpb(bpb)
        assert (progress.own_bpb, progress.val_step) == (bpb, step)
    assert progress.best_bpb == 1.25
    progress.step = 6
    assert progress.own_bpb is None and progress.val_bpb == 1.75
