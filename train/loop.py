"""The training loop: micro-steps, optimiser step, and what happens between steps.

Several ranks go through it together. Whatever may fail on one of them alone runs under
`Accord.together`, which ends it on all or on none: the weights are whole then, and all can save.
"""

import dataclasses
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanofuse.model.gpt import GPT
from nanofuse.train.accord import Accord
from nanofuse.train.assemble import follow, gathered
from nanofuse.train.bpb import Validation
from nanofuse.train.clock import Phases
from nanofuse.train.core import BATCH_TOKENS, evaluate_core
from nanofuse.train.data.corpus import ParquetCorpus, StdlibCorpus
from nanofuse.train.data.device_loader import DeviceLoader
from nanofuse.train.data.tokenizer import Tokenizer
from nanofuse.train.energy import EnergyMeter
from nanofuse.train.errors import UserError, first_line
from nanofuse.train.figures import Crew, window_figures
from nanofuse.train.files import way_out
from nanofuse.train.guard import START_SECONDS
from nanofuse.train.optim.muon_adamw import MuonAdamW
from nanofuse.train.optim.watch import NAMED
from nanofuse.train.pace import Pace
from nanofuse.train.plan import Plan
from nanofuse.train.progress import EMA_DECAY, Progress
from nanofuse.train.ranks import ALONE, Alone
from nanofuse.train.runlog import RunLog
from nanofuse.train.samples import draw_sample
from nanofuse.train.saving import Saver
from nanofuse.train.schedules import Schedule
from nanofuse.train.settings import Settings
from nanofuse.train.signals import Interrupted, Signals
from nanofuse.train.state import training_state
from nanofuse.train.step_times import StepTimes

RATES_HINT = (
    "--resume from the checkpoint before it, with a lower --matrix-lr, --embedding-lr, "
    "--unembedding-lr or --scalar-lr"
)


def peak_bytes(device):
    """The most memory that this process has held on a GPU so far; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def settle_garbage():
    """Collect once, and keep what survives out of every later collection.

    torch.compile leaves hundreds of thousands of objects that live as long as the process; each
    of Python's full collections would go over them and stall the step it falls into. Call
    gc.unfreeze() when done, or native modules report leaks at exit.
    """
    gc.collect()
    gc.freeze()


@dataclass
class Trainer:
    """A model with everything that trains it.

    `model` is called for losses (compiled or not); `raw_model` is the same weights uncompiled, for
    samples and checkpoints.
    """

    model: Callable
    raw_model: GPT
    optimizer: MuonAdamW
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
    phases: Phases  # since the start of the process, up to the first step
    progress: Progress
    estimate: Callable[[int], int]  # bytes of memory by rows of a micro-step
    tasks: list  # of train.core_bundle.Task, for CORE; empty without --core-every
    signals: Signals = field(default_factory=Signals)
    ranks: Alone = ALONE  # those that train together
    resumed: bool = False  # from a checkpoint of progress.step
    done: frozenset = frozenset()  # kinds of reports of that step that were made before
    whole: bool = True  # false where an update was cut off, so that weights lie between two steps

    def __post_init__(self):
        self.device = self.loader.device
        self.accord = Accord(self.ranks, self.signals)
        self.pace = Pace(self.device)
        # cropped whatever training does, so that BPB of both can be compared
        packing = dataclasses.replace(self.loader.packing, split="val", long_documents="crop")
        self.validation = Validation(packing, self.device, self.ranks)
        self.energy = EnergyMeter(self.device)
        self.times = StepTimes(self.energy, self.phases)
        self.state = self.loader.state  # of the loader, after the last whole step
        self.loss = None  # of that step, a tensor ()
        self.ema = torch.tensor(self.progress.loss_ema, device=self.device)

    def due(self, every):
        """Whether something that happens every `every` steps, and at the end, happens now."""
        return self.plan.due(self.progress.step, every)

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def micro_steps(self):
        """This rank's micro-steps of a step; returns the sum of their losses, ()."""
        total = torch.zeros((), device=self.device)
        with self.pace:
            for _ in range(self.plan.micro_steps // self.ranks.world):
                with self.accord.patient():
                    inputs, targets = next(self.loader)
                loss = self.model(inputs, targets)
                self.optimizer.note(self.loader.tokens)  # while the device is at work
                (loss / self.plan.micro_steps).backward()
                total += loss.detach()
        return total

    def train_step(self):
        """One optimiser step over a total batch; returns its mean loss as a tensor ()."""
        step = self.progress.step
        self.accord.allow(1)
        total = self.accord.together(self.micro_steps)
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
        follow(self.model)
        self.loss = self.ranks.total(total) / self.plan.micro_steps
        ema = self.ema.lerp(self.loss, 1 - EMA_DECAY)
        self.ema.copy_(torch.where(torch.isfinite(ema), ema, self.ema))
        self.progress.step += 1
        self.progress.loss_ema_steps += 1
        self.state = self.loader.state
        return self.loss

    def evaluate(self):
        """Measure validation BPB.

        Raises:
            UserError: it is not finite, or the split cannot be read.
        """
        progress = self.progress
        bpb = self.validation.bpb(self.model, self.plan.eval_rows, self.accord.decide_now)
        if not math.isfinite(bpb):
            saved = self.saver.saved_step == progress.step  # before it was known
            mend = f"{way_out(self.saver.step_folder())}; " if saved else ""
            raise UserError(f"validation BPB is {bpb} at step {progress.step}; {mend}{RATES_HINT}")
        progress.note_bpb(bpb)
        settle_garbage()  # the first evaluation compiles
        self.log.metrics("val", progress.step, bpb=bpb, train_seconds=progress.train_seconds)
        self.log.print(f"step {progress.step:>6}  val bpb {bpb:.6f}")

    def measure_core(self):
        """Measure CORE."""
        progress, rows = self.progress, self.settings.horizon.device_batch_size
        most = min(rows * self.settings.model.max_seq_len, BATCH_TOKENS)
        found = evaluate_core(
            self.raw_model, self.tokenizer, self.tasks, most, self.ranks, self.accord.decide_now
        )
        self.log.metrics("core", progress.step, **found, train_seconds=progress.train_seconds)
        self.log.print(f"step {progress.step:>6}  CORE {found['core']:.6f}")

    def sample(self):
        """Show a continuation of the prompt."""
        seed = self.settings.job.seed
        text = draw_sample(self.raw_model, self.tokenizer, self.prompt, seed)
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
        """Why the weights are not to be saved, whatever they are, in words, or None."""
        if not self.whole:
            return f"the update of step {self.progress.step + 1} was cut off"
        if self.loss is not None and not math.isfinite(self.loss.item()):
            return "its loss is not finite"
        found = self.optimizer.watch.read()
        if found.first_step and not self.skips:
            return f"gradients of step {found.first_step} were not finite"
        return None

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
            "val_bpb": progress.own_bpb,
            "num_iterations": self.plan.num_iterations,
            "optimizer_steps": self.optimizer.step_count,
            "loader": {
                **self.state.position(),
                "corpus": self.corpus.fingerprint,
                "content": self.corpus.content,
                "at": self.corpus.describe("train", self.state.unit),
            },
        }

    def save(self):
        """Write the checkpoint of this step, within `gathered`.

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
            training_state(self.model, self.optimizer),
            {name: torch.from_numpy(array) for name, array in self.state.to_arrays().items()},
            self.optimizer.rows() if self.ranks.world > 1 else None,
        )
        self.log.print(f"step {self.progress.step:>6}  saved {folder}")

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
        steps = self.times.take_steps()
        if not steps:
            return None
        self.accord.allow(steps)
        loss, found = self.accord.together(self.read_window)
        seconds = self.times.seconds()
        own = self.pace.take(), self.ranks.exposed.take(), peak_bytes(self.device)
        crew = Crew.of(self.ranks.collect(own), steps)
        return self.accord.together(self.report_window, steps, seconds, loss, found, crew)

    def read_window(self):
        """Loss and Gradients of the latest step; waits for all that the device does."""
        loss, found = self.loss.item(), self.optimizer.watch.read()
        self.check_finite(loss, found)
        return loss, found

    def report_window(self, steps, seconds, loss, found, crew):
        """Log `steps` steps that took `seconds`; returns what stands beside the bar."""
        progress = self.progress
        progress.loss = loss if math.isfinite(loss) else None
        progress.loss_ema = self.ema.item()
        progress.count_seconds(seconds, steps)
        times = self.times
        first = times.close(seconds, steps)
        if first:
            self.log.print(f"first step after {times.first_step_seconds:.1f} s: {self.phases}")
        self.accord.note_step(seconds / steps, anew=times.windows <= 2)  # the first one compiled
        values, status = window_figures(self, loss, found, seconds / steps, crew)
        self.log.metrics("train", progress.step, **values)
        if not self.log.has_bar:
            remaining = (self.plan.num_iterations - progress.step) * seconds / steps
            self.log.print(f"step {progress.step:>6}  {status}  ETA {remaining / 60:.1f} min")
        if first:
            settle_garbage()
        return status

    def reports_due(self):
        """What is due between this step and the next: "save", "val", "core", "sample"."""
        s, step = self.settings.reports, self.progress.step
        due = {
            "save": self.due(s.save_every),
            "val": self.plan.evaluates(step, s),
            "core": s.core_every >= 0 and self.due(s.core_every),
            "sample": s.sample_every >= 0 and self.due(s.sample_every),
        }
        return {name for name, now in due.items() if now}

    def between_steps(self, due):
        """Save, then evaluate, measure CORE and sample, as far as `due` names them.

        The checkpoint comes before what may fail, and gets the BPB of its weights afterwards.
        """
        if due:
            with gathered(self.model):
                self.report(due)

    def report(self, due):
        """As between_steps, with all weights at hand."""
        saved = "save" in due or self.saver.saved_step == self.progress.step
        if "save" in due:
            with self.accord.promised("save"):
                self.accord.together(self.save)
        if "val" in due:
            with self.accord.promised("val"):
                self.accord.together(self.evaluate)
            if not self.times.windows:
                self.phases.end("evaluation")
            if saved:
                self.accord.by_main(self.saver.amend, self.progress.step, self.meta())
        if saved:
            self.accord.by_main(self.saver.prune)
        if "core" in due:
            with self.accord.promised("core"):
                self.accord.together(self.measure_core)
        if "sample" in due:
            with self.accord.promised("sample"):
                self.accord.by_main(self.try_sample)

    def run(self):
        """Train from the current step to the last one; saves, evaluates and samples on the way.

        Raises:
            UserError: the loss is no longer finite (seen where it is logged), or of the data.
            Interrupted: a signal came; the last step is whole, and not saved.
        """
        progress, num_iterations = self.progress, self.plan.num_iterations
        self.ranks.guard.allow(START_SECONDS)
        self.model.train()
        self.signals.defer()
        due = self.reports_due()
        if self.resumed:  # what was made before the checkpoint's process ended is not made again
            due -= {"save", *self.done}
        if "val" not in due and progress.step < num_iterations:
            self.accord.together(self.validation.check)
        self.between_steps(due)
        self.accord.decide()
        while progress.step < num_iterations:
            self.accord.check_stop()
            if not self.times.steps:  # nothing above happens inside a window
                self.synchronize()
                self.ranks.exposed.take()  # of what was between the steps
                self.times.open()
            self.train_step()
            self.times.steps += 1
            due, status = self.reports_due(), None
            log = progress.step % self.settings.reports.train_log_every == 0
            if due or log or not self.times.windows or self.accord.stop:
                status = self.close_window()
            self.log.advance(status)
            self.between_steps(due)
