"""What the tests of the cache share: a build that must not run, and the warnings it gave."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest


def no_build(folder: Path) -> None:
    raise AssertionError("built again")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [r for r in caplog.records if r.name == "moejit.cache"]
    return [r.getMessage() for r in records if r.levelno >= logging.WARNING]
