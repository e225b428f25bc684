"""Digests of the training pass's exact results, to show that a change moves no bit.

    python -m tests.digests record FILE          digests of this tree, as JSON
    python -m tests.digests compare REVISION     this tree against another commit's

A digest is the SHA-256 of a tensor's bytes. Covered are the loss and the gradient of every
parameter, in eager and in the fused pass (fp32, bf16 and FP8; dense, bigram and grouped heads; two
layers and four), the losses of an evaluation, and weights, optimiser state and FP8 scales after
three steps in eager and in FP8, after one step in fp32 and bf16. `compare` checks the other commit
out into a temporary worktree, lets its own copy of this script run there, and exits 1 with the
names that differ.

On a CPU the kernels run in Triton's interpreter. Bits hold for one machine and one version of its
libraries, so nothing is stored: two trees are compared where they run. The interpreter's bf16
products are wrong, but the same in both.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported

from nanofuse.model.config import GPTConfig
from nanofuse.model.fp8.products import PlainGemm
from nanofuse.model.fused import FusedGPT
from nanofuse.model.gpt import GPT
from nanofuse.model.providers import PRODUCTS, find
from nanofuse.train.assemble import fused_optimizer
from nanofuse.train.optim.config import OptimConfig
from nanofuse.train.optim.muon_adamw import MuonAdamW
from nanofuse.train.state import training_state
from tests.helpers import random_model
from tests.interpreter import interpreter_casts_exactly

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"sequence_len": 16, "vocab_size": 96, "window_pattern": "SL", "bigram_embed_factor": 3}
CONFIGS = {
    "bigram": {},
    "dense": {"bigram_embed_factor": 0},
    "grouped": {"n_kv_head": 1},
    "two_layers": {"depth": 2},
}
PASSES = {  # provider of the products, dtype of the activations, optimiser steps
    "fp32": ("off", torch.float32, 1),
    "bf16": ("off", torch.bfloat16, 1),
    "fp8": ("torch", torch.bfloat16 if DEVICE == "cuda" else torch.float32, 3),
}
STEPS = [(1.0, 0.9, 0.2), (0.5, 0.95, 0.1), (0.25, 0.97, 0.0)]  # lr_mult, momentum, weight decay


class PlainGemmOnCPU(PlainGemm):
    """PlainGemm with the sum that torch has on GPUs only: bf16 products added to fp32."""

    def weight_grad(
        self,
        g,  # (M, N)
        x,  # (M, K)
        out,  # (N, K) fp32, added to
    ):
        out += g.float().t() @ x.float()


def products(provider, dtype):
    """The matrix products of one of PASSES."""
    plain = provider == "off" and dtype == torch.bfloat16 and DEVICE == "cpu"
    return PlainGemmOnCPU() if plain else find(PRODUCTS, provider).build()


def digest(tensor):
    """SHA-256 of a tensor's bytes, hexadecimal."""
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def make_config(depth=4, **fields):
    """Config of width 64 and two heads."""
    return GPTConfig.from_depth(depth, 64 // depth, 32, **{**SIZES, **fields})


def batch(config, seed):
    """Tokens and targets, (1, T) int64 each, of which some targets are ignored."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 1, config.sequence_len)
    tokens, targets = torch.randint(config.vocab_size, shape, generator=generator).to(DEVICE)
    targets[0, :3] = -1
    return tokens, targets


def make_model(config, dtype):
    """A GPT with random weights, the same for every dtype up to rounding."""
    model = GPT(config, dtype, device=DEVICE)
    model.load_state_dict(random_model(config, torch.float32, device=DEVICE).state_dict())
    return model.train()


def train(name, model, weights, optimizer, steps):
    """{name: digest} of steps of one micro-step each, and of an evaluation after them."""
    digests = {}
    config = weights.config
    for step, numbers in enumerate(STEPS[:steps]):
        loss = model(*batch(config, step))
        (0.5 * loss).backward()
        digests[f"{name}/step{step}/loss"] = digest(loss)
        for parameter, p in weights.named_parameters():
            digests[f"{name}/step{step}/grad/{parameter}"] = digest(p.grad)
        optimizer.step(*numbers)
        optimizer.zero_grad()
    for parameter, p in weights.named_parameters():
        digests[f"{name}/weights/{parameter}"] = digest(p)
    for key, tensor in training_state(model, optimizer).items():
        digests[f"{name}/state/{key}"] = digest(tensor)
    model.eval()
    digests[f"{name}/evaluation"] = digest(model(*batch(config, 99), reduction="none"))
    return digests


def digests():
    """{name: digest} of everything."""
    found = {}
    for label, fields in CONFIGS.items():
        config = make_config(**fields)
        eager = make_model(config, torch.float32)
        optimizer = MuonAdamW(eager.param_roles(), OptimConfig(), config.n_embd, lr_scale=0.5)
        found |= train(f"eager/{label}", eager, eager, optimizer, len(STEPS))
        for kind, (provider, dtype, steps) in PASSES.items():
            model = make_model(config, dtype)
            fused = FusedGPT(model, products(provider, dtype)).train()
            optimizer = fused_optimizer(fused, OptimConfig(), lr_scale=0.5)
            found |= train(f"fused/{kind}/{label}", fused, model, optimizer, steps)
    return found


def record(path):
    torch.set_num_threads(1)
    with interpreter_casts_exactly():
        found = digests()
    Path(path).write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")
    print(f"{len(found)} digests in {path}")


def record_in(tree, path):
    """Let a tree's own copy of this script record its digests."""
    command = [sys.executable, "-m", "tests.digests", "record", str(path)]
    subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL)
    return json.loads(Path(path).read_text())


def compare(revision):
    """Names whose digests differ between this tree and a revision, or are in one of them only."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        other = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(other), revision], check=True)
        try:
            trees = {other: Path(folder) / "theirs.json", ROOT: Path(folder) / "ours.json"}
            theirs, ours = pool.map(record_in, trees.keys(), trees.values())
        finally:
            subprocess.run([*git, "remove", "--force", str(other)], check=True)
    differ = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
    print(*differ, sep="\n")
    print(f"{len(differ)} of {len(ours)} digests differ from {revision}")
    return differ


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.digests", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("record").add_argument("file")
    commands.add_parser("compare").add_argument("revision")
    args = parser.parse_args()
    if args.command == "record":
        record(args.file)
    elif compare(args.revision):
        sys.exit(1)


if __name__ == "__main__":
    main()
