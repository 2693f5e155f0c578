"""What happened on the way from a call to a launch: counters, times, hooks.

`emit` counts an event, logs it and hands it to every hook; the dispatcher, the compiler and prewarm
call it. A launch from the memory table emits nothing: the hot path does not come here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["KINDS", "Counter", "Event", "counters", "emit", "hook", "reset", "timed"]

# In the order of a cold call. `hit` is an entry found on disk; `wait` is time spent behind another
# process that was compiling the same layer.
KINDS = ("plan", "render", "hit", "wait", "compile", "load", "launch")

_log = logging.getLogger("moejit.events")
_lock = threading.Lock()
_hooks: list[Callable[[Event], None]] = []


@dataclass(frozen=True)
class Event:
    """One step that took place.

    Attributes:
        kind: one of `KINDS`.
        name: the layer, or what else it was about.
        seconds: how long it took.
        detail: anything a reader of the log would want; may be empty.
    """

    kind: str
    name: str
    seconds: float
    detail: str = ""


@dataclass
class Counter:
    """How often one kind of event took place, and how long all of them took together."""

    count: int = 0
    seconds: float = 0.0


_counters = {kind: Counter() for kind in KINDS}


def emit(kind: str, name: str, seconds: float, detail: str = "") -> None:
    """Count one event, log it (compiles at INFO, the rest at DEBUG) and call the hooks."""
    event = Event(kind, name, seconds, detail)
    with _lock:
        counter = _counters[kind]
        counter.count += 1
        counter.seconds += seconds
        hooks = tuple(_hooks)
    level = logging.INFO if kind == "compile" else logging.DEBUG
    _log.log(level, "%s %s: %.1f ms%s", kind, name, seconds * 1e3, f" ({detail})" if detail else "")
    for call in hooks:
        call(event)


@contextmanager
def timed(kind: str, name: str) -> Iterator[None]:
    """Emit an event with the time that the block took, unless it raises."""
    start = time.perf_counter()
    yield
    emit(kind, name, time.perf_counter() - start)


def counters() -> dict[str, Counter]:
    """A copy of the counters, by kind."""
    with _lock:
        return {kind: Counter(c.count, c.seconds) for kind, c in _counters.items()}


def reset() -> None:
    """Set every counter to zero."""
    with _lock:
        for kind in KINDS:
            _counters[kind] = Counter()


@contextmanager
def hook(call: Callable[[Event], None]) -> Iterator[None]:
    """Hand every event to ``call`` for the length of a ``with`` block. It must not raise."""
    with _lock:
        _hooks.append(call)
    try:
        yield
    finally:
        with _lock:
            _hooks.remove(call)
