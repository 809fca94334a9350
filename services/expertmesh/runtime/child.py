"""Child processes that the kernel ends when their parent dies, however it dies."""

import os
import sys

# A bare interpreter asks the kernel to be ended with its parent, then becomes the program. A
# `preexec_fn` would do the same, but runs Python in the fork of a process full of gRPC and BLAS
# threads, which may deadlock.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def dying_with_parent(command: list[str]) -> list[str]:
    """`command` so that it gets SIGTERM when the thread that starts it ends (Linux; else as is).

    Start it from a thread that lives as long as the child is needed.
    """
    if sys.platform != "linux":
        return command
    return [sys.executable, "-ISc", _DIE_WITH_PARENT, str(os.getpid()), *command]
