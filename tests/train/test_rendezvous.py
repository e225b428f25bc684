"""How the processes of a run find each other, and what is said where they do not."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from nanofuse.train.errors import UserError
from nanofuse.train.rendezvous import Place, address, open_store
from tests.train.forks import ROOT
from tests.train.tiny import TINY

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """environment(**variables) sets those of NAMES, and no other."""

    def put(**variables):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def test_a_place_is_what_the_environment_says(environment):
    environment()
    assert Place.of_environment() == Place(0, 1, 0)
    environment(RANK="3", WORLD_SIZE="8", LOCAL_RANK="1")
    assert Place.of_environment() == Place(3, 8, 1)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "abc"}, "RANK='abc' is no number from 0 on; unset it"),
        ({"RANK": ""}, "RANK='' is no number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1' is no number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' is no number from 1 on"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is no rank of WORLD_SIZE=2"),
        ({"RANK": "1"}, "RANK=1 is no rank of WORLD_SIZE=1"),
    ],
)
def test_variables_that_make_no_sense_are_named(environment, variables, said):
    environment(**variables)
    with pytest.raises(UserError, match=said):
        Place.of_environment()


def test_a_host_that_nobody_knows_ends_in_a_line(environment, monkeypatch):
    """Where TCPStore would look for it for an hour, deaf to signals."""

    def unknown(*args):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    environment(MASTER_ADDR="nohost.invalid", MASTER_PORT="29500")
    with pytest.raises(UserError, match="MASTER_ADDR='nohost.invalid' is no host .*; name this"):
        open_store(Place(0, 2), host=True)


def test_an_address_has_a_host_and_a_port(environment):
    environment(MASTER_ADDR="here", MASTER_PORT="29500")
    assert address() == ("here", 29500)
    environment(MASTER_PORT="29500")
    with pytest.raises(UserError, match="MASTER_ADDR, where rank 0 is found, is not set"):
        address()
    for port in ("", "abc", "0", "99999"):
        environment(MASTER_ADDR="here", MASTER_PORT=port)
        with pytest.raises(UserError, match=f"MASTER_PORT='{port}' is no port"):
            address()


CODE = (
    "import nanofuse.train.rendezvous as r, nanofuse.train.run as run, sys;"
    "r.QUIET_SECONDS = 0.1; sys.argv[0] = 'train.run'; run.run_command(run.main)"
)


@pytest.fixture
def start(work_dir, data_dir):
    """start(rank, world): a process that waits for the others, on one port; and the port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []

    def run(rank, world):
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", CODE, *map(str, TINY), "--data", data_dir, "--run", "a"],
                env={
                    **os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank),
                    "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port), "TORCH_CPP_LOG_LEVEL": "ERROR",  # as run.main sets
                },
                cwd=work_dir,
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
        )  # fmt: skip
        return processes[-1]

    yield run, port
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_the_others_says_so_and_hears_signals(rank, start, work_dir):
    run, port = start
    process = run(rank, 2)
    whom = "all 2 ranks" if rank == 0 else f"rank 0 at 127.0.0.1:{port}"
    assert process.stderr.readline() == f"rank {rank} waits for {whom}\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (143, "stopped by SIGTERM before the first step\n")
    assert not (work_dir / "runs").exists()


def test_a_rank_whose_store_goes_while_it_waits_ends_in_a_line(start):
    run, _ = start
    first = run(0, 3)
    assert first.stderr.readline() == "rank 0 waits for all 3 ranks\n"
    second = run(1, 3)
    assert second.stderr.readline() == "rank 1 waits for all 3 ranks\n"
    first.kill()
    _, err = second.communicate(timeout=30)
    assert second.returncode == 2 and err.count("\n") == 1
    assert err.startswith("error: rank 1 does not reach the others (")
