"""Compile processes: results come back, a dead one costs its own job only, nobody stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from moejit.runtime.compile_pool import WorkerDied, run_jobs


def test_results_come_back_with_the_index_of_their_job() -> None:
    found = dict(run_jobs(divmod, [(7, 2), (9, 4), (1, 1)], workers=2))
    assert found == {0: (3, 1), 1: (2, 1), 2: (1, 0)}


def test_what_a_job_prints_is_not_a_result() -> None:
    assert list(run_jobs(print, [("noise",), ("more",)], workers=1)) == [(0, None), (1, None)]


def test_worker_that_dies_costs_its_own_job_only() -> None:
    jobs = [("exit 0",), ("kill -9 $PPID",), ("exit 3",)]
    found = dict(run_jobs(os.system, jobs, workers=1))
    died = found[1]
    assert isinstance(died, WorkerDied) and "signal 9" in str(died)
    assert found[0] == 0 and os.waitstatus_to_exitcode(found[2]) == 3


def test_leaving_early_stops_the_workers() -> None:
    start = time.monotonic()
    results = run_jobs(time.sleep, [(0,), (60,), (60,)], workers=2)
    assert next(results) == (0, None)
    results.close()
    assert time.monotonic() - start < 30


def test_script_on_standard_input_needs_no_main_guard() -> None:
    script = "from moejit.runtime.compile_pool import run_jobs\n"
    script += "print(sorted(run_jobs(abs, [(-1,), (-2,)], workers=2)))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable], input=script, capture_output=True, text=True, env=env, timeout=60
    )
    assert done.stdout.strip() == "[(0, 1), (1, 2)]", done.stderr


@pytest.mark.parametrize("workers", [1, 4])
def test_no_jobs_start_no_worker(workers: int) -> None:
    assert list(run_jobs(abs, [], workers)) == []
