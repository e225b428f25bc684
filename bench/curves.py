"""Training runs side by side: validation BPB and loss by step, and what a step took.

python -m bench.curves runs/fused runs/compiled runs/bf16 [--out records/DATE-curves]

Every folder is one that train.run wrote; the first is what the others are compared with. Prints
a Markdown table of validation BPB and milliseconds per step, and the largest difference from the
first run at steps that both evaluated. Into --out go curves.md, curves.json and, where matplotlib
is installed, curves.png.
"""

import json
import statistics
from pathlib import Path

from nanofuse.bench.report import table_lines
from nanofuse.train.command import CommandParser, run_command
from nanofuse.train.errors import UserError
from nanofuse.train.files import make_folder
from nanofuse.train.runlog import METRICS_FILE


def read_run(folder):
    """{"name", "bpb": {step: BPB}, "loss": {step: nats}, "ms": median ms/step} of a run's folder.

    The first window of steps, which compiles, does not count for "ms".

    Raises:
        UserError: no metrics, or no evaluation in them.
    """
    path = Path(folder) / METRICS_FILE
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        values = {kind: [r for r in records if r["kind"] == kind] for kind in ("val", "train")}
        bpb = {r["step"]: r["bpb"] for r in values["val"]}
        loss = {r["step"]: r["loss"] for r in values["train"]}
        times = [r["ms_per_step"] for r in values["train"]][1:]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is missing or damaged; give folders that train.run wrote"
        ) from None
    if not bpb:
        raise UserError(f"{path} holds no evaluation; train with --eval-every above 0")
    ms = statistics.median(times) if times else None
    return {"name": Path(folder).name, "bpb": bpb, "loss": loss, "ms": ms}


def gaps(run, first):
    """{step: BPB minus the first run's} at common steps."""
    common = sorted(run["bpb"].keys() & first["bpb"].keys())
    return {step: run["bpb"][step] - first["bpb"][step] for step in common}


def furthest(run, first):
    """Largest signed difference in BPB from the first run at common steps, or None without any."""
    return max(gaps(run, first).values(), key=abs, default=None)


def compare(runs):
    """Lines of the Markdown table."""
    steps = sorted({step for run in runs for step in run["bpb"]})
    rows = []
    for run in runs:
        gap = furthest(run, runs[0])
        rows.append(
            [
                run["name"],
                *(f"{run['bpb'][step]:.6f}" if step in run["bpb"] else "–" for step in steps),
                "–" if gap is None else f"{gap:+.6f}",
                "–" if run["ms"] is None else f"{run['ms']:.1f}",
            ]
        )
    head = ["run", *(f"BPB at {step}" for step in steps), "furthest from the first", "ms/step"]
    return list(table_lines(head, rows))


def plot(runs, path):
    """BPB, its difference from the first run's, and loss by step; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(15, 4), layout="constrained")
    panels = {
        "validation BPB": [run["bpb"] for run in runs],
        f"validation BPB, minus {runs[0]['name']}": [gaps(run, runs[0]) for run in runs],
        "loss": [run["loss"] for run in runs],
    }
    for axis, (label, lines) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for run, line in zip(runs, lines, strict=True):
            axis.plot(list(line), list(line.values()), label=run["name"], marker=".")
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=150)
    return True


def main(argv=None):
    parser = CommandParser(
        prog="python -m bench.curves", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, the first leads")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where table, JSON and plot go")
    args = parser.parse_args(argv)
    runs = [read_run(folder) for folder in args.runs]
    table = "\n".join(compare(runs)) + "\n"
    print(table, end="")
    if args.out:
        make_folder(args.out)
        (args.out / "curves.md").write_text(table, encoding="utf-8")
        (args.out / "curves.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
        if not plot(runs, args.out / "curves.png"):
            print("no plot: matplotlib is not installed (pip install -e '.[plot]')")


if __name__ == "__main__":
    run_command(main)
