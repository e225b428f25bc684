"""The command that trains.

    python -m train.run [--depth 16] [--data DIR] [--run NAME [--resume]] [--gpus N] ...
    torchrun --standalone --nproc_per_node=N -m train.run ...

See --help for every flag; runs/NAME/ gets the tokenizer, metrics.jsonl and the checkpoints.
"""

import os
import sys

from nanofuse.train.command import DEBUG_ENV, command_module, run_command
from nanofuse.train.launch import is_rank, launch, number_of_ranks
from nanofuse.train.settings import build_parser
from nanofuse.train.trackers import check_installed


def main(argv=None):
    given = vars(build_parser().parse_args(argv))
    check_installed(given)  # before torch loads
    if not is_rank():
        world = number_of_ranks(given.get("gpus", "1"), given.get("device_type", "auto"))
        if world > 1:
            argv = sys.argv[1:] if argv is None else argv
            sys.exit(launch(argv, command_module("nanofuse.train.run"), world))
    from nanofuse.train.bytecode import keep_bytecode
    from nanofuse.train.compiling import Compiling, on_gpu, wanted
    from nanofuse.train.pages import keep_pages
    from nanofuse.train.waking import wake_gpu

    if (line := keep_bytecode()) and os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, flush=True)
    compiling = Compiling.start() if wanted(given) else None
    if on_gpu(given):
        wake_gpu()
    else:
        keep_pages()
    # read when torch is loaded: threads that spin while they wait for each other take the cores
    # from whatever else runs there, and from the thread that they wait for
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if is_rank() and not os.environ.get(DEBUG_ENV):  # pages about every connection that ends
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # loads torch: --help and bad flags need not wait for it
    from nanofuse.train.building import train

    train(given, compiling)


if __name__ == "__main__":
    run_command(main, lossy=True)  # metrics.jsonl is the record
    if is_rank():  # all is said and saved; torch's threads may abort a rank that tears itself down
        os._exit(0)
