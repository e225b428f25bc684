"""Text from a trained run, shown as it comes.

    python -m train.generate --run NAME --prompt "…" [--num-samples 2] [--temperature 0.8]
    python -m train.generate --run NAME

Without --prompt, in a terminal, it asks for one text after the other: each is continued by itself,
Ctrl-C stops a continuation, /quit or Ctrl-D leaves. Several samples are printed once all have
ended. stderr gets tokens per second. On Hopper the kernels compute the tokens, as a CUDA graph
(model/decode.py); torch is loaded once the flags are parsed.
"""

import sys
from dataclasses import dataclass, replace
from typing import Any

from nanofuse.train.command import CommandParser, run_command
from nanofuse.train.errors import UserError
from nanofuse.train.flags import SEEDS, STEP, number, whole
from nanofuse.train.streaming import Pace, TextStream

MAX_SAMPLES = 2**14


def parse(argv):
    """The flags that were given, each within its bounds."""
    parser = CommandParser(prog="python -m train.generate", description="Text from a trained run.")
    add = parser.add_argument
    add("--run", required=True, metavar="NAME", help="run under runs/")
    add("--step", type=STEP, metavar="N", help="checkpoint to use (default: the latest)")
    add(
        "--prompt",
        metavar="TEXT",
        help="text to continue; <|bos|> goes before it (default: asked for in a terminal, else "
        "none)",
    )
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
    add(
        "--backend",
        choices=("auto", "fused", "eager"),
        default="auto",
        help="kernels in a CUDA graph, or plain PyTorch; auto: kernels on Hopper",
    )
    return parser.parse_args(argv)


@dataclass
class Writer:
    """A model that continues texts.

    Attributes:
        args: the flags.
        room: positions that the rotary table covers.
        decoder: model.decode.Decoder, or None.
        sampling: Sampling of the next text.
    """

    args: Any
    model: Any
    tokenizer: Any
    room: int
    decoder: Any
    sampling: Any

    def ids(self, prompt):
        """Tokens of a prompt.

        Raises:
            UserError: it leaves no room for --max-tokens.
        """
        return fitting(self.tokenizer, prompt, self.room, self.args.max_tokens)

    def columns(self, ids):
        """Token of every sample, None once it has ended, step by step.

        Raises:
            UserError: the weights are no numbers.
        """
        from nanofuse.model.engine import generate

        args = self.args
        try:
            yield from generate(
                self.model, ids, args.num_samples, args.max_tokens, self.sampling,
                self.tokenizer.bos, self.decoder,
            )  # fmt: skip
        except ValueError as error:
            raise UserError(f"--run {args.run}: {error}") from None

    def write(self, prompt):
        """Print a prompt and its continuations, and the pace.

        Raises:
            UserError: the prompt does not fit, or the weights are no numbers.
            KeyboardInterrupt: Ctrl-C, once what there was is printed.
        """
        ids, pace, stopped = self.ids(prompt), Pace(), None
        rows = [[] for _ in range(self.args.num_samples)]
        alone = len(rows) == 1
        stream = TextStream(self.tokenizer, lambda text: print(text, end="", flush=True))
        try:
            for column in self.columns(ids):
                if alone and not rows[0]:
                    print(prompt, end="")
                for row, token in zip(rows, column, strict=True):
                    if token is not None:
                        row.append(token)
                pace.add(sum(token is not None for token in column))
                if alone:
                    stream.add(column[0])
        except KeyboardInterrupt as stop:
            stopped = stop
        stream.end()
        if alone:
            print("" if rows[0] else prompt, flush=True)
        for index, row in enumerate([] if alone else rows):
            print(f"--- sample {index}", file=sys.stderr)
            print(prompt + self.tokenizer.decode(row))
        print(pace.line(self.how()), file=sys.stderr)
        if stopped:
            raise stopped

    def how(self):
        """Words for what computes the tokens."""
        if self.decoder is None:
            return "plain PyTorch"
        return "kernels" if self.decoder.graph is None else "kernels in a CUDA graph"


def fitting(tokenizer, prompt, room, max_tokens):
    """Tokens of a prompt, `<|bos|>` before them.

    Raises:
        UserError: they and max_tokens more do not fit into `room` positions.
    """
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    left = room - len(ids)
    if left < max_tokens:
        lower = " or lower --max-tokens" if left > 0 else ""
        raise UserError(
            f"--prompt has {len(ids):,} tokens, which leaves room for {max(left, 0)} of {room:,}; "
            f"shorten it{lower}"
        )
    return ids


def load(args):
    """The Writer, once what is asked for is known to fit.

    Raises:
        UserError: a run that is not there or damaged, or sizes that do not fit.
    """
    from nanofuse.model.config import ROTARY_LENGTHS
    from nanofuse.train.checkpoint import config_of, load_model, load_tokenizer
    from nanofuse.train.device import select_machine
    from nanofuse.train.memory import check_inference_memory
    from nanofuse.train.run_folder import find_checkpoint, load_meta, run_dir

    machine = select_machine(args.device_type, args.backend)
    device, dtype = machine.device, machine.dtype
    directory = run_dir(args.run)
    folder = find_checkpoint(directory, args.step)
    meta = load_meta(folder)
    config = config_of(meta, folder)
    tokenizer = load_tokenizer(directory, config, meta)
    room = ROTARY_LENGTHS * config.sequence_len
    ids = fitting(tokenizer, args.prompt or "", room, args.max_tokens)
    positions = len(ids) + args.max_tokens
    hint = "--num-samples or --max-tokens"
    check_inference_memory(config, dtype.itemsize, device, args.num_samples, positions, hint)
    model, _ = load_model(folder, device, dtype)
    from nanofuse.model.decode import Decoder, fits
    from nanofuse.model.engine import Sampling

    fused = machine.backend == "fused"
    if fused and not fits(config) and args.backend == "fused":
        raise UserError(f"--backend fused does not take a width of {config.n_embd}; use eager")
    decoder = Decoder(model, device.type == "cuda") if fused and fits(config) else None
    sampling = Sampling(args.temperature, args.top_k, args.seed)
    return Writer(args, model, tokenizer, room, decoder, sampling)


def converse(writer):
    """Ask for prompts, and write, until /quit or the end of the input."""
    try:
        import readline  # noqa: F401, gives input() a history and line editing
    except ImportError:  # Windows
        pass
    print("A text to continue; Ctrl-C stops it, /quit or Ctrl-D leaves.", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if prompt.strip() == "/quit":
            return
        if not prompt.strip():
            continue
        try:
            writer.write(prompt)
        except KeyboardInterrupt:
            pass
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        seed = (writer.sampling.seed + 1) % (SEEDS[1] + 1)  # the same text again, another answer
        writer.sampling = replace(writer.sampling, seed=seed)


def main(argv=None):
    args = parse(argv)
    writer = load(args)
    if args.prompt is None and sys.stdin.isatty():
        converse(writer)
    else:
        writer.write(args.prompt or "")


if __name__ == "__main__":
    run_command(main)
