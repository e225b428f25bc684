"""The training loop: micro-steps, optimiser step, and what happens between steps."""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from nanofuse.model.engine import Sampling, generate
from nanofuse.model.fused import FusedGPT
from nanofuse.model.gpt import GPT
from nanofuse.train.bpb import evaluate_bpb
from nanofuse.train.checkpoint import save_checkpoint
from nanofuse.train.data.corpus import ParquetCorpus, StdlibCorpus
from nanofuse.train.data.loader import DeviceLoader, PackedLoader
from nanofuse.train.data.tokenizer import Tokenizer
from nanofuse.train.errors import UserError
from nanofuse.train.optim.fused_muon_adamw import FusedMuonAdamW
from nanofuse.train.optim.muon_adamw import MuonAdamW
from nanofuse.train.plan import Plan
from nanofuse.train.runlog import RunLog
from nanofuse.train.schedules import Schedule
from nanofuse.train.settings import Settings

SAMPLE_TOKENS = 64


def settle_garbage():
    """Collect once, and keep what survives out of every later collection.

    torch.compile leaves hundreds of thousands of objects that live as long as the process; each
    of Python's full collections would go over them and stall the step it falls into. Call
    gc.unfreeze() when done, or native modules report leaks at exit.
    """
    gc.collect()
    gc.freeze()


@dataclass
class Progress:
    """What a checkpoint carries of the loop beside the tensors."""

    step: int = 0
    train_seconds: float = 0.0  # in training steps only: no evaluation, no saving
    val_bpb: float | None = None
    best_bpb: float | None = None
    loss: float | None = None


@dataclass
class Trainer:
    """A model with everything that trains it.

    `model` is called for losses (compiled or not); `raw_model` is the same weights uncompiled, for
    samples and checkpoints.
    """

    model: Callable
    raw_model: GPT
    optimizer: MuonAdamW | FusedMuonAdamW
    schedule: Schedule
    settings: Settings
    plan: Plan
    tokenizer: Tokenizer
    corpus: ParquetCorpus | StdlibCorpus
    loader: DeviceLoader
    log: RunLog
    directory: Path
    prompt: str  # samples continue it
    peak_flops: float | None  # bf16 peak of the device in FLOP/s, where it is known
    started: float  # time.perf_counter() at the start of the process
    progress: Progress
    first_step_seconds: float | None = None  # since the start of the process
    first_evaluation_seconds: float = 0.0  # of those, before the first step
    steady_seconds: float = 0.0  # of the steps after the first window
    steady_steps: int = 0

    def __post_init__(self):
        self.device = self.loader.device
        self.token_bytes = self.tokenizer.token_bytes().to(self.device)

    def due(self, every):
        """Whether something that happens every `every` steps, and at the end, happens now."""
        step = self.progress.step
        last = step == self.plan.num_iterations
        return last or (every > 0 and step > 0 and step % every == 0)

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def train_step(self):
        """One optimiser step over a total batch; returns its mean loss as a tensor ()."""
        step, micro_steps = self.progress.step, self.plan.micro_steps
        total = torch.zeros((), device=self.device)
        for _ in range(micro_steps):
            inputs, targets = next(self.loader)
            loss = self.model(inputs, targets)
            (loss / micro_steps).backward()
            total += loss.detach()
        self.optimizer.step(
            self.schedule.lr(step),
            self.schedule.momentum(step),
            self.plan.weight_decay * self.schedule.weight_decay(step),
        )
        self.optimizer.zero_grad()
        return total / micro_steps

    def evaluate(self):
        s = self.settings
        rows, length = s.horizon.device_batch_size, s.model.max_seq_len
        packed = PackedLoader(self.corpus, "val", self.tokenizer, rows, length, epochs=1)
        batches = DeviceLoader(packed, self.device)
        try:
            bpb = evaluate_bpb(self.model, batches, self.token_bytes, self.plan.eval_batches)
        finally:
            batches.close()
        progress = self.progress
        progress.val_bpb = bpb
        progress.best_bpb = bpb if progress.best_bpb is None else min(bpb, progress.best_bpb)
        settle_garbage()  # the first evaluation compiles
        self.log.metrics("val", progress.step, bpb=bpb, train_seconds=progress.train_seconds)
        self.log.print(f"step {progress.step:>6}  val bpb {bpb:.6f}")

    def sample(self):
        ids = [self.tokenizer.bos, *self.tokenizer.encode(self.prompt)]
        sampling = Sampling(temperature=0.8, top_k=50, seed=self.settings.job.seed)
        columns = generate(self.raw_model, ids, 1, SAMPLE_TOKENS, sampling, self.tokenizer.bos)
        text = self.prompt + self.tokenizer.decode([column[0] for column in columns])
        self.log.print(f"step {self.progress.step:>6}  sample: {text!r}")
        self.log.metrics("sample", self.progress.step, text=text)

    def save(self):
        state = self.loader.state
        meta = {
            "model_config": self.raw_model.config.to_dict(),
            "settings": self.settings.flat(),
            "progress": vars(self.progress),
            "val_bpb": self.progress.val_bpb,
            "num_iterations": self.plan.num_iterations,
            "optimizer_steps": self.optimizer.step_count,
            "loader": {
                **state.position(),
                "corpus": self.corpus.fingerprint,
                "at": self.corpus.describe("train", state.unit),
            },
        }
        folder = save_checkpoint(
            self.directory,
            self.progress.step,
            meta,
            self.raw_model,
            self.optimizer.state_dict(),
            state.to_tensors(),
        )
        self.log.print(f"step {self.progress.step:>6}  saved {folder}")

    def log_step(self, loss, seconds, steps):
        """Report a window of `steps` steps that took `seconds`, ending with this `loss`."""
        progress, plan = self.progress, self.plan
        step_seconds = seconds / steps
        tok_per_s = plan.total_batch_size / step_seconds
        lr_mult = self.schedule.lr(progress.step - 1)
        values = {
            "loss": loss,
            "lr_mult": lr_mult,
            "ms_per_step": 1e3 * step_seconds,
            "tok_per_s": tok_per_s,
            "epoch": self.loader.state.epoch,
            "train_seconds": progress.train_seconds,
        }
        status = (
            f"loss {loss:.4f}  lr x{lr_mult:.3f}  epoch {values['epoch']}  "
            f"{1e3 * step_seconds:.1f} ms/step  {tok_per_s:,.0f} tok/s"
        )
        clipped = self.model.fp8_clipped() if isinstance(self.model, FusedGPT) else None
        if clipped is not None:
            values["fp8_clipped"] = clipped
        if self.peak_flops:
            values["mfu"] = tok_per_s * self.raw_model.config.flops_per_token / self.peak_flops
            status += f"  MFU {100 * values['mfu']:.1f} % of {self.peak_flops / 1e12:.0f} TFLOP/s"
        self.log.metrics("train", progress.step, **values)
        if self.log.bar.disable:
            remaining = (plan.num_iterations - progress.step) * step_seconds
            self.log.print(f"step {progress.step:>6}  {status}  ETA {remaining / 60:.1f} min")
        return status

    def run(self):
        """Train from the current step to the last one; evaluates, samples and saves on the way.

        Raises:
            UserError: the loss is no longer finite (seen where it is logged).
        """
        s, progress = self.settings.reports, self.progress
        self.model.train()
        resumed_at = progress.step if self.settings.job.resume else None
        window_steps = 0
        while True:
            if progress.step != resumed_at:  # a resumed step was evaluated before it was saved
                if self.due(s.eval_every) or (progress.step == 0 and not s.skip_initial_eval):
                    began = time.perf_counter()
                    try:
                        self.evaluate()
                    except UserError:
                        if progress.step > 0:  # the training so far must not be lost
                            self.save()
                        raise
                    if self.first_step_seconds is None:
                        self.first_evaluation_seconds = time.perf_counter() - began
                if s.sample_every >= 0 and self.due(s.sample_every):
                    self.sample()
                if self.due(s.save_every):
                    self.save()
            if progress.step == self.plan.num_iterations:
                return
            if window_steps == 0:  # nothing above happens inside a window
                self.synchronize()
                window_start = time.perf_counter()
            loss = self.train_step()
            progress.step += 1
            window_steps += 1
            status = None
            first = self.first_step_seconds is None
            between = self.due(s.eval_every) or self.due(s.save_every) or self.due(s.sample_every)
            if first or between or progress.step % s.train_log_every == 0:
                progress.loss = loss.item()  # the only wait for the device
                if not math.isfinite(progress.loss):
                    raise UserError(
                        f"the loss is {progress.loss} at step {progress.step}; lower --matrix-lr, "
                        "--embedding-lr and --unembedding-lr, or --resume from a checkpoint"
                    )
                seconds = time.perf_counter() - window_start
                progress.train_seconds += seconds
                if first:
                    self.first_step_seconds = time.perf_counter() - self.started
                    spent = self.first_evaluation_seconds
                    note = f", {spent:.1f} s of them evaluation" if spent else ""
                    self.log.print(f"first step after {self.first_step_seconds:.1f} s{note}")
                else:
                    self.steady_seconds += seconds
                    self.steady_steps += window_steps
                status = self.log_step(progress.loss, seconds, window_steps)
                window_steps = 0
                if first:
                    settle_garbage()
            self.log.advance(status)

    def summary(self):
        """The run in one JSON-able dict."""
        progress, steps = self.progress, self.steady_steps
        peak = reserved = None
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
            reserved = torch.cuda.max_memory_reserved(self.device) / 2**30  # CUDA graphs' included
        return {
            "run": self.directory.name,
            "steps": progress.step,
            "tokens": progress.step * self.plan.total_batch_size,
            "loss": progress.loss,
            "val_bpb": progress.val_bpb,
            "best_bpb": progress.best_bpb,
            "train_seconds": round(progress.train_seconds, 3),
            "ms_per_step": 1e3 * self.steady_seconds / steps if steps else None,
            "time_to_first_step_s": self.first_step_seconds,
            "first_evaluation_s": self.first_evaluation_seconds,
            "peak_gib": peak,
            "reserved_gib": reserved,
        }
