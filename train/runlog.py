"""Where a run's figures go: a progress bar, metrics.jsonl, and Weights & Biases if asked for."""

import json
import sys

from tqdm import tqdm

from nanofuse.train.errors import UserError
from nanofuse.train.files import make_folder

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Progress bar and metrics of one run.

    Args:
        directory: the run's folder, made if need be; metrics.jsonl in it is appended to.
        first_step, num_iterations: range of the bar.
        wandb: log to Weights & Biases as well.

    Raises:
        UserError: wandb is asked for and not installed.
    """

    def __init__(self, directory, first_step, num_iterations, wandb=False):
        self.wandb = None
        if wandb:
            try:
                import wandb as client
            except ImportError:
                raise UserError(
                    "--wandb needs wandb; install it with pip install -e .[wandb]"
                ) from None
            self.wandb = client.init(project="nanofuse", name=directory.name)
        make_folder(directory)
        self.file = (directory / METRICS_FILE).open("a", encoding="utf-8", buffering=1)
        self.bar = tqdm(
            total=num_iterations,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=1.0,
            disable=not sys.stderr.isatty(),
            bar_format="{n_fmt}/{total_fmt} {percentage:3.0f}%|{bar:20}| {postfix} ETA {remaining}",
        )

    def metrics(self, kind, step, **values):
        """Append one JSON object {"kind", "step", ...} and pass it on to wandb."""
        record = {"kind": kind, "step": step, **values}
        self.file.write(json.dumps(record) + "\n")
        if self.wandb is not None:
            self.wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def advance(self, status=None):
        """One step further; `status` replaces the text beside the bar."""
        if status is not None:
            self.bar.set_postfix_str(status, refresh=False)
        self.bar.update()

    def print(self, text):
        """A line on stdout that does not tear the bar."""
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self):
        self.bar.close()
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()
