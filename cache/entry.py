"""One compiled layer on disk: a folder of files and the manifest that vouches for each of them.

In: a folder. Out: an `Entry` whose bytes were compared with the manifest, or `DamagedEntry` with
the reason. Loaders notice almost no damage themselves (half a ``.so`` loads, a flipped byte loads,
a broken header ends the process), so nothing is loaded that was not hashed first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moejit.cache.errors import DamagedEntry, InvalidBuild, InvalidKey
from moejit.cache.key import KernelKey
from moejit.cache.paths import owner_problem

__all__ = [
    "LAST_USED",
    "MANIFEST",
    "MANIFEST_SCHEMA",
    "BuildInfo",
    "Entry",
    "FileRecord",
    "Manifest",
    "read_entry",
    "record_files",
    "verify",
]

MANIFEST = "manifest.json"
LAST_USED = "last_used"
MANIFEST_SCHEMA = 1
# A manifest is about 5 KB. Of a longer, foreign file only this much is read, and fails to parse.
MANIFEST_MAX_BYTES = 8 << 20
_NOT_CONTENT = (MANIFEST, LAST_USED)


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a file has to be."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class BuildInfo:
    """What a builder knows about its result besides the files; all of it JSON values.

    Attributes:
        report: resource use and the like, by kernel.
        signature: the host function's signature, for people.
        min_driver: oldest driver that can run this, for an error message; not part of the key.
        created: versions, seconds a step took, and so on; joined with what the store writes.
    """

    report: Mapping[str, Any] = field(default_factory=dict)
    signature: str = ""
    min_driver: str = ""
    created: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The commit marker of an entry and the list of its files."""

    key: KernelKey
    files: Mapping[str, FileRecord]
    created: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    signature: str = ""
    min_driver: str = ""

    @property
    def digest(self) -> str:
        return self.key.digest()

    def to_json(self) -> str:
        """The text of ``manifest.json``, with a checksum over its own content.

        Raises:
            InvalidBuild: `report` or `created` holds something that is not JSON.
        """
        tree: dict[str, Any] = {
            "schema": MANIFEST_SCHEMA,
            "digest": self.digest,
            "key": json.loads(self.key.to_json()),
            "files": {n: {"size": r.size, "sha256": r.sha256} for n, r in self.files.items()},
            "created": dict(self.created),
            "report": dict(self.report),
            "signature": self.signature,
            "min_driver": self.min_driver,
        }
        try:
            # Through text once, so that the checksum is over what a reader will see.
            tree = json.loads(json.dumps(tree, allow_nan=False))
            tree["checksum"] = _checksum(tree)
            text = json.dumps(tree, indent=1, sort_keys=True, allow_nan=False)
            text.encode()
        except (TypeError, ValueError, RecursionError) as exc:
            raise InvalidBuild(self.key.name, f"its report is not JSON ({exc})") from exc
        return text + "\n"

    @classmethod
    def from_json(cls, text: bytes | str) -> Manifest:
        """The manifest that `to_json` wrote.

        Raises:
            ValueError: anything else, with what is wrong.
        """
        try:
            tree = json.loads(text)
        except RecursionError as exc:
            raise ValueError("it is nested too deeply") from exc
        if not isinstance(tree, dict):
            raise ValueError("it is not a JSON object")
        if tree.get("schema") != MANIFEST_SCHEMA:
            raise ValueError(f"its schema is {tree.get('schema')!r}, not {MANIFEST_SCHEMA}")
        checksum = tree.pop("checksum", None)
        if checksum != _checksum(tree):
            raise ValueError("its checksum does not match its content")
        expected = {"schema", "digest", "key", "files", "created", "report"}
        if set(tree) != expected | {"signature", "min_driver"}:
            raise ValueError(f"its fields are {sorted(tree)}")
        for name, kind in (("files", dict), ("created", dict), ("report", dict)):
            if not isinstance(tree[name], kind):
                raise ValueError(f"{name} is not an object")
        if not isinstance(tree["signature"], str) or not isinstance(tree["min_driver"], str):
            raise ValueError("signature and min_driver are not both texts")
        try:
            key = KernelKey.from_tree(tree["key"])
        except InvalidKey as exc:
            raise ValueError(str(exc)) from exc
        if tree["digest"] != key.digest():
            raise ValueError(f"its digest {tree['digest']!r} is not that of its key")
        if not tree["files"]:
            raise ValueError("it lists no file")
        return cls(
            key=key,
            files={name: _file_record(name, raw) for name, raw in tree["files"].items()},
            created=tree["created"],
            report=tree["report"],
            signature=tree["signature"],
            min_driver=tree["min_driver"],
        )


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A folder whose content was verified when this object was made.

    Attributes:
        path: the folder.
        manifest: its manifest.
        private: it lies in a temporary folder of this process and goes away with it.
    """

    path: Path
    manifest: Manifest
    private: bool = False

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def size_bytes(self) -> int:
        """Sum of the files' sizes, without the manifest."""
        return sum(record.size for record in self.manifest.files.values())

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists.

        Raises:
            DamagedEntry: the manifest lists no such file.
        """
        if name not in self.manifest.files:
            listed = ", ".join(sorted(self.manifest.files))
            raise DamagedEntry(self.path, f"it has no file {name!r}, only {listed}")
        return self.path / name

    def read(self, name: str) -> bytes:
        """Content of a file, compared with the manifest in the same read.

        Raises:
            DamagedEntry: not listed, unreadable, or not what the manifest says.
        """
        self.file(name)
        data = bytearray()
        problem = _file_problem(self.path, name, self.manifest.files[name], None, data)
        if problem is not None:
            raise DamagedEntry(self.path, problem)
        return bytes(data)


def verify(entry: Entry, trusted_uids: Collection[int] = ()) -> list[str]:
    """Every way in which the folder differs from what its manifest says; empty if in none."""
    try:
        manifest = _read_manifest(entry.path, trusted_uids)
    except DamagedEntry as exc:
        return [exc.problem]
    if manifest.key != entry.manifest.key:
        return ["its manifest is now that of another key"]
    return list(_problems(entry.path, manifest, trusted_uids))


def read_entry(
    path: Path,
    key: KernelKey | None = None,
    *,
    trusted_uids: Collection[int] = (),
    hash_files: bool = True,
) -> Entry:
    """The entry in a folder, after comparing it with its manifest and with `key`.

    Args:
        path: the entry's folder.
        key: the key that it has to be of; None takes any whose digest the folder's name carries.
        trusted_uids: owners to accept besides this user and root.
        hash_files: False reads the manifest alone, for listings; such an entry must not be loaded.

    Raises:
        DamagedEntry: it must not be loaded, and why.
    """
    manifest = _read_manifest(path, trusted_uids)
    if key is not None and manifest.key != key:
        raise DamagedEntry(path, "its manifest is that of another key")
    if path.name != manifest.key.entry_name:
        raise DamagedEntry(path, f"its manifest is that of {manifest.key.entry_name}")
    if hash_files:
        for problem in _problems(path, manifest, trusted_uids):
            raise DamagedEntry(path, problem)
    return Entry(path=path, manifest=manifest)


def record_files(folder: Path, name: str) -> dict[str, FileRecord]:
    """Size and digest of each file that a builder left.

    Raises:
        InvalidBuild: there is none, or something that an entry cannot hold (a link, a device).
        OSError: a file cannot be read.
    """
    records: dict[str, FileRecord] = {}
    for relative, info in _walk(folder):
        problem = _name_problem(relative)
        if not stat.S_ISREG(info.st_mode):
            problem = "it is neither a plain file nor a folder"
        if problem is not None:
            raise InvalidBuild(name, f"{relative!r}: {problem}")
        size, sha256 = _hash_file(folder / relative)
        records[relative] = FileRecord(size=size, sha256=sha256)
    if not records:
        raise InvalidBuild(name, "the builder left no file")
    return records


def _read_manifest(path: Path, trusted_uids: Collection[int]) -> Manifest:
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise DamagedEntry(path, "it is not a folder")
        if (problem := owner_problem(path, trusted_uids)) is not None:
            raise DamagedEntry(path, problem)
        fd, info = _open_plain(path / MANIFEST)
        with os.fdopen(fd, "rb") as file:
            text = file.read(MANIFEST_MAX_BYTES)
        if not _owner_ok(info, trusted_uids):
            raise DamagedEntry(path, f"{MANIFEST} belongs to uid {info.st_uid}")
        return Manifest.from_json(text)
    except OSError as exc:
        raise DamagedEntry(path, f"{MANIFEST} cannot be read ({exc.strerror or exc})") from exc
    except ValueError as exc:
        raise DamagedEntry(path, f"{MANIFEST} is not usable: {exc}") from exc


def _problems(path: Path, manifest: Manifest, trusted_uids: Collection[int]) -> Iterator[str]:
    for name, record in manifest.files.items():
        if (problem := _file_problem(path, name, record, trusted_uids)) is not None:
            yield problem


def _file_problem(
    path: Path,
    name: str,
    record: FileRecord,
    trusted_uids: Collection[int] | None,  # None: any, for bytes that nobody can exchange any more
    into: bytearray | None = None,
) -> str | None:
    try:
        for parent in Path(name).parents[:-1]:
            if not stat.S_ISDIR(os.lstat(path / parent).st_mode):
                return f"{parent} is not a folder"
        fd, info = _open_plain(path / name)
        with os.fdopen(fd, "rb", buffering=0) as file:
            if trusted_uids is not None and not _owner_ok(info, trusted_uids):
                return f"{name} belongs to uid {info.st_uid}"
            if info.st_size != record.size:
                return f"{name} has {info.st_size} bytes, its manifest says {record.size}"
            hasher = hashlib.sha256()
            while chunk := file.read(1 << 20):
                hasher.update(chunk)
                if into is not None:
                    into += chunk
    except OSError as exc:
        return f"{name} cannot be read ({exc.strerror or exc})"
    if hasher.hexdigest() != record.sha256:
        return f"the content of {name} is not what its manifest says (sha256)"
    return None


def _open_plain(path: Path) -> tuple[int, os.stat_result]:
    # O_NONBLOCK: a FIFO in place of the file would otherwise hang the reader.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "not a plain file")
    except BaseException:
        os.close(fd)
        raise
    return fd, info


def _owner_ok(info: os.stat_result, trusted_uids: Collection[int]) -> bool:
    return info.st_uid in (0, os.getuid()) or info.st_uid in trusted_uids


def _hash_file(path: Path) -> tuple[int, str]:
    fd, _ = _open_plain(path)
    size, hasher = 0, hashlib.sha256()
    with os.fdopen(fd, "rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            size += len(chunk)
            hasher.update(chunk)
    return size, hasher.hexdigest()


def _walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as items:
        for item in sorted(items, key=lambda item: item.name):
            if item.is_dir(follow_symlinks=False):
                yield from _walk(folder / item.name, f"{prefix}{item.name}/")
            else:
                yield prefix + item.name, item.stat(follow_symlinks=False)


def _checksum(tree: Mapping[str, Any]) -> str:
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _file_record(name: str, raw: object) -> FileRecord:
    if (problem := _name_problem(name)) is not None:
        raise ValueError(f"it lists {name!r}: {problem}")
    if not isinstance(raw, dict) or set(raw) != {"size", "sha256"}:
        raise ValueError(f"its record of {name!r} is {raw!r}")
    size, sha256 = raw["size"], raw["sha256"]
    if type(size) is not int or size < 0:
        raise ValueError(f"the size of {name!r} is {size!r}")
    if type(sha256) is not str or len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise ValueError(f"the sha256 of {name!r} is {sha256!r}")
    return FileRecord(size=size, sha256=sha256)


def _name_problem(name: str) -> str | None:
    """Why a file of an entry may not be called so, or None."""
    if name in _NOT_CONTENT:
        return "the name is taken by the store"
    if name.startswith("/") or "\\" in name or "\0" in name:
        return "it is not a relative path with forward slashes"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "it has an empty or a dotted part"
    if not name.isprintable():
        return "it has characters that cannot be printed"
    return None
