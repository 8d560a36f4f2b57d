"""How a training on the CPU gets its memory."""

import contextlib
import ctypes

#: Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
#: Bytes from which on memory comes from the system by itself, and goes back to it when it is freed.
_LARGE = 4 * 2**20


def keep_freed_memory() -> None:
    """Have this process use freed memory again instead of giving it back to the system.

    A training step frees and allocates arrays of the size of the dictionary. glibc takes large ones from the system
    anew each time, page by page, which costs up to a third of a step. Elsewhere than under glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def give_freed_memory_back() -> None:
    """End :func:`keep_freed_memory`, when a training has ended.

    What comes after it keeps small arrays while large ones come and go. Kept, the freed memory between them would be
    holes: half a gigabyte of them, after a training, with a thousand classes.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 2**16)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE)
        libc.malloc_trim(0)
