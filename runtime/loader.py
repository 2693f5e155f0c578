"""Loads a compiled layer into the process, without the compiler.

In: an `Entry` that the store has just verified. Out: the host function of the layer, callable
through TVM-FFI. All that is needed of the DSL is its runtime library, found on disk without
importing cutlass. A library for another architecture or another CPU is refused before it is opened:
opened, it would end the process instead of raising.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moejit.cache.entry import Entry
from moejit.cache.errors import DamagedEntry
from moejit.cache.fingerprint import native_cpu
from moejit.codegen.arch import arch_spec
from moejit.codegen.render import ENTRY
from moejit.runtime.compiler import LIBRARY, host_baseline
from moejit.runtime.errors import LoadFailed

__all__ = ["LayerFunction", "find_runtime", "load_layer", "open_runtime"]

LayerFunction = Callable[..., Any]

_RUNTIME = "libcute_dsl_runtime.so"
_lock = threading.Lock()
_runtime: list[ctypes.CDLL] = []  # empty until the first load; never closed


def load_layer(entry: Entry, capability: tuple[int, int] | None = None) -> LayerFunction:
    """The host function of a compiled layer.

    Args:
        entry: from `Store.find` or `Store.get_or_build`: verified a moment ago.
        capability: compute capability of the device that it will run on; None where there is none.

    Raises:
        LoadFailed: it is for another device or another CPU, or the loader refuses it.
    """
    name = entry.path.name
    key = entry.manifest.key
    needed = arch_spec(key.arch).capability
    if capability is not None and capability != needed:
        have = f"{capability[0]}.{capability[1]}"
        reason = f"it is built for {key.arch}, and the device has compute capability {have}"
        raise LoadFailed(name, reason, "Unset MOEJIT_ARCH, or set it to the device's architecture.")
    built = entry.manifest.report.get("host", key.host)
    here = (host_baseline(), {"machine": platform.machine(), "cpu": native_cpu()})
    if {k: built.get(k) for k in ("machine", "cpu")} not in here:
        reason = f"its host code is built for {built.get('machine')} {built.get('cpu')}"
        raise LoadFailed(
            name, reason, f"Remove it, so that this machine builds its own: {entry.path}"
        )
    open_runtime(name)
    import tvm_ffi

    try:
        library = entry.file(LIBRARY)
        module = tvm_ffi.load_module(str(library))
        function: LayerFunction = module.get_function(ENTRY)
    except (AttributeError, DamagedEntry, OSError, RuntimeError, ValueError) as exc:
        hint = f"It was built by {', '.join(key.dsl)}. `moejit doctor` checks this installation."
        raise LoadFailed(name, str(exc).strip(), hint) from exc
    return function


def find_runtime() -> list[Path]:
    """Every runtime library of an installed DSL, the one to take first.

    Looked for where nvidia-cutlass-dsl unpacks to. Where the CUDA 12 and the CUDA 13 flavour are
    both there, the newest that the driver can serve comes first, as in the DSL itself.
    """
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")  # a top-level name: runs none of its code
    places = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    places += [Path(entry or ".") / "nvidia_cutlass_dsl" for entry in sys.path]
    found: dict[Path, int] = {}
    for place in dict.fromkeys(places):
        for path in [*place.glob(f"*/lib/{_RUNTIME}"), *place.glob(f"lib/{_RUNTIME}")]:
            flavour = re.fullmatch(r"cu(\d+)", path.parent.parent.name)
            found[path] = int(flavour[1]) if flavour else 0
    if len(found) > 1 and (driver := _driver_cuda()):
        # newest first, but those that the driver is too old for last
        return sorted(found, key=lambda path: (found[path] > driver, -found[path]))
    return sorted(found, key=lambda path: -found[path])


def open_runtime(entry: str = "a layer") -> None:
    """Make this process able to load layers: TVM-FFI, and the DSL's library for their symbols.

    Once a process, 20 ms; a layer then loads in a fraction of one.

    Raises:
        LoadFailed: the runtime library is not installed, or does not open.
    """
    if _runtime:
        return
    with _lock:
        if _runtime:
            return
        libraries = find_runtime()
        if not libraries:
            hint = "Install it: pip install nvidia-cutlass-dsl (or nvidia-cutlass-dsl[cu13])."
            raise LoadFailed(entry, f"{_RUNTIME} of nvidia-cutlass-dsl is not installed", hint)
        import tvm_ffi  # noqa: F401

        try:
            _runtime.append(ctypes.CDLL(str(libraries[0]), mode=ctypes.RTLD_GLOBAL))
        except OSError as exc:
            raise LoadFailed(entry, str(exc), "Reinstall nvidia-cutlass-dsl.") from exc


def _driver_cuda() -> int:
    """Major CUDA version that the driver serves; 0 without a driver."""
    version = ctypes.c_int(0)
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return 0
    except (AttributeError, OSError):
        return 0
    return version.value // 1000
