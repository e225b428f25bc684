"""Text from a trained run.

python -m train.generate --run NAME --prompt "…" [--num-samples 2] [--temperature 0.8]

torch is loaded once the flags are parsed.
"""

import sys

from nanofuse.train.command import CommandParser, run_command
from nanofuse.train.errors import UserError
from nanofuse.train.flags import SEEDS, STEP, number, whole

MAX_SAMPLES = 2**14


def parse(argv):
    """The flags that were given, each within its bounds."""
    parser = CommandParser(prog="python -m train.generate", description="Text from a trained run.")
    add = parser.add_argument
    add("--run", required=True, metavar="NAME", help="run under runs/")
    add("--step", type=STEP, metavar="N", help="checkpoint to use (default: the latest)")
    add("--prompt", default="", help="text to continue; <|bos|> goes before it")
    for flag, kind, default, text in (
        ("--num-samples", whole(1, MAX_SAMPLES), 1, "continuations, from one prefill"),
        ("--max-tokens", whole(1, 2**31), 128, "tokens to add at most"),
        ("--temperature", number(0, 1e6), 0.8, "0 is greedy"),
        ("--top-k", whole(0, 2**31), 50, "draw from the k likeliest tokens, 0: all"),
        ("--seed", whole(*SEEDS), 0, "seed of the draws"),
    ):
        metavar = "X" if isinstance(default, float) else "N"
        add(flag, type=kind, default=default, metavar=metavar, help=f"{text} [{default}]")
    add("--device-type", choices=("auto", "cuda", "cpu"), default="auto", help="where to run")
    return parser.parse_args(argv)


def load(args):
    """(model, tokenizer, token ids of the prompt), once what is asked for is known to fit.

    Raises:
        UserError: a run that is not there or damaged, or sizes that do not fit.
    """
    import torch

    from nanofuse.model.config import ROTARY_LENGTHS
    from nanofuse.train.checkpoint import config_of, load_model, load_tokenizer
    from nanofuse.train.device import select_device
    from nanofuse.train.memory import check_inference_memory
    from nanofuse.train.run_folder import find_checkpoint, load_meta, run_dir

    device = select_device(args.device_type)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    directory = run_dir(args.run)
    folder = find_checkpoint(directory, args.step)
    meta = load_meta(folder)
    config = config_of(meta, folder)
    tokenizer = load_tokenizer(directory, config, meta)
    prompt = [tokenizer.bos, *tokenizer.encode(args.prompt)]
    room = ROTARY_LENGTHS * config.sequence_len - len(prompt)
    if room < args.max_tokens:
        raise UserError(
            f"--prompt has {len(prompt)} tokens, which leaves room for {max(room, 0)}; "
            "shorten it or lower --max-tokens"
        )
    positions = len(prompt) + args.max_tokens
    hint = "--num-samples or --max-tokens"
    check_inference_memory(config, dtype.itemsize, device, args.num_samples, positions, hint)
    model, _ = load_model(folder, device, dtype)
    return model, tokenizer, prompt


def main(argv=None):
    args = parse(argv)
    model, tokenizer, prompt = load(args)
    from nanofuse.model.engine import Sampling, generate

    sampling = Sampling(args.temperature, args.top_k, args.seed)
    rows = [[] for _ in range(args.num_samples)]
    try:
        for column in generate(
            model, prompt, args.num_samples, args.max_tokens, sampling, tokenizer.bos
        ):
            for row, token in zip(rows, column, strict=True):
                if token is not None:
                    row.append(token)
    except ValueError as error:
        raise UserError(f"--run {args.run}: {error}") from None
    for index, row in enumerate(rows):
        if args.num_samples > 1:
            print(f"--- sample {index}", file=sys.stderr)
        print(args.prompt + tokenizer.decode(row))


if __name__ == "__main__":
    run_command(main)
