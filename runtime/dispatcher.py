"""From a call signature to something that runs it: the only module that knows the order of steps.

A signature (every shape, stride, dtype, device and flag of a call) that was seen before is one
dictionary lookup, done by `runtime.api`. A new one comes here:

    plan -> in memory? -> render -> key -> on disk? -> compile, publish -> load -> bind

Plans are asked for at token buckets (powers of two), so that nearby token counts share a layer.
Layers that render to the same text are loaded once. Misses are serialised by layer, not globally.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import torch

from moejit.cache.store import Store
from moejit.codegen.plan import MoePlan
from moejit.codegen.problem import MoeProblem
from moejit.codegen.render import render
from moejit.codegen.select import select
from moejit.codegen.workspace import workspace_layout
from moejit.runtime import events
from moejit.runtime.backends import Backend, Call, backend_for
from moejit.runtime.build import build_entry, layer_key, open_store, prewarm_command, token_bucket
from moejit.runtime.errors import CaptureWouldCompile, JitDisabled
from moejit.runtime.known_weights import KnownWeights
from moejit.runtime.launcher import Bound, Layer, Runner
from moejit.runtime.loader import load_layer, open_runtime
from moejit.runtime.settings import Settings, on_change, settings

__all__ = ["Dispatcher", "active"]

# A signature holds T, so prompts of every length leave one each: at 2 KB apiece, 16 MB.
MAX_SIGNATURES = 8192

LayerId = tuple[tuple[object, ...], MoePlan]


class Dispatcher:
    """Everything that a process has loaded, and how it gets more.

    Attributes:
        settings: what it was made for.
        weights: sets of weight tensors that were looked at.
        runners: call signature -> what runs it, and a tensor of the output's shape, dtype and
            device that takes no memory. `runtime.api` reads both tables without a lock.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.weights = KnownWeights()
        self.runners: dict[tuple[object, ...], tuple[Runner, torch.Tensor]] = {}
        self.store: Store = open_store(settings)
        self._planned: dict[MoeProblem, Layer] = {}
        self._layers: dict[LayerId, Layer] = {}
        self._locks: dict[LayerId, threading.Lock] = {}
        self._guard = threading.Lock()  # of _locks; held for a dictionary operation

    def prepare(self, signature: tuple[object, ...], call: Call) -> Runner:
        """The runner of a signature that is not in the table yet; its first run is timed.

        Raises:
            MoejitError: there is no kernel for it, and none could or may be built.
        """
        if call.tokens == 0:
            self.runners[signature] = _nothing, _template(call)
            return _nothing
        backend = backend_for(call.device, self.settings)
        bound = backend.bind(call, self.layer)
        if len(self.runners) >= MAX_SIGNATURES:
            self.runners.clear()
        self.runners[signature] = bound.run, _template(call)
        return _FirstRun(bound, backend.name)

    def layer(self, problem: MoeProblem, backend: Backend) -> Layer:
        """The loaded layer for a problem: from memory, from disk, or compiled now."""
        bucketed = replace(problem, tokens=token_bucket(problem.tokens, problem.top_k))
        layer = self._planned.get(bucketed)
        if layer is None:
            layer = self._plan(bucketed, backend)
        if backend.capturing() and not layer.launched:
            raise CaptureWouldCompile(layer.name)
        return layer

    def _plan(self, problem: MoeProblem, backend: Backend) -> Layer:
        with events.timed("plan", f"T<={problem.tokens}"):
            plan = select(problem)
        identity = (tuple(problem.facts.items()), plan)
        with self._guard:
            lock = self._locks.setdefault(identity, threading.Lock())
        with lock:
            layer = self._layers.get(identity)
            if layer is None:
                if backend.capturing():
                    raise CaptureWouldCompile(f"{plan.name} for {problem}")
                layer = self._layers[identity] = self._load(problem, plan, backend)
        self._planned[problem] = layer
        return layer

    def _load(self, problem: MoeProblem, plan: MoePlan, backend: Backend) -> Layer:
        start = time.perf_counter()
        source = render(problem, plan)
        events.emit("render", source.name, time.perf_counter() - start)
        start = time.perf_counter()
        key = layer_key(source)
        entry = self.store.find(key)
        if entry is not None:
            events.emit("hit", source.name, time.perf_counter() - start)
        elif self.settings.jit != "auto":
            hint = f"Build it ahead of time: {prewarm_command(problem)}"
            raise JitDisabled(f"{source.name} ({problem.arch})", self.settings.jit, hint)
        else:
            entry = build_entry(self.store, key, source)
        open_runtime(source.name)
        start = time.perf_counter()
        function = load_layer(entry, backend.capability)
        events.emit("load", source.name, time.perf_counter() - start)
        return Layer(
            name=source.name,
            arch=problem.arch,
            plan=plan,
            layout=workspace_layout(problem, plan),
            function=function,
        )


class _FirstRun:
    """Runs a signature for the first time: says how long that took, and notes that it went well."""

    def __init__(self, bound: Bound, backend: str) -> None:
        self._bound, self._backend = bound, backend

    def __call__(self, *arguments: object) -> None:
        layer = self._bound.layer
        start = time.perf_counter()
        self._bound.run(*arguments)
        name = layer.name if layer else self._backend
        events.emit("launch", name, time.perf_counter() - start, "first of its shapes")
        if layer:
            layer.launched = True


def _template(call: Call) -> torch.Tensor:
    """(T, H) of the output's dtype on its device, all of it one element."""
    one = torch.empty(1, dtype=call.output_dtype, device=call.device)
    return one.expand(call.tokens, call.hidden)


def _nothing(*arguments: object) -> None:
    """Runs a call with no tokens."""


# The dispatcher of the settings in force; None before the first call and after a change.
current: Dispatcher | None = None
_current_lock = threading.Lock()


def active() -> Dispatcher:
    """The dispatcher of the settings in force; a change of settings starts a fresh one."""
    global current
    with _current_lock:
        in_force = settings()
        found = current
        if found is None or found.settings is not in_force:
            found = current = Dispatcher(in_force)
        return found


def _forget() -> None:
    global current
    current = None


on_change(_forget)
