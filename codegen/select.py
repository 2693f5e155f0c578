"""Which plan runs a problem: candidates, why a variant does not fit, and a simple cost model.

`why_not` is the only statement of validity: selection, prewarm, `inspect --why` and the tests ask
it. The cost model counts padded token tiles and pipeline steps: fitted to measured layers on an
H200, derived from datasheets for SM100.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from .arch import arch_spec
from .errors import NoVariantFits
from .layouts import ceil_div
from .plan import FinalizeVariant, MoePlan, RouteVariant, Sm90Gemm, Sm100Gemm
from .problem import MoeProblem
from .workspace import padded_k

__all__ = ["Candidate", "candidates", "explain", "select", "why_not"]

# wgmma N that the SM90 templates are compiled for.
SM90_TOKEN_TILES = (8, 16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One plan with the verdict on it.

    Attributes:
        cost_us: modelled microseconds of the layer, None where the plan does not fit.
        reasons: why it does not fit; empty where it does.
    """

    plan: MoePlan
    cost_us: float | None
    reasons: tuple[str, ...]


def candidates(problem: MoeProblem) -> list[MoePlan]:
    """Every plan there is for the problem's architecture, fitting or not."""
    spec = arch_spec(problem.arch)
    if spec.family == "sm90":
        smallest = _sm90_plan(SM90_TOKEN_TILES[0], inline_finalize=True)
        return [*(_sm90_plan(tile) for tile in SM90_TOKEN_TILES), smallest]
    return [_sm100_plan(tile_n) for tile_n in (128, 256)]


def why_not(problem: MoeProblem, plan: MoePlan) -> list[str]:
    """Every reason ``plan`` cannot run ``problem``; empty means that it can."""
    spec = arch_spec(problem.arch)
    reasons = []
    if plan.family != spec.family:
        reasons.append(f"its kernels are for {plan.family}, the problem asks for {problem.arch}")
    for which, gemm in (("gemm1", plan.gemm1), ("gemm2", plan.gemm2)):
        if gemm.smem_bytes > spec.smem_bytes:
            reasons.append(
                f"{which} needs {gemm.smem_bytes} bytes of shared memory, "
                f"{problem.arch} has {spec.smem_bytes}"
            )
        # SM100's gemm1 keeps half of its stages in gathers, of which two are being consumed
        least = 3 if isinstance(gemm, Sm100Gemm) and which == "gemm1" else 2
        if gemm.stages < least:
            reasons.append(
                f"{which} has {gemm.stages} of at least {least} stages: "
                "loads would not overlap the MMA"
            )
    if isinstance(plan.gemm1, Sm90Gemm):
        chunks = problem.tokens * padded_k(problem.hidden) // 8
        if chunks >= 2**31:
            reasons.append(
                f"gemm1 counts the 16-byte chunks of x in 32 bits: {problem.tokens} tokens have "
                f"{chunks}, at most {2**31 - 1} fit; split the call"
            )
        if plan.token_tile == 128 and problem.hidden <= plan.gemm1.k_tile:
            reasons.append(
                f"gemm1 has one step along K={problem.hidden}: without a loop around it the "
                "compiler spills registers at 128 token rows"
            )
    return reasons


def select(problem: MoeProblem) -> MoePlan:
    """The fitting plan with the lowest modelled cost.

    Raises:
        NoVariantFits: no plan can run the problem; lists every plan with its reasons.
    """
    verdicts = explain(problem)
    if verdicts[0].cost_us is None:
        raise NoVariantFits(str(problem), {c.plan.name: c.reasons for c in verdicts})
    return verdicts[0].plan


def explain(problem: MoeProblem) -> list[Candidate]:
    """Every candidate, cheapest first (the one that `select` takes), those that do not fit last."""
    found = []
    for plan in candidates(problem):
        reasons = tuple(why_not(problem, plan))
        cost = None if reasons else _cost_us(problem, plan)
        found.append(Candidate(plan=plan, cost_us=cost, reasons=reasons))
    # Candidates come smallest first, and sorting is stable: on a tie the smaller tile wins.
    return sorted(found, key=lambda c: math.inf if c.cost_us is None else c.cost_us)


def _sm90_plan(token_tile: int, *, inline_finalize: bool = False) -> MoePlan:
    # As many stages as fit, at most 8: more than 8 x 128 of K in flight buys nothing.
    none = Sm90Gemm(token_tile=token_tile, stages=0)
    stages = min(8, (arch_spec("sm_90a").smem_bytes - none.smem_bytes) // none.stage_bytes)
    gemm = Sm90Gemm(token_tile=token_tile, stages=stages)
    return MoePlan(
        family="sm90",
        token_tile=token_tile,
        route=RouteVariant(token_tile=token_tile, decode_x=True),
        gemm1=gemm,
        gemm2=gemm,
        finalize=FinalizeVariant(inline=inline_finalize),
    )


def _sm100_plan(tile_n: int) -> MoePlan:
    # As many stages as fit beside the output slices (docs/notes/sm100-kernels.md).
    narrow = tile_n == 128
    gemm1 = Sm100Gemm(tile_n=tile_n, stages=6 if narrow else 4)
    gemm2 = Sm100Gemm(tile_n=tile_n, stages=4 if narrow else 3, out_buffers=2 if narrow else 1)
    return MoePlan(
        family="sm100",
        token_tile=gemm1.tile_m,
        route=RouteVariant(token_tile=gemm1.tile_m, decode_x=False),
        gemm1=gemm1,
        gemm2=gemm2,
        finalize=FinalizeVariant(),
    )


@dataclass(frozen=True, kw_only=True)
class _Device:
    """What the cost model knows of a GPU. SM90 figures are fitted, SM100 ones come from datasheets.

    Attributes:
        sms: streaming multiprocessors; one persistent CTA each.
        fixed_us: launches, route and finalize of a layer with one token.
        slot_element_ps: routing, zeroing, adding and rounding one element of one slot's result.
        weight_element_ps: first read of a weight, beyond what the pipeline hides.
    """

    sms: int
    fixed_us: float
    slot_element_ps: float
    weight_element_ps: float


# H200: least squares over 35 measured layers (tests/unit/test_codegen_select.py, all within 5 %).
_H200 = _Device(sms=132, fixed_us=5.6, slot_element_ps=3.53, weight_element_ps=0.039)
# One step of 256 weight rows by 128 of K on one SM: decoding and loading, then wgmma by token row.
_SM90_STEP_US, _SM90_STEP_US_PER_ROW = 0.5525, 0.00955
# Finalize inside gemm2, on an H200: the GPU takes 0 to 0.7 us longer for 8 slots, 2 us for 32, 4
# for 128, as its CTAs end with a round trip to L2; the host saves a launch, 2.7 us, of which a
# caller without a CUDA graph sees some at the smallest layers only: counted as 1.
_INLINE_US, _INLINE_US_PER_SLOT, _LAUNCH_SAVED_US = 0.5, 0.03, 1.0
# B200, B300: modelled. 8 TB/s of memory; 9 and 13.5 PFLOP/s of dense FP4. A result element costs
# what 4 bytes of fp32 addition cost at half the memory's rate.
_B200 = _Device(sms=148, fixed_us=5.6, slot_element_ps=1.0, weight_element_ps=0.0)
_SM100_BYTES_PER_S = 8.0e12
_SM100_FLOPS = {"sm_100a": 9.0e15, "sm_103a": 13.5e15}
_SM100_TILE_US = 1.0  # filling the pipeline and draining the last accumulator of a tile; a guess

# Real routing is uneven: a standard deviation of an expert's rows, as a share of their mean, beyond
# that of a random draw. It keeps the choice from falling back to a smaller tile where the mean is
# just above a multiple of the larger one.
_SKEW = 0.2


def _cost_us(problem: MoeProblem, plan: MoePlan) -> float:
    """Modelled time of a layer, microseconds. Good for ranking plans; its terms add up."""
    device = _H200 if plan.family == "sm90" else _B200
    hit, tiles_each = _expected_tiles(problem, plan.token_tile)
    hit_experts = problem.num_local_experts * hit
    tiles = problem.num_local_experts * tiles_each
    local_share = problem.num_local_experts / problem.num_experts
    slot_elements = problem.tokens * problem.top_k * local_share * problem.hidden
    total = device.fixed_us + slot_elements * device.slot_element_ps * 1e-6
    if plan.finalize.inline:
        slots = problem.tokens * problem.top_k * local_share
        total += _INLINE_US + _INLINE_US_PER_SLOT * slots - _LAUNCH_SAVED_US
    for gemm, weight_rows, k in (
        (plan.gemm1, 2 * problem.intermediate, problem.hidden),
        (plan.gemm2, problem.hidden, problem.intermediate),
    ):
        if isinstance(gemm, Sm90Gemm):
            row_blocks = ceil_div(weight_rows, gemm.row_tile)
            step_us = _SM90_STEP_US + _SM90_STEP_US_PER_ROW * gemm.token_tile
            tile_us = ceil_div(k, gemm.k_tile) * step_us
        else:
            row_blocks = ceil_div(weight_rows, gemm.tile_n)
            mma_s = 2.0 * gemm.tile_m * gemm.tile_n * gemm.tile_k / _SM100_FLOPS[problem.arch]
            load_s = gemm.stage_bytes / _SM100_BYTES_PER_S
            step_us = max(mma_s, load_s) * device.sms * 1e6
            tile_us = ceil_div(k, gemm.tile_k) * step_us + _SM100_TILE_US
        # Fewer tiles than SMs still take one tile's time; more are spread evenly. None take none.
        waves = max(min(1.0, tiles), tiles * row_blocks / device.sms)
        total += waves * tile_us
        total += hit_experts * weight_rows * k * device.weight_element_ps * 1e-6
    return total


def _expected_tiles(problem: MoeProblem, token_tile: int) -> tuple[float, float]:
    """Share of experts with any row, and mean token tiles of an expert, for random routing.

    An expert with c rows needs ceil(c / token_tile) tiles, which is the number of j >= 0 with
    c > j * token_tile: the first chance is exact, the others take c as normal.
    """
    share = min(1.0, problem.top_k / problem.num_experts)
    hit = 1.0 - (1.0 - share) ** problem.tokens
    mean = problem.rows_per_expert
    deviation = math.sqrt(mean * (1.0 - share) + (_SKEW * mean) ** 2)
    if deviation >= token_tile:  # the last tile is as likely to hold any number of rows
        return hit, mean / token_tile + 0.5 - 0.5 / token_tile
    tiles, j, chance = hit, 1, 1.0
    while deviation > 0.0 and chance > 1e-6:
        chance = 1.0 - NormalDist(mean, deviation).cdf(j * token_tile + 0.5)
        tiles += chance
        j += 1
    return hit, tiles
