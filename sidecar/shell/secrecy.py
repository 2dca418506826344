"""Keeps keys and tokens in this process's memory: no core dump, and no reading by other processes of the same user.

PR_SET_DUMPABLE 0 also gives /proc/self to root, so that nobody else reads memory, environment or descriptors. Where the kernel
refuses, that is logged and no reason to stop: core dumps stay off by their size. prctl(2), core(5).
"""

import ctypes
import logging
import resource
from typing import Final

log = logging.getLogger(__name__)

PR_SET_DUMPABLE: Final = 4


def forbid_dumps() -> None:
    """Forbid core dumps and attaching, for this process; children that are started anew decide for themselves."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        log.warning("process stays dumpable", extra={"errno": ctypes.get_errno()})
