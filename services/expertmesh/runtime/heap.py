"""What the C library does with memory that was freed."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_KEPT_BYTES = 64 << 20
_MOST_KEPT_BYTES = 128 << 20


def keep_freed_memory() -> None:
    """Use the memory of one call's rows for the next call's.

    glibc gives large buffers back to the kernel, which clears every page when it is touched again:
    a call of 4,096 tokens took thousands of page faults and two fifths longer for it. Call it when
    the weights are loaded, so that what was needed for that is given back first. Does nothing with
    another C library.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return
    libc.malloc_trim(0)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT_BYTES)
