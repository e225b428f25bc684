"""The picture of train.plot: a panel for each figure that the runs logged."""

import io

from nanofuse.train.compare import AXES
from nanofuse.train.errors import UserError
from nanofuse.train.files import write_atomically

COLUMNS = 3
PANEL = 5.0, 3.4  # inches
PANELS = {  # of training records, and of CORE's, by field
    "loss_ema": "loss, smoothed",
    "lr_mult": "learning rate, of its peak",
    "tok_per_s": "tokens/s",
    "grad_norm": "gradient norm",
    "fp8_clipped": "tensors clipped in FP8",
    "core": "CORE",
}
LABELS = {"steps": "step", "tokens": "tokens", "time": "seconds of training"}


def smoothed(record):
    """The smoothed loss; the step's own in logs of 0.1, which lack it."""
    return record.loss if record.loss_ema is None else record.loss_ema


def series(run, field, axis):
    """Positions and values of a field of a run's records, without those that were not finite."""
    read = smoothed if field == "loss_ema" else lambda record: getattr(record, field)
    records = list((run.core if field == "core" else run.train).values())
    if field == "tok_per_s":  # the first window compiles
        records = records[1:]
    xs = {
        "steps": lambda record: record.step,
        "tokens": lambda record: record.step * run.tokens_per_step,
        "time": run.seconds,
    }[axis]
    pairs = [(xs(record), read(record)) for record in records if read(record) is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def draw_bpb(axes, groups, axis, colours):
    """Validation BPB, mean and sd."""
    for group, colour in zip(groups, colours, strict=True):
        points = [p for p in group.curve if p.step or len(group.curve) < 3]  # step 0 is far above
        xs = [getattr(point, AXES[axis]) for point in points]
        axes.plot(xs, [p.bpb for p in points], marker=".", color=colour, label=group.name)
        if len(group.runs) > 1:
            low, high = ([p.bpb + sign * p.sd for p in points] for sign in (-1, 1))
            axes.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_title("validation BPB")


def draw_gaps(axes, groups, axis, colours):
    """BPB minus the first group's, at steps that both evaluated."""
    theirs = {point.step: point.bpb for point in groups[0].curve}
    for group, colour in zip(groups, colours, strict=True):
        points = [point for point in group.curve if point.step in theirs]
        xs = [getattr(point, AXES[axis]) for point in points]
        axes.plot(xs, [p.bpb - theirs[p.step] for p in points], marker=".", color=colour)
    axes.set_title(f"validation BPB at equal steps, minus {groups[0].name}")


def figure_of(groups, axis):
    """The matplotlib Figure of groups of runs by an axis of compare.AXES.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "--out needs matplotlib; install it with pip install -e '.[plot]'"
        ) from None
    colours = [f"C{index}" for index in range(len(groups))]
    lines = {
        field: [[series(run, field, axis) for run in group.runs] for group in groups]
        for field in PANELS
    }
    shown = [f for f in PANELS if any(xs for runs in lines[f] for xs, _ in runs)]
    gaps = len(groups) > 1
    count = 1 + gaps + len(shown)
    rows = -(-count // COLUMNS)
    figure = Figure(figsize=(PANEL[0] * COLUMNS, PANEL[1] * rows), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False).flat
    draw_bpb(grid[0], groups, axis, colours)
    if gaps:
        draw_gaps(grid[1], groups, axis, colours)
    for axes, field in zip(grid[1 + gaps : count], shown, strict=True):
        for runs, colour in zip(lines[field], colours, strict=True):
            for xs, ys in runs:
                axes.plot(xs, ys, color=colour, linewidth=1, marker="." if len(xs) == 1 else None)
        axes.set_title(PANELS[field])
    for axes in grid[:count]:
        axes.set_xlabel(LABELS[axis])
        axes.grid(alpha=0.3)
    for axes in grid[count:]:
        axes.remove()
    grid[0].legend()
    return figure


def draw(groups, axis, paths):
    """Write the picture to each path, in the format of its suffix; the same runs, the same bits.

    Raises:
        UserError: matplotlib is not installed, or a file cannot be written.
    """
    figure = figure_of(groups, axis)
    import matplotlib

    for path in paths:
        content = io.BytesIO()
        svg = path.suffix == ".svg"
        with matplotlib.rc_context({"svg.hashsalt": "nanofuse"}):
            metadata = {"Date": None} if svg else None
            figure.savefig(content, format=path.suffix[1:], dpi=150, metadata=metadata)
        try:
            write_atomically(path, content.getvalue())
        except OSError as error:
            raise UserError(f"--out: {path} cannot be written ({error.strerror})") from None
