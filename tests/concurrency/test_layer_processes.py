"""Many processes call one cold layer at once: one compiles it, all of them load it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RACERS = 8

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cutlass") is None, reason="needs nvidia-cutlass-dsl"
)


def test_eight_processes_that_race_for_a_layer_compile_it_once(tmp_path: Path) -> None:
    barrier = tmp_path / "barrier"
    barrier.mkdir()
    environment = {
        **os.environ,
        "MOEJIT_BACKEND": "null",
        "MOEJIT_ARCH": "sm_90a",
        "MOEJIT_JIT": "auto",
        "MOEJIT_CACHE_DIR": str(tmp_path / "cache"),
        "XDG_RUNTIME_DIR": str(tmp_path / "run"),
    }
    (tmp_path / "run").mkdir(mode=0o700)
    script = Path(__file__).parent / "layer_racer.py"
    racers = [
        subprocess.Popen(
            [sys.executable, str(script), str(barrier), str(RACERS), str(n)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(RACERS)
    ]
    said = [racer.communicate(timeout=300) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * RACERS, said
    counts = [json.loads(out.splitlines()[-1]) for out, _ in said]
    assert sum(count["compile"] for count in counts) == 1
    assert [count["load"] for count in counts] == [1] * RACERS
