# SPDX-License-Identifier: MIT
"""Memory settings of glibc for training on the CPU."""

import contextlib
import ctypes

#: Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
#: From this size on, in bytes, each allocation is mapped separately and returned to the system when freed.
_LARGE = 4 * 2**20


def keep_freed_memory() -> None:
    """Make this process reuse freed memory instead of returning it to the system.

    Every training step frees and allocates arrays of the dictionary's size. glibc maps large ones again each time, page
    by page, which costs up to a third of a step. Does nothing without glibc.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def give_freed_memory_back() -> None:
    """Undo :func:`keep_freed_memory` after training.

    Later stages keep small arrays between large temporary ones. Freed memory that stays would fragment: half a
    gigabyte of it with a thousand classes.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 2**16)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE)
        libc.malloc_trim(0)
