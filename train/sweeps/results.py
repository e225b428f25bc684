"""What a sweep comes to: BPB by variant, the paired difference from the baseline, speed; as a table
in Markdown, JSON and a picture."""

import json
import statistics
from dataclasses import asdict, dataclass

from nanofuse.train.compare import Group, curve_of
from nanofuse.train.data.corpus import open_corpus
from nanofuse.train.data.digest import count_documents, data_digest
from nanofuse.train.data.tokenizer import FILE_NAME, Tokenizer
from nanofuse.train.errors import UserError
from nanofuse.train.files import write_text_atomically
from nanofuse.train.metrics import Run, read_metrics
from nanofuse.train.run_folder import run_dir
from nanofuse.train.runlog import METRICS_FILE
from nanofuse.train.sweeps.jobs import note_path, read_note
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
        ms_per_step: mean over the runs, of each the median over its log without the first window;
            of those that had a GPU to themselves, if any.
        slower: its ratio to the baseline's, less 1; None where one of them is of shared GPUs.
        shared: whether all runs shared their GPUs with others.
    """

    variant: str
    bpbs: dict[int, float]
    bpb: float
    sd: float | None
    difference: Paired | None
    ms_per_step: float | None
    slower: float | None
    tok_per_s: float | None
    shared: bool = False


@dataclass(frozen=True)
class Results:
    """Rows in the order of the file, the runs behind each, and what to know of them."""

    rows: list[Row]
    groups: list[Group]
    warnings: list[str]


def finished_run(item, note, folder):
    """The metrics.Run of a run that has finished.

    Raises:
        UserError: its log is gone, or damaged.
    """
    path = run_dir(item.run) / METRICS_FILE
    way_out = f"put a copy back, or delete {path.parent} and {note_path(folder, item.run)}"
    try:
        train, val, core = read_metrics(path)
    except UserError as error:
        raise UserError(f"{str(error).rpartition(';')[0] or error}; {way_out}") from None
    if not val:
        raise UserError(f"{path} holds no evaluation, though the run has finished; {way_out}")
    return Run(item.run, path, train, val, note.settings, None, note.commit, core)


def step_time(runs, shared):
    """(milliseconds of a step, mean over runs and None where not known; whether they are of GPUs
    that other runs shared). Runs that had a GPU to themselves count alone, where there are any.

    Args:
        runs: {seed: metrics.Run}.
        shared: seeds of the runs that shared a GPU.
    """
    alone = [run for seed, run in runs.items() if seed not in shared]
    times = [run.ms_per_step for run in alone or runs.values()]
    known = [time for time in times if time is not None]
    return statistics.mean(known) if known else None, not alone


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
    shared = {name: set() for name in sweep.varied}
    corpora, commits = set(), set()
    for item in sweep.items:
        if note := read_note(folder, item.run):
            runs[item.variant][item.seed] = finished_run(item, note, folder)
            bpbs[item.variant][item.seed] = note.bpb
            if note.shared:
                shared[item.variant].add(item.seed)
            corpora.add(note.corpus)
            commits.add(str(note.commit))
    rows, groups = [], []
    base = bpbs[sweep.baseline]
    base_ms, base_shared = step_time(runs[sweep.baseline], shared[sweep.baseline])
    for name in sweep.varied:
        own, found = list(runs[name].values()), bpbs[name]
        if not own:
            continue
        gaps = [found[seed] - base[seed] for seed in found if seed in base]
        ms, of_shared = step_time(runs[name], shared[name])
        comparable = name != sweep.baseline and not (of_shared or base_shared)
        tokens = own[0].tokens_per_step
        rows.append(
            Row(
                name,
                found,
                statistics.mean(found.values()),
                statistics.stdev(found.values()) if len(found) > 1 else None,
                paired(gaps) if gaps and name != sweep.baseline else None,
                ms,
                over(ms, base_ms) if comparable else None,
                1e3 * tokens / ms if ms and tokens else None,
                of_shared,
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
            "slower by", "tokens/s"]  # fmt: skip
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
                shown(row.ms_per_step, ".1f") + (" (shared)" if row.shared else ""),
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
        "median over a run's log without its first window, mean over runs; slower by: over "
        f"{sweep.baseline}'s."
    )
    if any(row.shared for row in results.rows):
        yield (
            "(shared): several runs trained on one GPU at a time; these ms/step and tokens/s are "
            "not those of a run alone, and are compared with nothing. BPB is the same."
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


def other_data(sweep, folder):
    """A line where what the sweep's file expects is of other data than a finished run's, else None.

    Raises:
        UserError: data or tokenizer cannot be read.
    """
    if sweep.corpus is None:
        return None
    ran = set()
    for item in sweep.items:
        note = read_note(folder, item.run) if item.variant in sweep.expected else None
        if note:
            job = item.settings.job
            tokenizer = Tokenizer.load(run_dir(item.run) / FILE_NAME).fingerprint
            ran.add((job.data, job.text_column, job.val_shard, note.corpus, tokenizer))
    for *place, fingerprint, tokenizer in ran:
        corpus = open_corpus(*place)
        same = corpus.fingerprint == fingerprint  # the data may have changed since
        same = same and sweep.corpus.startswith(f"{count_documents(corpus)}-")
        if not (same and data_digest(corpus, tokenizer) == sweep.corpus):
            return (
                f"BPB is not compared with what {sweep.path.name} expects: that is of corpus "
                f"{sweep.corpus}, and this is another (python -m train.data digest)"
            )
    return None


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
