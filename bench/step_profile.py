"""Where a training step's GPU time goes, by class of kernels.

python -m bench.step_profile --depth 16

Profiles one optimiser step of the recipe's model on micro-batches of 32 x 2048 with torch.profiler
and prints milliseconds per micro-step by class, and the kernels that take most time. The
optimiser's time is divided by the 8 micro-steps of a full step. The profiler slows the CPU down:
where kernel launches are the bottleneck, at small depths, the gaps are longer than in training.
Into --out go profile.json (for bench.report) and trace.json.gz (for chrome://tracing or Perfetto).
"""

import datetime
import gzip
import json
from pathlib import Path

import torch
from torch.profiler import profile, record_function, schedule

from nanofuse.bench.chrome_trace import GAPS, breakdown, dearest, read_kernels
from nanofuse.bench.report import table_lines
from nanofuse.bench.roofline import floor_parts
from nanofuse.bench.training import gpu_workload, synchronize, train_step
from nanofuse.model.fp8.scaling import CALIBRATED_STEPS
from nanofuse.model.providers import ATTENTION, PRODUCTS, choices
from nanofuse.train.assemble import assemble
from nanofuse.train.command import CommandParser, run_command
from nanofuse.train.device import select_fp8, select_machine
from nanofuse.train.errors import UserError
from nanofuse.train.files import make_folder
from nanofuse.train.flags import whole
from nanofuse.train.optim.config import OptimConfig

STEP_MICRO_STEPS = 8  # of 32 x 2048 tokens in a full step
WARMUP_STEPS = CALIBRATED_STEPS + 1
NAME_WIDTH = 90
PRINTED = 25  # kernels; profile.json has all


def record(built, batches, path):
    """Train past the first steps, profile one and write its Chrome trace to `path`, a *.json.gz."""
    for _ in range(WARMUP_STEPS):
        train_step(built, batches, record_function)
    synchronize()
    with profile(
        schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        for _ in range(2):  # the profiler's own start falls into the first
            train_step(built, batches, record_function)
            synchronize()
            profiler.step()


def load_trace(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def class_table(classes, floor):
    """Lines of the Markdown table by class, with the floors of those that have one."""
    total = sum(entry["ms"] for entry in classes.values())
    floors = {"GEMM": floor["products"], "attention": floor["attention"]}
    rows = []
    for name, entry in [*classes.items(), ("sum", {"ms": total, "kernels": None})]:
        kernels = "" if entry["kernels"] is None or name == GAPS else f"{entry['kernels']:.0f}"
        limit = sum(floor.values()) if name == "sum" else floors.get(name)
        rows.append(
            [name, f"{entry['ms']:.2f}", f"{entry['ms'] / total:.1%}", kernels]
            + ["" if limit is None else f"{limit:.1f}"]
        )
    return table_lines(["class", "ms per micro-step", "share", "kernels", "H200 floor, ms"], rows)


def kernel_table(rows):
    """Lines of the Markdown table of the kernels that take most time."""
    cells = [
        [f"{r['ms']:.3f}", f"{r['kernels']:.2f}", r["class"], f"`{r['name'][:NAME_WIDTH]}`"]
        for r in rows
    ]
    return table_lines(["ms per micro-step", "kernels", "class", "name"], cells)


def parse(argv):
    parser = CommandParser(
        prog="python -m bench.step_profile", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--depth", type=whole(1, 999), default=16)
    parser.add_argument("--backend", choices=["fused", "compile", "eager"], default="fused")
    parser.add_argument("--fp8", choices=choices(PRODUCTS), default="auto")
    parser.add_argument("--attention", choices=choices(ATTENTION), default="auto")
    parser.add_argument("--bigram-factor", type=whole(0, 2**20), default=5)
    parser.add_argument(
        "--micro-steps", type=whole(1, 1000), default=2, help="profiled; a full step has 8"
    )
    parser.add_argument("--out", type=Path, help="default runs/profile-dDEPTH-BACKEND")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if not torch.cuda.is_available():
        raise UserError("bench.step_profile needs a CUDA GPU")
    workload = gpu_workload(args.depth, args.bigram_factor, micro_steps=args.micro_steps)
    machine = select_machine("cuda", args.backend)
    fp8 = select_fp8(args.fp8, machine, workload.config, workload.rows)
    out = args.out or Path("runs") / f"profile-d{args.depth}-{args.backend}"
    make_folder(out)
    trace = out / "trace.json.gz"
    try:
        built = assemble(
            workload.config,
            machine,
            OptimConfig(),
            fp8,
            attention=args.attention,
            rows=workload.rows,
        )
        print("\n".join(built.facts))
        record(built, workload.batches(machine.device), trace)
    except torch.OutOfMemoryError:
        raise UserError(
            f"--depth {args.depth} does not fit in the memory of {machine.name}; take a smaller one"
        ) from None
    kernels = read_kernels(load_trace(trace))
    if not kernels:
        raise UserError("the profiler recorded no kernel; CUPTI may be missing or in use")
    classes = breakdown(kernels, args.micro_steps, STEP_MICRO_STEPS)
    floor = floor_parts(workload.config, workload.rows, fp8.made.fp8)
    rows = dearest(kernels, args.micro_steps, STEP_MICRO_STEPS)
    print("", *class_table(classes, floor), "", *kernel_table(rows[:PRINTED]), "", sep="\n")
    result = {
        "depth": args.depth,
        "backend": args.backend,
        "attention": built.attention.name,
        "fp8": fp8.name,
        "micro_steps": args.micro_steps,
        "gpu": machine.name,
        "date": datetime.date.today().isoformat(),
        "classes": classes,
        "floor": floor,
        "kernels": rows,
    }
    (out / "profile.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    run_command(main)
