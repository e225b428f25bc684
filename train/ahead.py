"""What a run does about its kernels before it launches them."""

from pathlib import Path

from nanofuse.kernels.common.tuning import sm_count
from nanofuse.model.backends import flash_ahead
from nanofuse.model.fused import kernels_are_interpreted
from nanofuse.train.compiling import Compiling, Request


class Ahead:
    """Compiles a run's kernels beside its start, where they are not in the caches.

    Args:
        compiling: train.compiling.Compiling, started; None: kernels compile when they are launched.
        file: of `python -m train.warm`, whose kernels are put into the caches first; or None.
    """

    def __init__(self, compiling=None, file=None):
        self.compiling, self.file = compiling or Compiling(), file
        self.request, self.needed = None, None

    def begin(self, settings, machine, config, fp8, world=1):
        """Say what the run will launch; only the first call counts.

        Args:
            settings: train.settings.Settings.
            machine: train.device.Machine.
            config: GPTConfig.
            fp8: providers.Choice of the products.
            world: number of ranks.

        Raises:
            UserError: the file is damaged, stale or for something else.
        """
        if self.request is not None:
            return
        on_gpu = machine.device.type == "cuda" and not kernels_are_interpreted()
        if machine.backend != "fused" or not on_gpu:
            return self.compiling.close()
        from nanofuse.train.kernel_cache import Needed, unpack  # needs Triton

        options = settings.machine
        self.request = Request.of(
            config,
            settings.optim,
            settings.horizon.device_batch_size,
            fp8.made.fp8,
            flash_ahead.expected(options.attention),
            options.deterministic,
            machine.name,
            machine.capability,
            sm_count(machine.device),
            world=world,
            gradients=options.fp8_gradients,
        )
        if self.file:
            count = unpack(Path(self.file), machine.capability)
            print(f"kernels: {count} entries of {self.file}", flush=True)
        self.needed = Needed(machine.capability)
        there = self.needed.there(self.request)
        if there:
            self.compiling.drop(f"kernels: all in the caches, {there} entries")
        else:
            self.compiling.ask(self.request)

    def ready(self):
        """Wait until all is compiled: to be called before the first launch."""
        compiling = self.compiling
        compiling.wait(lambda line: print(line, flush=True))
        if compiling.entries and not compiling.problem:
            self.needed.add({self.request.digest(): sorted(set(compiling.entries))})

    def close(self):
        self.compiling.close()
