"""Checkpoints from and to nanochat.

    python -m train.convert from-nanochat DIR --run NAME [--step N] [--tokenizer FILE]
    python -m train.convert to-nanochat DIR --run NAME [--step N]

Optimiser state is not converted, so a converted run generates but does not resume. torch is loaded
once the flags are parsed.
"""

import json
import shutil
from pathlib import Path

from nanofuse.model.config import NANOCHAT_FIELDS
from nanofuse.train.command import CommandParser, run_command
from nanofuse.train.errors import UserError
from nanofuse.train.flags import STEP


def import_run(args):
    """Make a run of a nanochat checkpoint."""
    from nanofuse.train.checkpoint import run_dir, save_checkpoint
    from nanofuse.train.data.tokenizer import FILE_NAME, Tokenizer
    from nanofuse.train.files import atomic_folder
    from nanofuse.train.nanochat import from_nanochat

    target = run_dir(args.run)
    if target.exists():
        raise UserError(f"{target} exists; choose another --run")
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    model, step, val_bpb = from_nanochat(args.dir, args.step)
    if tokenizer and tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"--tokenizer {args.tokenizer} has {tokenizer.vocab_size} tokens, "
            f"the model {model.config.vocab_size}"
        )
    facts = {"model_config": model.config.to_dict(), "source": str(args.dir), "val_bpb": val_bpb}
    with atomic_folder(target) as temporary:
        save_checkpoint(temporary, step, facts, model)
        if args.tokenizer:
            shutil.copy(args.tokenizer, temporary / FILE_NAME)
    print(f"{target}: {model.config.num_params:,} parameters of step {step}")


def export_run(args):
    """Write a dense run in nanochat's format."""
    import torch

    from nanofuse.train.checkpoint import (
        MODEL,
        config_of,
        find_checkpoint,
        load_meta,
        load_tensors,
        run_dir,
    )
    from nanofuse.train.files import atomic_folder

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
        text = json.dumps(facts, indent=2, allow_nan=False)
        (temporary / f"meta_{step:06d}.json").write_text(text, encoding="utf-8")
    print(f"{target}: step {step} in nanochat's format")


def main(argv=None):
    parser = CommandParser(
        prog="python -m train.convert", description="Checkpoints from and to nanochat."
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CommandParser)
    into = commands.add_parser("from-nanochat", help="make a run of a nanochat checkpoint")
    into.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json to keep with the run")
    into.set_defaults(call=import_run)
    out = commands.add_parser("to-nanochat", help="write a dense run in nanochat's format")
    out.set_defaults(call=export_run)
    for command, text in ((into, "nanochat's checkpoint folder"), (out, "folder to make")):
        command.add_argument("dir", metavar="DIR", help=text)
        command.add_argument("--run", required=True, metavar="NAME", help="run under runs/")
        command.add_argument("--step", type=STEP, metavar="N", help="step (default: the latest)")
    args = parser.parse_args(argv)
    args.call(args)


if __name__ == "__main__":
    run_command(main)
