"""Compile processes: jobs in, results out, one at a time each, over pipes.

Not `multiprocessing`: its fresh processes import the caller's main module again, which a script
without an ``if __name__ == "__main__"`` or one that is read from standard input does not survive.
A worker that dies ends its job with `WorkerDied` and is replaced for the next one.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from moejit.runtime.compiler import hide_gpu

__all__ = ["WorkerDied", "run_jobs", "serve"]

_STOP_S = 5.0  # to leave a staging folder clean; a worker inside the compiler may need it
_MAIN = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from moejit.runtime.compile_pool import serve; serve()"
)


class WorkerDied(Exception):
    """A compile process ended in the middle of a job; ``args[0]`` says how."""


def run_jobs(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int
) -> Iterator[tuple[int, Any]]:
    """Call ``function(*job)`` for each job in other processes; all of it must pickle.

    Yields:
        (index of the job, result or `WorkerDied`), in the order in which they end. Leaving early,
        also by an interrupt, stops the workers.
    """
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", _MAIN, json.dumps(sys.path)]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(worker)
        return worker

    def run(job: tuple[Any, ...]) -> Any:
        try:
            worker = idle.get_nowait()
        except queue.Empty:
            worker = start()
        assert worker.stdin is not None and worker.stdout is not None
        try:
            pickle.dump((function, job), worker.stdin)
            worker.stdin.flush()
            result = pickle.load(worker.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            worker.kill()
            code = worker.wait()
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            return WorkerDied(how)
        idle.put(worker)
        return result

    pool = ThreadPoolExecutor(workers, thread_name_prefix="moejit-compile")
    try:
        pending = {pool.submit(run, job): index for index, job in enumerate(jobs)}
        for future in as_completed(pending):
            yield pending[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        _stop(started)
        pool.shutdown()


def serve() -> None:
    """What a worker does: run jobs from standard input until it closes."""
    # An interrupt at the terminal goes to all; the parent decides, and a SIGTERM unwinds.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    hide_gpu()
    jobs, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a compiler prints must not get between the results
    try:
        while True:
            function, job = pickle.load(jobs)
            pickle.dump(function(*job), results)
            results.flush()
    except (EOFError, BrokenPipeError):  # the parent is done, or gone
        pass


def _stop(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        worker.terminate()
    for worker in workers:
        try:
            worker.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:
                pass
