"""A lock on a file, by which two processes do not write one folder."""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path


def lock_file(path: Path) -> AbstractContextManager:
    """Lock a file for this process, if its file system has locks; raise BlockingIOError if another process holds it.

    On POSIX filelock does not do: its lock is inherited by a loader's workers, and held by one that outlives its run.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where no other process inherits it
        return _lock_without_fcntl(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)  # neither waits nor truncates
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # which of them is the system's choice
        file.close()
        raise BlockingIOError from error
    except OSError:
        pass  # a file system without locks
    return file


def _lock_without_fcntl(path: Path) -> AbstractContextManager:
    from filelock import FileLock, Timeout

    try:
        return FileLock(path).acquire(timeout=0)
    except Timeout as error:
        raise BlockingIOError from error
    except NotImplementedError:
        return nullcontext()  # a file system without locks
