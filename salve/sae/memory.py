"""How a training on the CPU gets its memory."""

import contextlib
import ctypes

#: Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Have this process use freed memory again instead of giving it back to the system.

    A training step frees and allocates arrays of the size of the dictionary. glibc takes large ones from the system
    anew each time, page by page, which costs up to a third of a step. Elsewhere than under glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
