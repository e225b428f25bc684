"""Tokens per second of generation with random weights, plain and with the kernels in a CUDA graph.

    python -m bench.decode --depth 16 --rows 1,16

Both continue the same prompt greedily. First the logits of a few steps are compared: the kernels'
may differ from those of the model in fp32 by at most twice what the plain path's do. Rates leave
out the prefill and the first steps. "of copy" is the share of the measured copy bandwidth at which
the weights that a step multiplies by are read.
"""

import time

import torch

from nanofuse.bench.harness import ON_GPU
from nanofuse.model.config import GPTConfig
from nanofuse.model.decode import Decoder
from nanofuse.model.engine import KVCache, Sampling, generate
from nanofuse.model.gpt import GPT
from nanofuse.train.command import CommandParser, run_command
from nanofuse.train.errors import UserError
from nanofuse.train.flags import whole
from nanofuse.train.gpu import copy_ceiling
from nanofuse.train.tables import aligned_lines

WARM_STEPS = 8
COMPARED_STEPS = 8


def random_model(config, device):
    """A GPT in bf16 whose every weight is random, so that every part of it counts."""
    model = GPT(config, torch.bfloat16, device=device)
    model.init_weights()
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, device=device).to(p) * 0.02)
    return model.eval()


@torch.inference_mode()
def compare(model, decoder, prompt, rows):
    """Relative errors (kernels, plain) of the logits of some steps, to the model in fp32.

    Raises:
        RuntimeError: the kernels' is more than twice the other.
    """
    device = model.cos.device
    truth = GPT(model.config, torch.float32, device=device).eval()
    truth.load_state_dict(model.state_dict())
    caches = []
    for each in (model, truth):
        cache = KVCache(model.config, 1, each.dtype, device)
        each(torch.tensor([prompt], device=device), cache=cache)
        caches.append(cache)
    decoder.start(caches[0], rows, len(prompt) + COMPARED_STEPS)
    plain, exact = (cache.expand(rows) for cache in caches)
    generator = torch.Generator(device).manual_seed(2)
    errors, size = [0.0, 0.0], 0.0
    for _ in range(COMPARED_STEPS):
        shape = model.config.vocab_size, (rows,)
        tokens = torch.randint(*shape, generator=generator, device=device)
        true = truth(tokens[:, None], cache=exact)[:, -1]
        found = decoder.step(tokens), model(tokens[:, None], cache=plain)[:, -1]
        errors = [e + (f - true).norm().item() for e, f in zip(errors, found, strict=True)]
        size += true.norm().item()
    if errors[0] > 2 * errors[1]:
        raise RuntimeError(f"errors {errors[0]:.3g} with the kernels, {errors[1]:.3g} without")
    return [e / size for e in errors]


def milliseconds(model, decoder, prompt, rows, steps):
    """Of one step of all rows; with decoder None by the plain path."""
    columns = generate(
        model, prompt, rows, WARM_STEPS + steps, Sampling(temperature=0), None, decoder
    )
    for _ in range(WARM_STEPS):
        next(columns)
    start = time.perf_counter()  # every step waits for its tokens
    for _ in range(steps):
        next(columns)
    seconds = time.perf_counter() - start
    columns.close()
    return 1000 * seconds / steps


def main(argv=None):
    parser = CommandParser(
        prog="python -m bench.decode", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--depth", type=whole(1, 64), default=16, metavar="N", help="[16]")
    parser.add_argument("--rows", default="1,16", metavar="N,N", help="rows at once [1,16]")
    parser.add_argument("--steps", type=whole(1, 10**6), default=256, metavar="N", help="[256]")
    args = parser.parse_args(argv)
    if not ON_GPU:
        raise UserError("bench.decode needs a CUDA GPU")
    model = random_model(GPTConfig.from_depth(args.depth), torch.device("cuda"))
    config, prompt = model.config, list(range(64))
    copy = copy_ceiling()
    weights = 2 * config.num_scaling_params
    lines = []
    for rows in map(whole(1, 2**14), args.rows.split(",")):
        decoder = Decoder(model, graphs=True)
        errors = compare(model, decoder, prompt, rows)
        for name, used, error in zip(
            ("kernels, graph", "plain"), (decoder, None), errors, strict=True
        ):
            ms = milliseconds(model, used, prompt, rows, args.steps)
            share = weights / (ms / 1000) / copy
            cells = f"{ms:.3f}", f"{1000 * rows / ms:,.0f}", f"{share:.0%}", f"{error:.1e}"
            lines.append([str(rows), name, *cells])
    head = ["rows", "path", "ms/step", "tokens/s", "of copy", "error"]
    print(f"d{args.depth}, {torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("\n".join(aligned_lines(head, lines)))


if __name__ == "__main__":
    run_command(main)
