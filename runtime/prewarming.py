"""Fills the cache ahead of time: problems in, compiled layers on disk and a report out.

Needs no GPU. Problems that render to the same source are one job; what the cache holds already is
skipped, so a second run does nothing. Jobs run in processes of their own, since the compiler serves
one thread at a time, and with the GPU hidden.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from moejit.codegen.errors import MoejitError
from moejit.codegen.problem import MoeProblem
from moejit.codegen.render import LayerSource, render
from moejit.codegen.select import select
from moejit.runtime.build import build_entry, layer_key, open_store, prewarm_command, token_bucket
from moejit.runtime.compile_pool import WorkerDied, run_jobs
from moejit.runtime.errors import CompileFailed, NotKept
from moejit.runtime.settings import Settings, scope, settings

__all__ = ["Outcome", "PrewarmReport", "distinct_sources", "prewarm", "prewarm_command"]

# A compile worker with torch and the DSL in it, measured; a compile adds little to it.
_WORKER_BYTES = 1 << 30


@dataclass(frozen=True)
class Outcome:
    """What became of one layer.

    Attributes:
        name: name of the layer, as in the cache.
        arch: target.
        state: ``warm`` (was there), ``built`` or ``failed``.
        seconds: what it took here.
        error: why it failed, None otherwise; `NotKept` where it compiled and the cache could not
            hold it.
    """

    name: str
    arch: str
    state: str
    seconds: float
    error: MoejitError | None = None


@dataclass(frozen=True)
class PrewarmReport:
    """What `prewarm` did, by layer; and problems that no layer can run."""

    outcomes: tuple[Outcome, ...]
    rejected: tuple[tuple[MoeProblem, MoejitError], ...]
    seconds: float

    def _named(self, state: str) -> tuple[Outcome, ...]:
        return tuple(o for o in self.outcomes if o.state == state)

    @property
    def warm(self) -> tuple[Outcome, ...]:
        """Layers that the cache held already."""
        return self._named("warm")

    @property
    def built(self) -> tuple[Outcome, ...]:
        """Layers that were compiled now."""
        return self._named("built")

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """Layers that could not be compiled, or not be kept."""
        return self._named("failed")

    @property
    def ok(self) -> bool:
        """Whether every problem has its layer in the cache now."""
        return not self.failed and not self.rejected


def prewarm(
    problems: Iterable[MoeProblem],
    *,
    jobs: int | None = None,
    on_compile: Callable[[Outcome], None] | None = None,
) -> PrewarmReport:
    """Compile what the cache lacks of the layers that ``problems`` need.

    Failures do not stop the others: they are in the report.

    Args:
        problems: one for each shape and token count; see `codegen.MoeProblem`.
        jobs: compile processes; None takes what CPUs and memory allow, 1 compiles in this process.
        on_compile: called with each layer's outcome as soon as it is known.
    """
    start = time.perf_counter()
    sources, rejected = distinct_sources(problems)
    store = open_store(settings())
    outcomes: list[Outcome] = []

    def done(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if on_compile is not None:
            on_compile(outcome)

    missing = []
    for source in sources:
        looked = time.perf_counter()
        if store.find(layer_key(source)) is None:
            missing.append(source)
        else:
            done(Outcome(source.name, source.arch, "warm", time.perf_counter() - looked))
    workers = min(len(missing), _default_jobs() if jobs is None else max(jobs, 1))
    if workers <= 1:
        for source in missing:
            done(_build(source, settings()))
    else:
        _build_in_pool(missing, workers, done)
    return PrewarmReport(tuple(outcomes), tuple(rejected), time.perf_counter() - start)


def distinct_sources(
    problems: Iterable[MoeProblem],
) -> tuple[list[LayerSource], list[tuple[MoeProblem, MoejitError]]]:
    """The different layers that the problems need, in order; and the problems that have none."""
    planned: dict[object, LayerSource] = {}
    rejected: list[tuple[MoeProblem, MoejitError]] = []
    for problem in dict.fromkeys(problems):
        bucketed = replace(problem, tokens=token_bucket(problem.tokens, problem.top_k))
        try:
            plan = select(bucketed)
            identity = (*problem.facts.items(), plan)
            if identity not in planned:
                planned[identity] = render(bucketed, plan)
        except MoejitError as exc:
            rejected.append((problem, exc))
    by_text = {(source.arch, source.sha256): source for source in planned.values()}
    return list(by_text.values()), rejected


def _build_in_pool(
    sources: Sequence[LayerSource], workers: int, done: Callable[[Outcome], None]
) -> None:
    # Fresh processes, never forks of this one: it may hold a CUDA context and threads.
    jobs = [(source, settings()) for source in sources]
    for index, result in run_jobs(_build, jobs, workers):
        if isinstance(result, WorkerDied):
            source = sources[index]
            text = f"the compile process died ({result}); was it out of memory? Try fewer jobs (-j)"
            error = CompileFailed(source.name, source.arch, text=text)
            result = Outcome(source.name, source.arch, "failed", 0.0, error)
        done(result)


def _build(source: LayerSource, parent: Settings) -> Outcome:
    """One job: compile and publish. Runs in a worker, so it takes and returns plain values."""
    start = time.perf_counter()
    error: MoejitError | None = None
    try:
        with scope(**parent.values()):
            store = open_store(parent)
            if build_entry(store, layer_key(source), source).private:
                error = NotKept(source.name, str(store.root), store.write_problem)
    except MoejitError as exc:
        error = exc
    except Exception as exc:  # whatever it is: the report is where it belongs, the others go on
        error = CompileFailed(source.name, source.arch, text=f"{type(exc).__name__}: {exc}")
    state = "failed" if error else "built"
    return Outcome(source.name, source.arch, state, time.perf_counter() - start, error)


def _default_jobs() -> int:
    """Compile processes that this machine has CPUs and memory for, control groups included."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and int(quota[1]):
        cpus = min(cpus, max(1, int(quota[0]) // int(quota[1])))
    room = []
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            room.append(int(line.split()[1]) * 1024)
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.strip().isdigit() and used.strip().isdigit():
        room.append(int(limit) - int(used))
    return max(1, min(cpus, min(room, default=_WORKER_BYTES * cpus) // _WORKER_BYTES))


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return ""
