"""The command that trains.

    python -m train.run [--depth 16] [--data DIR] [--run NAME [--resume]] ...

See --help for every flag; runs/NAME/ gets the tokenizer, metrics.jsonl and the checkpoints.
"""

import os

from nanofuse.train.command import run_command
from nanofuse.train.settings import build_parser


def main(argv=None):
    given = vars(build_parser().parse_args(argv))
    # read when torch is loaded: threads that spin while they wait for each other take the cores
    # from whatever else runs there, and from the thread that they wait for
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from nanofuse.train.start import train  # loads torch: --help and bad flags need not wait for it

    train(given)


if __name__ == "__main__":
    run_command(main, lossy=True)  # metrics.jsonl is the record
