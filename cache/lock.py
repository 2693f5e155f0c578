"""One build per key and node: a file lock that can be late or missing, but never in the way.

The store is correct without it (publishing is one rename); the lock saves the second compile.
Reading never takes it.
"""

from __future__ import annotations

import enum
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moejit.cache.paths import host_name, make_private_dir, owner_problem, warn_once

__all__ = ["LockState", "holder_of", "key_lock"]

log = logging.getLogger("moejit.cache")

# Waiters of a lock that is held for seconds: 20 ms is a late start of at most 1 %.
_POLL_S = 0.02

# Locks that a forked child inherited. Older releases of filelock unlock when the object is
# collected, in the child too, and that would free the parent's lock.
_inherited: list[object] = []


class LockState(enum.Enum):
    """What became of an attempt to lock."""

    HELD = "held"
    TIMED_OUT = "timed out"  # somebody else is (or looks) busy with the same key
    UNAVAILABLE = "unavailable"  # this node has no place for locks; a warning was logged


@contextmanager
def key_lock(lock_dir: Path, name: str, timeout_s: float) -> Iterator[LockState]:
    """Holds the lock `name` of a folder for the length of a ``with`` block, if it can be had.

    A fresh file handle each time: threads of one process exclude each other like processes do. A
    child forked inside the block does not release its parent's lock. The lock file stays behind,
    since unlinking one splits its waiters over two inodes.

    Args:
        lock_dir: created with mode 0700 if needed; refused if it belongs to somebody else.
        name: file name without suffix.
        timeout_s: how long to wait; never longer.

    Yields:
        The state; the block runs in each case and has to look at it.
    """
    path = lock_dir / f"{name}.lock"
    state, lock, pid = LockState.UNAVAILABLE, None, os.getpid()
    try:
        # Here and not above: it costs 50 ms, and a warm start locks nothing.
        from filelock import FileLock, Timeout

        try:
            make_private_dir(lock_dir)
            if (problem := owner_problem(lock_dir)) is not None:
                raise PermissionError(problem)
            lock = FileLock(path, timeout=max(0.0, timeout_s), poll_interval=_POLL_S)
            lock.acquire()
            state = LockState.HELD
        except Timeout:
            state = LockState.TIMED_OUT
            log.warning(
                "the lock of %s is still held by %s after %g s: building without it",
                name,
                holder_of(path),
                timeout_s,
            )
    except (OSError, RuntimeError, NotImplementedError, ImportError) as exc:
        warn_once(
            f"lock:{lock_dir}",
            f"no locks in {lock_dir} ({exc}): several processes may now compile the same kernel",
        )
    if state is LockState.HELD:
        _write_holder(path)
    try:
        yield state
    finally:
        if os.getpid() != pid:
            _inherited.append(lock)
        elif state is LockState.HELD and lock is not None:
            try:
                _holder_file(path).unlink(missing_ok=True)  # before the release: it is ours still
                lock.release()
            except (OSError, RuntimeError) as exc:
                log.debug("releasing %s: %s", path, exc)


def holder_of(lock_path: Path) -> str:
    """``"pid 4711 on node7"``, as the holder wrote it beside its lock, or "an unknown process"."""
    try:
        holder = json.loads(_holder_file(lock_path).read_text(encoding="utf-8"))
        seconds = max(0, int(time.time() - float(holder["since"])))
        return f"pid {int(holder['pid'])} on {holder['host']} (for {seconds} s)"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return "an unknown process"


def _holder_file(lock_path: Path) -> Path:
    return lock_path.with_suffix(".holder")


def _write_holder(lock_path: Path) -> None:
    holder = {"pid": os.getpid(), "host": host_name(), "since": time.time()}
    temp = lock_path.with_suffix(f".holder.{os.getpid()}")
    try:
        temp.write_text(json.dumps(holder), encoding="utf-8")
        os.replace(temp, _holder_file(lock_path))
    except OSError as exc:
        log.debug("noting the holder of %s: %s", lock_path, exc)
