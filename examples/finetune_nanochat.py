"""Fine-tune nanochat's checkpoint on a text of your own.

    python -m examples.finetune_nanochat DIR TEXT RUN     its checkpoint folder, a file, a name
    python -m train.generate --run RUN --prompt "..."

DIR is nanochat's base_checkpoints/TAG; its tokenizer is found beside it. The imported weights are
kept as runs/RUN/step_N, the tuned ones as the step that follows, so that `train.generate --step N`
shows the model from before. Shown here: what `train.convert` makes is a run like any other, and
`assemble` gives model and optimiser on every device, with the kernels on Hopper.
"""

import sys
from pathlib import Path

import torch

from nanofuse.model.config import GPTConfig
from nanofuse.train.assemble import assemble
from nanofuse.train.checkpoint import load_tensors, load_tokenizer, load_weights, save_checkpoint
from nanofuse.train.command import run_command
from nanofuse.train.convert import main as convert
from nanofuse.train.device import select_fp8, select_machine
from nanofuse.train.errors import UserError
from nanofuse.train.optim.config import OptimConfig
from nanofuse.train.run_folder import MODEL, find_checkpoint, load_meta, run_dir

LR_SCALE = 0.1  # of pre-training's rates: enough to learn a style, too little to forget


def batches(
    ids,  # (n,) int64, the tokens of the text
    rows,
    length,
    seed=0,
):
    """Inputs and targets (rows, length) from random places of the text, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - length, (rows, 1), generator=generator)
        row = ids[starts + torch.arange(length + 1)]  # (rows, length + 1)
        yield row[:, :-1], row[:, 1:]


def finetune(directory, text, name, steps=20, rows=4):
    """Import, tune and save; returns the losses of the steps, in nats per token."""
    if not text:
        raise UserError("TEXT is empty; there is nothing to learn")
    convert(["from-nanochat", str(directory), "--run", name])
    folder = find_checkpoint(run_dir(name), None)
    meta = load_meta(folder)
    config = GPTConfig(**meta["model_config"])
    tokenizer = load_tokenizer(run_dir(name), config, meta)

    machine = select_machine("auto", "auto")
    made = assemble(
        config,
        machine,
        OptimConfig(),
        select_fp8("auto", machine, config, rows),
        lr_scale=LR_SCALE,
        set_weights=lambda model: load_weights(model, load_tensors(folder / MODEL), folder),
    )
    ids = torch.tensor([tokenizer.bos, *tokenizer.encode(text)])  # (n,)
    source = batches(ids, rows, min(config.sequence_len, len(ids) - 1))
    losses = []
    for step in range(steps):
        inputs, targets = (x.to(machine.device) for x in next(source))
        loss = made.model(inputs, targets)
        loss.backward()
        made.optimizer.step(lr_mult=1 - step / steps)  # to zero at the end, in a line
        made.optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step:>3}  loss {losses[-1]:.4f}")
    facts = {name: meta[name] for name in ("model_config", "source", "tokenizer")}
    save_checkpoint(run_dir(name), meta["step"] + steps, facts, made.raw_model)
    return losses


def main():
    if len(sys.argv) != 4:
        raise UserError("usage: python -m examples.finetune_nanochat DIR TEXT RUN")
    directory, text, name = sys.argv[1:]
    try:
        text = Path(text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"TEXT {text} cannot be read ({reason}); name a file of UTF-8") from None
    finetune(directory, text, name)


if __name__ == "__main__":
    run_command(main)
