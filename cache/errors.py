"""Errors of the cache.

Damage on disk is not among them: `Store.find` turns `DamagedEntry` into a miss. What remains is a
key that cannot be hashed, a builder that broke its contract, and no place left to write to.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["CacheError", "CacheUnusable", "DamagedEntry", "InvalidBuild", "InvalidKey"]


class CacheError(Exception):
    """Base of the cache's errors. Fields stay in ``args`` so that they survive pickling."""


class InvalidKey(CacheError):
    """A value that has no unambiguous place in a `KernelKey`."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(where, problem)
        self.where, self.problem = where, problem

    def __str__(self) -> str:
        return f"kernel key field {self.where}: {self.problem}"


class DamagedEntry(CacheError):
    """A folder that is there but must not be loaded."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def __str__(self) -> str:
        return f"cache entry {self.path}: {self.problem}"


class InvalidBuild(CacheError):
    """The builder left something in its folder that an entry cannot hold."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(name, problem)
        self.name, self.problem = name, problem

    def __str__(self) -> str:
        return f"the build of {self.name} cannot become a cache entry: {self.problem}"


class CacheUnusable(CacheError):
    """Neither the cache root nor the temporary folder takes a build."""

    def __init__(self, root: Path | None, root_problem: str, temp_problem: str) -> None:
        super().__init__(root, root_problem, temp_problem)
        self.root, self.root_problem, self.temp_problem = root, root_problem, temp_problem

    def __str__(self) -> str:
        return (
            f"nowhere to build a kernel: cache root {self.root} ({self.root_problem}); "
            f"temporary folder ({self.temp_problem}). Free some space, or point the cache root "
            "or TMPDIR at a folder that this user can write"
        )
