"""Runs compared: seeds of one configuration together, and BPB at equal steps, tokens and time.

A group is the runs of one configuration. Its curve has the steps that all of its runs evaluated.
Between two evaluations BPB is taken to be a straight line.
"""

import statistics
from dataclasses import dataclass
from typing import Any

from nanofuse.train.errors import UserError
from nanofuse.train.metrics import Run

AXES = {"steps": "step", "tokens": "tokens", "time": "seconds"}  # --x: field of a Point
MOST_COLUMNS = 6  # of a table of BPB


@dataclass(frozen=True)
class Point:
    """An evaluation of a group: means over its runs; `sd` of BPB, None of a single run; seconds as
    Run.seconds counts them."""

    step: int
    bpb: float
    sd: float | None
    seconds: float
    tokens: int | None
    flops: float | None


@dataclass(frozen=True)
class Group:
    """Runs of one configuration; `label` is its name where it has one."""

    runs: list[Run]
    curve: list[Point]
    label: str | None = None

    @property
    def name(self) -> str:
        if self.label is not None:
            return self.label
        first = self.runs[0].name
        return first if len(self.runs) == 1 else f"{first} and {len(self.runs) - 1} more"

    @property
    def ms_per_step(self) -> float | None:
        times = [run.ms_per_step for run in self.runs if run.ms_per_step is not None]
        return statistics.mean(times) if times else None

    def positions(self, axis: str) -> list[float]:
        """Of the curve's points on an axis of AXES."""
        return [getattr(point, AXES[axis]) for point in self.curve]


def curve_of(runs: list[Run]) -> list[Point]:
    """The curve of a configuration's runs.

    Raises:
        UserError: they have no step in common.
    """
    steps = sorted(set.intersection(*(set(run.val) for run in runs)))
    if not steps:
        names = ", ".join(run.name for run in runs)
        raise UserError(
            f"{names}: runs of one configuration, and no step that all of them evaluated"
        )
    size, flops = runs[0].tokens_per_step, runs[0].flops_per_token
    points = []
    for step in steps:
        bpbs = [run.val[step].bpb for run in runs]
        points.append(
            Point(
                step,
                statistics.mean(bpbs),
                statistics.stdev(bpbs) if len(bpbs) > 1 else None,
                statistics.mean(run.seconds(run.val[step]) for run in runs),
                None if size is None else size * step,
                None if size is None or flops is None else float(size) * step * flops,
            )
        )
    return points


def grouped(runs: list[Run], apart: bool = False) -> list[Group]:
    """The runs by configuration, in their order; a run whose settings are unknown is by itself.

    Args:
        apart: each run by itself.

    Raises:
        UserError: as curve_of.
    """
    parts: list[list[Run]] = []
    for run in runs:
        same = [p for p in parts if run.settings and p[0].configuration == run.configuration]
        if same and not apart:
            same[0].append(run)
        else:
            parts.append([run])
    try:
        return [Group(part, curve_of(part)) for part in parts]
    except UserError as error:
        raise UserError(f"{error}; compare them one by one with --apart") from None


def changes(group: Group, first: Group) -> dict[str, tuple[Any, Any]] | None:
    """{setting: (value, value in the first group)} that differ; None: not known of both."""
    mine, theirs = group.runs[0].configuration, first.runs[0].configuration
    if mine is None or theirs is None:
        return None
    names = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
    return {name: (mine.get(name), theirs.get(name)) for name in names}


def bpb_at(group: Group, axis: str, x: float) -> tuple[float, float | None] | None:
    """BPB and its sd at a position of an axis, None beyond the evaluations; between two of them the
    sd is the larger one of theirs."""
    xs = group.positions(axis)
    for index, point in enumerate(group.curve):
        if xs[index] == x:
            return point.bpb, point.sd
        if index and xs[index - 1] < x < xs[index]:
            before = group.curve[index - 1]
            share = (x - xs[index - 1]) / (xs[index] - xs[index - 1])
            sd = None if point.sd is None or before.sd is None else max(point.sd, before.sd)
            return before.bpb + share * (point.bpb - before.bpb), sd
    return None


def columns(groups: list[Group], axis: str) -> list[float]:
    """Positions at which all groups can be compared: those of the first one's evaluations that lie
    within all curves, and where the first curve ends; at most MOST_COLUMNS."""
    ranges = [group.positions(axis) for group in groups]
    low, high = max(xs[0] for xs in ranges), min(xs[-1] for xs in ranges)
    found = [x for x in ranges[0] if low <= x <= high]
    if low <= high and high not in found:
        found.append(high)
    if len(found) > 1 and found[0] == 0:  # nothing is learned there
        found = found[1:]
    if len(found) <= MOST_COLUMNS:
        return found
    stride = (len(found) - 1) / (MOST_COLUMNS - 1)
    return [found[round(stride * i)] for i in range(MOST_COLUMNS)]


def furthest(group: Group, first: Group) -> float | None:
    """Largest signed difference in BPB from the first group where both evaluated, or None."""
    theirs = {point.step: point.bpb for point in first.curve}
    gaps = [point.bpb - theirs[point.step] for point in group.curve if point.step in theirs]
    return max(gaps, key=abs, default=None)


def cost_of(group: Group, field: str, bpb: float) -> float | None:
    """FLOPs or seconds after which a group first has this BPB; None: unknown, or never."""
    before = None
    for point in group.curve:
        cost = getattr(point, field)
        if cost is None:
            return None
        if point.bpb <= bpb:
            if before is None:
                return cost
            then = getattr(before, field)
            return then + (cost - then) * (before.bpb - bpb) / (before.bpb - point.bpb)
        before = point
    return None


@dataclass(frozen=True)
class Multiplier:
    """How much cheaper a group reaches a BPB than the first: above 1 it is cheaper.

    Attributes:
        bpb: the lowest that both reached.
        flops, seconds: what the first group needs over what this one needs; None: not known.
    """

    name: str
    bpb: float
    flops: float | None
    seconds: float | None


def multiplier(group: Group, first: Group) -> Multiplier:
    """Of a group against the first one."""
    bpb = max(min(point.bpb for point in each.curve) for each in (group, first))

    def ratio(field: str) -> float | None:
        mine, theirs = cost_of(group, field, bpb), cost_of(first, field, bpb)
        return theirs / mine if mine and theirs else None

    return Multiplier(group.name, bpb, ratio("flops"), ratio("seconds"))
