"""What a process does with its memory and its garbage collector."""

import gc
import resource
import subprocess
import sys

import pytest

from expertmesh.runtime.imports import collector_paused

FAULTS = """
import ctypes, resource
from expertmesh.runtime.heap import keep_freed_memory
{call}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def touch():
    memory = libc.malloc(48 << 20)
    ctypes.memset(memory, 1, 48 << 20)
    libc.free(memory)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(call: str) -> int:
    """Page faults of using 48 MiB five times."""
    code = FAULTS.format(call=call)
    return int(subprocess.check_output([sys.executable, "-c", code], text=True))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    pages = (48 << 20) // resource.getpagesize()
    assert faults("") > 2 * pages
    assert faults("keep_freed_memory()") < pages / 10


def test_the_collector_rests_for_the_length_of_a_block() -> None:
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), collector_paused():
        raise KeyError("in an import")
    assert gc.isenabled()
