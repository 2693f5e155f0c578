"""Who compiles, and for which host: the facts of a key that do not come from the problem.

Nothing is imported to find out, least of all cutlass (0.6 s). A probe that fails gives a text that
starts with ``unprobed:``, so that it never shares a key with one that works.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejit.cache.paths import make_private_dir, owner_problem

__all__ = ["Toolchain", "find_compiler", "native_cpu", "toolchain"]

log = logging.getLogger("moejit.cache")

UNPROBED = "unprobed:"
MEMO = "compiler.json"
_MEMO_SCHEMA = 1
_MEMO_KEEP = 16  # nodes that share a home have a compiler each
_DSO = "_cutlass_ir*.so"
_LIBS = Path("_mlir", "_mlir_libs")


@dataclass(frozen=True, kw_only=True)
class Toolchain:
    """The compiler's identity; the three fields of the same name in `KernelKey`."""

    dsl: tuple[str, ...]
    compiler_digest: str
    tvm_ffi: str


def toolchain(memo_roots: Sequence[Path] = ()) -> Toolchain:
    """The compiler that an import would find now.

    Args:
        memo_roots: cache roots that may hold the digest of the compiler's shared object already;
            a new one is written to the first. Without, the file is hashed each time (0.1-0.3 s).

    Never raises: see `UNPROBED`. About 1 ms with a memo; keep the result, it does not change.
    """
    versions = _distributions()
    dsl = sorted(f"{n}=={v}" for n, v in versions.items() if n.startswith("nvidia-cutlass-dsl"))
    ffi = re.match(r"\d+\.\d+", versions.get("apache-tvm-ffi", ""))
    return Toolchain(
        dsl=tuple(dsl) or (f"{UNPROBED} no nvidia-cutlass-dsl distribution",),
        compiler_digest=_compiler_digest(memo_roots),
        tvm_ffi=ffi.group() if ffi else f"{UNPROBED} no apache-tvm-ffi distribution",
    )


def native_cpu() -> str:
    """A text that is equal on two hosts only if their instruction sets are."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features"):
                    flags = " ".join(sorted(value.split()))
                    return f"native-{hashlib.sha256(flags.encode()).hexdigest()[:16]}"
    except OSError:
        pass
    return f"{UNPROBED} instruction set of {platform.node()}"


def find_compiler() -> list[Path]:
    """The compiler's shared objects, without importing them; more than one if flavours coexist.

    Looked for where an import of cutlass would look, then where its wheels unpack to: packages are
    also put on PYTHONPATH by hand, without a record of their files.
    """
    for folder in _library_folders():
        found = sorted(folder.glob(_DSO))
        if found:
            return found
    for name in ("cutlass", "nvidia_cutlass_dsl"):
        found = sorted(path for place in _places(name) for path in place.rglob(_DSO))
        if found:
            return found
    return []


def _library_folders() -> Iterator[Path]:
    for place in _places("cutlass"):
        yield place / _LIBS
    for place in _places("nvidia_cutlass_dsl"):
        for inner in ("dsl_packages", "python_packages"):
            yield place / inner / "cutlass" / _LIBS
    for entry in sys.path:
        yield Path(entry or ".") / "cutlass" / _LIBS
        for inner in ("dsl_packages", "python_packages"):
            yield Path(entry or ".") / "nvidia_cutlass_dsl" / inner / "cutlass" / _LIBS


def _places(name: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(name)  # of a top-level name: runs none of its code
        return [Path(p) for p in (spec and spec.submodule_search_locations) or ()]
    except (ImportError, ValueError, AttributeError, OSError):
        return []


def _distributions() -> dict[str, str]:
    # From the folder names (PEP 376 fixes their form), not importlib.metadata.distributions():
    # that opens the METADATA of every installed package, 15 ms for 56 of them against 0.3 ms.
    found: dict[str, str] = {}
    for entry in sys.path:
        try:
            names = os.listdir(entry or ".")
        except OSError:
            continue
        for name in names:
            stem, dot, kind = name.rpartition(".")
            if dot and kind in ("dist-info", "egg-info") and "-" in stem:
                project, _, version = stem.partition("-")
                if kind == "egg-info":
                    version = version.partition("-py")[0]
                found.setdefault(re.sub(r"[-_.]+", "-", project).lower(), version)
    return found


def _compiler_digest(memo_roots: Sequence[Path]) -> str:
    objects = find_compiler()
    if not objects:
        return f"{UNPROBED} no {_DSO} found"
    memo = {root: _read_memo(root) for root in memo_roots}
    digests, fresh = [], []
    for path in objects:
        try:
            record = _identity(path)
            known = _known(memo.values(), record)
            if known is None:
                # The whole file, not its ends: it carries no build id, and two nightly builds of
                # one version may have the same size, header and symbol table. 0.1 s from memory.
                known = _sha256(path)
                fresh.append({**record, "sha256": known})
        except OSError as exc:
            return f"{UNPROBED} {path.name}: {exc.strerror or exc}"
        digests.append(f"{record['size']}:{known}")
    if fresh and memo_roots:
        _write_memo(memo_roots[0], [*fresh, *memo[memo_roots[0]]])
    return ",".join(digests)


def _identity(path: Path) -> dict[str, Any]:
    # Not the inode and not ctime: a memo that came with a container image has to hold. A stale
    # one would take equal path, size and mtime, and by the key's `dsl` field equal versions too.
    info = os.stat(path)
    return {"path": os.path.abspath(path), "size": info.st_size, "mtime_ns": info.st_mtime_ns}


def _known(memos: Iterable[list[dict[str, Any]]], record: dict[str, Any]) -> str | None:
    for records in memos:
        for old in records:
            if all(old[name] == value for name, value in record.items()):
                sha256: str = old["sha256"]
                return sha256
    return None


def _read_memo(root: Path) -> list[dict[str, Any]]:
    path = root / MEMO
    try:
        if owner_problem(root) or owner_problem(path) or not path.is_file():
            return []
        tree = json.loads(path.read_bytes())
        if tree["schema"] != _MEMO_SCHEMA:
            return []
        kinds = {"path": str, "size": int, "mtime_ns": int, "sha256": str}
        return [
            record
            for record in tree["files"]
            if set(record) == set(kinds) and all(type(record[n]) is k for n, k in kinds.items())
        ]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []


def _write_memo(root: Path, records: list[dict[str, Any]]) -> None:
    temp = root / f"{MEMO}.{os.getpid()}"
    try:
        make_private_dir(root)
        temp.write_text(json.dumps({"schema": _MEMO_SCHEMA, "files": records[:_MEMO_KEEP]}))
        os.replace(temp, root / MEMO)
    except OSError as exc:
        log.debug("not remembering the compiler's digest: %s", exc)
        try:
            temp.unlink(missing_ok=True)
        except OSError:
            pass


def _sha256(path: Path) -> str:
    hasher = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(4 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()
