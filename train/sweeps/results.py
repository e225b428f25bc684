"""What a sweep comes to: BPB by variant, the paired difference from the baseline, speed; as a table
in Markdown, JSON and a picture."""

import json
import statistics
from dataclasses import asdict, dataclass

from nanofuse.train.compare import Group, curve_of
from nanofuse.train.errors import UserError
from nanofuse.train.files import write_text_atomically
from nanofuse.train.metrics import Run, read_metrics
from nanofuse.train.run_folder import run_dir
from nanofuse.train.runlog import METRICS_FILE
from nanofuse.train.sweeps.jobs import read_note
from nanofuse.train.sweeps.student import Paired, paired
from nanofuse.train.tables import aligned_lines

TABLE, FIGURES, PICTURES = "table.md", "table.json", ("curves.png", "curves.svg")


@dataclass(frozen=True)
class Row:
    """A variant.

    Attributes:
        bpbs: {seed: validation BPB at the end} of the runs that have finished.
        bpb, sd: their mean, and the deviation of a sample; sd is None of one run.
        difference: from the baseline, over the seeds that both finished; None: they share none.
        ms_per_step: mean over the runs, of each the median over its log without the first window.
        slower: its ratio to the baseline's, less 1.
    """

    variant: str
    bpbs: dict[int, float]
    bpb: float
    sd: float | None
    difference: Paired | None
    ms_per_step: float | None
    slower: float | None
    tok_per_s: float | None


@dataclass(frozen=True)
class Results:
    """Rows in the order of the file, the runs behind each, and what to know of them."""

    rows: list[Row]
    groups: list[Group]
    warnings: list[str]


def finished_run(item, note):
    """The metrics.Run of a run that has finished."""
    path = run_dir(item.run) / METRICS_FILE
    train, val, core = read_metrics(path)
    return Run(item.run, path, train, val, note.settings, None, note.commit, core)


def mean_of(values):
    """The mean of those that are known, or None."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def over(value, base):
    """value / base - 1, or None where one of them is not known."""
    return None if value is None or base is None else value / base - 1


def gather(sweep, folder):
    """Results of the runs that have finished; None where none has.

    Raises:
        UserError: a file of theirs is damaged.
    """
    runs = {name: {} for name in sweep.varied}
    bpbs = {name: {} for name in sweep.varied}
    corpora, commits = set(), set()
    for item in sweep.items:
        if note := read_note(folder, item.run):
            runs[item.variant][item.seed] = finished_run(item, note)
            bpbs[item.variant][item.seed] = note.bpb
            corpora.add(note.corpus)
            commits.add(str(note.commit))
    rows, groups = [], []
    base = bpbs[sweep.baseline]
    base_ms = mean_of(run.ms_per_step for run in runs[sweep.baseline].values())
    for name in sweep.varied:
        own, found = list(runs[name].values()), bpbs[name]
        if not own:
            continue
        gaps = [found[seed] - base[seed] for seed in found if seed in base]
        ms = mean_of(run.ms_per_step for run in own)
        tokens = own[0].tokens_per_step
        rows.append(
            Row(
                name,
                found,
                statistics.mean(found.values()),
                statistics.stdev(found.values()) if len(found) > 1 else None,
                paired(gaps) if gaps and name != sweep.baseline else None,
                ms,
                over(ms, base_ms) if name != sweep.baseline else None,
                1e3 * tokens / ms if ms and tokens else None,
            )
        )
        groups.append(Group(own, curve_of(own), name))
    warnings = []
    if len(corpora) > 1:
        warnings.append("the runs were trained on different data and cannot be compared")
    if len(commits) > 1:
        warnings.append(f"the runs are of several commits: {', '.join(sorted(commits))}")
    return Results(rows, groups, warnings) if rows else None


def shown(value, form):
    return "–" if value is None else format(value, form)


def table_lines(sweep, results):
    """The table in Markdown."""
    head = ["variant", "runs", "BPB", f"minus {sweep.baseline}", "95 % interval", "p", "ms/step",
            "step", "tokens/s"]  # fmt: skip
    rows = []
    for row in results.rows:
        bpb = f"{row.bpb:.6f}" + ("" if row.sd is None else f" ± {row.sd:.6f}")
        gap, interval, p = row.difference, "–", "–"
        if gap and gap.margin is not None:
            interval = f"{gap.mean - gap.margin:+.6f} to {gap.mean + gap.margin:+.6f}"
            p = f"{gap.p:.2g}"
        rows.append(
            [
                row.variant,
                str(len(row.bpbs)),
                bpb,
                shown(gap and gap.mean, "+.6f"),
                interval,
                p,
                shown(row.ms_per_step, ".1f"),
                shown(row.slower, "+.2%"),
                shown(row.tok_per_s, ",.0f"),
            ]
        )
    yield from aligned_lines(head, rows)


def report(sweep, results):
    """Lines of text: title, table, and how to read it."""
    yield f"# {sweep.name}"
    yield ""
    if sweep.about:
        yield sweep.about
        yield ""
    yield from table_lines(sweep, results)
    yield ""
    seeds = ", ".join(map(str, sweep.seeds))
    yield (
        f"BPB of validation after the last step, mean ± standard deviation over seeds {seeds}; "
        f"differences from {sweep.baseline} seed by seed, with Student's paired t test. ms/step: "
        "median over a run's log without its first window, mean over runs."
    )
    for warning in results.warnings:
        yield f"Warning: {warning}."


def flags_of(sweep):
    """{variant: {field: value}} of the flags that were given, without seeds."""
    return {
        item.variant: {name: value for name, value in item.given.items() if name != "seed"}
        for item in sweep.items
    }


def write(sweep, results, folder):
    """Table, figures and picture into the sweep's folder.

    Returns:
        the files' names, and words for a picture that could not be drawn, or None.
    """
    figures = {
        "sweep": sweep.name,
        "baseline": sweep.baseline,
        "flags": flags_of(sweep),
        "variants": [asdict(row) for row in results.rows],
        "warnings": results.warnings,
    }
    write_text_atomically(folder / FIGURES, json.dumps(figures, indent=1) + "\n")
    write_text_atomically(folder / TABLE, "\n".join(report(sweep, results)) + "\n")
    names = [TABLE, FIGURES]
    try:
        from nanofuse.train.pictures import draw

        draw(results.groups, "steps", [folder / name for name in PICTURES])
    except UserError as error:
        return names, str(error).replace("--out", "the picture", 1)
    return [*names, *PICTURES], None


def unexpected(sweep, results):
    """A line for every BPB that is not what the sweep's file expects, or was not evaluated."""
    found = {group.name: group.runs for group in results.groups} if results else {}
    for variant, values in sweep.expected.items():
        for run in found.get(variant, []):
            for step, bpb in values.items():
                if step not in run.val:
                    yield f"{run.name}: no evaluation at step {step}, where {bpb} is expected"
                elif not abs(run.val[step].bpb - bpb) <= sweep.tolerance:
                    yield (
                        f"{run.name}: BPB {run.val[step].bpb:.6f} at step {step}, expected "
                        f"{bpb} ± {sweep.tolerance:g}"
                    )
