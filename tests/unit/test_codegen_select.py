"""Which plan is chosen, why others are not, and how good the cost model is."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest

from moejit.codegen import (
    ARCHS,
    MoePlan,
    MoeProblem,
    NoVariantFits,
    arch_spec,
    candidates,
    explain,
    select,
    why_not,
)
from moejit.codegen.plan import Sm90Gemm

# `moejit.codegen.select` is the function of that name.
MODULE = sys.modules["moejit.codegen.select"]

Q30 = {"hidden": 2048, "intermediate": 768, "num_experts": 128, "top_k": 8}
R1 = {"hidden": 7168, "intermediate": 2048, "num_experts": 256, "top_k": 8}
MIXTRAL = {"hidden": 4096, "intermediate": 14336, "num_experts": 8, "top_k": 2}
GPT_OSS = {"hidden": 2880, "intermediate": 2880, "num_experts": 128, "top_k": 4}
SHAPES = [
    pytest.param(Q30, id="Q30"),
    pytest.param(R1, id="R1"),
    pytest.param(MIXTRAL, id="Mixtral"),
    pytest.param(GPT_OSS, id="gpt-oss"),
]

# Measured on an H200, 2026-11-22: microseconds a layer of Q30, fused finalize, uniform random
# routing, by token tile.
MEASURED_TILES = (8, 16, 32, 64, 128)
MEASURED_US = {
    1: (21.1, 22.9, 25.6, 32.2, 45.9),
    16: (80, 88, 100, 127, 186),
    64: (117, 129, 147, 189, 279),
    256: (260, 189, 159, 200, 290),
    1024: (833, 533, 384, 333, 341),
    2048: (1589, 993, 667, 539, 525),
    8192: (6179, 3725, 2436, 1843, 1692),
}


def problem_of(
    shape: dict[str, int], tokens: int, arch: str = "sm_90a", **other: Any
) -> MoeProblem:
    fields: dict[str, Any] = {"num_local_experts": shape["num_experts"], **shape, **other}
    return MoeProblem(arch=arch, tokens=tokens, **fields)


# ---- plans ---------------------------------------------------------------------------------------


def test_plan_names_are_injective() -> None:
    named: dict[str, MoePlan] = {}
    for arch in ARCHS:
        plans = candidates(problem_of(Q30, 1, arch))
        assert len({plan.name for plan in plans}) == len(plans)
        for plan in plans:
            assert named.setdefault(plan.name, plan) == plan
            assert plan.name.replace("_", "").isalnum()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_candidate_fits(arch: str, shape: dict[str, int]) -> None:
    problem = problem_of(shape, 1, arch)
    for plan in candidates(problem):
        assert why_not(problem, plan) == []
        assert plan.family == arch_spec(arch).family
        assert plan.token_tile == plan.route.token_tile


# ---- why not -------------------------------------------------------------------------------------


def test_why_not_tells_of_shared_memory() -> None:
    problem = problem_of(Q30, 1)
    plan = replace(candidates(problem)[-1], gemm2=Sm90Gemm(token_tile=128, stages=5))
    # (256 / 2 + 256 / 16 + 128 * 2) * 128 bytes a stage, five of them, and 2048
    assert why_not(problem, plan) == [
        "gemm2 needs 258048 bytes of shared memory, sm_90a has 232448"
    ]


def test_why_not_tells_of_a_single_stage() -> None:
    problem = problem_of(Q30, 1)
    plan = replace(candidates(problem)[0], gemm1=Sm90Gemm(token_tile=8, stages=1))
    (reason,) = why_not(problem, plan)
    assert reason == "gemm1 has 1 of at least 2 stages: loads would not overlap the MMA"


def test_why_not_tells_of_the_wrong_family() -> None:
    (plan, _) = candidates(problem_of(Q30, 1, "sm_100a"))
    (reason,) = why_not(problem_of(Q30, 1, "sm_90a"), plan)
    assert "sm100" in reason and "sm_90a" in reason


def test_why_not_gives_every_reason() -> None:
    plan = candidates(problem_of(Q30, 1, "sm_100a"))[0]
    plan = replace(plan, gemm1=replace(plan.gemm1, stages=1), gemm2=replace(plan.gemm2, stages=99))
    reasons = why_not(problem_of(Q30, 1, "sm_90a"), plan)
    assert [reason.split()[0] for reason in reasons] == ["its", "gemm1", "gemm2"]


@pytest.mark.parametrize(
    ("arch", "reason"), [("sm_90a", "gemm1 has 0 of"), ("sm_100a", "gemm1 needs 222208 bytes")]
)
def test_select_gives_the_reasons_when_nothing_fits(
    arch: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHS, arch, replace(arch_spec(arch), smem_bytes=16 * 1024))
    problem = problem_of(Q30, 1, arch)
    with pytest.raises(NoVariantFits) as caught:
        select(problem)
    plans = candidates(problem)
    assert set(caught.value.rejections) == {plan.name for plan in plans}
    for plan in plans:
        assert caught.value.rejections[plan.name] == tuple(why_not(problem, plan))
        assert f"{plan.name}: {why_not(problem, plan)[0]}" in str(caught.value)
    assert reason in str(caught.value)
    assert "hidden=2048" in caught.value.problem


# ---- the choice ----------------------------------------------------------------------------------


def test_explain_puts_the_choice_first_and_misfits_last(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(Q30, 300)
    plans = candidates(problem)
    bad = replace(plans[0], gemm1=Sm90Gemm(token_tile=8, stages=99))
    monkeypatch.setattr(MODULE, "candidates", lambda _: [bad, *plans[1:]])
    found = explain(problem)
    assert found[0].plan == select(problem)
    assert found[-1].plan == bad and found[-1].cost_us is None and found[-1].reasons
    costs = [c.cost_us for c in found[:-1]]
    assert costs == sorted(c for c in costs if c is not None)
    assert not any(c.reasons for c in found[:-1])


@pytest.mark.parametrize("tokens", MEASURED_US)
def test_choice_is_the_measured_best(tokens: int) -> None:
    """Within 3 % of it; measured (H200, 2026-11-22)."""
    measured = dict(zip(MEASURED_TILES, MEASURED_US[tokens], strict=True))
    chosen = select(problem_of(Q30, tokens)).token_tile
    assert measured[chosen] <= 1.03 * min(measured.values())


@pytest.mark.parametrize("tokens", MEASURED_US)
def test_model_is_close_to_the_measurement(tokens: int) -> None:
    measured = dict(zip(MEASURED_TILES, MEASURED_US[tokens], strict=True))
    for candidate in explain(problem_of(Q30, tokens)):
        if candidate.plan.finalize.inline:
            continue
        assert candidate.cost_us == pytest.approx(measured[candidate.plan.token_tile], rel=0.05)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_grow_with_tokens(arch: str, shape: dict[str, int]) -> None:
    def size(plan: MoePlan) -> int:
        gemm = plan.gemm1
        return gemm.token_tile if isinstance(gemm, Sm90Gemm) else gemm.tile_n

    tokens = [*range(0, 64), *range(64, 1024, 16), *range(1024, 8193, 128), 2**14, 2**18, 2**20]
    sizes = [size(select(problem_of(shape, t, arch))) for t in tokens]
    assert sizes == sorted(sizes)
    smallest, largest = (8, 128) if arch == "sm_90a" else (128, 256)
    assert (sizes[0], sizes[-1]) == (smallest, largest)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_cost_grows_with_tokens_and_is_finite(arch: str, shape: dict[str, int]) -> None:
    before: dict[str, float] = {}
    for tokens in (0, 1, 2, 7, 64, 100, 1000, 4096, 10**6):
        for candidate in explain(problem_of(shape, tokens, arch)):
            assert candidate.cost_us is not None
            assert 0.0 < before.get(candidate.plan.name, 0.1) <= candidate.cost_us < 1e9
            before[candidate.plan.name] = candidate.cost_us


def test_expert_parallelism_costs_less_and_keeps_the_tile() -> None:
    """Rows per expert decide the tile, however many experts are here."""
    whole = explain(problem_of(Q30, 1024))[0]
    part = explain(problem_of(Q30, 1024, num_local_experts=16))[0]
    assert part.plan == whole.plan
    assert part.cost_us is not None and whole.cost_us is not None
    assert part.cost_us < whole.cost_us / 3


def test_more_slots_than_experts_can_be_asked_for() -> None:
    shape = {"hidden": 256, "intermediate": 256, "num_experts": 4, "top_k": 8}
    assert select(problem_of(shape, 3)).token_tile == 8


# us a layer with gemm2 finishing the tokens itself, less the same with a finalize kernel. Measured:
# H200, 2026-11-22, Q30, token tile 8, fused; the host time is 2.7 us less at every token count.
INLINE_COSTS_US = {1: 0.7, 4: 1.6, 16: 4.0, 64: 8.7}


@pytest.mark.parametrize("tokens", INLINE_COSTS_US)
def test_finalize_inside_gemm2_is_taken_only_where_it_costs_less_than_a_launch(tokens: int) -> None:
    verdicts = {c.plan.name: c for c in explain(problem_of(Q30, tokens))}
    inline = next(c for c in verdicts.values() if c.plan.finalize.inline)
    other = verdicts[inline.plan.name.removesuffix("_fin")]
    assert inline.cost_us is not None
    assert other.cost_us is not None
    assert (inline.cost_us < other.cost_us) == (INLINE_COSTS_US[tokens] < 1.0)


def test_more_tokens_than_the_gather_can_count_are_refused() -> None:
    shape = {"hidden": 7168, "intermediate": 2048, "top_k": 8, "num_experts": 256}
    most = 2**31 * 8 // 7168
    assert select(problem_of(shape, most)).token_tile == 128
    with pytest.raises(NoVariantFits, match="16-byte chunks of x"):
        select(problem_of(shape, most + 1))
