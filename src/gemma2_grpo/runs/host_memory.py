"""How the process keeps host memory between programs."""

import ctypes
import platform

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Makes glibc keep freed buffers for the next program; call it before JAX is imported.

    XLA on a CPU takes one large buffer per call of a program and gives it back after. By default
    glibc returns it to the kernel, which hands it out again page by page and cleared: a fifth of
    the time of an update. One arena, since each thread would else keep what it has freed.

    Returns:
        Whether it was done; elsewhere than on glibc there is nothing to do.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = {
        _M_ARENA_MAX: 1,
        _M_MMAP_THRESHOLD: 2**30,
        _M_TRIM_THRESHOLD: _LARGEST_INT,
    }
    return all(libc.mallopt(name, value) for name, value in settings.items())
