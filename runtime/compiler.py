"""Compiles the rendered source of a layer: the only module that imports the DSL, when asked to.

In: a `LayerSource` and an empty folder. Out, in that folder: the source files, ``kernel.ptx`` and
``kernel.so`` (host code, kernels and all), and a `CompileReport`. The same source gives the same
bytes on any machine: every option is explicit, host code is built for a portable baseline, and no
path, date or library of the build machine gets in.

The DSL keeps its options and its tracing state in singletons, so one lock serialises every compile
of a process; `runtime.prewarming` compiles in parallel by processes.
"""

from __future__ import annotations

import importlib
import importlib.util
import linecache
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from moejit.cache.fingerprint import native_cpu
from moejit.codegen.render import ENTRY, LayerSource
from moejit.runtime.cubin import KernelResources, kernel_resources
from moejit.runtime.errors import CompileFailed, LinkerMissing
from moejit.runtime.settings import settings

__all__ = [
    "LIBRARY",
    "PTX",
    "CompileOptions",
    "CompileReport",
    "compile_layer",
    "find_linker",
    "hide_gpu",
    "host_baseline",
    "kernel_names",
]

LIBRARY = "kernel.so"
PTX = "kernel.ptx"

_LINKERS = ("cc", "gcc", "clang", "ld")
# Without the C runtime's start files the library needs nothing of the build machine. Symbols bind
# inside it and at load: a missing one fails the load, instead of ending the process in a call.
_LINK_FLAGS = ("-Bsymbolic", "-z", "now", "-z", "noexecstack", "--build-id=none")

# Host code is compiled for this, not for the CPU that happens to compile it.
_BASELINES = {
    "x86_64": ("x86_64-unknown-linux-gnu", "x86-64-v2"),
    "aarch64": ("aarch64-unknown-linux-gnu", "generic"),
}

_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """What can be asked of the compiler; every field is part of the cache key.

    Attributes:
        opt_level: 0 to 3.
        line_info: keep source lines in the cubin, for profilers. Embeds paths of this machine and
            takes several times as long, so never for a cache that travels.
    """

    opt_level: int = 3
    line_info: bool = False

    @property
    def facts(self) -> dict[str, str | int | bool]:
        return dict(asdict(self))


@dataclass(frozen=True, kw_only=True)
class CompileReport:
    """What a compile produced and what it took.

    Attributes:
        arch: target, as the PTX states it.
        kernels: resources of every kernel, by symbol.
        host: machine and CPU baseline that the host code was built for.
        trace_s: seconds to run the rendered Python, with ptxas and LLVM behind it.
        export_s: seconds to write the object file.
        link_s: seconds to link.
        library_bytes: size of ``kernel.so``.
    """

    arch: str
    kernels: tuple[KernelResources, ...]
    host: dict[str, str]
    trace_s: float
    export_s: float
    link_s: float
    library_bytes: int

    @property
    def seconds(self) -> float:
        return self.trace_s + self.export_s + self.link_s

    @property
    def times(self) -> dict[str, float]:
        """Seconds of each step."""
        return {"trace_s": self.trace_s, "export_s": self.export_s, "link_s": self.link_s}

    def to_json(self) -> dict[str, Any]:
        """What the compile produced, as plain JSON values for the manifest."""
        tree = asdict(self)
        return {name: value for name, value in tree.items() if name not in self.times}


def compile_layer(
    source: LayerSource, arch: str, out: Path, options: CompileOptions | None = None
) -> CompileReport:
    """Compile a layer into the folder ``out``.

    Raises:
        CompileFailed: the compiler refused the source; names the rendered and the template line.
        LinkerMissing: there is no program to link the shared library with.
    """
    options = options or CompileOptions()
    linker = find_linker(settings().linker)
    overrides = settings().dsl_overrides
    if overrides:
        text = f"{', '.join(overrides)} would change the compiled code; unset it and try again"
        raise CompileFailed(source.name, arch, text=text)
    if importlib.util.find_spec("cutlass") is None:
        text = "the compiler is not installed: pip install 'nvidia-cutlass-dsl>=4.8,<4.9'"
        raise CompileFailed(source.name, arch, text=text)
    for file in source.files:
        (out / file.name).write_text(file.text, "utf-8")
    with _lock, tempfile.TemporaryDirectory(prefix="moejit-compile-") as scratch:
        start = time.perf_counter()
        with _quiet(), _package(source, out) as kernel:
            try:
                compiled = _trace(kernel, arch, options, Path(scratch))
            except Exception as exc:
                raise _explained(exc, source, arch, out) from exc
            ptx = str(compiled.__ptx__)
            targets = re.findall(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
            if targets != [arch]:
                text = f"the compiler targeted {', '.join(targets) or 'nothing'} instead of {arch}"
                raise CompileFailed(source.name, arch, text=text)
            traced = time.perf_counter()
            objects = Path(scratch) / "kernel.o"
            host = _export(compiled, objects)
        exported = time.perf_counter()
        (out / PTX).write_text(ptx, "utf-8")
        # Not linked in `out`: a full disk there is an error of the system's, for the store to
        # handle, and must not look like one of the linker's.
        linked_to = Path(scratch) / LIBRARY
        _link(linker, objects, linked_to, source.name, arch)
        shutil.copyfile(linked_to, out / LIBRARY)
        linked = time.perf_counter()
    library = (out / LIBRARY).read_bytes()
    return CompileReport(
        arch=arch,
        kernels=tuple(kernel_resources(library)),
        host=host,
        trace_s=traced - start,
        export_s=exported - traced,
        link_s=linked - exported,
        library_bytes=len(library),
    )


def host_baseline() -> dict[str, str]:
    """The machine and the CPU that host code is built for here; part of the cache key.

    The C library is not in it: what is linked here with -nostdlib names no library that it needs,
    and its undefined symbols are all of TVM-FFI and of the DSL's runtime.
    """
    machine = platform.machine()
    cpu = _BASELINES[machine][1] if machine in _BASELINES else native_cpu()
    return {"machine": machine, "cpu": cpu}


def kernel_names(source: LayerSource) -> tuple[str, ...]:
    """Symbol prefixes of the layer's kernels, in the order of the files that hold them."""
    found = []
    for file in source.files:
        found += re.findall(rf"\b{re.escape(source.symbol_prefix)}\w*", file.text)
    return tuple(dict.fromkeys(found))


def find_linker(command: str | None) -> list[str]:
    """The command that links a shared library, as arguments.

    Raises:
        LinkerMissing: neither ``command`` nor any of the usual programs is there.
    """
    if command:
        try:
            words = shlex.split(command)
        except ValueError:  # a quotation mark without its partner
            words = []
        if words and shutil.which(words[0]):
            return words
        raise LinkerMissing((command,), "CC")
    for name in _LINKERS:
        if path := shutil.which(name):
            return [path]
    raise LinkerMissing(_LINKERS)


def hide_gpu() -> None:
    """Keep CUDA away from this process: a compile worker needs no device and must not hold one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _trace(kernel: ModuleType, arch: str, options: CompileOptions, scratch: Path) -> Any:
    """Run the host function under the compiler. Every option, also those that equal the default."""
    from cutlass import cute
    from cutlass.base_dsl import compiler as dsl

    chosen = (
        cute.GPUArch(arch),
        cute.OptLevel(options.opt_level),
        cute.EnableTVMFFI(True),
        cute.EnableAssertions(False),
        cute.GenerateLineInfo(options.line_info),
        cute.PtxasOptions(""),
        cute.KeepPTX(True),
        cute.KeepCUBIN(True),
        dsl.KeepSASS(False),
        dsl.DumpDir(str(scratch)),
    )
    return cute.compile[chosen](getattr(kernel, ENTRY), *kernel.compile_arguments())


def _export(compiled: Any, path: Path) -> dict[str, str]:
    """Write the object file; returns the host that it is for.

    The DSL's own `export_to_c` compiles host code for the CPU at hand (AVX-512 and all). The same
    module goes through the same writer here, with a baseline CPU. These names are private to the
    DSL: where one is missing, native code is better than none, and the loader checks for it.
    """
    machine = platform.machine()
    try:
        from cutlass.base_dsl.export import get_export_module
        from cutlass.cutlass_dsl.tvm_ffi_provider import rename_tvm_ffi_function

        dump = compiled.export_provider.mlirExecutionEngine.dump_object_file_pic
        triple, cpu = _BASELINES[machine]
    except (ImportError, AttributeError, KeyError):
        compiled.export_to_c(str(path), function_name=ENTRY)
        return {"machine": machine, "cpu": native_cpu()}
    kept = {f"__tvm_ffi_{compiled.function_name}"}
    module = get_export_module(
        compiled.ir_module, f"__cute_internal_{ENTRY}", preserve_symbols=kept
    )
    rename_tvm_ffi_function(module, compiled.function_name, ENTRY)
    dump(
        module,
        str(path),
        f"__tvm_ffi_{ENTRY}",
        host_triple=triple,
        host_cpu=cpu,
        host_features="",
    )
    return {"machine": machine, "cpu": cpu}


def _link(linker: list[str], objects: Path, library: Path, name: str, arch: str) -> None:
    if Path(linker[0]).name.split(".")[0] in ("ld", "ld64", "lld", "mold"):
        flags = ["-shared", *_LINK_FLAGS]
    else:
        flags = ["-shared", "-nostdlib", "-Wl," + ",".join(_LINK_FLAGS)]
    command = [*linker, *flags, "-o", library.name, str(objects)]
    # In the library's own folder: linkers may record the output's name, never where it lies.
    done = subprocess.run(command, cwd=library.parent, capture_output=True, text=True)
    if done.returncode:
        raise CompileFailed(name, arch, text=f"{shlex.join(command)}\n{done.stderr.strip()}")


@contextmanager
def _quiet() -> Iterator[None]:
    """A deprecation inside the DSL is no reason for a user's ``-W error`` to fail a compile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@contextmanager
def _package(source: LayerSource, folder: Path) -> Iterator[ModuleType]:
    """Import the rendered files as a package under a name of their own; forget them afterwards.

    They must be real files: the DSL reads them back with `inspect`.
    """
    name = f"moejit_layer_{source.sha256[:16]}"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    keep, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    importlib.invalidate_caches()
    try:
        spec.loader.exec_module(package)
        try:
            kernel = importlib.import_module(f"{name}.kernel")
        except Exception as exc:
            raise _explained(exc, source, source.arch, folder) from exc
        yield kernel
    finally:
        sys.dont_write_bytecode = keep
        for module in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
            del sys.modules[module]
        for file in [f for f in linecache.cache if f.startswith(str(folder))]:
            del linecache.cache[file]


def _explained(exc: BaseException, source: LayerSource, arch: str, folder: Path) -> CompileFailed:
    """The failure with the place it came from: rendered line, and the template line behind it."""
    place = _place(exc, folder)
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(exc)).strip() or type(exc).__name__
    if type(exc).__module__ == "builtins":
        text = f"{type(exc).__name__}: {text}"
    text = text.replace(f"{folder}{os.sep}", "")
    if place is None:
        return CompileFailed(source.name, arch, text=text)
    file, line = place
    template, template_line = source.template_line(file, line) or ("", 0)
    return CompileFailed(
        source.name,
        arch,
        template=f"templates/{template}" if template else file,
        line=template_line if template else line,
        text=f"rendered as {file}:{line} in {source.name}\n{text}",
    )


def _place(exc: BaseException, folder: Path) -> tuple[str, int] | None:
    """The innermost rendered line that the exception, or one that caused it, points at."""
    seen: set[int] = set()
    at: BaseException | None = exc
    found = None
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        file, line = getattr(at, "filename", None), getattr(at, "line", None)
        line = line if isinstance(line, int) else getattr(at, "lineno", None)
        if isinstance(file, str) and isinstance(line, int) and Path(file).parent == folder:
            return Path(file).name, line
        for frame in traceback.extract_tb(at.__traceback__):
            if Path(frame.filename).parent == folder and frame.lineno:
                found = Path(frame.filename).name, frame.lineno
        at = at.__cause__ or at.__context__
    return found
