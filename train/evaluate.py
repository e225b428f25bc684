"""A trained model's bits per byte on any shards, and its CORE.

    python -m train.evaluate RUN [--data PATH] [--split train] [--val-shard FILE]
    python -m train.evaluate RUN --core-bundle DIR [--max-per-task 500] [--skip-bpb]

RUN is a name under runs/, or the folder of a run or checkpoint. BPB is measured as training does
it, with the run's data, shard, rows and tokens where no flag says otherwise. CORE's tasks are read
from a folder in the layout of nanochat's eval_bundle (train/core_bundle.py). Results are printed,
and kept in the run's folder as evaluate-STEP.json; what another call found there stays. torch is
loaded once the flags are parsed.
"""

import json
import sys

from nanofuse.train.command import CommandParser, add_data_argument, not_empty, run_command
from nanofuse.train.errors import UserError
from nanofuse.train.flags import STEP, whole
from nanofuse.train.tables import aligned_lines

CPU_BATCH_TOKENS = 4096  # of a batch of CORE


def parse(argv):
    """The flags that were given, each within its bounds."""
    parser = CommandParser(prog="python -m train.evaluate", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "run",
        metavar="RUN",
        type=not_empty,
        help="name under runs/, or a run's or checkpoint's folder",
    )
    add("--step", type=STEP, metavar="N", help="checkpoint to use (default: the latest)")
    add_data_argument(parser)
    add("--split", choices=("val", "train"), default="val", help="what of the data [val]")
    add("--val-shard", metavar="FILE", type=not_empty, help="shard that is the split val")
    add("--text-column", metavar="NAME", type=not_empty, help="column with the text")
    add("--eval-tokens", type=whole(1, 2**48), metavar="N", help="tokens of BPB")
    add("--device-batch-size", type=whole(1, 2**24), metavar="N", help="rows at a time")
    add("--skip-bpb", action="store_true", help="CORE alone")
    add("--core-bundle", metavar="DIR", type=not_empty, help="folder with CORE's tasks")
    add("--max-per-task", type=whole(1), default=-1, metavar="N", help="examples of a task [all]")
    add("--device-type", choices=("auto", "cuda", "cpu"), default="auto", help="where to run")
    add("--json", action="store_true", help="JSON in place of text")
    args = parser.parse_args(argv)
    if args.skip_bpb and not args.core_bundle:
        raise UserError("--skip-bpb leaves nothing to do; add --core-bundle DIR")
    if args.max_per_task > 0 and not args.core_bundle:
        raise UserError("--max-per-task is for CORE; add --core-bundle DIR")
    return args


class Bar:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, words, total, unit):
        from tqdm import tqdm

        quiet = not (sys.stderr and sys.stderr.isatty())
        self.bar = tqdm(total=total, unit=unit, desc=words, disable=quiet, dynamic_ncols=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def advance(self, count=1, words=None):
        if words is not None:
            self.bar.set_description_str(words, refresh=False)
        self.bar.update(count)


def run_settings(args, meta, device_type):
    """Settings of a run, or the defaults of a converted one, with what the flags say in place.

    Raises:
        UserError: the run's settings are damaged.
    """
    from nanofuse.train.files import native
    from nanofuse.train.settings import resolve, resolve_resumed

    saved = meta.get("settings")
    if saved is None:
        settings = resolve({}, device_type)
    else:
        settings = resolve_resumed({}, {name: native(value) for name, value in saved.items()})
    changes = {"max_seq_len": meta["model_config"]["sequence_len"]}
    if args.data:  # the run's shard and column belong to its own data
        changes |= {"data": args.data, "val_shard": "", "text_column": "text"}
    given = ("val_shard", "text_column", "eval_tokens", "device_batch_size")
    changes |= {name: getattr(args, name) for name in given if getattr(args, name)}
    return settings.replace(changes)


def measure_bpb(model, tokenizer, settings, split, device):
    """{"bpb", "data", "split", "tokens"} of a model called for losses.

    Raises:
        UserError: data that cannot be read, or without a byte to predict.
    """
    from nanofuse.train.bpb import Validation, raise_failure
    from nanofuse.train.data.corpus import open_corpus
    from nanofuse.train.data.loader import Packing
    from nanofuse.train.data.tokens import open_cache

    job, length = settings.job, settings.model.max_seq_len
    corpus = open_corpus(job.data, job.text_column, job.val_shard)
    cache = open_cache(corpus, tokenizer, job.cache)
    if cache:
        cache.keeps = False  # an evaluation leaves nothing beside the data
    size = settings.horizon.device_batch_size
    rows = -(-settings.reports.eval_tokens // length)
    packing = Packing(corpus, split, tokenizer, size, length, cache=cache)
    with Bar("BPB", -(-rows // size), "batch") as bar:

        def decide(failure):
            raise_failure(failure)
            bar.advance()

        bpb = Validation(packing, device).bpb(model, rows, decide)
    what = f"{corpus.name}; {corpus.validation}"
    return {"bpb": bpb, "data": what, "split": split, "tokens": rows * length}


def measure_core(model, tokenizer, tasks, device):
    """What evaluate_core finds."""
    from nanofuse.train.core import BATCH_TOKENS, evaluate_core

    size = BATCH_TOKENS if device.type == "cuda" else CPU_BATCH_TOKENS
    with Bar("CORE", None, "sequence") as bar:
        return evaluate_core(
            model,
            tokenizer,
            tasks,
            size,
            note=lambda task, count: bar.advance(count, f"CORE: {task.label}"),
        )


def load(args):
    """(folder of the checkpoint, its meta, GPT, what is called for losses, tokenizer, Settings).

    Raises:
        UserError: a run that is not there or damaged, or sizes that do not fit.
    """
    import torch

    from nanofuse.model.backends.choice import select_attention
    from nanofuse.model.fp8.products import PlainGemm
    from nanofuse.model.fused import FusedGPT
    from nanofuse.train.checkpoint import config_of, load_model, load_tokenizer
    from nanofuse.train.device import choosing, select_machine
    from nanofuse.train.memory import check_memory
    from nanofuse.train.run_folder import find_run, load_meta

    machine = select_machine(args.device_type, "auto")
    directory, folder = find_run(args.run, args.step)
    meta = load_meta(folder)
    config = config_of(meta, folder)
    tokenizer = load_tokenizer(directory, config, meta)
    settings = run_settings(args, meta, machine.device.type)
    size = settings.horizon.device_batch_size
    logits = 0 if args.skip_bpb else 12 * size * config.sequence_len * config.padded_vocab_size
    needed = 4 * config.num_params + logits
    what = f"evaluating {config.num_params:,} parameters with {size:,} rows"
    check_memory(needed, machine.device, what, "--device-batch-size")
    if machine.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as training does
    model, _ = load_model(folder, machine.device, machine.dtype)
    with choosing("attention", "auto"):
        chosen = select_attention("auto", machine.need(), False, config)
    chosen.made.prepare(config.sequence_len, config.windows, machine.device)
    model.attention = chosen.made
    losses = FusedGPT(model, PlainGemm()).eval() if machine.backend == "fused" else model
    return folder, meta, model, losses, tokenizer, settings


def keep(folder, found):
    """Write what was found into evaluate-STEP.json of the run, beside what is there of other
    calls; returns the file.

    Raises:
        UserError: it cannot be written.
    """
    from nanofuse.train.files import write_text_atomically

    path = folder.parent / f"evaluate-{found['step']:06d}.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        before = {}
    before = before if isinstance(before, dict) else {}
    try:
        write_text_atomically(path, json.dumps({**before, **found}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from None
    return path


def report(found, tasks):
    """Lines of text for people."""
    if bpb := found.get("bpb"):
        yield (
            f"step {found['step']:,}: {bpb['split']} BPB {bpb['bpb']:.6f}, "
            f"{bpb['tokens']:,} tokens of {bpb['data']}"
        )
    if core := found.get("core"):
        head = ["task", "shots", "examples", "accuracy", "guessing", "centred"]
        rows = []
        for task in tasks:
            one = core["tasks"][task.label]
            figures = one["accuracy"], 0.01 * task.baseline, one["centred"]
            shown = (f"{figure:.4f}" for figure in figures)
            rows.append([task.label, str(task.shots), f"{one['examples']:,}", *shown])
        yield from aligned_lines(head, rows)
        yield f"step {found['step']:,}: CORE {core['core']:.6f}"


def main(argv=None):
    args = parse(argv)
    tasks = []
    if args.core_bundle:
        from nanofuse.train.core_bundle import load_bundle

        tasks = load_bundle(args.core_bundle, args.max_per_task)
    folder, meta, model, losses, tokenizer, settings = load(args)
    device = model.resid_lambdas.device
    found = {"run": folder.absolute().parent.name, "step": meta["step"]}
    if not args.skip_bpb:
        found["bpb"] = measure_bpb(losses, tokenizer, settings, args.split, device)
    if tasks:
        core = measure_core(model, tokenizer, tasks, device)
        found["core"] = {"max_per_task": args.max_per_task, **core}
    failure = None
    try:
        path = keep(folder, found)
    except UserError as error:  # what was measured is shown all the same
        failure = error
    print(json.dumps(found, indent=1) if args.json else "\n".join(report(found, tasks)))
    if failure is not None:
        raise failure
    if not args.json:
        print(f"kept in {path}")


if __name__ == "__main__":
    run_command(main)
