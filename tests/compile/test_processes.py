"""Several ranks of one node start at once and ask for the same layer: one compiles, all load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moejit.runtime.settings import Settings

HERE = Path(__file__).parent

RANK = """
import json, sys
sys.path[:0] = {path!r}
from problems import random_problem
from moejit.runtime import counters, moe_nvfp4
moe_nvfp4(**random_problem())
print(json.dumps({{kind: counter.count for kind, counter in counters().items()}}))
"""


@pytest.mark.slow
def test_ranks_that_start_together_compile_once(private_settings: Settings) -> None:
    source = str(HERE.parents[1] / "src")
    env = {k: v for k, v in os.environ.items() if not k.startswith("MOEJIT_")}
    env |= {
        "MOEJIT_BACKEND": "null",
        "MOEJIT_ARCH": "sm_90a",
        "MOEJIT_CACHE_DIR": str(private_settings.cache_dir),
        "XDG_RUNTIME_DIR": str(private_settings.cache_dir.parent),
    }
    code = RANK.format(path=[str(HERE.parent), source])
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    counted = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert sum(c["compile"] for c in counted) == 1
    assert all(c["compile"] + c["wait"] + c["hit"] == 1 and c["load"] == 1 for c in counted)
