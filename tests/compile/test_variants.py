"""Every plan there is, for every architecture, compiles here without a GPU and spills nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from moejit.codegen import ARCHS, MoePlan, MoeProblem, candidates, render, why_not
from moejit.runtime.compiler import compile_layer

QWEN3_30B = {"hidden": 2048, "intermediate": 768, "top_k": 8, "num_experts": 128}


def problem(arch: str, **changes: object) -> MoeProblem:
    facts = {"arch": arch, **QWEN3_30B, "num_local_experts": 128, "tokens": 64, **changes}
    return MoeProblem(**facts)  # type: ignore[arg-type]


def every_plan() -> list[object]:
    found = []
    for arch in ARCHS:
        for deterministic in (False, True):
            asked = problem(arch, deterministic=deterministic)
            kind = "deterministic" if deterministic else "fused"
            for plan in candidates(asked):
                found.append(pytest.param(asked, plan, id=f"{arch}-{plan.name}-{kind}"))
    return found


def assert_compiles(asked: MoeProblem, plan: MoePlan, folder: Path) -> None:
    report = compile_layer(render(asked, plan), asked.arch, folder)
    assert report.arch == asked.arch
    assert [k.name for k in report.kernels if k.stack_bytes] == []
    kernels = 3 if plan.finalize.inline else 4
    assert len(report.kernels) == kernels
    assert all(0 < k.registers <= 255 for k in report.kernels)
    # 0.3 to 1.1 s a kernel were measured; the rule is 2 s
    assert report.seconds < 2.0 * kernels


@pytest.mark.parametrize(("asked", "plan"), every_plan())
def test_plan_compiles_without_spills(asked: MoeProblem, plan: MoePlan, tmp_path: Path) -> None:
    assert_compiles(asked, plan, tmp_path)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"hidden": 2880, "intermediate": 2880, "top_k": 4}, id="gpt-oss"),
        pytest.param({"hidden": 7168, "intermediate": 2048}, id="deepseek-r1"),
        pytest.param({"hidden": 4096, "intermediate": 14336, "top_k": 2}, id="mixtral-8x7b"),
        pytest.param({"hidden": 4096, "intermediate": 1536}, id="qwen3-235b-a22b"),
        pytest.param({"hidden": 64, "intermediate": 64, "top_k": 1}, id="smallest"),
        pytest.param({"hidden": 320, "intermediate": 192, "top_k": 3}, id="tails"),
        pytest.param({"ids_dtype": "int64", "scales_dtype": "bfloat16"}, id="int64-bf16"),
        pytest.param({"scales_dtype": "float16", "output_dtype": "float16"}, id="fp16"),
        pytest.param({"pdl": False}, id="no-pdl"),
        pytest.param({"top_k": 32, "deterministic": True}, id="top_k-32"),
    ],
)
def test_facts_compile_without_spills(
    arch: str, changes: dict[str, object], tmp_path: Path
) -> None:
    asked = problem(arch, **changes)
    # the plan with the largest accumulators, where registers are scarce
    fitting = [plan for plan in candidates(asked) if not why_not(asked, plan)]
    largest = max(fitting, key=lambda plan: (plan.token_tile, plan.gemm1.stage_bytes))
    assert_compiles(asked, largest, tmp_path)
