"""Where a process stands among those of its run, and how they find each other.

torchrun and --gpus say it by the same variables: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. Until all are there the main thread waits in Python, so that signals are heard.
"""

import os
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from nanofuse.train.errors import UserError
from nanofuse.train.guard import START_SECONDS
from nanofuse.train.launch import STORE_FD

QUIET_SECONDS = 10  # without the others, before it is said that this one waits
LOOK_SECONDS = 0.02, 0.5  # between two looks for the others: at first, and at most
ANSWER_SECONDS = 5  # for an address to answer


@dataclass(frozen=True)
class Place:
    """Where a process stands: its rank of `world`, and its GPU of the host."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def of_environment(cls):
        """As torchrun and --gpus say it; the only process without them.

        Raises:
            UserError: a variable that is no such number.
        """
        world = _variable("WORLD_SIZE", 1, 1)
        place = cls(_variable("RANK", 0, 0), world, _variable("LOCAL_RANK", 0, 0))
        if place.rank >= world:
            raise UserError(
                f"RANK={place.rank} is no rank of WORLD_SIZE={world}, whose first is 0; unset both "
                "for a run of one process"
            )
        return place


def _variable(name, default, least):
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        if (number := int(text)) >= least:
            return number
    except ValueError:
        pass
    raise UserError(f"{name}={text!r} is no number from {least} on; unset it, or start by torchrun")


def address():
    """(host, port) of the store.

    Raises:
        UserError: the environment does not say it.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host:
        raise UserError("MASTER_ADDR, where rank 0 is found, is not set; start by torchrun")
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"MASTER_PORT={port!r} is no port; start by torchrun")
    return host, int(port)


def open_store(place, host=False):
    """A connection to the store of all ranks.

    Args:
        host: whether this process is to serve it, unless torchrun or another one does.

    Raises:
        UserError: it is not there.
        RuntimeError: it cannot be served, or is gone.
    """
    name, port = address()
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listening = {}
    if host and STORE_FD in os.environ:
        listening = {"master_listen_fd": int(os.environ[STORE_FD])}
    serving = host and not served
    if serving:
        try:
            socket.getaddrinfo(name, port)
        except OSError as error:
            what = f"MASTER_ADDR={name!r} is no host ({error.strerror})"
            raise UserError(f"{what}; name this one, or start by torchrun") from None
    else:
        _wait(place, f"rank 0 at {name}:{port}", lambda: _answers(name, port))
    store = dist.TCPStore(
        name,
        port,
        is_master=serving,
        wait_for_workers=False,
        timeout=timedelta(seconds=START_SECONDS),
        **listening,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"nanofuse {attempt}", store)


def meet(place, store):
    """Wait for all ranks.

    Raises:
        UserError: they do not come.
        RuntimeError: the store is gone.
    """
    keys = [f"here {rank}" for rank in range(place.world)]
    store.set(keys[place.rank], "1")
    _wait(place, f"all {place.world} ranks", lambda: store.check(keys))


def _answers(name, port):
    try:
        socket.create_connection((name, port), ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def _wait(place, whom, there):
    began, pause, said = time.monotonic(), LOOK_SECONDS[0], False
    while not there():
        waited = time.monotonic() - began
        if waited > START_SECONDS:
            raise UserError(f"rank {place.rank} does not reach the others ({whom})")
        if waited > QUIET_SECONDS and not said:
            print(f"rank {place.rank} waits for {whom}", file=sys.stderr, flush=True)
            said = True
        time.sleep(pause)
        pause = min(2 * pause, LOOK_SECONDS[1])
