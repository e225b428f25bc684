"""Runs written by hand: metrics.jsonl, and a checkpoint without weights beside it."""

import json

from nanofuse.train.run_folder import META, MODEL
from nanofuse.train.settings import Settings

TINY = {"depth": 1, "aspect_ratio": 32, "head_dim": 16, "max_seq_len": 32, "vocab_size": 320}
TOKENS = 1000  # a step


def metrics(bpbs, ms=10.0, last=None, **figures):
    """Lines of a log: evaluations {step: BPB}, and a training record at step 1, whose compilation
    takes 900 ms, and at every evaluated step."""
    steps = sorted({1, *bpbs, *([last] if last else [])} - {0})
    lines = [{"kind": "val", "step": 0, "bpb": bpbs[0], "train_seconds": 0.0}] if 0 in bpbs else []
    for step in steps:
        took = 900.0 if step == 1 else ms
        seconds = (900 + ms * (step - 1)) / 1e3
        record = {"loss": 3.0, "loss_ema": 3.5, "lr_mult": 1.0, "ms_per_step": took}
        record |= {"tok_per_s": 1e3 * TOKENS / took, "train_seconds": seconds, **figures}
        lines.append({"kind": "train", "step": step, **record})
        if step in bpbs:
            lines.append({"kind": "val", "step": step, "bpb": bpbs[step], "train_seconds": seconds})
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_run(folder, bpbs, ms=10.0, **figures):
    """A run's folder with such a log only."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(metrics(bpbs, ms, **figures))
    return str(folder)


def meta_of(step, length, commit="a" * 40, bpb=None, **flags):
    """meta.json of a checkpoint at a step of a run of this length, with these flags."""
    settings = Settings().replace({**TINY, **flags})
    return {
        "format": 1,
        "step": step,
        "model_config": settings.model.config().to_dict(),
        "settings": settings.flat(),
        "progress": {"step": step, "train_seconds": 1.0, "val_bpb": bpb, "best_bpb": bpb},
        "val_bpb": bpb,
        "num_iterations": length,
        "optimizer_steps": step,
        "loader": {"epoch": 0, "unit": 0, "document": 0, "corpus": "it"},
        "code": {"commit": commit, "changed": False},
    }


def add_checkpoint(folder, step, length, **facts):
    """A checkpoint whose weights are an empty file of tensors."""
    place = folder / f"step_{step:06d}"
    place.mkdir(parents=True)
    (place / META).write_text(json.dumps(meta_of(step, length, **facts)))
    (place / MODEL).write_bytes((2).to_bytes(8, "little") + b"{}")
    return place
