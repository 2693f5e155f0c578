"""From a compiled layer on disk to a function, with and without the compiler in the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layers import toy_layer
from problems import random_problem

from moejit.cache.entry import Entry
from moejit.codegen import MoeProblem
from moejit.runtime import moe_nvfp4
from moejit.runtime.build import build_entry, layer_key, open_store
from moejit.runtime.errors import LoadFailed
from moejit.runtime.loader import find_runtime, load_layer, open_runtime
from moejit.runtime.prewarming import prewarm
from moejit.runtime.settings import Settings, scope

HERE = Path(__file__).parent


@pytest.fixture
def entry(private_settings: Settings) -> Entry:
    source = toy_layer()
    return build_entry(open_store(private_settings), layer_key(source), source)


def test_function_checks_its_arguments(entry: Entry) -> None:
    """The real host code runs as far as it gets without a device: it refuses a CPU tensor."""
    function = load_layer(entry)
    out = torch.zeros(4, 128, dtype=torch.bfloat16)
    with pytest.raises((ValueError, TypeError), match="moe_layer"):
        function(out, *[0] * 16)


def test_manifest_says_what_was_compiled(entry: Entry) -> None:
    report = entry.manifest.report
    assert [kernel["name"] for kernel in report["kernels"]] == [
        "moejit_toy_first_0",
        "moejit_toy_second_1",
    ]
    assert report["arch"] == "sm_90a"
    assert entry.manifest.min_driver == "545"
    assert entry.manifest.created["trace_s"] > 0


@pytest.mark.parametrize("capability", [(8, 0), (10, 0), (12, 0)])
def test_layer_for_another_device_is_refused(entry: Entry, capability: tuple[int, int]) -> None:
    with pytest.raises(LoadFailed, match=r"built for sm_90a.*capability"):
        load_layer(entry, capability)
    assert load_layer(entry, (9, 0)) is not None


@pytest.mark.parametrize(
    "host", [{"machine": "s390x", "cpu": "z15"}, {"machine": "x86_64", "cpu": "native-0123"}]
)
def test_layer_for_another_cpu_is_refused(entry: Entry, host: dict[str, str]) -> None:
    report = {**entry.manifest.report, "host": host}
    foreign = replace(entry, manifest=replace(entry.manifest, report=report))
    with pytest.raises(LoadFailed, match="host code is built for"):
        load_layer(foreign)


def test_missing_library_is_a_load_failure(entry: Entry) -> None:
    files = {n: r for n, r in entry.manifest.files.items() if n != "kernel.so"}
    without = replace(entry, manifest=replace(entry.manifest, files=files))
    with pytest.raises(LoadFailed, match=r"kernel\.so"):
        load_layer(without)


def test_damaged_library_is_compiled_again(private_settings: Settings) -> None:
    """The loader would not notice: the store does."""
    store, source = open_store(private_settings), toy_layer()
    first = build_entry(store, layer_key(source), source)
    library = first.file("kernel.so")
    data = bytearray(library.read_bytes())
    data[len(data) // 2] ^= 1
    library.chmod(0o644)
    library.write_bytes(data)
    assert store.find(layer_key(source)) is None
    again = build_entry(store, layer_key(source), source)
    assert load_layer(again) is not None


def test_runtime_library_is_found_without_importing_the_compiler() -> None:
    code = (
        "import sys; from moejit.runtime.loader import find_runtime; "
        "print(len(find_runtime()), 'cutlass' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_env()
    )
    count, imported = done.stdout.split()
    assert int(count) >= 1 and imported == "False"


def test_runtime_library_is_found_where_wheels_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flavour in ("cu12", "cu13"):
        folder = tmp_path / "nvidia_cutlass_dsl" / flavour / "lib"
        folder.mkdir(parents=True)
        (folder / "libcute_dsl_runtime.so").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for driver, order in ((0, [13, 12]), (13, [13, 12]), (12, [12, 13])):
        monkeypatch.setattr("moejit.runtime.loader._driver_cuda", lambda version=driver: version)
        assert [p.parent.parent.name for p in find_runtime()] == [f"cu{n}" for n in order]


# ---- a warm process ------------------------------------------------------------------------------

WARM = """
import json, sys, time
sys.path[:0] = {path!r}
from problems import random_problem
from moejit.runtime import moe_nvfp4, events
with events.hook(lambda event: seen.append((event.kind, event.seconds))):
    seen = []
    for top_k in (2, 1):
        moe_nvfp4(**random_problem(top_k=top_k))
print(json.dumps({{"cutlass": "cutlass" in sys.modules, "events": seen}}))
"""


def test_warm_process_has_no_compiler_and_loads_in_a_millisecond(
    private_settings: Settings,
) -> None:
    """Prewarmed here; a fresh process then runs the call, in the mode that forbids compiling."""
    shape = {"hidden": 128, "intermediate": 64, "num_experts": 4, "num_local_experts": 4}
    problems = [
        MoeProblem(arch="sm_90a", top_k=top_k, tokens=5, **shape)  # type: ignore[arg-type]
        for top_k in (2, 1)
    ]
    assert prewarm(problems, jobs=1).ok
    path = [str(HERE.parent), str(HERE.parents[1] / "src")]
    done = subprocess.run(
        [sys.executable, "-c", WARM.format(path=path)],
        capture_output=True,
        text=True,
        check=True,
        env=_env(
            MOEJIT_BACKEND="null",
            MOEJIT_ARCH="sm_90a",
            MOEJIT_JIT="error",
            MOEJIT_CACHE_DIR=str(private_settings.cache_dir),
        ),
    )
    found = json.loads(done.stdout)
    assert found["cutlass"] is False
    kinds = [kind for kind, _ in found["events"]]
    assert kinds == ["plan", "render", "hit", "load", "launch"] * 2
    loads = [seconds for kind, seconds in found["events"] if kind == "load"]
    assert min(loads) <= 1e-3


@pytest.mark.slow
def test_prewarm_in_processes_fills_the_cache() -> None:
    """Three layers, two compile processes, none of them with a GPU; twice is as good as once."""
    shape = {"hidden": 128, "intermediate": 64, "num_experts": 4, "num_local_experts": 4}
    problems = [
        MoeProblem(arch="sm_90a", top_k=top_k, tokens=tokens, **shape)  # type: ignore[arg-type]
        for top_k in (1, 2, 3)
        for tokens in (3, 4)
    ]
    seen: list[str] = []
    report = prewarm(problems, jobs=2, on_compile=lambda outcome: seen.append(outcome.state))
    assert report.ok, [str(o.error) for o in report.failed]
    assert seen == ["built"] * 3
    assert len(prewarm(problems, jobs=2).warm) == 3
    with scope(jit="error"):
        moe_nvfp4(**random_problem(tokens=4, top_k=3))


def test_opening_the_runtime_twice_is_nothing() -> None:
    open_runtime()
    open_runtime()


def _env(**changes: str) -> dict[str, str]:
    source = str(HERE.parents[1] / "src")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MOEJIT_")}
    path = os.pathsep.join(filter(None, [source, kept.get("PYTHONPATH", "")]))
    return {**kept, "PYTHONPATH": path, **changes}
