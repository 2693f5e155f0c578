"""Runs one call and hands back what lay between its kernels: the permutation and the intermediate.

For people who look for where two results part, and for tests that judge the two GEMMs on their own.
The kernels, plan and cache are those of `moe_nvfp4`; only the workspace is a private one, poisoned
first, so that what a kernel forgets shows: with 0xFF (NaN in every float format, -1 in every
integer), or with random bytes, which also show a forgotten -1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moejit.codegen.plan import MoePlan
from moejit.codegen.problem import MoeProblem
from moejit.codegen.workspace import ALIGNMENT, padded_k, workspace_layout
from moejit.runtime import dispatcher
from moejit.runtime.backends import Call, backend_for
from moejit.runtime.checks import check_arguments
from moejit.runtime.layouts import unpack_fp4, unswizzle_scales
from moejit.runtime.quantize import decode_e2m1, decode_e4m3
from moejit.runtime.reference import Intermediate

__all__ = ["Differences", "LayerTrace", "intermediate_differences", "trace_layer"]

_E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


@dataclass(frozen=True)
class LayerTrace:
    """What one call left behind.

    Attributes:
        problem: what was asked; plan: how it was done.
        output: [T, H], the result.
        slot_row: [T, top_k] int64, permuted row of each slot; -1 for slots that are not local.
        tiles: token tiles in use.
        values: [T, top_k, I] fp32, the intermediate as GEMM2 sees it (code times block scale); zero
            for slots that are not local.
    """

    problem: MoeProblem
    plan: MoePlan
    output: torch.Tensor
    slot_row: torch.Tensor
    tiles: int
    values: torch.Tensor


@dataclass(frozen=True)
class Differences:
    """Where a traced intermediate departs from the reference's.

    Attributes:
        scales: blocks of 16 whose scale factor differs.
        codes: elements that differ in blocks with equal scale factors.
        elements: elements compared.
        scale_gap: largest distance of such a scale factor, before rounding, from the midpoint
            between two e4m3 numbers, relative to it.
        code_gap: largest distance of such an element, before rounding and in units of its scale
            factor (so that 6 is the largest code), from the midpoint between two e2m1 numbers.
    """

    scales: int
    codes: int
    elements: int
    scale_gap: float
    code_gap: float


def trace_layer(*, random_poison: bool = False, **arguments: Any) -> LayerTrace:
    """Run `moe_nvfp4` with these keyword arguments, on a GPU, in a private poisoned workspace.

    Args:
        random_poison: fill the workspace with random bytes instead of 0xFF.
        arguments: as `moe_nvfp4`.

    Raises:
        As `moe_nvfp4`.
    """
    checked = check_arguments(**arguments)
    x, ids = arguments["x"], arguments["token_selected_experts"]
    output_dtype = arguments.get("output_dtype", torch.bfloat16)
    call = Call(
        device=x.device,
        tokens=checked.tokens,
        hidden=checked.hidden,
        intermediate=checked.intermediate,
        top_k=arguments["top_k"],
        num_experts=arguments["num_experts"],
        num_local_experts=checked.num_local_experts,
        local_expert_offset=arguments.get("local_expert_offset", 0),
        ids_dtype=ids.dtype,
        scales_dtype=arguments["token_final_scales"].dtype,
        output_dtype=output_dtype,
        deterministic=not arguments.get("use_fused_finalize", True),
        pdl=arguments.get("enable_pdl", True),
        extents=None,
    )
    active = dispatcher.active()
    backend = backend_for(x.device, active.settings)
    arch = active.settings.arch or _arch(backend.capability)
    problem = call.problem(arch)
    layer = active.layer(problem, backend)

    tokens, experts = call.tokens, call.num_local_experts
    layout = workspace_layout(problem, layer.plan)
    size = layout.bytes(tokens, experts)
    buffer = torch.full((size + ALIGNMENT,), 0xFF, dtype=torch.uint8, device=x.device)
    if random_poison:
        buffer.random_(0, 256)
    start = -buffer.data_ptr() % ALIGNMENT
    workspace = buffer[start : start + size]
    output = torch.full((tokens, call.hidden), float("nan"), dtype=output_dtype, device=x.device)
    inputs = (
        "x",
        "x_sf",
        "token_selected_experts",
        "token_final_scales",
        "w1_weight",
        "w1_weight_sf",
        "w1_alpha",
        "fc2_input_scale",
        "w2_weight",
        "w2_weight_sf",
        "w2_alpha",
    )
    sms = torch.cuda.get_device_properties(x.device).multi_processor_count
    layer.function(
        output,
        *(arguments[name].data_ptr() for name in inputs),
        workspace.data_ptr(),
        tokens,
        experts,
        call.local_expert_offset,
        sms,
    )
    torch.cuda.synchronize(x.device)

    offsets = layout.offsets(tokens, experts)
    top_k, inter = call.top_k, call.intermediate
    slots = tokens * top_k
    rows = layer.plan.max_tiles(tokens, top_k, experts) * layer.plan.token_tile

    def section(name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        begin = offsets[name]
        return workspace[begin : begin + count * dtype.itemsize].view(dtype)

    slot_row = section("slot_row", slots, torch.int32).long()
    if layer.plan.family == "sm90":
        columns = padded_k(inter)
        act = section("act", rows * columns, torch.bfloat16).view(rows, columns)
        by_row = _natural_order(act)[:, :inter].float()
    else:
        packed = section("act", rows * inter // 2, torch.uint8).view(rows, inter // 2)
        scales = unswizzle_scales(section("act_sf", rows * inter // 16, torch.uint8), rows, inter)
        codes = decode_e2m1(unpack_fp4(packed))
        by_row = codes * decode_e4m3(scales).repeat_interleave(16, dim=-1)
    local = slot_row >= 0
    values = torch.zeros((slots, inter), dtype=torch.float32, device=x.device)
    values[local] = by_row[slot_row[local]]
    return LayerTrace(
        problem=problem,
        plan=layer.plan,
        output=output,
        slot_row=slot_row.view(tokens, top_k),
        tiles=int(section("num_tiles", 1, torch.int32)),
        values=values.view(tokens, top_k, inter),
    )


def intermediate_differences(
    traced: LayerTrace, reference: Intermediate, fc2_input_scale: torch.Tensor
) -> Differences:
    """How a traced intermediate differs from the reference's, and how near those were to a tie.

    A kernel adds products in another order than the reference, so a value next to a rounding
    boundary may fall to its other side. Anything further away is a fault.

    Args:
        traced: from `trace_layer`.
        reference: from `moe_reference(..., accumulate=torch.float64, return_intermediate=True)`.
        fc2_input_scale: as in the call.
    """
    inter = traced.values.shape[-1]
    blocks = (-1, inter // 16, 16)
    theirs = decode_e4m3(reference.sf).reshape(-1, inter // 16)  # (slots, I / 16)
    codes = decode_e2m1(unpack_fp4(reference.packed)).reshape(blocks)
    wanted = codes * theirs.unsqueeze(-1)
    found = traced.values.reshape(blocks)
    y = reference.y.reshape(blocks)
    differs = found != wanted
    encode = fc2_input_scale.double()
    with_difference = differs.any(dim=-1).nonzero()  # (n, 2): slot, block
    slot, block = with_difference.unbind(-1)
    y, found, scale = y[slot, block].double(), found[slot, block], theirs[slot, block].double()
    # Equal scale factors: what was found is a code of the reference's grid in every element.
    quotient = found.double() / scale.unsqueeze(-1)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64, device=y.device)
    same_scale = (quotient.abs().unsqueeze(-1) == grid).any(-1).all(-1)

    midpoints = torch.tensor(_E2M1_MIDPOINTS, dtype=torch.float64, device=y.device)
    exact = (y * encode / scale.unsqueeze(-1)).abs()
    gap = (exact.unsqueeze(-1) - midpoints).abs().amin(-1)
    flipped = differs[slot, block] & same_scale.unsqueeze(-1)
    code_gap = float(gap[flipped].max()) if bool(flipped.any()) else 0.0

    raw = y.abs().amax(-1) / 6 * encode  # scale factor before rounding
    table = decode_e4m3(torch.arange(0x7F, dtype=torch.uint8, device=y.device)).double()
    between = (table[1:] + table[:-1]) / 2
    scale_gaps = ((raw.unsqueeze(-1) - between).abs() / between).amin(-1)[~same_scale]
    return Differences(
        scales=int((~same_scale).sum()),
        codes=int(flipped.sum()),
        elements=int((traced.slot_row >= 0).sum()) * inter,
        scale_gap=float(scale_gaps.max()) if scale_gaps.numel() else 0.0,
        code_gap=code_gap,
    )


def _natural_order(act: torch.Tensor) -> torch.Tensor:
    """(rows, K) in the operand order of the SM90 GEMMs -> elements in order along K.

    Element 32c + 8i + p of a K128 block lies at position (4i + p % 4) * 8 + 2c + p // 4 of it.
    """
    element = torch.arange(128, device=act.device)
    run, word, p = element // 32, element // 8 % 4, element % 8
    position = (4 * word + p % 4) * 8 + 2 * run + p // 4
    rows, columns = act.shape
    return act.view(rows, columns // 128, 128)[:, :, position].reshape(rows, columns)


def _arch(capability: tuple[int, int] | None) -> str:
    from moejit.codegen.arch import arch_for_capability
    from moejit.runtime.errors import BackendUnavailable

    if capability is None:
        raise BackendUnavailable("trace", "a trace needs a GPU", "Pass CUDA tensors.")
    return arch_for_capability(capability)
