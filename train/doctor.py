"""What this machine has, what works on it and why the rest does not, and the run that suits it.

python -m train.doctor [--data PATH] [--quick] [--json]

Versions; backends and providers with their self-checks; measured rates beside known ceilings, on a
GPU (--quick leaves them out, as a run beside it would slow both); room; data; the command to run,
with the step time measured on such a GPU before. Lines come as they are found: where nothing has
been compiled yet, providers take their time. Nothing is written.
"""

import json

from nanofuse.train.command import CommandParser, add_data_argument, run_command
from nanofuse.train.run_folder import RUNS_DIR

WANTED = ("triton", "transformer-engine", "flash-attn-4")  # libraries that make a run faster
SLOW_SECONDS = 5  # of a check: more is said
RATES = {  # words, unit and its size
    "copy": ("copy", "GB/s", 1e9),
    "bf16": ("bf16 product", "TFLOP/s", 1e12),
    "fp8": ("FP8 product", "TFLOP/s", 1e12),
}


def examine(flag=None, quick=False):
    """Yields {name: facts} part by part, each when it is known; all together are JSON-able.

    Args:
        flag: --data.
        quick: measure no rates.

    Raises:
        UserError: something is wrong with what the flag names.
    """
    from nanofuse.model import providers
    from nanofuse.train import checkup
    from nanofuse.train.data.corpus import STDLIB, data_directory
    from nanofuse.train.device import select_machine
    from nanofuse.train.disk import free_bytes
    from nanofuse.train.gpu import nvidia_smi
    from nanofuse.train.versions import code, versions

    data = checkup.data_facts(flag)
    machine = select_machine("auto", "auto")
    gpu = machine.device.type == "cuda"
    free, total = checkup.memory(machine.device)
    yield {
        "device": machine.name,
        "capability": ".".join(map(str, machine.capability)) if gpu else None,
        "driver": nvidia_smi("driver_version") if gpu else None,
        "memory": {"free": free, "total": total},
        "versions": versions(),
        "code": code(),
        "backends": checkup.try_backends(machine),
    }
    chosen = {}
    for kind, records, tries in (
        ("attention", providers.ATTENTION, checkup.try_attention(machine)),
        ("fp8", providers.PRODUCTS, checkup.try_products(machine)),
    ):
        found = []
        for each in tries:
            found.append(each)
            yield {kind: found}
        chosen[kind] = checkup.first_working(found, records, machine.backend)
    yield {"chosen": {"backend": machine.backend, **chosen}}
    yield {"rates": None if quick else checkup.rates(machine)}
    folders = {str(RUNS_DIR.absolute())}
    if flag != STDLIB:
        folders.add(str(data_directory(flag).absolute()))
    yield {
        "disk": {folder: free_bytes(folder) for folder in sorted(folders)},
        "data": data,
        "advice": checkup.advice(machine, *chosen.values(), free, data, flag),
    }


def gib(count):
    return "unknown" if count is None else f"{count / 2**30:,.1f} GiB"


def device_line(found):
    memory = found["memory"]
    if found["capability"] is None:
        return (
            f"device: {found['device']}, {gib(memory['total'])} of memory; no CUDA GPU is visible"
        )
    return (
        f"device: {found['device']}, compute capability {found['capability']}, driver "
        f"{found['driver'] or 'unknown'}, {gib(memory['free'])} of {gib(memory['total'])} free"
    )


def rate_lines(found):
    """Measured rates beside known ones."""
    if found["rates"] is None:
        return
    for name, rate in found["rates"].items():
        words, unit, size = RATES[name]
        measured, known = rate["measured"], rate["known"]
        if isinstance(measured, str):
            yield f"rate: {words} not measured ({measured})"
            continue
        beside = "no figure of this GPU on record"
        if known:
            beside = f"{measured / known:.0%} of the {known / size:,.0f} on record"
        yield f"rate: {words} {measured / size:,.0f} {unit}, {beside}"


def data_line(data):
    if "error" in data:
        return f"data: {data['error']}"
    tokenizer = "no tokenizer yet, the first run trains one"
    if data["shards"] is None:  # nowhere to keep one
        tokenizer = "each run trains its tokenizer"
    elif data["tokenizer"]:
        tokenizer = f"tokenizer of {data['tokenizer']:,} tokens"
    cached = ""
    if data["shards"] is not None:
        cached = f"; tokens kept of {data['cached']} of {data['shards']} shards"
    return f"data: {data['name']}; {tokenizer}{cached}"


def advice_lines(found):
    """What to run, and what is known of it."""
    advice = found["advice"]
    for command in advice["commands"]:
        yield f"run: {command}"
    where = "without a GPU" if found["capability"] is None else "on this GPU, with these providers"
    steps = f"{advice['steps']:,} steps of {advice['tokens_per_step']:,} tokens"
    if ms := advice["ms_per_step"]:
        hours = ms * advice["steps"] / 3.6e6
        yield f"predicted: {steps} at {ms:,.0f} ms, {hours:.1f} h (records/{advice['record']})"
    else:
        yield f"predicted: {steps}; the time of one is not measured {where}"
    rows = f"--device-batch-size up to {advice['rows']:,} by the memory estimate"
    yield f"batch: {rows}" if advice["rows"] else "batch: not one row fits in the free memory"


def versions_line(found):
    there = found["versions"]
    missing = {name: "not installed" for name in WANTED if name not in there}
    return "versions: " + ", ".join(f"{name} {v}" for name, v in (there | missing).items())


def report(found):
    """Lines of text for people, of as many parts as are known: more parts, more lines at the end.

    Args:
        found: the parts of `examine` so far, in one.
    """
    yield device_line(found)
    yield versions_line(found)
    if found["code"]:
        changed = ", with changes" if found["code"]["changed"] else ""
        yield f"code: commit {found['code']['commit'][:10]}{changed}"
    for kind in ("backends", "attention", "fp8"):
        for each in found.get(kind, []):
            verdict = "yes" if each["works"] else "no"
            took = each.get("seconds", 0)
            late = f" (took {took:.0f} s)" if took >= SLOW_SECONDS else ""
            yield f"{kind.removesuffix('s')}: {verdict}, {each['why']}{late}"
    if "chosen" in found:
        chosen = found["chosen"].items()
        yield "auto takes: " + ", ".join(f"--{flag} {name}" for flag, name in chosen)
    if "rates" in found:
        yield from rate_lines(found)
    if "advice" in found:
        for folder, free in found["disk"].items():
            yield f"disk: {gib(free)} free in {folder}"
        yield data_line(found["data"])
        yield from advice_lines(found)


def main(argv=None):
    parser = CommandParser(prog="python -m train.doctor", description=__doc__.partition("\n")[0])
    add_data_argument(parser)
    parser.add_argument("--quick", action="store_true", help="measure no rates on the GPU")
    parser.add_argument("--json", action="store_true", help="JSON in place of text")
    args = parser.parse_args(argv)
    found, said = {}, 0
    for part in examine(args.data, args.quick):
        found |= part
        lines = [] if args.json else list(report(found))
        for line in lines[said:]:
            print(line, flush=True)
        said = len(lines)
    if args.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_command(main)
