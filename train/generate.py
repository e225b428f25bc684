"""Text from a trained run.

python -m train.generate --run NAME --prompt "…" [--num-samples 2] [--temperature 0.8]
"""

import sys

import torch

from nanofuse.model.engine import Sampling, generate
from nanofuse.train.checkpoint import find_checkpoint, load_model, load_tokenizer, run_dir
from nanofuse.train.command import CommandParser, run_command
from nanofuse.train.device import select_device
from nanofuse.train.errors import UserError


def main(argv=None):
    parser = CommandParser(prog="python -m train.generate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--run", required=True, metavar="NAME", help="run under runs/")
    add("--step", type=int, help="checkpoint to use (default: the latest)")
    add("--prompt", default="", help="text to continue; <|bos|> goes before it")
    add("--num-samples", type=int, default=1, help="continuations, from one prefill [1]")
    add("--max-tokens", type=int, default=128, help="tokens to add at most [128]")
    add("--temperature", type=float, default=0.8, help="0 is greedy [0.8]")
    add("--top-k", type=int, default=50, help="draw from the k likeliest tokens, 0: all [50]")
    add("--seed", type=int, default=0, help="seed of the draws [0]")
    add("--device-type", choices=("auto", "cuda", "cpu"), default="auto", help="where to run")
    args = parser.parse_args(argv)
    for name in ("num_samples", "max_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("temperature", "top_k"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} must not be negative")
    device = select_device(args.device_type)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    directory = run_dir(args.run)
    model, _ = load_model(find_checkpoint(directory, args.step), device, dtype)
    tokenizer = load_tokenizer(directory, model.config)
    prompt = [tokenizer.bos, *tokenizer.encode(args.prompt)]
    room = model.cos.size(0) - len(prompt)
    if room < args.max_tokens:
        raise UserError(
            f"--prompt has {len(prompt)} tokens, which leaves room for {max(room, 0)}; "
            "shorten it or lower --max-tokens"
        )
    sampling = Sampling(args.temperature, args.top_k, args.seed)
    rows = [[] for _ in range(args.num_samples)]
    for column in generate(
        model, prompt, args.num_samples, args.max_tokens, sampling, tokenizer.bos
    ):
        for row, token in zip(rows, column, strict=True):
            if token is not None:
                row.append(token)
    for index, row in enumerate(rows):
        if args.num_samples > 1:
            print(f"--- sample {index}", file=sys.stderr)
        print(args.prompt + tokenizer.decode(row))


if __name__ == "__main__":
    run_command(main)
