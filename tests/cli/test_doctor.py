"""`moejit doctor`: each thing that can be missing is named, with what to do about it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moejit.runtime import doctor
from moejit.runtime.settings import scope, settings

Run = Callable[..., Any]


def check(name: str) -> doctor.Check:
    (found,) = [c for c in doctor.examine(settings()) if c.what == name]
    return found


def test_doctor_says_each_check_and_each_setting(moejit: Run) -> None:
    done = moejit("doctor", "--json")
    tree = json.loads(done.out)
    assert done.code == int(any(c["status"] == "missing" for c in tree["checks"]))
    assert {"moejit", "python", "torch", "linker", "cache folder", "lock"} <= {
        c["what"] for c in tree["checks"]
    }
    assert all(c["hint"] for c in tree["checks"] if c["status"] != "ok")
    assert {s["variable"] for s in tree["settings"]} >= {"MOEJIT_BACKEND", "MOEJIT_JIT"}


def test_doctor_prints_tables_for_people(moejit: Run, cache_dir: Path) -> None:
    done = moejit("doctor")
    assert "linker" in done.out and str(cache_dir) in done.out and "scope" in done.out


def test_looking_leaves_nothing_behind(moejit: Run, cache_dir: Path, tmp_path: Path) -> None:
    moejit("doctor")
    assert not cache_dir.exists() and not (tmp_path / "locks").exists()


def test_missing_linker_is_an_error_only_where_layers_are_compiled(moejit: Run) -> None:
    with scope(linker="no-such-linker"):
        assert check("linker").status == "missing"
        assert moejit("doctor").code == 1
    with scope(linker="no-such-linker", jit="off"):
        assert check("linker").status == "note"


def test_compiler_of_another_version_is_named(
    monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    real = doctor.importlib.metadata.version
    fake = {"nvidia-cutlass-dsl": "4.7.1"}
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda n: fake.get(n) or real(n))
    found = check("nvidia-cutlass-dsl")
    assert (found.status, found.found) == ("missing", "4.7.1")
    assert "<4.9" in found.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_cache_is_a_note(cache_dir: Path) -> None:
    cache_dir.mkdir(mode=0o500)
    assert check("cache folder").status == "note"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_cache_of_another_user_is_a_note(cache_dir: Path) -> None:
    cache_dir.mkdir()
    os.chown(cache_dir, 12345, -1)
    found = check("cache folder")
    assert found.status == "note" and "12345" in found.found and "cp -r" in found.hint


def test_cache_path_that_is_a_file_is_a_note(cache_dir: Path) -> None:
    cache_dir.write_text("")
    assert check("cache folder").status == "note"


def test_lock_that_excludes_nobody_is_a_note(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check("lock").status == "ok"

    class Granted:
        def __init__(self, *args: object, **kwargs: object) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *exc: object) -> None: ...

    monkeypatch.setattr(doctor.filelock, "FileLock", Granted)
    assert "granted again" in check("lock").found


def test_variable_that_changes_compiled_code_is_missing_cleanliness(cache_dir: Path) -> None:
    with scope(dsl_overrides=("CUTE_DSL_LINEINFO=1",)):
        assert check("CUTE_DSL_*").status == "missing"


def test_settings_page_has_every_variable(cache_dir: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/settings.md").read_text("utf-8")
    for one in settings().describe():
        for variable in one.variable.replace("*", "").split(" or "):
            assert variable in page
