"""The processes of one run, one a GPU, and every word that passes between them.

Everything of torch.distributed is here. What trains gets an object with the methods of `Alone`,
which is a run of one process; `Ranks` is one of several, made by torchrun or by --gpus. Tensors on
a GPU travel by NCCL, all else by Gloo. Sums are made here in the order of the ranks, so that their
bits depend on no library's algorithm; a maximum has no order.

NVLink multicast stays off, unless the environment says otherwise.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from nanofuse.train.command import DEBUG_ENV, ending, exit_code
from nanofuse.train.console import flush_or_drop
from nanofuse.train.errors import PeerFailed, RunBroken, UserError
from nanofuse.train.guard import START_SECONDS, Guard, NoGuard
from nanofuse.train.launch import PARENT
from nanofuse.train.pace import Pace
from nanofuse.train.rendezvous import Place, meet, open_store

# of this rank's GPU, though a call of torch.distributed may raise them
OWN_ERRORS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
# under the name of torch 2.13, which warns of the older one
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
MOST_VOTES = 6  # of one agreement
LEAVING_SECONDS = 60  # for the others to leave as well, when all is said and saved
POLL_SECONDS = 0.0005  # between two looks at a word that is on its way
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}


class Pending:
    """Transfers on their way; `wait` orders what follows behind them."""

    def __init__(self, works=(), within=contextlib.nullcontext):
        self.works, self.within = works, within

    def wait(self):
        """Have the current stream (on a CPU: this thread) wait for them, the first time."""
        works, self.works = self.works, ()
        if works:
            with self.within():
                for work in works:
                    work.wait()


class Alone:
    """A run of one process: nothing to exchange, nobody to wait for."""

    rank, local, world, main = 0, 0, 1, True
    guard = NoGuard()
    exposed = Pace(torch.device("cpu"))  # the time in which the device waits for other ranks

    def use(self, device):
        """From now on tensors travel that are on this device."""

    def swap(self, sends, receives):
        """Move tensors between ranks.

        Args:
            sends, receives: [(rank, tensor)], contiguous; what two ranks move between each other
                stands in one order on both sides, and has its size; what is empty stays. The most
                tensors that a rank moves to or from another one are as many on every rank.

        Returns:
            Pending; until it was waited for the tensors must stay as they are.
        """
        if sends or receives:
            raise ValueError("a run of one process has nobody to swap with")
        return Pending()

    def gather(
        self,
        x,  # any shape, the same on every rank
    ):
        """x of every rank, (world, *x.shape)."""
        return x[None]

    def total(
        self,
        x,  # any shape, the same on every rank
    ):
        """The sum over all ranks, in their order."""
        parts = self.gather(x)
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    def maximum_(
        self,
        x,  # any shape, the same on every rank
    ):
        """Replace x by the largest over all ranks, element by element; a NaN may be lost."""

    def agree(self, *numbers):
        """The largest of each number (int) over all ranks; every rank waits for every other one,
        and no GPU does."""
        return numbers

    def share(self, thing):
        """Rank 0's thing (anything that pickles) on every rank."""
        return thing

    def collect(self, thing):
        """[thing of rank 0, of rank 1, …] on every rank."""
        return [thing]

    def by_main(self, action, *args):
        """What rank 0's action(*args) returns, on every rank.

        Raises:
            PeerFailed: on the others, where it fails, with nothing to say.
        """
        if self.world == 1:
            return action(*args)
        failure, result = None, None
        if self.main:
            try:
                result = action(*args)
            except BaseException as error:
                failure = error
        code, result = self.share((exit_code(failure), None if failure else result))
        if failure is not None:
            raise failure
        if code:
            raise PeerFailed("", code)
        return result

    def close(self):
        """Leave the others, at the end."""


ALONE = Alone()


class Ranks(Alone):
    """A run of several processes, each of which calls the same methods in the same order.

    They meet over the store of torchrun or of --gpus.

    Args:
        place: Place.
        device: of the tensors that travel: a GPU, for NCCL, or the CPU, for Gloo; as `use`.

    Raises:
        UserError: the others are not there.
        RunBroken: from every method: another rank has failed, or is gone.
    """

    def __init__(self, place, device="cpu"):
        self.rank, self.world, self.main = place.rank, place.world, place.rank == 0
        self.local = place.local
        for name, value in NO_MULTICAST.items():
            os.environ.setdefault(name, value)
        patience = timedelta(seconds=START_SECONDS)
        try:
            store = open_store(place, host=self.main)
            meet(place, store)
            parent = os.environ.get(PARENT)
            self.guard = Guard(open_store(place), self.rank, self.world, parent and int(parent))
            groups = dist.PrefixStore("groups", store)
            dist.init_process_group(
                "gloo", store=groups, rank=self.rank, world_size=self.world, timeout=patience
            )
        except UserError:
            raise
        except (RuntimeError, ValueError) as error:
            reason = str(error).split("\n")[0][:200]
            raise UserError(f"rank {self.rank} does not reach the others ({reason})") from None
        self.host = self.fabric = dist.group.WORLD
        self.guard.start()
        self.use(device)

    def use(self, device):
        self.device = torch.device(device)
        self.exposed = Pace(self.device)
        self.fabric = self.host
        if self.device.type == "cuda":
            self.fabric = dist.new_group(backend="nccl")

    @contextlib.contextmanager
    def _exposed(self):
        """As _among_others, of a call that the current stream waits for."""
        with self.exposed, self._among_others():
            yield

    @contextlib.contextmanager
    def _among_others(self):
        """A call of torch.distributed: an error of it is that of a rank that has gone."""
        with self.guard.waiting():
            try:
                yield
            except OWN_ERRORS:
                raise
            except RuntimeError as error:
                self.guard.listen()
                line = str(error).split("\n")[0]  # of Gloo: [file:line] What. More
                reason = line.rpartition("] ")[2].partition(". ")[0][:100]
                raise RunBroken(
                    f"rank {self.rank} ends, as another one is gone ({reason})", 1
                ) from None

    def swap(self, sends, receives):
        if self.device.type == "cuda":
            with self._among_others():
                works = [
                    dist.all_to_all(come, go, group=self.fabric, async_op=True)
                    for come, go in in_rounds(sends, receives, self.world)
                ]
            return Pending(works, self._exposed)
        ops = [dist.P2POp(dist.isend, x, peer, self.fabric) for peer, x in sends if x.numel()]
        ops += [dist.P2POp(dist.irecv, x, peer, self.fabric) for peer, x in receives if x.numel()]
        with self._among_others():
            works = dist.batch_isend_irecv(ops) if ops else ()
        return Pending(works, self._exposed)

    def gather(self, x):
        parts = x.new_empty(self.world, *x.shape)
        with self._exposed():
            all_gather_single(parts.view(-1), x.reshape(-1), group=self.fabric)
        return parts

    def maximum_(self, x):
        with self._exposed():
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.fabric)

    def agree(self, *numbers):
        return self._meet(1, numbers)

    def _meet(self, kind, numbers=()):
        """As agree, of at most MOST_VOTES numbers; hears of a rank that has failed.

        Args:
            kind: of the call, which all ranks must be in.
        """
        most = [0] * (MOST_VOTES - len(numbers))
        votes = torch.tensor([kind, -kind, *numbers, *most], dtype=torch.int64)
        with self._among_others():
            work = dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.host, async_op=True)
            while not work.is_completed():
                self.guard.check()
                time.sleep(POLL_SECONDS)
            work.wait()
        largest, smallest, *votes = votes.tolist()
        if largest != -smallest:
            raise RunBroken(f"rank {self.rank} ends, as the ranks are out of step", 1)
        return tuple(votes[: len(numbers)])

    def share(self, thing):
        box = [thing]
        self._meet(2)
        with self._among_others():
            dist.broadcast_object_list(box, src=0, group=self.host)
        return box[0]

    def collect(self, thing):
        things = [None] * self.world
        self._meet(3)
        with self._among_others():
            dist.all_gather_object(things, thing, group=self.host)
        return things

    def leave(self, failure):
        """End this process for an error: the first rank to fail says its line and an exit code, the
        others in a few words that they end with it. Does not return."""
        self.guard.stop()
        flush_or_drop()
        code, line = exit_code(failure), ending(failure)
        if os.environ.get(DEBUG_ENV):
            traceback.print_exception(failure)
        if isinstance(failure, (PeerFailed, RunBroken)):
            line = str(failure)
        elif self.guard.claim(code, line).rank == self.rank:
            print(line, file=sys.stderr, flush=True)
            self.guard.tell()
            line = ""
        self.guard.wait_for_the_first()
        if line and code < 128:
            print(line, file=sys.stderr, flush=True)
        self.guard.part()
        os._exit(code)

    def close(self):
        self.agree()
        self.guard.stop()
        # nobody looks after this rank any more; it has done its work, whatever the others do
        late = threading.Timer(LEAVING_SECONDS, os._exit, [0])
        late.daemon = True
        late.start()
        try:
            self.agree()  # the host of the store leaves when nobody looks there any more
            dist.destroy_process_group()
        finally:
            late.cancel()


def in_rounds(sends, receives, world):
    """What `swap` moves as calls of all_to_all, whose host time is that of one transfer. NCCL has
    every rank meet every other one in each, whatever moves: all ranks must make as many.

    Returns:
        [(what comes, what goes)], of each rank a tensor (n,) uint8, empty where nothing moves. The
        n-th tensor between two ranks is in the n-th pair of both.
    """
    if not sends and not receives:
        return []
    nothing = (sends or receives)[0][1].new_empty(0, dtype=torch.uint8)

    def by_rank(pairs):
        found = [[] for _ in range(world)]
        for rank, x in pairs:
            found[rank].append(x.view(-1).view(torch.uint8) if x.numel() else nothing)
        return found

    coming, going = by_rank(receives), by_rank(sends)
    return [
        tuple([x[i] if i < len(x) else nothing for x in way] for way in (coming, going))
        for i in range(max(map(len, (*coming, *going))))
    ]


def join():
    """The Ranks that this process is one of; ALONE without others.

    Raises:
        UserError: the others are not there.
    """
    place = Place.of_environment()
    return ALONE if place.world == 1 else Ranks(place)
