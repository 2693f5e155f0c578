"""The order of steps, who builds, what is refused; compiler and loader are stood in for."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import random_problem

from moejit.runtime import build, dispatcher, events, moe_nvfp4
from moejit.runtime.compiler import CompileReport, host_baseline
from moejit.runtime.errors import CaptureWouldCompile, CompileFailed, JitDisabled, LoadFailed
from moejit.runtime.prewarming import prewarm
from moejit.runtime.settings import scope


class Compiles(list[str]):
    """Names of the layers that the stand-in compiled."""

    seconds = 0.0


@pytest.fixture
def compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiles]:
    found = Compiles()

    def compile_layer(source: Any, arch: str, out: Path, options: Any = None) -> CompileReport:
        time.sleep(found.seconds)
        found.append(source.name)
        (out / "kernel.so").write_bytes(b"not a library")
        host = host_baseline()
        return CompileReport(
            arch=arch, kernels=(), host=host, trace_s=0, export_s=0, link_s=0, library_bytes=13
        )

    monkeypatch.setattr(build, "compile_layer", compile_layer)
    monkeypatch.setattr(dispatcher, "open_runtime", lambda name: None)
    monkeypatch.setattr(dispatcher, "load_layer", lambda entry, capability: print)
    folders = {"cache_dir": tmp_path / "cache", "lock_dir": tmp_path / "locks"}
    with scope(backend="null", arch="sm_90a", jit="auto", **folders):
        events.reset()
        yield found


def call(**changes: Any) -> torch.Tensor:
    return moe_nvfp4(**random_problem(**changes))


def test_first_call_compiles_and_later_ones_do_not(compiles: Compiles) -> None:
    arguments = random_problem()
    for _ in range(3):
        moe_nvfp4(**arguments)
    assert len(compiles) == 1
    counted = events.counters()
    assert [counted[kind].count for kind in ("plan", "render", "compile", "load", "launch")] == [
        1,
        1,
        1,
        1,
        1,
    ]


def test_token_counts_of_a_bucket_share_a_plan_and_a_layer(compiles: Compiles) -> None:
    for tokens in (5, 6, 7, 8):
        call(tokens=tokens)
    assert len(compiles) == 1
    assert events.counters()["plan"].count == 1


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": 1},
        {"hidden": 256},
        {"intermediate": 128},
        {"output_dtype": torch.float16},
        {"ids_dtype": torch.int64},
        {"scales_dtype": torch.bfloat16},
    ],
    ids=lambda change: next(iter(change)),
)
def test_compile_time_facts_need_another_layer(compiles: Compiles, change: Any) -> None:
    call()
    call(**change)
    assert len(set(compiles)) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"num_experts": 8},
        {"num_local_experts": 2},
        {"num_local_experts": 2, "local_expert_offset": 2},
    ],
    ids=str,
)
def test_run_time_facts_share_a_layer(compiles: Compiles, change: Any) -> None:
    call()
    call(**change)
    assert len(compiles) == 1


def test_layer_on_disk_is_found_by_a_fresh_dispatcher(compiles: Compiles) -> None:
    call()
    with scope():  # forgets what is loaded
        call()
    assert len(compiles) == 1
    assert events.counters()["hit"].count == 1


@pytest.mark.parametrize("mode", ["off", "error"])
def test_jit_disabled_names_the_layer_and_the_command(compiles: Compiles, mode: str) -> None:
    with scope(jit=mode), pytest.raises(JitDisabled) as caught:
        call(tokens=5)
    text = str(caught.value)
    assert "h128_i64_k2" in text and f"MOEJIT_JIT={mode}" in text
    assert "moejit prewarm --arch sm_90a --hidden 128 --intermediate 64 --top-k 2" in text
    assert compiles == []


def test_jit_disabled_runs_what_is_on_disk(compiles: Compiles) -> None:
    call()
    with scope(jit="error"):
        call()
    assert len(compiles) == 1


def test_prewarm_command_is_understood_by_the_command_line(compiles: Compiles) -> None:
    problem = build_problem(ids_dtype="int64", deterministic=True, pdl=False)
    words = shlex.split(build.prewarm_command(problem))
    assert words[:2] == ["moejit", "prewarm"]
    assert "--no-pdl" in words and words[words.index("--ids-dtype") + 1] == "int64"


def test_capture_refuses_to_compile_or_to_run_first(
    compiles: Compiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    capturing = True
    monkeypatch.setattr("moejit.runtime.backends.NullBackend.capturing", lambda backend: capturing)
    with pytest.raises(CaptureWouldCompile):
        call()
    assert compiles == []
    capturing = False
    arguments = random_problem()
    moe_nvfp4(**arguments)
    capturing = True
    moe_nvfp4(**arguments)  # seen before: no question is asked


def test_failed_compile_is_raised_every_time_and_never_stored(
    compiles: Compiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Any, arch: str, out: Path, options: Any = None) -> CompileReport:
        compiles.append(source.name)
        raise CompileFailed(source.name, arch, "templates/x.j2", 7, "no")

    monkeypatch.setattr(build, "compile_layer", refuse)
    for _ in range(2):
        with pytest.raises(CompileFailed, match=r"templates/x\.j2:7"):
            call()
    assert len(compiles) == 2


def test_threads_that_ask_for_one_layer_build_it_once(compiles: Compiles) -> None:
    compiles.seconds = 0.05
    arguments = [random_problem(tokens=tokens) for tokens in (5, 6, 7, 8)]
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            moe_nvfp4(**arguments[index % 4])
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(compiles) == 1
    assert events.counters()["load"].count == 1


def test_no_tokens_is_an_empty_result_without_a_layer(compiles: Compiles) -> None:
    for _ in range(2):
        assert call(tokens=0).shape == (0, 128)
    assert compiles == []


def test_signature_table_is_bounded(compiles: Compiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "MAX_SIGNATURES", 2)
    for tokens in (5, 6, 7, 8, 5):
        call(tokens=tokens)
    assert len(dispatcher.active().runners) <= 2
    assert len(compiles) == 1


def test_prewarm_builds_what_a_call_needs(compiles: Compiles) -> None:
    problem = build_problem()
    report = prewarm([problem, problem], jobs=1)
    assert report.ok and [o.state for o in report.outcomes] == ["built"]
    assert [o.state for o in prewarm([problem], jobs=1).outcomes] == ["warm"]
    with scope(jit="error"):
        call()
    assert len(compiles) == 1


def test_prewarm_collects_failures_and_goes_on(
    compiles: Compiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = build.compile_layer

    def sometimes(source: Any, arch: str, out: Path, options: Any = None) -> CompileReport:
        if "h256" in source.name:
            raise CompileFailed(source.name, arch, text="no")
        return real(source, arch, out, options)

    monkeypatch.setattr(build, "compile_layer", sometimes)
    seen: list[str] = []
    problems = [build_problem(hidden=256), build_problem()]
    report = prewarm(problems, jobs=1, on_compile=lambda outcome: seen.append(outcome.state))
    assert seen == ["failed", "built"]
    assert not report.ok
    assert isinstance(report.failed[0].error, CompileFailed)


def test_token_bucket() -> None:
    buckets = [build.token_bucket(tokens, 8) for tokens in (0, 1, 2, 3, 64, 65)]
    assert buckets == [1, 1, 2, 4, 64, 128]
    assert build.token_bucket(2**28 - 2**18, 8) == 2**28 - 2**18


def test_load_failure_is_raised(compiles: Compiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(entry: Any, capability: Any) -> None:
        raise LoadFailed(entry.path.name, "no")

    monkeypatch.setattr(dispatcher, "load_layer", refuse)
    with pytest.raises(LoadFailed):
        call()


def build_problem(**changes: Any) -> Any:
    from moejit.codegen.problem import MoeProblem

    fields: dict[str, Any] = {
        "arch": "sm_90a",
        "hidden": 128,
        "intermediate": 64,
        "top_k": 2,
        "num_experts": 4,
        "num_local_experts": 4,
        "tokens": 5,
    }
    return MoeProblem(**{**fields, **changes})
