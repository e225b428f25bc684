"""Runs side by side: loss, validation BPB and speed by step, tokens or time.

python -m train.plot runs/fused runs/compiled runs/bf16 [--x time] [--out curves] [--json]

Every RUN is a folder that train.run wrote, its name under runs/, or a metrics.jsonl. Runs whose
settings differ in seed and name only are one configuration, and shown as mean ± sd; the first one
is what the others are compared with. Prints BPB at equal steps, tokens and time, and the compute
multipliers. With --out a picture is drawn, as FILE or, without a suffix, FILE.png and FILE.svg.
"""

import json
from dataclasses import asdict
from pathlib import Path

from nanofuse.train.command import CommandParser, not_empty, run_command
from nanofuse.train.compare import AXES, bpb_at, changes, columns, furthest, grouped, multiplier
from nanofuse.train.errors import UserError
from nanofuse.train.metrics import read_run
from nanofuse.train.settings import flag_name
from nanofuse.train.tables import aligned_lines

MILLIONS = 100_000  # tokens from which on they are counted in millions
SUFFIXES = (".png", ".svg")
NOTE = """\
Multipliers: what the first needs over what this one needs, to the lowest BPB that both reached;
BPB is a straight line between evaluations. Seconds are of training steps; the first window of
steps, which compiles, counts at the median rate of the others."""


def distinct(runs, given):
    """The runs, with what was given in place of a name that two of them have.

    Raises:
        UserError: one was given twice.
    """
    paths = [run.path.resolve() for run in runs]
    for path, name in zip(paths, given, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"{name} is given twice; name each run once")
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else type(run)(**{**vars(run), "name": name})
        for run, name in zip(runs, given, strict=True)
    ]


def number(value, form):
    return "–" if value is None else format(value, form)


def position(axis, x):
    """A position in words, such as "52.4 M tokens"."""
    if axis == "steps":
        return f"step {x:,}"
    if axis == "time":
        return f"{x:,.1f} s"
    return f"{x / 1e6:,.1f} M tokens" if x >= MILLIONS else f"{x:,.0f} tokens"


def said(value):
    """A setting's value in words."""
    return "''" if value == "" else value


def cell(found):
    """BPB and its sd, (BPB, sd) or None, as a table shows them."""
    if found is None:
        return "–"
    bpb, sd = found
    return f"{bpb:.6f}" if sd is None else f"{bpb:.6f} ± {sd:.6f}"


def known_axes(groups):
    """The axes of which every group's positions are known."""
    return [axis for axis in AXES if not any(None in group.positions(axis) for group in groups)]


def report(groups):
    """Lines of text for people."""
    first = groups[0]
    one_size = len({group.runs[0].tokens_per_step for group in groups}) == 1
    for axis in known_axes(groups):
        if axis == "tokens" and one_size:
            continue  # the table of steps
        at = columns(groups, axis)
        title = "steps and tokens" if axis == "steps" and one_size else axis
        title = f"at equal {title}" if len(groups) > 1 else f"by {title}"
        yield f"{title}:" if at else f"{title}: the runs have none in common"
        if at:
            head = ["run", *(f"BPB at {position(axis, x)}" for x in at)]
            rows = [[group.name, *(cell(bpb_at(group, axis, x)) for x in at)] for group in groups]
            yield from aligned_lines(head, rows)
        yield ""
    head = ["run", "furthest from the first", "ms/step", "FLOPs multiplier", "seconds multiplier",
            "at BPB"]  # fmt: skip
    rows = [[first.name, "–", number(first.ms_per_step, ".1f"), "–", "–", "–"]]
    for group in groups[1:]:
        found = multiplier(group, first)
        rows.append(
            [
                group.name,
                number(furthest(group, first), "+.6f"),
                number(group.ms_per_step, ".1f"),
                number(found.flops, ".3f"),
                number(found.seconds, ".3f"),
                number(found.bpb, ".6f"),
            ]
        )
    if len(groups) > 1:
        yield from aligned_lines(head, rows)
        yield NOTE
    else:
        yield f"{first.name}: {number(first.ms_per_step, '.1f')} ms/step"
    for group in groups:
        commits = sorted({str(run.commit) for run in group.runs})
        if len(commits) > 1:
            yield f"{group.name}: of several commits ({', '.join(commits)}); --apart parts them"
        if group is not first:
            yield f"{group.name}: {differences(group, first)}"


def differences(group, first):
    """In words, the settings in which a group differs from the first."""
    found = changes(group, first)
    if found is None:
        return "settings not known, as there is no checkpoint beside the metrics"
    shown = (
        f"{flag_name(name)} {said(new)} (first: {said(old)})" for name, (new, old) in found.items()
    )
    return ", ".join(shown) or "the first one's settings"


def as_json(groups):
    """All of it, JSON-able."""
    first = groups[0]
    return {
        "groups": [
            {
                "name": group.name,
                "runs": [run.name for run in group.runs],
                "commits": [run.commit for run in group.runs],
                "changes": changes(group, first),
                "ms_per_step": group.ms_per_step,
                "evaluations": [asdict(point) for point in group.curve],
                "furthest": furthest(group, first),
                "multiplier": asdict(multiplier(group, first)),
            }
            for group in groups
        ],
        "equal": {
            axis: [
                {"at": x, "bpb": [(bpb_at(group, axis, x) or [None])[0] for group in groups]}
                for x in columns(groups, axis)
            ]
            for axis in known_axes(groups)
        },
    }


def picture_paths(out):
    """Where the picture goes: FILE with its suffix, or with both.

    Raises:
        UserError: another suffix, or a folder.
    """
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file in it")
    if out.suffix in SUFFIXES:
        return [out]
    if out.suffix:
        raise UserError(f"--out {out} must end in {' or '.join(SUFFIXES)}, or have no suffix")
    return [out.with_suffix(suffix) for suffix in SUFFIXES]


def main(argv=None):
    parser = CommandParser(prog="python -m train.plot", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", type=not_empty, help="the first leads")
    parser.add_argument("--x", choices=list(AXES), default="steps", help="axis of the picture")
    parser.add_argument(
        "--out", type=not_empty, metavar="FILE", help="picture, .png or .svg (no suffix: both)"
    )
    parser.add_argument("--apart", action="store_true", help="do not group seeds")
    parser.add_argument("--json", action="store_true", help="JSON in place of tables")
    args = parser.parse_args(argv)
    paths = picture_paths(Path(args.out)) if args.out else []
    runs = distinct([read_run(given) for given in args.runs], args.runs)
    groups = grouped(runs, args.apart)
    if args.x not in known_axes(groups):
        raise UserError(f"--x {args.x}: a run has logged no training step; use --x steps")
    if paths:
        from nanofuse.train.pictures import draw  # needs matplotlib

        draw(groups, args.x, paths)
    if args.json:
        print(json.dumps(as_json(groups), indent=1))
    else:
        print("\n".join(report(groups)))
        if paths:
            print(f"written: {', '.join(map(str, paths))}")


if __name__ == "__main__":
    run_command(main)
