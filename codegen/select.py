"""Which plan runs a problem: candidates, why a variant does not fit, and a simple cost model.

`why_not` is the only statement of validity: selection, prewarm, `inspect --why` and the tests ask it.
The cost model is first order (bytes and tensor-core work of padded tiles, waves of CTAs); measured
tables come with the tuner.
"""

from __future__ import annotations

from dataclasses import dataclass

from .arch import arch_spec
from .errors import NoVariantFits
from .plan import FinalizeVariant, MoePlan, RouteVariant, Sm90Gemm, Sm100Gemm
from .problem import MoeProblem

__all__ = ["Candidate", "candidates", "explain", "select", "why_not"]

# Barriers, tile bookkeeping and alignment slack beside the pipeline stages, bytes.
SM90_SMEM_RESERVE = 2048
# wgmma N that the SM90 templates are compiled for.
SM90_TOKEN_TILES = (8, 16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One plan with the verdict on it.

    Attributes:
        cost_us: modelled microseconds of both GEMMs, None where the plan does not fit.
        reasons: why it does not fit; empty where it does.
    """

    plan: MoePlan
    cost_us: float | None
    reasons: tuple[str, ...]


def candidates(problem: MoeProblem) -> list[MoePlan]:
    """Every plan there is for the problem's architecture, fitting or not."""
    spec = arch_spec(problem.arch)
    if spec.family == "sm90":
        return [_sm90_plan(tile) for tile in SM90_TOKEN_TILES]
    return [_sm100_plan(tile_n) for tile_n in (128, 256)]


def why_not(problem: MoeProblem, plan: MoePlan) -> list[str]:
    """Every reason ``plan`` cannot run ``problem``; empty means that it can."""
    spec = arch_spec(problem.arch)
    reasons = []
    if plan.family != spec.family:
        reasons.append(f"its kernels are for {plan.family}, the problem asks for {problem.arch}")
    for which, gemm in (("gemm1", plan.gemm1), ("gemm2", plan.gemm2)):
        smem = gemm.stages * gemm.stage_bytes
        if isinstance(gemm, Sm90Gemm):
            smem += SM90_SMEM_RESERVE
        if smem > spec.smem_bytes:
            reasons.append(
                f"{which} needs {smem} bytes of shared memory, {problem.arch} has {spec.smem_bytes}"
            )
        if gemm.stages < 2:
            reasons.append(f"{which} has {gemm.stages} stage: loads would not overlap the MMA")
    return reasons


def select(problem: MoeProblem) -> MoePlan:
    """The fitting plan with the lowest modelled cost.

    Raises:
        NoVariantFits: no plan can run the problem; lists every plan with its reasons.
    """
    verdicts = explain(problem)
    fitting = [c for c in verdicts if c.cost_us is not None]
    if not fitting:
        raise NoVariantFits(str(problem), {c.plan.name: c.reasons for c in verdicts})
    return min(fitting, key=lambda c: (c.cost_us, c.plan.name)).plan


def explain(problem: MoeProblem) -> list[Candidate]:
    """Every candidate with its modelled cost or with the reasons against it."""
    found = []
    for plan in candidates(problem):
        reasons = tuple(why_not(problem, plan))
        cost = None if reasons else _cost_us(problem, plan)
        found.append(Candidate(plan=plan, cost_us=cost, reasons=reasons))
    return found


def _sm90_plan(token_tile: int) -> MoePlan:
    # As many stages as fit, at most 8: more than 8 x 128 of K in flight buys nothing (sm90 notes §4).
    stage = Sm90Gemm(token_tile=token_tile, stages=1).stage_bytes
    stages = min(8, (arch_spec("sm_90a").smem_bytes - SM90_SMEM_RESERVE) // stage)
    gemm = Sm90Gemm(token_tile=token_tile, stages=stages)
    return MoePlan(
        family="sm90",
        token_tile=token_tile,
        route=RouteVariant(token_tile=token_tile, decode_x=True),
        gemm1=gemm,
        gemm2=gemm,
        finalize=FinalizeVariant(),
    )


def _sm100_plan(tile_n: int) -> MoePlan:
    stages = 5 if tile_n == 128 else 3
    gemm = Sm100Gemm(tile_n=tile_n, stages=stages)
    return MoePlan(
        family="sm100",
        token_tile=gemm.tile_m,
        route=RouteVariant(token_tile=gemm.tile_m, decode_x=False),
        gemm1=gemm,
        gemm2=gemm,
        finalize=FinalizeVariant(),
    )


# First-order device constants: SMs, sustained bytes/s, tensor operations/s. Sources: measured on an H200
# (4.3 TB/s copy, 790 TFLOP/s bf16); B200 and B300 from their datasheets (8 TB/s, 9 and 13.5 PFLOP/s
# dense FP4), labelled modelled wherever a figure derived from them is shown.
_DEVICE = {
    "sm_90a": (132, 4.3e12, 790e12),
    "sm_100a": (148, 8.0e12, 9.0e15),
    "sm_103a": (148, 8.0e12, 13.5e15),
}


def _cost_us(problem: MoeProblem, plan: MoePlan) -> float:
    """Modelled time of both GEMMs: waves of tiles, each bound by its weight bytes or its MMA work."""
    sms, bytes_per_s, flops_per_s = _DEVICE[problem.arch]
    rows = problem.rows_per_expert
    local = problem.num_local_experts
    # experts that get at least one row, and token tiles of each, under uniform routing
    hit = local * (1.0 - (1.0 - problem.top_k / problem.num_experts) ** problem.tokens)
    tiles_each = max(1.0, rows / plan.token_tile + (0.5 if rows > plan.token_tile / 2 else 0.0))
    total = 0.0
    for gemm, weight_rows, k in (
        (plan.gemm1, 2 * problem.intermediate, problem.hidden),
        (plan.gemm2, problem.hidden, problem.intermediate),
    ):
        row_tile = gemm.row_tile if isinstance(gemm, Sm90Gemm) else gemm.tile_n
        tiles = hit * tiles_each * -(-weight_rows // row_tile)
        waves = max(1.0, tiles / sms)
        mma_s = 2.0 * row_tile * plan.token_tile * k / (flops_per_s / sms)
        load_s = (row_tile * 0.5625 + plan.token_tile * 0.5) * k / (bytes_per_s / sms)
        # decoding weights on SM90 costs issue slots: 24 of 64-ish a 16x16 fragment (hopper notes §3)
        decode_s = row_tile * k / 256 * 24 / (4 * 1.7e9) if isinstance(gemm, Sm90Gemm) else 0.0
        total += waves * (max(mma_s, load_s, decode_s) + 1.0e-6)
    return total * 1e6
