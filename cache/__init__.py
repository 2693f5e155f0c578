"""Compiled layers on disk. Bytes in, verified bytes out; knows nothing of kernels.

`Store.get_or_build` is the whole life of an entry; `KernelKey` says what an entry is a function
of; `toolchain` fills in who compiles. Needs the standard library and filelock.
Imports neither torch nor cutlass, and nothing else of moejit.
"""

from __future__ import annotations

from moejit.cache.entry import BuildInfo, Entry, FileRecord, Manifest, read_entry, verify
from moejit.cache.errors import CacheError, CacheUnusable, DamagedEntry, InvalidBuild, InvalidKey
from moejit.cache.fingerprint import Toolchain, find_compiler, native_cpu, toolchain
from moejit.cache.key import KEY_SCHEMA, KernelKey, canonical, why_different
from moejit.cache.paths import default_lock_dir, default_root
from moejit.cache.store import Store, Verdict

__all__ = [
    "KEY_SCHEMA",
    "BuildInfo",
    "CacheError",
    "CacheUnusable",
    "DamagedEntry",
    "Entry",
    "FileRecord",
    "InvalidBuild",
    "InvalidKey",
    "KernelKey",
    "Manifest",
    "Store",
    "Toolchain",
    "Verdict",
    "canonical",
    "default_lock_dir",
    "default_root",
    "find_compiler",
    "native_cpu",
    "read_entry",
    "toolchain",
    "verify",
    "why_different",
]
