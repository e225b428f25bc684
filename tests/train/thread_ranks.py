"""Several ranks as threads of one process: what train.ranks.Ranks promises, without its start.

One thread runs at a time, until it waits for the others: Triton's interpreter takes no more.
"""

import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import torch

from nanofuse.train.ranks import Alone, Pending, in_rounds


class _Board:
    """What the ranks of one run put down for each other."""

    def __init__(self, world):
        self.barrier = threading.Barrier(world, timeout=60)
        self.things = [None] * world
        self.turn = threading.Lock()
        self.mail = defaultdict(list)  # (from, to, which swap): tensors on their way, events
        self.read = defaultdict(list)  # (to, from, which swap): events
        self.rounds = defaultdict(list)  # which swap: calls of all_to_all that each rank would make

    def wait(self):
        """Let the others come here, too."""
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()


def _event(x):
    """That what was launched so far on a tensor's GPU is done; None on a CPU."""
    return torch.cuda.current_stream().record_event() if x.is_cuda else None


def _wait(event):
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


class _Arrival:
    """A transfer that ends when it is waited for, as late as one may. On a GPU the streams that are
    current at its start and where it is waited for are in that order."""

    def __init__(self, ranks, sends, receives):
        self.ranks, self.receives, self.swap = ranks, receives, ranks.swaps
        self.peers = [peer for peer, _ in sends]
        ranks.board.rounds[self.swap].append(len(in_rounds(sends, receives, ranks.world)))
        for peer, x in sends:
            assert x.is_contiguous() and peer != ranks.rank
            ranks.board.mail[ranks.rank, peer, self.swap].append((x, _event(x)))

    def wait(self):
        board, rank = self.ranks.board, self.ranks.rank
        board.wait()
        assert len(set(board.rounds[self.swap])) == 1  # else NCCL waits for ever
        for peer, x in self.receives:
            there, sent = board.mail[peer, rank, self.swap].pop(0)
            assert x.is_contiguous() and there.shape == x.shape and there.dtype == x.dtype
            _wait(sent)
            x.copy_(there)
            board.read[rank, peer, self.swap].append(_event(x))
        board.wait()
        for peer in self.peers:
            _wait(board.read[peer, rank, self.swap].pop(0))


class ThreadRanks(Alone):
    """One of `world` ranks."""

    def __init__(self, rank, board):
        self.rank, self.world, self.main = rank, len(board.things), rank == 0
        self.board = board
        self.moved = self.swaps = 0  # bytes sent, calls of swap

    def swap(self, sends, receives):
        self.moved += sum(x.nbytes for _, x in sends)
        self.swaps += 1
        return Pending([_Arrival(self, sends, receives)])

    def collect(self, thing):
        self.board.things[self.rank] = thing
        self.board.wait()
        things = list(self.board.things)
        self.board.wait()
        return things

    def gather(self, x):
        return torch.stack([y.clone() for y in self.collect(x.clone())])

    def maximum_(self, x):
        x.copy_(self.gather(x).amax(dim=0))

    def agree(self, *numbers):
        return tuple(map(max, zip(*self.collect(numbers), strict=True)))

    def share(self, thing):
        return self.collect(thing)[0]


def run_ranks(world, function):
    """[function(ranks) of each rank], run at once in as many threads; `world` 1 gives Alone."""
    if world == 1:
        return [function(Alone())]
    board = _Board(world)

    def one(rank):
        with board.turn:
            try:
                return function(ThreadRanks(rank, board))
            except BaseException:
                board.barrier.abort()
                raise

    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(one, rank) for rank in range(world)]
    errors = [e for e in (f.exception() for f in futures) if e is not None]
    broken = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    for error in broken or errors:
        raise error
    return [f.result() for f in futures]
