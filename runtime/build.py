"""Between a rendered source and an entry in the cache: its key, its store, its build.

Shared by the dispatcher, which builds one layer when a call needs it, and by prewarm, which builds
many ahead of time. Imports neither torch nor cutlass.
"""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path

from moejit.cache.entry import BuildInfo, Entry
from moejit.cache.fingerprint import Toolchain, toolchain
from moejit.cache.key import KernelKey
from moejit.cache.store import Store
from moejit.codegen.arch import arch_spec
from moejit.codegen.problem import MoeProblem
from moejit.codegen.render import LayerSource
from moejit.runtime import events
from moejit.runtime.compiler import CompileOptions, compile_layer, host_baseline, kernel_names
from moejit.runtime.settings import Settings, settings

__all__ = ["build_entry", "layer_key", "open_store", "prewarm_command", "token_bucket"]

_MAX_SLOTS = 2**31 - 2**20  # the limit that `MoeProblem` sets on tokens * top_k


def open_store(settings: Settings) -> Store:
    """The cache that the settings name."""
    return Store(
        (settings.cache_dir, *settings.read_only_cache_dirs),
        settings.lock_dir,
        lock_timeout_s=settings.lock_timeout_s,
    )


def layer_key(source: LayerSource, options: CompileOptions | None = None) -> KernelKey:
    """All that the compiled layer is a function of: source, options, toolchain, host."""
    tools = _toolchain(settings().cache_dir)
    return KernelKey(
        name=source.name,
        source_sha256=source.sha256,
        spec=source.facts,
        kernel_names=kernel_names(source),
        arch=source.arch,
        options=(options or CompileOptions()).facts,
        dsl=tools.dsl,
        compiler_digest=tools.compiler_digest,
        tvm_ffi=tools.tvm_ffi,
        host=host_baseline(),
    )


def build_entry(
    store: Store, key: KernelKey, source: LayerSource, options: CompileOptions | None = None
) -> Entry:
    """The entry of a source, compiled unless another process has just done so.

    Raises:
        CompileFailed, LinkerMissing: as `compile_layer`; nothing is stored then.
    """
    start = time.perf_counter()
    built = False

    def build(folder: Path) -> BuildInfo:
        nonlocal built
        built = True
        report = compile_layer(source, source.arch, folder, options)
        events.emit("compile", source.name, report.seconds, f"for {source.arch}")
        return BuildInfo(
            report=report.to_json(),
            min_driver=arch_spec(source.arch).min_driver,
            created=report.times,
        )

    entry = store.get_or_build(key, build)
    if not built:
        events.emit("wait", source.name, time.perf_counter() - start, "another process built it")
    return entry


def token_bucket(tokens: int, top_k: int) -> int:
    """The token count that a plan is asked for: the next power of two within the limit."""
    bucket = 1 << max(tokens - 1, 0).bit_length()
    return bucket if bucket * top_k < _MAX_SLOTS else tokens


def prewarm_command(problem: MoeProblem) -> str:
    """The command that puts the layer for this problem into the cache."""
    words = [
        "moejit prewarm",
        f"--arch {problem.arch}",
        f"--hidden {problem.hidden} --intermediate {problem.intermediate}",
        f"--top-k {problem.top_k} --experts {problem.num_experts}",
    ]
    if problem.num_local_experts != problem.num_experts:
        words.append(f"--local-experts {problem.num_local_experts}")
    words.append(f"--tokens {problem.tokens}")
    words.append(f"--finalize {'deterministic' if problem.deterministic else 'fused'}")
    for option, value, default in (
        ("--output-dtype", problem.output_dtype, "bfloat16"),
        ("--ids-dtype", problem.ids_dtype, "int32"),
        ("--scales-dtype", problem.scales_dtype, "float32"),
    ):
        if value != default:
            words.append(f"{option} {value}")
    if not problem.pdl:
        words.append("--no-pdl")
    return " ".join(words)


@lru_cache(maxsize=4)
def _toolchain(root: Path) -> Toolchain:
    return toolchain([root])
