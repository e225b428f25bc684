"""The smallest run of the command, and what is in its folder."""

import json
import re

import torch

from nanofuse.train.checkpoint import load_tensors
from nanofuse.train.run_folder import LOADER, MODEL, OPTIM, checkpoints, run_dir

TINY = (
    "--depth 1 --aspect-ratio 32 --head-dim 16 --max-seq-len 64 --device-batch-size 2 "
    "--total-batch-size 256 --eval-tokens 256 --eval-every -1 --skip-initial-eval "
    "--sample-every -1 --train-log-every 1 --device-type cpu --bigram-embed-factor 1"
).split()


def records(directory, kind="train"):
    """Records of one kind in the metrics of a run's folder; every line must be one."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(directory):
    return {record["step"]: record["loss"] for record in records(directory)}


def steps(run):
    return list(checkpoints(run_dir(run)))


def strangers(directory):
    """Names in a run's folder beside checkpoints, tokenizer and metrics."""
    known = r"step_\d+|tokenizer\.json|metrics\.jsonl"
    return sorted(p.name for p in directory.iterdir() if not re.fullmatch(known, p.name))


def assert_same_run(a, b, step):
    """Two run folders have the same losses, each step once, and the same checkpoint of `step`."""
    for directory in (a, b):
        logged = [record["step"] for record in records(directory)]
        assert logged == list(range(1, step + 1))
    assert losses(a) == losses(b)
    for name in (MODEL, OPTIM, LOADER):
        one, two = (load_tensors(d / f"step_{step:06d}" / name) for d in (a, b))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
