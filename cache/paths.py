"""Where the cache lives, who may own it, and the few file-system steps that the rest shares."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

__all__ = [
    "default_lock_dir",
    "default_root",
    "fsync_dir",
    "host_name",
    "make_private_dir",
    "owner_problem",
    "remove_tree",
    "warn_once",
]

log = logging.getLogger("moejit.cache")

# dict.setdefault is atomic, so no lock is needed here that a fork could inherit in a held state.
_warned: dict[str, object] = {}


def default_root(env: Mapping[str, str]) -> Path:
    """``$XDG_CACHE_HOME/moejit``, else ``~/.cache/moejit``, else a temporary place and a warning.

    Relative values are ignored, as the XDG base directory specification asks.
    """
    xdg, home = env.get("XDG_CACHE_HOME", ""), env.get("HOME", "")
    if os.path.isabs(xdg):
        return Path(xdg, "moejit")
    if os.path.isabs(home):
        return Path(home, ".cache", "moejit")
    root = Path(tempfile.gettempdir(), f"moejit-{os.getuid()}", "cache")
    warn_once(
        "no-home",
        f"neither XDG_CACHE_HOME nor HOME names a folder: the kernel cache is {root}, which may "
        "not outlive this machine's next cleaning. Set MOEJIT_CACHE_DIR to keep it",
    )
    return root


def default_lock_dir(env: Mapping[str, str]) -> Path:
    """``$XDG_RUNTIME_DIR/moejit``, else ``<tmp>/moejit-<uid>``: on this node, and this user's own.

    Not under the root, which may be read-only or on NFS, where flock cannot be relied on.
    """
    runtime = env.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime) and os.path.isdir(runtime):
        return Path(runtime, "moejit")
    return Path(tempfile.gettempdir(), f"moejit-{os.getuid()}")


def make_private_dir(path: Path) -> None:
    """Creates the folder with mode 0700 if it is not there; an existing one stays as it is.

    Raises:
        OSError: it cannot be created, or something else stands in its place.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
    except FileExistsError:
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None


def owner_problem(path: Path, trusted_uids: Collection[int] = ()) -> str | None:
    """Why code in `path` may not be run by this user, or None.

    Raises:
        OSError: the path cannot be looked at.
    """
    uid = os.lstat(path).st_uid
    if uid in (0, os.getuid()) or uid in trusted_uids:
        return None
    return f"{path} belongs to uid {uid}, neither to this user ({os.getuid()}) nor to root"


def fsync_dir(path: Path) -> None:
    """Makes the names in a folder durable, where the file system knows how to.

    Raises:
        OSError: the disk refused (full, broken).
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(fd)


def remove_tree(path: Path) -> None:
    """Removes a folder, a file or a link; never raises for what the file system says."""
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)
    except OSError:
        pass


def host_name() -> str:
    """This node's name with everything but letters, digits and ``-`` left out."""
    return "".join(c for c in os.uname().nodename if c.isascii() and (c.isalnum() or c == "-"))


def warn_once(topic: str, message: str) -> None:
    """Logs a warning unless this process has logged one on the same topic."""
    token = object()
    if _warned.setdefault(topic, token) is token:
        log.warning("%s", message)
