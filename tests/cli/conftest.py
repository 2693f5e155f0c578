"""The command line as a user meets it: arguments in, exit code and both streams out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moejit.runtime import cli
from moejit.runtime.cli import output
from moejit.runtime.settings import scope


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def cache_dir(tmp_path: Path) -> Iterator[Path]:
    """A cache of this test's own; nothing of the user's is read or written."""
    root = tmp_path / "cache"
    with scope(cache_dir=root, lock_dir=tmp_path / "locks", backend="auto", arch=None, jit="auto"):
        yield root


@pytest.fixture
def moejit(
    cache_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Runs one command in this process."""
    # rich asks for the width once per console; tests must not depend on the terminal's
    monkeypatch.setattr(output.out, "width", 200)
    monkeypatch.setattr(output.notes, "width", 200)

    def run(*argv: str) -> Outcome:
        capsys.readouterr()
        code = cli.main(argv)
        streams = capsys.readouterr()
        return Outcome(code, streams.out, streams.err)

    return run
