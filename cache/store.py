"""The cache on disk: find an entry, or build it once and publish it.

In: a `KernelKey`, and a callable that fills a folder. Out: an `Entry` whose bytes were verified.
Layout under a root: ``entries/<2 hex>/<name>-<digest>/``, ``staging/``, ``quarantine/``.

There is no ``__contains__``: between asking and using, another process may change the answer.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moejit.cache import staging
from moejit.cache.entry import LAST_USED, BuildInfo, Entry, Manifest, read_entry, verify
from moejit.cache.errors import CacheUnusable, DamagedEntry
from moejit.cache.key import KernelKey
from moejit.cache.lock import LockState, key_lock
from moejit.cache.paths import (
    default_lock_dir,
    make_private_dir,
    owner_problem,
    remove_tree,
    warn_once,
)

__all__ = ["Build", "Store", "Verdict"]

log = logging.getLogger("moejit.cache")

Build = Callable[[Path], "BuildInfo | None"]

# Longer than a queue of a few layers takes to compile (3-10 s each), short enough for a start-up
# that waits on a wedged process to come through.
LOCK_TIMEOUT_S = 120.0
# A build that has written nothing for an hour is dead: a layer compiles in seconds.
STALE_STAGING_S = 3600.0
_DAY_S = 86400.0
_OWNER_ADVICE = (
    "Entries are code that would run as this user. If you trust them, copy the folder as this user "
    "(cp -r) or change its owner (chown -R), or point MOEJIT_CACHE_DIR at a folder of your own"
)
_TRIES = 3


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What `Store.verify` found out about one folder."""

    path: Path
    entry: Entry | None
    problems: tuple[str, ...]


class Store:
    """Entries under one writable root and any number of read-only ones.

    Safe to share between threads, and across a fork. Nothing on disk makes it raise, apart from a
    temporary folder that fails after the root did.

    Args:
        roots: the first is written to, all are read, in this order. Created when first written.
        lock_dir: node-local folder for locks; by default `default_lock_dir` of the environment.
        lock_timeout_s: how long to wait for another process that builds the same key.
        trusted_uids: owners whose entries may be run, besides this user and root.
    """

    def __init__(
        self,
        roots: Sequence[Path],
        lock_dir: Path | None = None,
        *,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
        trusted_uids: Collection[int] = (),
    ) -> None:
        if not roots:
            raise ValueError("a store needs at least one root, the one it writes to")
        self.roots = tuple(Path(os.path.abspath(root)) for root in roots)
        self.lock_dir = lock_dir if lock_dir is not None else default_lock_dir(os.environ)
        self.lock_timeout_s = lock_timeout_s
        self.trusted_uids = frozenset(trusted_uids)
        self._warned: dict[Path, object] = {}  # damaged entries; setdefault is the only guard
        self._private: dict[str, Entry] = {}  # built where only this process sees them
        self._write_problem = ""  # why the root is not written to any more

    @property
    def root(self) -> Path:
        """The root that is written to."""
        return self.roots[0]

    @property
    def write_problem(self) -> str:
        """Why the root is not written to any more; empty while it is."""
        return self._write_problem

    def entry_path(self, key: KernelKey, root: Path | None = None) -> Path:
        """Where the entry of a key lies, whether or not it does."""
        return (root or self.root) / "entries" / key.digest()[:2] / key.entry_name

    def find(self, key: KernelKey) -> Entry | None:
        """The entry, or None when it is absent, damaged, or somebody else's.

        Takes no lock. Does not raise for what is on disk: damage is a miss and one warning.
        """
        for root in self.roots:
            entry = self._look(root, key)
            if entry is not None:
                if root == self.root:
                    _touch(entry.path / LAST_USED)
                return entry
        private = self._private.get(key.digest())
        if private is None or verify(private):
            return None
        return private

    def get_or_build(self, key: KernelKey, build: Build) -> Entry:
        """The entry, built and published first if need be; once per node however many ask.

        Args:
            key: what to look for.
            build: fills the folder it is given with at least one file; runs again in a temporary
                folder if the root turns out to be full or read-only.

        Returns:
            The entry. Its `private` says that it could not be published (one warning says why).

        Raises:
            CacheUnusable: the temporary folder cannot be written either.
            InvalidBuild: the builder left something that an entry cannot hold.
            Exception: whatever `build` raises; nothing is published then.
        """
        entry = self.find(key)
        if entry is not None:
            return entry
        with key_lock(self.lock_dir, self._lock_name(key), self.lock_timeout_s) as state:
            entry = self.find(key)  # built while we waited
            if entry is not None:
                return entry
            return self._build(key, build, state)

    def match(self, prefix: str) -> Sequence[Entry]:
        """Entries whose digest or name starts so; like `list`, not verified beyond the manifest."""
        return [
            e for e in self.list() if any(s.startswith(prefix) for s in (e.digest, e.path.name))
        ]

    def list(self) -> Sequence[Entry]:
        """All entries of all roots, by root and name. Files are not hashed: do not load these."""
        found = []
        for root in self.roots:
            if (problem := self._root_problem(root)) is not None:
                _warn_owner(root, problem)
        for path in self._folders():
            try:
                entry = read_entry(path, trusted_uids=self.trusted_uids, hash_files=False)
            except DamagedEntry as exc:
                self._warn_damage(exc)
            else:
                found.append(entry)
        return found

    def verify(self) -> Sequence[Verdict]:
        """Every folder of every root, each of its files compared with its manifest."""
        verdicts = [
            Verdict(path=root, entry=None, problems=(f"{problem}. {_OWNER_ADVICE}",))
            for root in self.roots
            if (problem := self._root_problem(root)) is not None
        ]
        for path in self._folders():
            try:
                entry = read_entry(path, trusted_uids=self.trusted_uids, hash_files=False)
            except DamagedEntry as exc:
                verdicts.append(Verdict(path=path, entry=None, problems=(exc.problem,)))
            else:
                problems = tuple(verify(entry, self.trusted_uids))
                verdicts.append(Verdict(path=path, entry=entry, problems=problems))
        return verdicts

    def remove(self, digest: str) -> bool:
        """Takes the entry of a full digest out of the writable root; whether there was one.

        Processes that have loaded it keep it: files are unlinked, never overwritten.
        """
        removed = False
        for path in self._folders(self.root):
            if path.name.endswith(f"-{digest}"):
                removed |= self._discard(path)
        return removed

    def clear(self) -> int:
        """Removes all entries, the quarantine and dead staging folders; how many entries went."""
        removed = sum(self._discard(path) for path in self._folders(self.root))
        staging.sweep(self.root / "quarantine", 0.0)
        self.sweep_staging()
        return removed

    def sweep_staging(self, older_than_s: float = STALE_STAGING_S) -> int:
        """Removes what killed builders left behind; returns how many folders went."""
        return staging.sweep(self.root / "staging", older_than_s)

    def size_bytes(self) -> int:
        """Bytes of all files under the writable root, quarantine and staging included."""
        total = 0
        for folder, _, files in os.walk(self.root):
            for name in files:
                try:
                    total += os.lstat(os.path.join(folder, name)).st_size
                except OSError:
                    continue
        return total

    def _look(self, root: Path, key: KernelKey) -> Entry | None:
        path = self.entry_path(key, root)
        for _ in range(_TRIES):
            try:
                before = os.lstat(path)
            except OSError:
                return None
            try:
                for folder in (root, path.parent.parent, path.parent):
                    if (problem := owner_problem(folder, self.trusted_uids)) is not None:
                        _warn_owner(folder, problem)
                        return None
                return read_entry(path, key, trusted_uids=self.trusted_uids)
            except (DamagedEntry, OSError) as exc:
                if _same(before, path):
                    damage = exc if isinstance(exc, DamagedEntry) else DamagedEntry(path, str(exc))
                    self._warn_damage(damage)
                    return None
                # Replaced or moved aside under our hands: not damage, look again.
        return None

    def _build(self, key: KernelKey, build: Build, state: LockState) -> Entry:
        if self._write_problem:
            return self._build_privately(key, build)
        try:
            self._prepare_root()
            self.sweep_staging()
            folder = staging.open_staging(self.root, key)
        except OSError as exc:
            return self._build_privately(key, build, exc)
        try:
            try:
                info, seconds = _timed(build, folder)
            except Exception as exc:
                if not staging.no_room(exc):
                    raise
                reason: BaseException = exc
            else:
                try:
                    manifest = staging.seal(folder, key, info, seconds=seconds)
                    return self._publish(folder, key, manifest, state)
                except OSError as exc:
                    reason = exc
        finally:
            remove_tree(folder)  # not there any more once it is published
        return self._build_privately(key, build, reason)

    def _publish(self, folder: Path, key: KernelKey, manifest: Manifest, state: LockState) -> Entry:
        final = self.entry_path(key)
        entry = staging.publish(
            folder,
            final,
            manifest,
            winner=lambda: self._look(self.root, key),
            may_move_aside=state is not LockState.TIMED_OUT,
        )
        if entry is not None:
            self._warned.pop(final, None)  # damage that comes back is news
            return entry
        log.warning("a damaged entry stays at %s; this process uses its own build", final)
        try:
            copy = staging.copy_privately(folder, key)
        except OSError as exc:
            raise CacheUnusable(self.root, f"a damaged entry stays at {final}", str(exc)) from exc
        return self._remember(copy, key, manifest)

    def _build_privately(
        self, key: KernelKey, build: Build, reason: BaseException | None = None
    ) -> Entry:
        if reason is not None:
            # The root is left alone from here on: with a full disk each kernel would otherwise be
            # compiled twice.
            self._write_problem = str(reason)
            warn_once(
                f"write:{self.root}",
                f"cannot write the kernel cache {self.root} ({reason}): kernels built by this "
                "process go to a temporary folder and are lost when it ends",
            )
        try:
            folder = staging.new_private_dir(key)
        except OSError as exc:
            raise CacheUnusable(self.root, self._write_problem, str(exc)) from exc
        try:
            info, seconds = _timed(build, folder)
            manifest = staging.seal(folder, key, info, seconds=seconds, durable=False)
        except BaseException as exc:
            remove_tree(folder)
            if staging.no_room(exc):
                raise CacheUnusable(self.root, self._write_problem, str(exc)) from exc
            raise
        return self._remember(folder, key, manifest)

    def _remember(self, folder: Path, key: KernelKey, manifest: Manifest) -> Entry:
        entry = Entry(path=folder, manifest=manifest, private=True)
        self._private[key.digest()] = entry
        return entry

    def _prepare_root(self) -> None:
        make_private_dir(self.root)
        if (problem := owner_problem(self.root, self.trusted_uids)) is not None:
            # We would not read back what we write there.
            raise PermissionError(f"{problem}. {_OWNER_ADVICE}")

    def _root_problem(self, root: Path) -> str | None:
        try:
            return owner_problem(root, self.trusted_uids)
        except OSError:
            return None  # not there, which is no problem

    def _lock_name(self, key: KernelKey) -> str:
        # Names the root too: the same key in two roots is two builds.
        root = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:8]
        return f"{key.digest()}-{root}"

    def _folders(self, *roots: Path) -> Iterator[Path]:
        for root in roots or self.roots:
            if self._root_problem(root) is not None:
                continue  # one thing to say about the root, not one for each entry
            for shard in _listdir(root / "entries"):
                yield from _listdir(shard)

    def _discard(self, path: Path) -> bool:
        # By way of staging: a reader sees the entry whole or not at all, also while it goes.
        grave = self.root / "staging" / f"removed.{os.getpid()}.{time.monotonic_ns()}.{path.name}"
        try:
            make_private_dir(grave.parent)
            os.rename(path, grave)
        except OSError as exc:
            log.warning("cannot remove %s: %s", path, exc)
            return False
        remove_tree(grave)
        self._warned.pop(path, None)
        return True

    def _warn_damage(self, damage: DamagedEntry) -> None:
        token = object()
        if self._warned.setdefault(damage.path, token) is token:
            log.warning("%s: it is not used", damage)


def _warn_owner(folder: Path, problem: str) -> None:
    warn_once(f"owner:{folder}", f"{problem}: its entries are not used. {_OWNER_ADVICE}")


def _timed(build: Build, folder: Path) -> tuple[BuildInfo, float]:
    start = time.perf_counter()
    info = build(folder)
    return info or BuildInfo(), time.perf_counter() - start


def _touch(path: Path) -> None:
    """Notes the use of an entry, at most once a day; a note that cannot be made is left out."""
    try:
        info = os.lstat(path)
        if stat.S_ISREG(info.st_mode) and time.time() - info.st_mtime >= _DAY_S:
            os.utime(path, follow_symlinks=False)
    except OSError:
        pass


def _same(before: os.stat_result, path: Path) -> bool:
    try:
        now = os.lstat(path)
    except OSError:
        return False
    return (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)


def _listdir(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
