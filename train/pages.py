"""Freed memory stays with a process that trains on a CPU.

glibc gives large blocks back to the system when they are freed, and the system clears the pages of
the next one. A training step allocates the same blocks again and again, so that a sixth of it was
that (dev/LOG.md, 2026-11-29).
"""

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
LARGEST = 2**31 - 1  # bytes at the heap's end that stay; an int


def keep_pages():
    """Have malloc take all memory from the heap and give none of it back, in this process and from
    now on. Returns whether the C library does: one that is not glibc is left as it is."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return all(
            mallopt(option, value) == 1
            for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, LARGEST))
        )
    return False
