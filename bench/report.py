"""Saved results of bench_step and profile as tables, a summary and plots.

python -m bench.report FILE.json... [--out records/DATE-step]

Every FILE is what `pytest bench/bench_step.py --benchmark-only --benchmark-json FILE` saved, or a
profile.json of `python -m bench.step_profile`. Into the folder go table.md, summary.json (one
object per depth and precision: the product against its fastest baseline) and, where matplotlib is
installed, speedup.png, floor.png, breakdown.png (the last from the profiles) and step.svg, the
README's picture: the profiles beside each other, and the speed-up by depth.
"""

import json
from pathlib import Path

from nanofuse.bench.chrome_trace import CLASSES, GAPS
from nanofuse.model.providers import in_fp8
from nanofuse.train.command import CommandParser, run_command
from nanofuse.train.errors import UserError
from nanofuse.train.files import make_folder

STEP_HEAD = ["depth", "backend", "attention", "fp8", "ms/step", "forward", "backward", "optimiser",
             "tok/s", "peak GiB", "first step, s", "of floor", "J/M tokens",
             "fused faster by"]  # fmt: skip
NOTE = (
    "ms/step, forward, backward, optimiser: medians in milliseconds. First step: building the "
    "model and one step, without imports. Of floor: floor of forward and backward on an H200 "
    "(bench/roofline.py) over the step's time. J/M tokens: the GPU's joules per million tokens."
)


def table_lines(head, rows):
    """A Markdown table, line by line; every cell is a string."""
    for cells in [head, ["---"] * len(head), *rows]:
        yield f"| {' | '.join(cells)} |"


def _number(value, form):
    return "–" if value is None else format(value, form)


def _share(info, contender):
    floor = info.get("floor_ms")
    return floor and floor / contender["ms_per_step"]


def _step_rows(info):
    product, *others = info["contenders"]
    for contender in (product, *others):
        ratio = contender["ms_per_step"] / product["ms_per_step"]
        yield [
            str(info["depth"]),
            contender["backend"],
            contender["attention"],
            contender["fp8"],
            *(f"{contender[key]:.1f}" for key in ("ms_per_step", "forward_ms", "backward_ms")),
            f"{contender['optimizer_ms']:.1f}",
            f"{contender['tok_per_s']:,.0f}",
            _number(contender["peak_gib"], ".1f"),
            f"{contender['time_to_first_step_s']:.1f}",
            _number(_share(info, contender), ".0%"),
            _number(contender.get("joules_per_million_tokens"), ".1f"),
            "" if contender is product else f"{ratio:.2f}",
        ]


def step_table(infos):
    """Lines of the Markdown table of every contender of bench_step's results."""
    yield from table_lines(STEP_HEAD, [row for info in infos for row in _step_rows(info)])
    for info in infos:
        for line in info["left_out"]:
            yield f"d{info['depth']}: {line}"
        if any("CUDA graphs: off" in fact for fact in info["contenders"][0].get("facts", ())):
            yield f"d{info['depth']}: fused without CUDA graphs"
        if info["allocation_retries"]:
            yield (
                f"d{info['depth']}: torch ran out of memory {info['allocation_retries']} times "
                "and freed its cache in timed steps; take fewer --baselines"
            )


def summarize(info, commit=None):
    """One object of summary.json: the first contender (the fused pass) and the fastest other."""
    product, *others = info["contenders"]
    baseline = min(others, key=lambda other: other["ms_per_step"], default=None)
    of = baseline.get if baseline else lambda key: None
    figures = ("backend", "attention", "fp8", "ms_per_step", "tok_per_s", "peak_gib")
    return {
        "depth": info["depth"],
        **{key: product[key] for key in figures},
        "time_to_first_step_s": product["time_to_first_step_s"],
        "joules_per_million_tokens": product.get("joules_per_million_tokens"),
        "baseline_backend": of("backend"),
        "baseline_attention": of("attention"),
        "baseline_fp8": of("fp8"),
        "baseline_ms_per_step": of("ms_per_step"),
        "baseline_peak_gib": of("peak_gib"),
        "baseline_time_to_first_step_s": of("time_to_first_step_s"),
        "speedup": of("ms_per_step") and of("ms_per_step") / product["ms_per_step"],
        "floor_ms": info.get("floor_ms"),
        "floor_share": _share(info, product),
        "gpu": info["device"],
        "commit": commit or info["commit"],
    }


def load(paths):
    """extra_info of bench_step's results and profiles, in the order of depth; and the latest date.

    Raises:
        UserError: a file that cannot be read or holds neither; the message names it.
    """
    infos, profiles, dates = [], [], []
    for path in paths:
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        except ValueError as error:  # not UTF-8, or not JSON
            raise UserError(f"{path} is not JSON: {error}") from error
        try:
            if "classes" in document:
                profiles.append(document)
                dates.append(document["date"])
                _breakdown(document)
            else:
                found = [b["extra_info"] for b in document["benchmarks"]]
                found = [info for info in found if "contenders" in info]
                for info in found:  # what is missing must show here, not half-way through
                    summarize(info), list(step_table([info]))
                infos += found
                dates.append(document["datetime"][:10])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(
                f"{path} holds neither pytest-benchmark's results of bench_step nor a profile "
                f"({type(error).__name__}: {error})"
            ) from error
    if not infos and not profiles:
        raise UserError(f"no result of bench_step in {', '.join(map(str, paths))}")
    for members in (infos, profiles):
        members.sort(key=lambda member: member["depth"])
    return infos, profiles, max(dates)


def _breakdown(profile):
    """{class: ms per micro-step} and the label of a profile."""
    label = f"d{profile['depth']} {profile['backend']}, fp8 {profile['fp8']}"
    return {name: float(entry["ms"]) for name, entry in profile["classes"].items()}, label


def breakdown_table(profiles):
    """Lines of the Markdown table of the profiles: ms per micro-step by class of kernels."""
    columns = [_breakdown(profile) for profile in profiles]
    names = list(dict.fromkeys(name for classes, _ in columns for name in classes))
    rows = [[name, *(f"{classes.get(name, 0):.2f}" for classes, _ in columns)] for name in names]
    totals = [f"{sum(classes.values()):.2f}" for classes, _ in columns]
    head = ["ms per micro-step", *(label for _, label in columns)]
    yield from table_lines(head, [*rows, ["sum", *totals]])


def _by_precision(summaries):
    """The summaries that have a baseline, {FP8 provider: [summary]}."""
    series = {}
    for summary in summaries:
        if summary["speedup"]:
            series.setdefault(summary["fp8"], []).append(summary)
    return series


def _plot_speedup(axes, summaries):
    for fp8, members in _by_precision(summaries).items():
        depths, speedups = ([m[key] for m in members] for key in ("depth", "speedup"))
        axes.plot(depths, speedups, "o-", label=f"fp8 {fp8}")
        for depth, speedup in zip(depths, speedups, strict=True):
            axes.annotate(f"{speedup:.2f}", (depth, speedup), (0, 6), textcoords="offset points")
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xlabel="depth", ylabel="times faster than the fastest baseline", ylim=(0, None))
    axes.legend()


def _plot_floor(axes, infos):
    series = {}
    for info in infos:
        for contender in info["contenders"]:
            name = f"{contender['backend']}, {contender['attention']}, fp8 {contender['fp8']}"
            series.setdefault(name, []).append((info["depth"], 100 * _share(info, contender)))
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set(xlabel="depth", ylabel="floor / time of a step, %", ylim=(0, 100))
    axes.legend()


def _plot_breakdown(axes, profiles):
    columns = [_breakdown(profile) for profile in profiles]
    names = list(dict.fromkeys(name for classes, _ in columns for name in classes))
    bottom = [0.0] * len(columns)
    for i, name in enumerate(names):
        heights = [classes.get(name, 0.0) for classes, _ in columns]
        axes.bar(range(len(columns)), heights, bottom=bottom, label=name, color=f"C{i}")
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(columns)), [label.replace(" ", "\n", 1) for _, label in columns])
    axes.set(ylabel="ms per micro-step")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_step(figure, summaries, profiles):
    """Milliseconds of a micro-step by class, a bar a profile, and beside it speed-up by depth."""
    left, right = figure.subplots(1, 2, width_ratios=(5, 3))
    starts = [0.0] * len(profiles)
    columns = [_breakdown(profile)[0] for profile in profiles]
    names = sorted({name for classes in columns for name in classes}, key=[*CLASSES, GAPS].index)
    labels = [f"{p['backend']}, {'FP8' if in_fp8(p['fp8']) else 'bf16'}" for p in profiles]
    for i, name in enumerate(names):
        widths = [classes.get(name, 0.0) for classes in columns]
        left.barh(labels, widths, left=starts, label=name, color=f"C{i}")
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for label, total in zip(labels, starts, strict=True):
        left.annotate(f"{total:.0f} ms", (total, label), (4, 0), textcoords="offset points")
    left.set(xlabel=f"ms of a micro-step at d{profiles[0]['depth']}", xlim=(0, 1.15 * max(starts)))
    left.invert_yaxis()
    left.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    for label, members in _by_precision(summaries).items():
        depths = [str(m["depth"]) for m in members]
        bars = right.bar(depths, [m["speedup"] for m in members], label=label, alpha=0.8)
        right.bar_label(bars, fmt="%.2f")
    right.axhline(1, color="grey", linewidth=1)
    right.set(xlabel="depth", ylabel="times faster than torch.compile")
    right.margins(y=0.12)


def write_plots(out, infos, summaries, profiles):
    """Draw the plots that there is data for; returns lines that say which are missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ["no plots: they need matplotlib (pip install 'nanofuse[plot]')"]
    floors = [info for info in infos if info.get("floor_ms")]
    plots = {
        "speedup.png": (_plot_speedup, summaries if _by_precision(summaries) else []),
        "floor.png": (_plot_floor, floors),
        "breakdown.png": (_plot_breakdown, profiles),
    }
    missing = []
    for name, (plot, data) in plots.items():
        if not data:
            missing.append(name)
            continue
        figure = Figure(figsize=(8, 5), layout="constrained")
        plot(figure.add_subplot(), data)
        figure.savefig(out / name, dpi=120)
    if profiles and _by_precision(summaries):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        _draw_step(figure, [s for s in summaries if in_fp8(s["fp8"])], profiles)
        figure.savefig(out / "step.svg")
    else:
        missing.append("step.svg")
    return [f"no data for {', '.join(missing)}"] if missing else []


def main(argv=None):
    parser = CommandParser(
        prog="python -m bench.report", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSON of bench_step or profile")
    parser.add_argument("--out", type=Path, help="default records/DATE-step, the results' date")
    parser.add_argument("--commit", help="of the code, where the machine that ran knew no better")
    args = parser.parse_args(argv)
    infos, profiles, date = load(args.files)
    out = args.out or Path("records") / f"{date}-step"
    make_folder(out)
    summaries = [summarize(info, args.commit) for info in infos]
    lines = []
    if infos:
        gpus = ", ".join(sorted({summary["gpu"] for summary in summaries}))
        lines += [*step_table(infos), "", f"{gpus}. {NOTE}", ""]
    if profiles:
        lines += [*breakdown_table(profiles), ""]
    (out / "table.md").write_text("\n".join(lines), encoding="utf-8")
    (out / "summary.json").write_text(json.dumps(summaries, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))
    for line in write_plots(out, infos, summaries, profiles):
        print(line)
    print(f"written to {out}")


if __name__ == "__main__":
    run_command(main)
