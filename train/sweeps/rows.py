"""The rows of a forward pass that fit, for runs of a sweep that have --device-batch-size auto.

    python -m nanofuse.train.sweeps.rows OUT PROCESSES [flags of train.run]

A process of its own finds them out as such a run does before it starts, where PROCESSES share a
device, and writes the number into OUT. Whoever starts it keeps what was found with the sweep, so
that runs of equal sizes have equal rows. torch is loaded when the rows are found only.
"""

import json
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from nanofuse.train.command import run_command
from nanofuse.train.errors import RunEnded, UserError
from nanofuse.train.files import write_text_atomically
from nanofuse.train.settings import ROWS, asks_for_rows, build_parser
from nanofuse.train.signals import Interrupted, Signals
from nanofuse.train.sweeps.definition import arguments, with_rows

MODULE = "nanofuse.train.sweeps.rows"
FILE = "rows.json"  # in the sweep's folder
SPARE = 0.9  # of a device's memory, that several processes share out; the rest is no tensor's
# flags of model and machine that take no memory
NO_SIZE = {"window_pattern", "bigram_lambda_init", "fp8_gradients", "kernel_cache", "gpus"}


def sizes(item, processes, gpu):
    """What the rows depend on, as text.

    Args:
        processes: that share a device.
        gpu: its name, or None for a CPU.
    """
    settings, total = item.settings, item.plan.total_batch_size
    facts = {"gpu": gpu, "processes": processes, "total_batch_size": total}
    facts["data"] = settings.job.data  # whose tokenizer may set the vocabulary
    facts |= asdict(settings.model) | asdict(settings.machine)
    return json.dumps({name: value for name, value in facts.items() if name not in NO_SIZE})


def read_known(folder):
    """{sizes: rows} that were found before.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / FILE
    try:
        found = json.loads(path.read_text())
        return {str(key): int(rows) for key, rows in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({str(error)[:99]}); delete it") from None


@dataclass(frozen=True, eq=False)
class Search:
    """What a process is to find out, as the Pool takes it; `run` is the name of its log."""

    run: str
    item: object  # definition.Item
    out: Path
    processes: int

    def command(self, resume):
        item = self.item
        return [MODULE, str(self.out), str(self.processes), "--run", item.run,
                *arguments(item.given)]  # fmt: skip


def settle_rows(items, states, folder, processes, gpu, search):
    """The items with rows in place of auto: those of their checkpoint, else as found.

    Args:
        states: of the items (jobs.State).
        folder: of the sweep.
        processes, gpu: as `sizes` has them.
        search: search([Search]) yields (Search, jobs.Outcome) of each.

    Raises:
        UserError: for one of them no rows are found.
    """
    known = read_known(folder)
    keys = {i.run: sizes(i, processes, gpu) for i in items if asks_for_rows(i.given)}
    missing = {}  # sizes: the first item that has them
    for item, state in zip(items, states, strict=True):
        if item.run in keys and state.kind == "new" and keys[item.run] not in known:
            missing.setdefault(keys[item.run], item)
    searches = {
        Search(f"rows-{number}", item, folder / f"rows-{number}.found", processes): key
        for number, (key, item) in enumerate(missing.items(), 1)
    }
    for each, outcome in search(list(searches)):
        if outcome.kind == "failed":
            raise UserError(f"{each.item.variant}: no rows for auto, {outcome.text}")
        if outcome.kind == "finished":
            known[searches[each]] = int(each.out.read_text())
            each.out.unlink()
            write_text_atomically(folder / FILE, json.dumps(known, indent=1) + "\n")
    settled = []
    for item, state in zip(items, states, strict=True):
        rows = item.run in keys and (state.rows or known.get(keys[item.run]))
        settled.append(with_rows(item, rows) if rows else item)
    return settled


def find(given, processes):
    """The rows of a run by the flags that were given ({name: value}).

    Raises:
        UserError: bad input, or not one row fits.
        RunEnded: a signal came.
    """
    from nanofuse.train.ahead import Ahead
    from nanofuse.train.compiling import Compiling, wanted
    from nanofuse.train.device import select_device
    from nanofuse.train.lock import RunLock
    from nanofuse.train.memory import take_part
    from nanofuse.train.start import start_new
    from nanofuse.train.trial import settle_rows as tried

    compiling = Compiling.start() if wanted(given) else None
    if processes > 1:
        take_part(SPARE / processes, select_device(given.get("device_type", "auto")))
    try:
        ahead = Ahead(compiling, given.get("kernel_cache"))
        with Signals(), closing(ahead), RunLock() as lock:  # none of them leaves anything
            start = tried(start_new(given, lock, ahead=ahead), ahead.ready)
    except Interrupted as stop:
        raise RunEnded(f"stopped by {stop}", 128 + stop.number) from None
    return start.settings.flat()[ROWS]


def main(argv=None):
    out, processes, *flags = sys.argv[1:] if argv is None else argv
    rows = find(vars(build_parser().parse_args(flags)), int(processes))
    write_text_atomically(Path(out), f"{rows}\n")


if __name__ == "__main__":
    run_command(main)
