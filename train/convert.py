"""Checkpoints from and to nanochat.

    python -m train.convert from-nanochat DIR --run NAME [--step N] [--tokenizer FILE]
    python -m train.convert to-nanochat DIR --run NAME [--step N]

nanochat (karpathy/nanochat at dc54a1a) keeps model_NNNNNN.pt, read with weights_only=True, and
meta_NNNNNN.json, whose model_config has this project's field names. Optimiser state is not
converted, so a converted run generates but does not resume.
"""

import json
import pickle
import re
import shutil
from pathlib import Path

import torch

from nanofuse.model.gpt import GPT
from nanofuse.train.checkpoint import (
    MODEL,
    config_of,
    find_checkpoint,
    load_meta,
    load_tensors,
    load_weights,
    run_dir,
    save_checkpoint,
)
from nanofuse.train.command import CommandParser, run_command
from nanofuse.train.data.tokenizer import FILE_NAME, Tokenizer
from nanofuse.train.errors import UserError
from nanofuse.train.files import atomic_folder

NANOCHAT_FIELDS = (
    "sequence_len",
    "vocab_size",
    "n_layer",
    "n_head",
    "n_kv_head",
    "n_embd",
    "window_pattern",
)
COMPILED_PREFIX = "_orig_mod."  # torch.compile's, in checkpoints of compiled models


def read_nanochat(directory, step=None):
    """(tensors, meta, step) of a nanochat checkpoint, the latest unless `step` is given.

    Raises:
        UserError: files missing or damaged.
    """
    directory = Path(directory)
    steps = sorted(
        int(match[1])
        for path in directory.glob("model_*.pt")
        if (match := re.fullmatch(r"model_(\d+)\.pt", path.name))
    )
    if not steps:
        raise UserError(f"{directory} holds no model_NNNNNN.pt; name nanochat's checkpoint folder")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"{directory} has no step {step}; there are: {', '.join(map(str, steps))}")
    weights, meta_path = directory / f"model_{step:06d}.pt", directory / f"meta_{step:06d}.json"
    try:
        tensors = torch.load(weights, map_location="cpu", weights_only=True)
        tensors = {name.removeprefix(COMPILED_PREFIX): t for name, t in tensors.items()}
    except (OSError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError):
        raise UserError(f"{weights} is damaged or holds more than tensors; copy it again") from None
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        meta["model_config"] = {name: meta["model_config"][name] for name in NANOCHAT_FIELDS}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{meta_path} is missing, damaged or lacks model_config fields") from None
    return tensors, meta, step


def from_nanochat(directory, step=None):
    """A dense GPT (fp32, CPU) with nanochat's weights, its meta and step.

    Raises:
        UserError: files missing or damaged, or weights that do not fit the architecture.
    """
    tensors, meta, step = read_nanochat(directory, step)
    fields = {**meta["model_config"], "bigram_embed_factor": 0}
    model = GPT(config_of({"model_config": fields}, directory))
    load_weights(model, {name: t.float() for name, t in tensors.items()}, directory)
    return model, meta, step


def import_run(args):
    target = run_dir(args.run)
    if target.exists():
        raise UserError(f"{target} exists; choose another --run")
    model, meta, step = from_nanochat(args.dir, args.step)
    if args.tokenizer:
        tokenizer = Tokenizer.load(args.tokenizer)
        if tokenizer.vocab_size != model.config.vocab_size:
            raise UserError(
                f"--tokenizer {args.tokenizer} has {tokenizer.vocab_size} tokens, "
                f"the model {model.config.vocab_size}"
            )
    kept = {key: meta[key] for key in ("val_bpb",) if key in meta}
    with atomic_folder(target) as temporary:
        facts = {"model_config": model.config.to_dict(), "source": str(args.dir), **kept}
        save_checkpoint(temporary, step, facts, model)
        if args.tokenizer:
            shutil.copy(args.tokenizer, temporary / FILE_NAME)
    print(f"{target}: {model.config.num_params:,} parameters of step {step}")


def export_run(args):
    folder = find_checkpoint(run_dir(args.run), args.step)
    meta = load_meta(folder)
    config = config_of(meta, folder)
    if config.bigram_embed_factor:
        raise UserError(
            f"--run {args.run} has a bigram table, which nanochat does not know; "
            "only runs of --bigram-embed-factor 0 can be exported"
        )
    step, target = meta["step"], Path(args.dir)
    if target.exists():
        raise UserError(f"{target} exists; name a folder to be made")
    tensors = load_tensors(folder / MODEL)
    facts = {
        "step": step,
        "val_bpb": meta.get("val_bpb"),
        "model_config": {name: getattr(config, name) for name in NANOCHAT_FIELDS},
    }
    with atomic_folder(target) as temporary:
        torch.save(tensors, temporary / f"model_{step:06d}.pt")
        (temporary / f"meta_{step:06d}.json").write_text(json.dumps(facts, indent=2))
    print(f"{target}: step {step} in nanochat's format")


def main(argv=None):
    parser = CommandParser(prog="python -m train.convert", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CommandParser)
    into = commands.add_parser("from-nanochat", help="make a run of a nanochat checkpoint")
    into.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json to keep with the run")
    into.set_defaults(call=import_run)
    out = commands.add_parser("to-nanochat", help="write a dense run in nanochat's format")
    out.set_defaults(call=export_run)
    for command, text in ((into, "nanochat's checkpoint folder"), (out, "folder to make")):
        command.add_argument("dir", metavar="DIR", help=text)
        command.add_argument("--run", required=True, metavar="NAME", help="run under runs/")
        command.add_argument("--step", type=int, help="step (default: the latest)")
    args = parser.parse_args(argv)
    args.call(args)


if __name__ == "__main__":
    run_command(main)
