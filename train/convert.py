"""Checkpoints and tokenizers from and to nanochat.

    python -m train.convert from-nanochat DIR --run NAME [--step N] [--tokenizer FILE]
    python -m train.convert to-nanochat DIR --run NAME [--step N]

Optimiser state is not converted, so a converted run generates but does not resume. to-nanochat is
the older name of `python -m train.export nanochat`. torch is loaded once the flags are parsed.
"""

from pathlib import Path

from nanofuse.train.command import CommandParser, not_empty, run_command
from nanofuse.train.errors import UserError
from nanofuse.train.flags import STEP


def import_tokenizer(directory, given):
    """(Tokenizer, its file) of --tokenizer, or of what nanochat keeps with a checkpoint folder;
    (None, None) where there is none."""
    from nanofuse.train.data.pickled import load_pickled
    from nanofuse.train.data.tokenizer import Tokenizer
    from nanofuse.train.nanochat import find_pickle

    path = given or find_pickle(directory)
    if path is None:
        return None, None
    is_json = Path(path).suffix == ".json"
    return (Tokenizer.load if is_json else load_pickled)(path), path


def import_run(args):
    """Make a run of a nanochat checkpoint."""
    from nanofuse.train.checkpoint import save_checkpoint
    from nanofuse.train.data.tokenizer import FILE_NAME
    from nanofuse.train.files import atomic_folder
    from nanofuse.train.nanochat import from_nanochat
    from nanofuse.train.run_folder import run_dir

    target = run_dir(args.run)
    if target.exists():
        raise UserError(f"{target} exists; choose another --run")
    tokenizer, path = import_tokenizer(args.dir, args.tokenizer)
    model, step, val_bpb, assumed = from_nanochat(args.dir, args.step)
    facts = {"model_config": model.config.to_dict(), "source": str(args.dir), "val_bpb": val_bpb}
    if tokenizer:
        if tokenizer.vocab_size != model.config.vocab_size:
            raise UserError(
                f"{'--tokenizer ' if args.tokenizer else ''}{path} has {tokenizer.vocab_size} "
                f"tokens, the model {model.config.vocab_size}; name the one that it was trained "
                "with as --tokenizer"
            )
        facts["tokenizer"] = tokenizer.fingerprint
    with atomic_folder(target) as temporary:
        save_checkpoint(temporary, step, facts, model)
        if tokenizer:
            tokenizer.save(temporary / FILE_NAME)
    print(f"{target}: {model.config.num_params:,} parameters of step {step}")
    if assumed:
        print(f"model: {', '.join(assumed)}, as nanochat takes older checkpoints")
    print(f"tokenizer: {path or 'none found; train.generate needs one, so name it as --tokenizer'}")


def export_run(args):
    """Write a run in nanochat's format."""
    from nanofuse.train.exporting import export_nanochat
    from nanofuse.train.run_folder import find_checkpoint, run_dir

    directory = run_dir(args.run)
    export_nanochat(directory, find_checkpoint(directory, args.step), Path(args.dir))


def main(argv=None):
    parser = CommandParser(
        prog="python -m train.convert", description="Checkpoints from and to nanochat."
    )
    commands = parser.add_subparsers(required=True, parser_class=CommandParser)
    into = commands.add_parser("from-nanochat", help="make a run of a nanochat checkpoint")
    into.add_argument(
        "--tokenizer",
        metavar="FILE",
        type=not_empty,
        help="tokenizer.pkl of nanochat or tokenizer.json to keep with the run "
        "(default: tokenizer/tokenizer.pkl in DIR, or beside base_checkpoints/)",
    )
    into.set_defaults(call=import_run)
    out = commands.add_parser("to-nanochat", help="write a run in nanochat's format")
    out.set_defaults(call=export_run)
    for command, text in ((into, "nanochat's checkpoint folder"), (out, "folder to make")):
        command.add_argument("dir", metavar="DIR", type=not_empty, help=text)
        command.add_argument("--run", required=True, metavar="NAME", help="run under runs/")
        command.add_argument("--step", type=STEP, metavar="N", help="step (default: the latest)")
    args = parser.parse_args(argv)
    args.call(args)


if __name__ == "__main__":
    run_command(main)
