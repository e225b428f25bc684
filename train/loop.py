"""The training loop: micro-steps, optimiser step, and what happens between steps."""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanofuse.model.engine import Sampling, generate
from nanofuse.model.fused import FusedGPT
from nanofuse.model.gpt import GPT
from nanofuse.train.bpb import TOO_SMALL, evaluate_bpb
from nanofuse.train.data.corpus import ParquetCorpus, StdlibCorpus
from nanofuse.train.data.loader import DeviceLoader, PackedLoader
from nanofuse.train.data.tokenizer import Tokenizer
from nanofuse.train.errors import UserError
from nanofuse.train.optim.fused_muon_adamw import FusedMuonAdamW
from nanofuse.train.optim.muon_adamw import MuonAdamW
from nanofuse.train.optim.watch import NAMED
from nanofuse.train.plan import Plan
from nanofuse.train.runlog import RunLog, first_line
from nanofuse.train.saving import Saver
from nanofuse.train.schedules import Schedule
from nanofuse.train.settings import Settings
from nanofuse.train.signals import Interrupted, Signals

SAMPLE_TOKENS = 64
EMA_DECAY = 0.9  # of the smoothed loss, a step
RATES_HINT = (
    "--resume from the checkpoint before it, with a lower --matrix-lr, --embedding-lr, "
    "--unembedding-lr or --scalar-lr"
)


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
    val_bpb: float | None = None  # of the latest evaluation
    val_step: int | None = None  # which was at this step
    best_bpb: float | None = None
    loss: float | None = None
    loss_ema: float = 0.0  # sum of the losses so far, weighted with powers of EMA_DECAY
    loss_ema_steps: int = 0

    @property
    def smoothed_loss(self):
        """Mean of the losses so far, weighted with powers of EMA_DECAY; None before the first."""
        weight = 1 - EMA_DECAY**self.loss_ema_steps
        return self.loss_ema / weight if weight else None


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
    saver: Saver
    directory: Path
    prompt: str  # samples continue it
    peak_flops: float | None  # bf16 peak of the device in FLOP/s, where it is known
    started: float  # time.perf_counter() at the start of the process
    progress: Progress
    signals: Signals = field(default_factory=Signals)
    resumed: bool = False  # from a checkpoint of progress.step
    done: frozenset = frozenset()  # kinds of reports of that step that were made before
    first_step_seconds: float | None = None  # since the start of the process
    first_evaluation_seconds: float = 0.0  # of those, before the first step
    steady_seconds: float = 0.0  # of the steps after the first window
    steady_steps: int = 0
    window_steps: int = 0  # since the device was last waited for
    whole: bool = True  # false where an update was cut off, so that weights lie between two steps

    def __post_init__(self):
        self.device = self.loader.device
        self.token_bytes = self.tokenizer.token_bytes().to(self.device)
        self.state = self.loader.state  # of the loader, after the last whole step
        self.loss = None  # of that step, a tensor ()
        self.ema = torch.tensor(self.progress.loss_ema, device=self.device)

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
        before = self.optimizer.step_count
        try:
            self.optimizer.step(
                self.schedule.lr(step),
                self.schedule.momentum(step),
                self.plan.weight_decay * self.schedule.weight_decay(step),
            )
        except BaseException:
            self.whole = self.optimizer.step_count == before
            raise
        self.optimizer.zero_grad()
        self.loss = total / micro_steps
        ema = self.ema.lerp(self.loss, 1 - EMA_DECAY)
        self.ema.copy_(torch.where(torch.isfinite(ema), ema, self.ema))
        self.progress.step += 1
        self.progress.loss_ema_steps += 1
        self.state = self.loader.state
        return self.loss

    def validation_loader(self, rows):
        """Packed batches of `rows` rows of the validation split, the last one filled up."""
        length = self.settings.model.max_seq_len
        return PackedLoader(self.corpus, "val", self.tokenizer, rows, length, epochs=1, fill=True)

    def check_validation(self):
        """Refuse a validation split that does not fill a row.

        Raises:
            UserError: it does not, or cannot be read.
        """
        packed = self.validation_loader(1)
        try:
            if next(packed, None) is None:
                raise UserError(TOO_SMALL)
        finally:
            packed.close()

    def evaluate(self):
        packed = self.validation_loader(self.settings.horizon.device_batch_size)
        batches = DeviceLoader(packed, self.device)

        def watched():
            for batch in batches:
                self.signals.check()
                yield batch

        try:
            bpb = evaluate_bpb(self.model, watched(), self.token_bytes, self.plan.eval_rows)
        finally:
            batches.close()
        if not math.isfinite(bpb):
            raise UserError(f"validation BPB is {bpb} at step {self.progress.step}; {RATES_HINT}")
        progress = self.progress
        progress.val_bpb, progress.val_step = bpb, progress.step
        progress.best_bpb = bpb if progress.best_bpb is None else min(bpb, progress.best_bpb)
        settle_garbage()  # the first evaluation compiles
        self.log.metrics("val", progress.step, bpb=bpb, train_seconds=progress.train_seconds)
        self.log.print(f"step {progress.step:>6}  val bpb {bpb:.6f}")

    def sample(self):
        """Show a continuation of the prompt, as far as both fit the rotary table."""
        room = self.raw_model.cos.size(0)
        ids = [self.tokenizer.bos, *self.tokenizer.encode(self.prompt)][: max(room // 2, 1)]
        count = min(SAMPLE_TOKENS, room - len(ids) + 1)
        sampling = Sampling(temperature=0.8, top_k=50, seed=self.settings.job.seed)
        columns = generate(self.raw_model, ids, 1, count, sampling, self.tokenizer.bos)
        drawn = [column[0] for column in columns]
        text = self.tokenizer.decode([*ids[1:], *drawn])
        self.log.print(f"step {self.progress.step:>6}  sample: {text!r}")
        self.log.metrics("sample", self.progress.step, text=text)

    def try_sample(self):
        """As sample; one that fails is said in one line."""
        try:
            self.sample()
        except (Interrupted, KeyboardInterrupt, SystemExit, OSError):
            raise
        except BaseException as error:  # panics of native libraries are no Exception
            self.log.print(f"step {self.progress.step:>6}  no sample ({first_line(error)})")

    def not_savable(self):
        """Why the weights are not to be saved, in words, or None."""
        if not self.whole:
            return f"the update of step {self.progress.step + 1} was cut off"
        if self.loss is not None and not math.isfinite(self.loss.item()):
            return "its loss is not finite"
        found = self.optimizer.watch.read()
        if found.first_step and not self.skips:
            return f"gradients of step {found.first_step} were not finite"
        names = self.nonfinite_weights()
        return f"{', '.join(names)} is not finite" if names else None

    @property
    def skips(self):
        """Whether steps whose gradients are not finite are left out, and training goes on."""
        return self.settings.optim.on_nonfinite == "skip"

    @torch.no_grad()
    def nonfinite_weights(self):
        """Names of the first parameters with a value that is not finite."""
        named = dict(self.raw_model.named_parameters())
        finite = torch.stack([torch.isfinite(p).all() for p in named.values()]).tolist()
        return [name for name, good in zip(named, finite, strict=True) if not good][:NAMED]

    def meta(self):
        """What meta.json holds of the loop and its settings."""
        progress = self.progress
        return {
            "model_config": self.raw_model.config.to_dict(),
            "settings": self.settings.flat(),
            "progress": vars(progress),
            "val_bpb": progress.val_bpb if progress.val_step == progress.step else None,
            "num_iterations": self.plan.num_iterations,
            "optimizer_steps": self.optimizer.step_count,
            "loader": {
                **self.state.position(),
                "corpus": self.corpus.fingerprint,
                "at": self.corpus.describe("train", self.state.unit),
            },
        }

    def save(self):
        """Write the checkpoint of this step.

        Raises:
            UserError: it cannot be written, or weights are not finite.
        """
        names = self.nonfinite_weights()
        if names:
            raise UserError(
                f"weights are not finite after step {self.progress.step} ({', '.join(names)}) and "
                f"are not saved; {RATES_HINT}"
            )
        self.progress.loss_ema = self.ema.item()
        folder = self.saver.save(
            self.progress.step,
            self.meta(),
            self.raw_model,
            self.optimizer.state_dict(),
            self.state.to_tensors(),
        )
        self.log.print(f"step {self.progress.step:>6}  saved {folder}")

    def log_step(self, loss, found, seconds, steps):
        """Report a window of `steps` steps that took `seconds`, ending with this `loss` and with
        these Gradients."""
        progress, plan = self.progress, self.plan
        step_seconds = seconds / steps
        tok_per_s = plan.total_batch_size / step_seconds
        lr_mult = self.schedule.lr(progress.step - 1)
        smoothed = progress.smoothed_loss
        values = {
            "loss": loss if math.isfinite(loss) else None,
            "loss_ema": smoothed,
            "grad_norm": found.norm if math.isfinite(found.norm) else None,
            "nonfinite_steps": found.nonfinite_steps,
            "lr_mult": lr_mult,
            "ms_per_step": 1e3 * step_seconds,
            "tok_per_s": tok_per_s,
            "epoch": self.state.epoch,
            "train_seconds": progress.train_seconds,
        }
        status = (
            f"loss {smoothed:.4f} (step {loss:.4f})  |g| {found.norm:.3g}  lr x{lr_mult:.3f}  "
            f"epoch {values['epoch']}  {1e3 * step_seconds:.1f} ms/step  {tok_per_s:,.0f} tok/s"
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

    def check_finite(self, loss, found):
        """Refuse a loss or Gradients that are not finite; where steps are left out, say so.

        Raises:
            UserError: the run is to stop.
        """
        step, names = found.first_step, ", ".join(found.names)
        if step and self.skips:
            self.log.print(
                f"step {self.progress.step:>6}  left out, as gradients were not finite: "
                f"{found.nonfinite_steps} steps so far, the latest from step {step} on ({names})"
            )
            self.optimizer.watch.forget()
        elif step:
            raise UserError(
                f"gradients of step {step} are not finite ({names}); {RATES_HINT}, "
                "or leave such steps out with --on-nonfinite skip"
            )
        elif not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {self.progress.step}; {RATES_HINT}")

    def close_window(self):
        """Wait for the device, and report the steps since it was last waited for.

        Returns:
            what stands beside the bar, None where there were no steps.

        Raises:
            UserError: loss or gradients are no longer finite.
        """
        progress, steps, self.window_steps = self.progress, self.window_steps, 0
        if not steps:
            return None
        loss, found = self.loss.item(), self.optimizer.watch.read()  # the only wait for the device
        self.check_finite(loss, found)
        progress.loss = loss if math.isfinite(loss) else None
        progress.loss_ema = self.ema.item()
        seconds = time.perf_counter() - self.window_start
        progress.train_seconds += seconds
        first = self.first_step_seconds is None
        if first:
            self.first_step_seconds = time.perf_counter() - self.started
            spent = self.first_evaluation_seconds
            note = f", {spent:.1f} s of them evaluation" if spent else ""
            self.log.print(f"first step after {self.first_step_seconds:.1f} s{note}")
        else:
            self.steady_seconds += seconds
            self.steady_steps += steps
        status = self.log_step(loss, found, seconds, steps)
        if first:
            settle_garbage()
        return status

    def reports_due(self):
        """What is due between this step and the next: "save", "val", "sample"."""
        s, step = self.settings.reports, self.progress.step
        due = {
            "save": self.due(s.save_every),
            "val": self.due(s.eval_every) or (step == 0 and not s.skip_initial_eval),
            "sample": s.sample_every >= 0 and self.due(s.sample_every),
        }
        return {name for name, now in due.items() if now}

    def between_steps(self, due):
        """Save, then evaluate and sample, as far as `due` names them.

        The checkpoint comes before what may fail, and gets the BPB of its weights afterwards.
        """
        saved = "save" in due or self.saver.saved_step == self.progress.step
        if "save" in due:
            self.save()
        if "val" in due:
            began = time.perf_counter()
            self.evaluate()
            if self.first_step_seconds is None:
                self.first_evaluation_seconds = time.perf_counter() - began
            if saved:
                self.saver.amend(self.progress.step, self.meta())
        if saved:
            self.saver.prune()
        if "sample" in due:
            self.try_sample()

    def run(self):
        """Train from the current step to the last one; saves, evaluates and samples on the way.

        Raises:
            UserError: the loss is no longer finite (seen where it is logged), or of the data.
            Interrupted: a signal came; the last step is whole, and not saved.
        """
        progress, num_iterations = self.progress, self.plan.num_iterations
        self.model.train()
        self.signals.defer()
        due = self.reports_due()
        if self.resumed:  # what was made before the checkpoint's process ended is not made again
            due -= {"save", *self.done}
        if "val" not in due and progress.step < num_iterations:
            self.check_validation()
        self.between_steps(due)
        while progress.step < num_iterations:
            self.signals.check()
            if self.window_steps == 0:  # nothing above happens inside a window
                self.synchronize()
                self.window_start = time.perf_counter()
            self.train_step()
            self.window_steps += 1
            due, status = self.reports_due(), None
            log = progress.step % self.settings.reports.train_log_every == 0
            if due or log or self.first_step_seconds is None or self.signals.number is not None:
                status = self.close_window()
            self.log.advance(status)
            self.between_steps(due)

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
            "loss_ema": progress.smoothed_loss,
            "val_bpb": progress.val_bpb,
            "best_bpb": progress.best_bpb,
            "train_seconds": round(progress.train_seconds, 3),
            "ms_per_step": 1e3 * self.steady_seconds / steps if steps else None,
            "time_to_first_step_s": self.first_step_seconds,
            "first_evaluation_s": self.first_evaluation_seconds,
            "peak_gib": peak,
            "reserved_gib": reserved,
        }
