"""Where else a run's figures go, if asked for: Weights & Biases, TensorBoard, Trackio.

Each takes the records of metrics.jsonl under the names "kind/figure" (of CORE's tasks
"core/tasks/LABEL/figure"), and the settings once. A resumed run goes on in the same place. Steps
that it makes again are kept once by TensorBoard and by Weights & Biases (the later and the earlier
one), twice by Trackio.
"""

import json
import sys
from contextlib import suppress
from importlib.util import find_spec
from numbers import Real

from nanofuse.train.errors import UserError, first_line

PROJECT = "nanofuse"
FOLDER = "tensorboard"  # in the run's folder
EVENTS = "events.out.tfevents.*"  # the names of its files there


class _Run:
    """What the run of a service takes, as wandb and those made after it have it."""

    def log(self, values, step):
        self.run.log(values, step=step)

    def close(self):
        self.run.finish()


class Wandb(_Run):
    """A run of Weights & Biases, a new one or the one of this id; `id` is its own.

    Raises:
        ImportError: it is not installed.
    """

    name = "wandb"
    mend = "run wandb login, or give --no-wandb"

    def __init__(self, directory, settings, step, wandb_id):
        import wandb

        known = {"id": wandb_id, "resume": "allow"} if wandb_id else {}
        self.run = wandb.init(project=PROJECT, name=directory.name, config=settings, **known)
        self.id = self.run.id


class Trackio(_Run):
    """A run of Hugging Face's Trackio, of the name of the run's folder.

    Raises:
        ImportError: it is not installed.
    """

    name = "trackio"
    mend = "give --no-trackio"

    def __init__(self, directory, settings, step, wandb_id):
        import trackio

        resume = "never" if step is None else "allow"
        self.run = trackio.init(
            project=PROJECT, name=directory.name, config=settings, resume=resume
        )


class TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir runs` shows them.

    Raises:
        ImportError: it is not installed.
    """

    name = "tensorboard"
    mend = "give --no-tensorboard"

    def __init__(self, directory, settings, step, wandb_id):
        from torch.utils.tensorboard import SummaryWriter

        folder = directory / FOLDER
        new = not any(folder.glob(EVENTS))  # a run may be older than the flag
        purge = None if step is None else step + 1  # later steps are made again
        self.writer = SummaryWriter(str(folder), purge_step=purge)
        if new:
            text = json.dumps(settings, indent=1)
            self.writer.add_text("settings", f"<pre>{text}</pre>", 0)

    def log(self, values, step):
        for name, value in values.items():
            if isinstance(value, Real) and not isinstance(value, bool):
                self.writer.add_scalar(name, value, step)

    def close(self):
        self.writer.close()


KINDS = (Wandb, Trackio, TensorBoard)


def check_installed(asked):
    """Refuse trackers that are not installed; loads none of them.

    Args:
        asked: {flag's field: value}.

    Raises:
        UserError: one that is asked for is not there.
    """
    for kind in KINDS:
        if asked.get(kind.name) and not _is_there(kind.name):
            raise UserError(_refusal(kind, ImportError()))


def _is_there(module):
    """Whether a module is loaded, or can be. A folder of that name is none, such as the one that
    wandb makes where it runs."""
    if module in sys.modules:
        return sys.modules[module] is not None
    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def close_all(trackers):
    """Close trackers after an error, which is the one that is told."""
    for tracker in trackers:
        with suppress(Exception):
            tracker.close()


def start_trackers(reports, directory, settings, step=None, wandb_id=None):
    """The trackers that Reports asks for, ready.

    Args:
        reports: train.settings.Reports.
        directory: the run's folder; its name is the run's.
        settings: {name: value} of the run's hyperparameters.
        step: that a resumed run goes on from; None: a new one.
        wandb_id: of the run in Weights & Biases that goes on; None: a new one.

    Raises:
        UserError: one is not installed, or does not start; those before it are closed.
    """
    made = []
    for kind in KINDS:
        if not getattr(reports, kind.name):
            continue
        try:
            made.append(kind(directory, settings, step, wandb_id))
        except Exception as error:
            close_all(made)
            raise UserError(_refusal(kind, error)) from None
    return made


def _refusal(kind, error):
    """What keeps a tracker from its start, and the mend, in one line."""
    if isinstance(error, ImportError):
        name = kind.name
        return (
            f"--{name} needs {name}; install it with pip install -e '.[{name}]', "
            f"or give --no-{name}"
        )
    return f"--{kind.name} does not start ({first_line(error)}); {kind.mend}"
