"""What holds for every command: quick help, exit codes, no traceback for a user's mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import moejit as package
from moejit.codegen.errors import BadProblem

Run = Callable[..., Any]
COMMANDS = ("demo", "prewarm", "inspect", "cache", "doctor")


def test_version(moejit: Run) -> None:
    done = moejit("--version")
    assert (done.code, done.out) == (0, f"moejit {package.__version__}\n")


def test_no_command_prints_the_help(moejit: Run) -> None:
    assert all(name in moejit().out + moejit().err for name in COMMANDS)


@pytest.mark.parametrize("command", [(), *[(name,) for name in COMMANDS], ("cache", "list")])
def test_help_of_each_command(moejit: Run, command: tuple[str, ...]) -> None:
    done = moejit(*command, "--help")
    assert done.code == 0 and "Usage" in done.out


def test_help_loads_neither_torch_nor_the_compiler() -> None:
    code = (
        "import sys; from moejit.__main__ import main; assert main(['--help']) == 0;"
        "heavy = {'torch', 'cutlass', 'tvm_ffi', 'numpy', 'jinja2'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_unknown_option_and_command_exit_with_2(moejit: Run) -> None:
    for argv in (("--nope",), ("nope",), ("cache", "nope"), ("doctor", "--nope")):
        done = moejit(*argv)
        assert done.code == 2 and "nope" in done.err


def test_error_of_ours_is_one_message_and_exit_2(
    moejit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise BadProblem("hidden", 100, "a positive multiple of 64")

    monkeypatch.setattr("moejit.runtime.doctor.examine", fails)
    done = moejit("doctor")
    assert done.code == 2
    assert done.err == "moejit: hidden is 100; it must be a positive multiple of 64\n"


def test_bad_setting_is_one_message_and_exit_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moejit", "doctor"],
        env={**os.environ, "MOEJIT_BACKEND": "gpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "MOEJIT_BACKEND is 'gpu'" in done.stderr


def test_fault_of_ours_keeps_its_traceback(moejit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("moejit.runtime.doctor.examine", fails)
    with pytest.raises(ZeroDivisionError):
        moejit("doctor")
