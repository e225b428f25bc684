"""A trained model for other programs.

    python -m train.export hf RUN DIR [--step N] [--dtype bfloat16]
    python -m train.export nanochat RUN DIR [--step N]

RUN is a run's folder, its name under runs/, or the folder of a checkpoint. Optimiser state is not
written. torch is loaded once the flags are parsed.
"""

from pathlib import Path

from nanofuse.train.command import CommandParser, not_empty, run_command
from nanofuse.train.flags import STEP


def main(argv=None):
    parser = CommandParser(
        prog="python -m train.export", description="A trained model for other programs."
    )
    commands = parser.add_subparsers(required=True, parser_class=CommandParser)
    hub = commands.add_parser("hf", help="for Hugging Face's transformers, lm-eval and the like")
    hub.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights; the lambdas stay float32 [float32]",
    )
    nanochat = commands.add_parser("nanochat", help="in nanochat's format")
    for name, command in (("hf", hub), ("nanochat", nanochat)):
        command.set_defaults(format=name)
        command.add_argument("run", metavar="RUN", type=not_empty, help="run or checkpoint")
        command.add_argument("dir", metavar="DIR", type=not_empty, help="folder to make")
        command.add_argument("--step", type=STEP, metavar="N", help="step (default: the latest)")
    args = parser.parse_args(argv)
    from nanofuse.train.exporting import export_hugging_face, export_nanochat
    from nanofuse.train.run_folder import find_run

    directory, folder = find_run(args.run, args.step)
    if args.format == "hf":
        export_hugging_face(directory, folder, Path(args.dir), args.dtype)
    else:
        export_nanochat(directory, folder, Path(args.dir))


if __name__ == "__main__":
    run_command(main)
