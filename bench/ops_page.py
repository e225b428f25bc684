"""docs/ops.md: every op with its formula, truth, test, bench and recorded times.

    python -m bench.ops_page

Times are taken from files of this repository, records/ and kernels/common/tuned.json; a test
(tests/bench/test_ops_page.py) makes the page anew and compares.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from nanofuse.bench.cases.ops import OPS
from nanofuse.train.command import CommandParser, run_command
from nanofuse.train.errors import UserError

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "ops.md"
TUNED = "kernels/common/tuned.json"
RECORDS = (  # (file of bench's table or JSON, GPU, width), the newest first
    ("records/2026-11-28-watch/bench.txt", "NVIDIA H200", 1024),
    ("records/2026-11-28-house/ops.json", "NVIDIA H200", 1024),
    ("records/2026-11-25-depths/mlp.txt", "NVIDIA H100 80GB HBM3", 1024),
    ("records/2026-11-23-kernels/bench.txt", "NVIDIA H200", 1024),
)
HEAD = """# Ops

Every op of `kernels/`, where its parts are, and what it took on record. `python -m bench.ops_page`
writes this page from [bench/cases/ops.py](../bench/cases/ops.py), the records and
[tuned.json](../kernels/common/tuned.json); a test compares it.

| op | formula, in short | truth | test | bench |
| --- | --- | --- | --- | --- |
"""
TIMES = """
## Times

The newest figure of each GPU and width; the kernel may have changed since. The roof is what was
measured on the same GPU: its copy bandwidth, or a large bf16 product by cuBLAS (FP8 products may
pass 100 %), whichever the call comes closer to. A tuner's entry from before 2026-11-28 has no
share. Without a record there is a dash.

| op | call | GPU | width | µs | % of roof | from |
| --- | --- | --- | ---: | ---: | ---: | --- |
"""


@dataclass(frozen=True)
class Figure:
    """A recorded time of one call."""

    gpu: str
    width: int
    us: float
    share: float | None  # of the roof
    source: str  # file, from the root


def from_table(text):
    """(name, us, share) of the rows that bench prints."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 8 and re.fullmatch(r"[\d.]+", cells[2]):
            shares = [float(cells[i].rstrip(" %")) / 100 for i in (4, 6) if cells[i]]
            yield cells[0], float(cells[2]), max(shares, default=None)


def from_json(text):
    """(name, us, share) of pytest-benchmark's file."""
    for bench in json.loads(text)["benchmarks"]:
        info = bench["extra_info"]
        if "us" in info:
            shares = [info[key] for key in ("copy_share", "matmul_share") if key in info]
            yield bench["name"].removeprefix("bench_"), info["us"], max(shares, default=None)


def recorded():
    """{(name in a record's table, GPU, width): Figure}, the newest of each."""
    found = {}
    for source, gpu, width in RECORDS:
        text = (ROOT / source).read_text(encoding="utf-8")
        for name, us, share in (from_json if source.endswith(".json") else from_table)(text):
            found.setdefault((name, gpu, width), Figure(gpu, width, us, share, source))
    return found


def tuned():
    """{(op in tuned.json, GPU, width of the model): Figure}."""
    table = json.loads((ROOT / TUNED).read_text(encoding="utf-8"))
    return {
        (op, gpu, entry["width"]): Figure(
            gpu, entry["width"], entry["us"], entry.get("share"), TUNED
        )
        for gpu, ops in table.items()
        for op, entries in ops.items()
        for entry in entries
    }


def figures(call, records, winners):
    """The Figures of a call, one for each GPU and width; a bench's goes before the tuner's."""
    names = {*call.names}
    found = {k[1:]: figure for k, figure in winners.items() if k[0] == call.tuned}
    found |= {k[1:]: figure for k, figure in records.items() if k[0] in names}
    return [found[key] for key in sorted(found)]


def linked(path, text):
    """A link from docs/ to a file, which must be there; a dash without one."""
    if not path:
        return "–"
    assert (ROOT / path).is_file(), path
    return f"[{text}](../{path})"


def op_row(op):
    """An op's line of the first table."""
    name = op.truth or f"{op.name}_ref"
    home = next(
        path
        for path in sorted((ROOT / "kernels").glob("*.py"))
        if f"\ndef {name}(" in path.read_text(encoding="utf-8")
    )
    test = op.test or f"tests/kernels/test_{op.name}.py"
    bench = "" if op.bench == "-" else f"bench/bench_{op.bench or op.name}.py"
    cells = (
        linked(f"kernels/{op.name}.py", op.name),
        op.formula.replace("|", "\\|"),
        linked(f"kernels/{home.name}", f"`{name}`"),
        linked(test, Path(test).stem),
        linked(bench, Path(bench).stem),
    )
    return f"| {' | '.join(cells)} |\n"


def time_rows(op, records, winners):
    """An op's lines of the second table."""
    for call in op.calls:
        for figure in figures(call, records, winners) or [None]:
            shown = ("–",) * 5
            if figure:
                share = "–" if figure.share is None else f"{100 * figure.share:.0f}"
                path = Path(figure.source)
                label = path.name if figure.source == TUNED else path.parent.name
                source = linked(figure.source, label)
                gpu = figure.gpu.removeprefix("NVIDIA ")
                shown = (gpu, str(figure.width), f"{figure.us:,.1f}", share, source)
            yield f"| {op.name} | {call.what} | {' | '.join(shown)} |\n"
    if not op.calls:
        yield f"| {op.name} | – | – | – | – | – | – |\n"


def page():
    """The text of docs/ops.md."""
    records, winners = recorded(), tuned()
    times = (row for op in OPS for row in time_rows(op, records, winners))
    return HEAD + "".join(map(op_row, OPS)) + TIMES + "".join(times)


def main(argv=None):
    parser = CommandParser(
        prog="python -m bench.ops_page", description=(__doc__ or "").partition("\n")[0]
    )
    parser.parse_args(argv)
    if not PAGE.parent.is_dir():
        raise UserError(f"{PAGE.parent} is not there; bench.ops_page runs in a clone")
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written to {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
