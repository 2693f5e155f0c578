"""Shared by all tests: a cache folder of their own, and `tests/` on the path for `problems`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# `import problems` works in every test file; the repository's root stays off the path.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test alone."""
    folder = tmp_path / "moejit-cache"
    monkeypatch.setenv("MOEJIT_CACHE_DIR", str(folder))
    return folder
