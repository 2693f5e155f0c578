"""From a builder's folder to an entry that others see: stage, seal, publish, move aside, sweep.

A rename of the whole folder is the only commit point. Readers see all of an entry or none of it,
and losing the race to another builder is not an error.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from moejit.cache.entry import LAST_USED, MANIFEST, BuildInfo, Entry, Manifest, record_files
from moejit.cache.errors import InvalidBuild
from moejit.cache.key import KernelKey
from moejit.cache.paths import fsync_dir, host_name, make_private_dir, remove_tree

__all__ = [
    "copy_privately",
    "move_aside",
    "new_private_dir",
    "no_room",
    "open_staging",
    "publish",
    "seal",
    "sweep",
]

log = logging.getLogger("moejit.cache")

# Damaged entries are kept for a look, but not without end.
QUARANTINE_KEEP = 16
_LOST_RACE = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

_private_base: dict[int, Path] = {}  # by pid: a forked child makes its own


def open_staging(root: Path, key: KernelKey) -> Path:
    """A fresh folder under ``<root>/staging``, on the file system that the entry will be on.

    Raises:
        OSError: the root cannot be written.
    """
    make_private_dir(root / "staging")
    unique = f"{key.digest()}.{host_name()}.{os.getpid()}.{secrets.token_hex(4)}"
    folder = root / "staging" / unique
    folder.mkdir(mode=0o700)
    return folder


def new_private_dir(key: KernelKey) -> Path:
    """A fresh folder for an entry that only this process uses; removed when the process ends.

    Raises:
        OSError: the temporary folder cannot be written either.
    """
    base = _private_base.get(os.getpid())
    if base is None:
        base = Path(tempfile.mkdtemp(prefix="moejit-private-"))
        if _private_base.setdefault(os.getpid(), base) is not base:  # another thread was first
            remove_tree(base)
            base = _private_base[os.getpid()]
        else:
            # Not atexit: Finalize also runs at the end of multiprocessing workers, and only in
            # the process that registered it. Imported here, for it costs 12 ms.
            from multiprocessing.util import Finalize

            Finalize(None, remove_tree, args=(base,), exitpriority=1)
    folder = Path(tempfile.mkdtemp(prefix="entry-", dir=base), key.entry_name)
    folder.mkdir(mode=0o700)
    return folder


def seal(
    folder: Path, key: KernelKey, info: BuildInfo, *, seconds: float, durable: bool = True
) -> Manifest:
    """Writes the manifest of a finished build, last of all files; `durable` flushes each to disk.

    Raises:
        InvalidBuild: the builder left something that an entry cannot hold.
        OSError: the disk refused.
    """
    for name in (MANIFEST, LAST_USED):
        if os.path.lexists(folder / name):
            raise InvalidBuild(key.name, f"{name!r}: the name is taken by the store")
    for compiled in [*folder.rglob("__pycache__")]:
        remove_tree(compiled)  # left by importing the sources; would run unverified later
    created = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": host_name(),
        "pid": os.getpid(),
        "build_seconds": round(seconds, 3),
        **info.created,
    }
    manifest = Manifest(
        key=key,
        files=record_files(folder, key.name),
        created=created,
        report=info.report,
        signature=info.signature,
        min_driver=info.min_driver,
    )
    (folder / LAST_USED).touch()
    if durable:
        for name in manifest.files:
            _fsync_file(folder / name)
    _write_file(folder / MANIFEST, manifest.to_json().encode(), durable)
    if durable:
        for inner in {(folder / name).parent for name in manifest.files} | {folder}:
            fsync_dir(inner)
    return manifest


def publish(
    folder: Path,
    final: Path,
    manifest: Manifest,
    *,
    winner: Callable[[], Entry | None],
    may_move_aside: bool,
) -> Entry | None:
    """Renames a sealed folder to its final name.

    Args:
        folder: what `seal` finished; gone afterwards, or left to the caller when None is returned.
        final: the entry's path.
        manifest: of `folder`.
        winner: reads and verifies what already lies at `final`; None if that is damaged.
        may_move_aside: whether a damaged winner may be replaced (not while its builder is alive).

    Returns:
        The entry at `final`, ours or the winner's; None if a damaged one stands in the way.

    Raises:
        OSError: the disk refused.
    """
    for parent in (final.parent.parent, final.parent):
        make_private_dir(parent)
    for _ in range(3):
        try:
            os.rename(folder, final)
        except OSError as exc:
            if exc.errno not in _LOST_RACE:
                raise
        else:
            _settle(final.parent)
            return Entry(path=final, manifest=manifest)
        # Looked at once more right before it is moved: on a shared root another node, whose lock
        # is not ours, may have repaired it meanwhile.
        if (entry := winner()) is not None:
            return entry
        if not may_move_aside:
            return None
        move_aside(final.parent.parent.parent, final)
    return None


def move_aside(root: Path, path: Path) -> None:
    """Renames a damaged entry into ``<root>/quarantine``, and keeps the newest few there.

    Raises:
        OSError: the disk refused. That it is gone already is fine.
    """
    quarantine = root / "quarantine"
    make_private_dir(quarantine)
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    try:
        os.rename(path, quarantine / f"{stamp}.{secrets.token_hex(4)}.{path.name[-64:]}")
    except FileNotFoundError:
        return
    for old in sorted(quarantine.iterdir())[:-QUARANTINE_KEEP]:
        remove_tree(old)


def sweep(folder: Path, older_than_s: float) -> int:
    """Removes what nobody has written to for so long; returns how many. Never raises."""
    removed, now = 0, time.time()
    try:
        candidates = list(folder.iterdir())
    except OSError:
        return 0
    for path in candidates:
        try:
            newest = max(os.lstat(p).st_mtime for p in [path, *path.rglob("*")])
        except OSError:
            continue  # just published, or swept by somebody else
        if now - newest >= older_than_s:
            remove_tree(path)
            removed += not os.path.lexists(path)
    return removed


def no_room(exc: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that the disk takes no more."""
    seen: BaseException | None = exc
    for _ in range(8):
        if isinstance(seen, OSError) and seen.errno in _NO_ROOM:
            return True
        if seen is None:
            return False
        seen = seen.__cause__
    return False


def copy_privately(folder: Path, key: KernelKey) -> Path:
    """A copy of a sealed folder that only this process uses.

    Raises:
        OSError: the temporary folder cannot be written.
    """
    target = new_private_dir(key)
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return target


def _settle(folder: Path) -> None:
    try:
        fsync_dir(folder)
    except OSError as exc:  # published all the same; after a power cut it may be a miss
        log.debug("flushing %s: %s", folder, exc)


def _fsync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_file(path: Path, data: bytes, durable: bool) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())
