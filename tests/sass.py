"""Reads of shared memory that nobody waits for before the memory is given back, in machine code.

A kernel in which warps have roles gives a slot of shared memory back by an arrival on an mbarrier;
then TMA writes into it. Before the arrival the warps meet at a barrier. That barrier waits for the
warps, not for reads that they have issued: LDS and LDSM are under way until an instruction waits
for their scoreboard. One that is still under way at the barrier, or at the arrival, may read what
TMA wrote meanwhile: on an H200 that gave wrong numbers (records/2026-11-30-joins).

An instruction of compute capability 9.0 has 128 bits. Of its upper 64, bits 46 to 48 are the number
of the scoreboard that it sets when its result is there, and bits 52 to 57 the scoreboards that it
waits for: https://arxiv.org/abs/1804.06826, section 2.1. A read that sets none (7) comes back
before the next one that does, whose scoreboard is waited for.

Code is read in the order of its addresses, not along its branches: a read at the end of a loop and
an arrival at its beginning are not seen together.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);\s+/\* 0x[0-9a-f]{16} \*/")
ENCODED = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")
LOAD = re.compile(r"\b(?:LDS|LDSM)\b")
# a read by a thread's own address; one by a uniform register alone is of what a role was handed
READ = re.compile(r"\b(?:LDS|LDSM)\b[^\[]*\[[^\]]*\bR\d")
SCOREBOARDS, NONE = 6, 7


@dataclass
class Scan:
    """Of a kernel: how many reads and arrivals it has, and the arrivals that come too early, as
    (address, addresses of the reads under way)."""

    reads: int = 0
    arrivals: int = 0
    early: list = field(default_factory=list)


def instructions(cubin):
    """(address, text, scoreboard it sets, mask of those it waits for) of each instruction.

    Args:
        cubin: bytes of a compiled kernel.
    """
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-c", "-hex", file.name]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = lines.splitlines()
    for line, after in zip(lines, lines[1:], strict=False):
        if found := INSTRUCTION.match(line):
            upper = int(ENCODED.search(after)[1], 16)
            yield found[1], found[2], upper >> 46 & 7, upper >> 52 & 63


def scan(cubin):
    """The Scan of a compiled kernel."""
    result, at_barrier, unmarked = Scan(), set(), []
    under_way = {board: [] for board in range(SCOREBOARDS)}
    for address, text, sets, waits in instructions(cubin):
        for board in under_way:
            if waits >> board & 1:
                under_way[board] = []
        if READ.search(text):
            result.reads += 1
            unmarked.append(address)
        if sets != NONE and LOAD.search(text):
            under_way[sets] += unmarked
            unmarked = []
        now = {*unmarked, *sum(under_way.values(), [])}
        if "BAR.SYNC" in text:
            at_barrier = now
        elif "SYNCS.ARRIVE" in text and "A1T0" in text:
            result.arrivals += 1
            if now | at_barrier:
                result.early.append((address, sorted(now | at_barrier)))
    return result
