"""Tests here compile for GPUs that need not be there, with nvidia-cutlass-dsl and a linker."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moejit.runtime.settings import Settings, scope

sys.path.insert(0, str(Path(__file__).parent))

if importlib.util.find_spec("cutlass") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def private_settings(tmp_path: Path) -> Iterator[Settings]:
    """A cache and locks of this test's own; nothing that the developer's environment says."""
    with scope(
        backend="null",
        arch="sm_90a",
        jit="auto",
        cache_dir=tmp_path / "cache",
        read_only_cache_dirs=(),
        lock_dir=tmp_path / "locks",
        linker=None,
        dsl_overrides=(),
    ) as settings:
        yield settings
