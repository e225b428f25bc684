"""Checkpoints of a run that is on, and what is saved and said when it ends before its last step."""

import os
import traceback

import torch

from nanofuse.train.assemble import gathered
from nanofuse.train.checkpoint import save_checkpoint
from nanofuse.train.command import DEBUG_ENV, command_module, exit_code
from nanofuse.train.data.tokenizer import FILE_NAME
from nanofuse.train.disk import SaveError
from nanofuse.train.errors import PeerFailed, RunBroken, RunEnded, UserError, first_line
from nanofuse.train.files import portable
from nanofuse.train.guard import START_SECONDS
from nanofuse.train.lock import LOCK_FILE
from nanofuse.train.memory import out_of_memory
from nanofuse.train.ranks import ALONE
from nanofuse.train.run_folder import amend_meta, checkpoints, prune
from nanofuse.train.runlog import METRICS_FILE
from nanofuse.train.signals import Interrupted
from nanofuse.train.versions import code, versions


class Saver:
    """Writes the checkpoints of one run into its folder; `save` is for all ranks at once, `amend`
    and `prune` are rank 0's.

    Args:
        lock: train.lock.RunLock that holds the folder.
        log: train.runlog.RunLog.
        tokenizer: written again where the folder was removed.
        keep: checkpoints that `prune` leaves, beside the best one.
        saved_step: step of the checkpoint that the run goes on from, or None.
        ranks: those that train.

    Attributes:
        saved_step: step of the latest checkpoint of this run, or None.
        lost_at: step at which the folder was found to be gone, or None.
    """

    def __init__(self, lock, log, tokenizer, keep, saved_step=None, ranks=ALONE):
        self.ranks = ranks
        self.lock, self.log, self.tokenizer, self.keep = lock, log, tokenizer, keep
        self.directory = lock.directory
        self.saved_step, self.lost_at, self.stays = saved_step, None, False
        self.facts = {"tokenizer": tokenizer.fingerprint, "code": code(), "versions": versions()}

    def _complete(self, meta):
        """The meta of a step with the run's own facts, and with names of files in UTF-8."""
        whole = {**meta, **self.facts, "wandb": self.log.wandb_id}
        settings = {name: portable(value) for name, value in whole["settings"].items()}
        at = {name: portable(value) for name, value in whole["loader"]["at"].items()}
        return {**whole, "settings": settings, "loader": {**whole["loader"], "at": at}}

    def save(self, step, meta, model, optim_state, loader_tensors, rows=None):
        """As save_checkpoint; a folder that was removed is made again, with all that belongs there.

        Raises:
            UserError: it cannot be written.
        """
        self.ranks.by_main(self._restore, step)
        meta, tensors = self._complete(meta), (model, optim_state, loader_tensors)
        folder = save_checkpoint(self.directory, step, meta, *tensors, self.ranks, rows)
        self.saved_step = step
        return folder

    def _restore(self, step):
        """Make again what was lost of the run's folder: lock, tokenizer and metrics.

        Raises:
            UserError: it cannot be made, or another process has it.
        """
        names, whole = (LOCK_FILE, FILE_NAME, METRICS_FILE), False
        lost = [name for name in names if not (self.directory / name).exists()]
        if self.lock.lost:
            whole = self.lock.moved
            self.lock.retake()
        if whole or FILE_NAME in lost:
            self.tokenizer.save(self.directory / FILE_NAME)
        if whole or METRICS_FILE in lost:
            self.log.restore()
        if whole:
            self.lost_at = step
            self.log.print(f"run: {self.directory} was removed or renamed; it is made again")
        elif lost:
            self.log.print(f"run: {', '.join(lost)} of {self.directory} was removed; made again")

    def step_folder(self):
        """The folder of the step that was saved last."""
        return checkpoints(self.directory)[self.saved_step]

    def amend(self, step, meta):
        """Bring meta.json of a step that is saved up to date."""
        folder = checkpoints(self.directory).get(step)
        if folder is not None:
            amend_meta(folder, self._complete(meta))

    def prune(self):
        """Remove what --keep does not keep; what cannot be removed stays, and is told once."""
        try:
            for folder in prune(self.directory, self.keep, self.saved_step):
                self.log.print(f"removed {folder}")
        except OSError as error:
            if not self.stays:
                self.log.print(f"keep: {error.filename} cannot be removed ({error.strerror})")
            self.stays = True

    def command(self):
        """The command that goes on from the newest checkpoint, or None without one."""
        if not checkpoints(self.directory):
            return None
        gpus = f" --gpus {self.ranks.world}" if self.ranks.world > 1 else ""
        return f"python -m {command_module()} --run {self.directory.name} --resume{gpus}"


def run_and_save(trainer):
    """trainer.run(); whatever ends it early, the steps that were made are saved first, unless ranks
    have no common end.

    Raises:
        UserError: bad input, met on the way.
        RunEnded: any other error (code 1), a signal (128 and its number), or a folder that was
            removed under the run (1).
    """
    failure = None
    try:
        trainer.run()
    except BaseException as error:  # panics of native libraries are no Exception
        failure = error
        if not os.environ.get(DEBUG_ENV):  # frames hold tensors, and memory may be short
            traceback.clear_frames(error.__traceback__)
    saver, step, ranks = trainer.saver, trainer.progress.step, trainer.ranks
    notes = []
    if failure is not None:
        notes.append(describe_failure(failure, trainer))
    speaker = trainer.accord.speaker
    united = ranks.world == 1 or failure is None or speaker is not None
    if united:
        ranks.guard.allow(START_SECONDS)
        unsaved = step > (saver.saved_step or 0) or bool(step and saver.lock.lost)
        unsaved, vain = ranks.agree(unsaved, isinstance(failure, SaveError))
        if unsaved and not vain:
            notes.append(save_now(trainer))
        saver.lost_at = ranks.share(saver.lost_at)
    if failure is None and saver.lost_at is None:
        return
    if isinstance(failure, PeerFailed) or (isinstance(failure, RunBroken) and not ranks.main):
        raise failure
    if united and trainer.accord.speaker not in (None, ranks.rank):
        raise PeerFailed(
            f"rank {ranks.rank} ends with rank {trainer.accord.speaker}", exit_code(failure)
        )
    if not united:
        notes.append(f"step {step} is not saved")
    if step and saver.saved_step == step:
        notes.append(f"step {step} is saved")
    if saver.lost_at is not None:
        notes.append(
            f"{saver.directory} was removed under the run: nothing from before step "
            f"{saver.lost_at} is there"
        )
    if failure is not None and (command := saver.command()):
        notes.append(f"go on with {command}")
    message = "; ".join(filter(None, notes))
    if ranks.rank and not isinstance(failure, RunBroken):
        message = f"rank {ranks.rank}: {message}"
    if isinstance(failure, (UserError, OSError, torch.OutOfMemoryError, MemoryError)):
        raise UserError(message) from failure
    kind = RunBroken if isinstance(failure, RunBroken) else RunEnded
    raise kind(message, 1 if failure is None else exit_code(failure)) from failure


def describe_failure(failure, trainer):
    """One line for what ended a run."""
    if isinstance(failure, (UserError, RunEnded)):
        return str(failure)
    if isinstance(failure, Interrupted):
        return f"stopped by {failure} after step {trainer.progress.step}"
    if isinstance(failure, (torch.OutOfMemoryError, MemoryError)):
        rows = trainer.settings.horizon.device_batch_size
        return out_of_memory(rows, trainer.estimate, trainer.device)
    if isinstance(failure, OSError) and failure.filename:
        return f"{failure.filename}: {failure.strerror}"
    return f"{first_line(failure)} ({DEBUG_ENV}=1 shows where)"


def save_now(trainer):
    """Save the last whole step, if it can be; returns words for why not, or None."""
    step, ranks = trainer.progress.step, trainer.ranks
    reason = _attempt(_look_for_reasons, trainer)
    if not ranks.agree(reason is not None)[0]:
        with gathered(trainer.model):
            reason = _attempt(_save_and_prune, trainer)
    else:
        reason = reason or "another rank cannot"
    return f"step {step} is not saved ({reason})" if reason else None


def _look_for_reasons(trainer):
    """Raise UserError where the last step is not to be saved."""
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    trainer.close_window()
    if reason := trainer.not_savable():
        raise UserError(reason)


def _save_and_prune(trainer):
    if names := trainer.nonfinite_weights():
        raise UserError(f"{', '.join(names)} is not finite")
    trainer.save()
    trainer.ranks.by_main(trainer.saver.prune)


def _attempt(action, *args):
    """What goes wrong with action(*args), in a line, or None."""
    try:
        action(*args)
    except UserError as error:
        return str(error)
    except Exception as error:  # such as those of a GPU that has failed
        return first_line(error)
    return None
