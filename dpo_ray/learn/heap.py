"""The C heap of a process that trains on a CPU."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
LARGE_BYTES, KEPT_BYTES = 4 << 20, 32 << 20


def give_back_large_tensors() -> bool:
    """Let a tensor of LARGE_BYTES or more go back to the system when it is freed; return whether this C library can.

    glibc keeps what is freed below 32 MiB to hand it out again. The layers that FSDP2 gathers and frees are cut up by small
    blocks between them, so that they all stay resident: more than the shards of two workers.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # A threshold of one's own sets the other to 128 KiB, by which the end of the heap comes and goes all the time.
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
