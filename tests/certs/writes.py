"""Watch what this process writes to any file: fanotify, so the kernel says it, whatever library did the writing."""

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# linux/fanotify.h
_CLOEXEC, _NONBLOCK, _UNLIMITED_QUEUE = 0x1, 0x2, 0x10
_MARK_ADD, _MARK_MOUNT = 0x1, 0x10
_MODIFY, _CLOSE_WRITE = 0x2, 0x8
_AT_FDCWD = -100
_EVENT = struct.Struct("=IBBHQii")  # length, version, reserved, length of this, mask, descriptor, process


@contextmanager
def files_written() -> Iterator[set[str]]:
    """Give the set of paths that this process has written to; filled when the block ends. Needs root."""
    library = ctypes.CDLL(None, use_errno=True)
    watch = library.fanotify_init(_CLOEXEC | _NONBLOCK | _UNLIMITED_QUEUE, os.O_RDONLY | os.O_CLOEXEC)
    if watch < 0:
        raise OSError(ctypes.get_errno(), "fanotify_init")
    written: set[str] = set()
    try:
        for mount in {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}:
            library.fanotify_mark(
                watch,
                _MARK_ADD | _MARK_MOUNT,
                ctypes.c_uint64(_MODIFY | _CLOSE_WRITE),
                _AT_FDCWD,
                mount.encode(),
            )  # of proc, sys and the like it is refused, and nothing can be kept there
        yield written
        written |= _read(watch)
    finally:
        os.close(watch)


def _read(watch: int) -> set[str]:
    paths = set()
    with suppress(BlockingIOError):
        while events := os.read(watch, 64 * 1024):
            at = 0
            while at < len(events):
                length, _, _, _, _, descriptor, process = _EVENT.unpack_from(events, at)
                if process == os.getpid():
                    paths.add(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115 - a link, not a path
                os.close(descriptor)
                at += length
    return paths
