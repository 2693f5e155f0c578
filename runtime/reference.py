"""The NVFP4 MoE layer in plain torch: what every kernel of moejit is tested against.

One expert at a time: gather its tokens, multiply, activate, quantize, multiply, scale. No fusion,
no tiling, no clever layout; only the numerics contract, in this order, on CPU or CUDA tensors:

1. x and weights decode exactly: e2m1 * e4m3 (block scales are unsigned, NaN stays NaN).
2. up = acc_up * w1_alpha[e]; gate = acc_gate * w1_alpha[e]; y = up * gate * sigmoid(gate).
3. y is quantized in blocks of 16 with fp32 steps, in this order::

       amax = max |y|                                        NaN wins
       SF8  = e4m3_rn_satfinite((amax * 0.16666667f) * fc2_input_scale)
       s    = min((1 / SF8) * fc2_input_scale, FLT_MAX)      SF8 == 0: s = FLT_MAX
       q    = e2m1_rn_satfinite(y * s)

   The kernels take ``rcp.approx.ftz`` for 1 / SF8, which is within one ulp. Their block scales and
   codes may therefore differ from these only where SF or y * s lies within 2 fp32 ulp of a rounding
   boundary, plus what the order of summation moved y.
4. v = acc * (w2_alpha[e] * routing scale); the top_k terms of a token are added in slot order and
   rounded once to the output dtype. An fp16 output beyond 65504 becomes infinity, as torch's cast.

A slot whose global id is outside [offset, offset + local) contributes nothing; a token without a
local expert is zero; an id that occurs twice in a token counts twice.

With ``accumulate=torch.float64`` steps 1, 2 and 4 run in float64 and y is rounded to fp32 once, so
that the result is that of ideal matrix products; with float32 every step is fp32 (never TF32).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from moejit.codegen.layouts import SF_VEC
from moejit.runtime.checks import check_arguments
from moejit.runtime.errors import BadArgument
from moejit.runtime.layouts import as_bytes, pack_fp4, sf_storage, split_up_gate, unswizzle_scales
from moejit.runtime.quantize import dequantize_nvfp4, e2m1_codes, e4m3_bytes

__all__ = [
    "Comparison",
    "Intermediate",
    "compare",
    "gemm2_from_codes",
    "moe_reference",
    "quantize_intermediate",
    "run_reference",
]

_FLT_MAX = torch.finfo(torch.float32).max
_CHUNK_ELEMENTS = 1 << 28  # of the per-slot results: 1 GiB of fp32 at a time


@dataclass(frozen=True)
class Intermediate:
    """What lies between the two GEMMs, by slot; rows of slots that are not local are zero.

    Attributes:
        y: [T, top_k, I] fp32, after the activation, before quantization.
        packed: [T, top_k, I/2] uint8 FP4 codes, low nibble first.
        sf: [T, top_k, I/16] uint8 e4m3 block scales, linear.
        local: [T, top_k] bool, slots whose expert is on this rank.
    """

    y: torch.Tensor
    packed: torch.Tensor
    sf: torch.Tensor
    local: torch.Tensor


def moe_reference(
    x: torch.Tensor,
    x_sf: torch.Tensor,
    token_selected_experts: torch.Tensor,
    token_final_scales: torch.Tensor,
    w1_weight: torch.Tensor,
    w1_weight_sf: torch.Tensor,
    w1_alpha: torch.Tensor,
    fc2_input_scale: torch.Tensor,
    w2_weight: torch.Tensor,
    w2_weight_sf: torch.Tensor,
    w2_alpha: torch.Tensor,
    num_experts: int,
    top_k: int,
    num_local_experts: int | None = None,
    local_expert_offset: int = 0,
    output_dtype: torch.dtype = torch.bfloat16,
    use_fused_finalize: bool = True,
    moe_output: torch.Tensor | None = None,
    aux_stream: Any = None,
    enable_pdl: bool = True,
    *,
    accumulate: torch.dtype = torch.float32,
    return_intermediate: bool = False,
) -> tuple[torch.Tensor, Intermediate | None]:
    """The layer's result, and on request what lay between the GEMMs.

    Args:
        x: ... enable_pdl: As `moejit.runtime.moe_nvfp4` (see `runtime.checks.check_arguments` for
            shapes); ``use_fused_finalize``, ``aux_stream`` and ``enable_pdl`` change nothing here.
        accumulate: float32 or float64; see the module's text.
        return_intermediate: Also return an `Intermediate` (it holds [T, top_k, I] fp32).

    Returns:
        (output, intermediate): [T, H] of ``output_dtype``, ``moe_output`` itself when given; and
        None unless asked for.

    Raises:
        BadArgument: like `moe_nvfp4`.
    """
    call = check_arguments(
        x,
        x_sf,
        token_selected_experts,
        token_final_scales,
        w1_weight,
        w1_weight_sf,
        w1_alpha,
        fc2_input_scale,
        w2_weight,
        w2_weight_sf,
        w2_alpha,
        num_experts,
        top_k,
        num_local_experts,
        local_expert_offset,
        output_dtype,
        use_fused_finalize,
        moe_output,
        aux_stream,
        enable_pdl,
    )
    hidden, inter, experts = call.hidden, call.intermediate, call.num_local_experts
    x, x_sf = as_bytes(x), as_bytes(x_sf).view(call.tokens, hidden // SF_VEC)
    w1_sf = sf_storage(as_bytes(w1_weight_sf), 2 * inter, hidden, experts)
    output = moe_output
    if output is None:
        output = torch.empty((call.tokens, hidden), dtype=output_dtype, device=x.device)
    parts: list[Intermediate] = []
    for rows in _token_chunks(call.tokens, top_k * hidden):
        ids = token_selected_experts[rows]
        n = ids.shape[0]
        y = torch.zeros((n * top_k, inter), dtype=torch.float32, device=x.device)
        for e, slots in _slots_by_expert(ids, local_expert_offset, experts):
            tokens = torch.div(slots, top_k, rounding_mode="floor")
            a = dequantize_nvfp4(x[rows][tokens], x_sf[rows][tokens], dtype=accumulate)
            w1 = _weight(w1_weight[e], w1_sf[e], accumulate)
            up, gate = split_up_gate(_matmul(a, w1) * w1_alpha[e].to(accumulate), dim=-1)
            y[slots] = (up * (gate * torch.sigmoid(gate))).float()
        packed, sf = quantize_intermediate(y, fc2_input_scale)
        local = _is_local(ids, local_expert_offset, experts)
        part = Intermediate(
            y=y.view(n, top_k, inter),
            packed=packed.view(n, top_k, inter // 2) * local.unsqueeze(-1),
            sf=sf.view(n, top_k, inter // SF_VEC) * local.unsqueeze(-1),
            local=local,
        )
        output[rows] = gemm2_from_codes(
            part.packed,
            part.sf,
            ids,
            token_final_scales[rows],
            w2_weight,
            w2_weight_sf,
            w2_alpha,
            local_expert_offset=local_expert_offset,
            output_dtype=output_dtype,
            accumulate=accumulate,
        )
        if return_intermediate:
            parts.append(part)
    if not return_intermediate:
        return output, None
    names = ("y", "packed", "sf", "local")
    return output, Intermediate(*(torch.cat([getattr(p, name) for p in parts]) for name in names))


def run_reference(*args: Any, **kwargs: Any) -> torch.Tensor:
    """The reference backend of `moe_nvfp4`: its arguments, its [T, H] result, fp32 steps."""
    return moe_reference(*args, **kwargs)[0]


def quantize_intermediate(
    y: torch.Tensor, fc2_input_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 3 of the contract.

    Args:
        y: [..., I] fp32, I a multiple of 16.
        fc2_input_scale: One fp32; multiplies.

    Returns:
        (packed, sf): uint8 [..., I/2] FP4 codes and uint8 [..., I/16] e4m3 bytes. A NaN in a block
        gives it scale 0x7F; where the scale is 0, codes are +-6 (0 for y == 0) and decode to 0.
    """
    blocks = y.reshape(*y.shape[:-1], y.shape[-1] // SF_VEC, SF_VEC)
    encode = fc2_input_scale.reshape(())
    sf = e4m3_bytes((blocks.abs().amax(dim=-1) * 0.16666667) * encode)
    s = (sf.float().reciprocal() * encode).clamp(max=_FLT_MAX)
    return pack_fp4(e2m1_codes(blocks * s.unsqueeze(-1)).flatten(-2)), sf.view(torch.uint8)


def gemm2_from_codes(
    packed: torch.Tensor,
    sf: torch.Tensor,
    token_selected_experts: torch.Tensor,
    token_final_scales: torch.Tensor,
    w2_weight: torch.Tensor,
    w2_weight_sf: torch.Tensor,
    w2_alpha: torch.Tensor,
    *,
    local_expert_offset: int = 0,
    output_dtype: torch.dtype = torch.bfloat16,
    accumulate: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Step 4 alone, from a given intermediate: judges the second GEMM by a kernel's own codes.

    Args:
        packed: [T, top_k, I/2] uint8 codes by slot.
        sf: [T, top_k, I/16] e4m3 bytes by slot, linear.
        token_selected_experts: [T, top_k] global ids.
        token_final_scales: [T, top_k].
        w2_weight: [L, H, I/2].
        w2_weight_sf: Any form that `moe_nvfp4` takes.
        w2_alpha: [L] fp32.
        local_expert_offset: Global id of the first local expert.
        output_dtype: bfloat16, float16, or float32 to see the sum before rounding.
        accumulate: float32 or float64.

    Returns:
        [T, H] of ``output_dtype``.
    """
    tokens, top_k = token_selected_experts.shape
    experts, hidden, half_inter = w2_weight.shape
    w2_sf = sf_storage(as_bytes(w2_weight_sf), hidden, 2 * half_inter, experts)
    codes = packed.reshape(tokens * top_k, half_inter)
    scales = as_bytes(sf).reshape(tokens * top_k, half_inter // 8)
    result = torch.empty((tokens, hidden), dtype=output_dtype, device=packed.device)
    for rows in _token_chunks(tokens, top_k * hidden):
        ids, routing = token_selected_experts[rows], token_final_scales[rows].reshape(-1)
        terms = torch.zeros((ids.numel(), hidden), dtype=accumulate, device=packed.device)
        for e, slots in _slots_by_expert(ids, local_expert_offset, experts):
            source = slots + rows.start * top_k
            a = dequantize_nvfp4(codes[source], scales[source], dtype=accumulate)
            w2 = _weight(w2_weight[e], w2_sf[e], accumulate)
            factor = w2_alpha[e].to(accumulate) * routing[slots].to(accumulate)
            terms[slots] = _matmul(a, w2) * factor.unsqueeze(-1)
        by_slot = terms.view(ids.shape[0], top_k, hidden)
        total = torch.zeros_like(by_slot[:, 0])
        for j in range(top_k):
            total += by_slot[:, j]
        result[rows] = total.to(output_dtype)
    return result


# ---- judging -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """How far an output is from the reference.

    Attributes:
        passed: At least ``required`` of the elements are within tolerance, and none is beyond 8
            times the tolerance. NaN is never within tolerance.
        within: Fraction of elements within tolerance.
        worst: Largest |out - ref| / tolerance; infinity if any element is NaN or a lone infinity.
        worst_index: Where that is; empty for empty tensors.
        relative_l2: ||out - ref|| / ||ref||.
    """

    passed: bool
    within: float
    worst: float
    worst_index: tuple[int, ...]
    relative_l2: float

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        return (
            f"{verdict}: {self.within:.6%} within tolerance, worst {self.worst:.3g} x tolerance at "
            f"{list(self.worst_index)}, relative L2 error {self.relative_l2:.3e}"
        )


def compare(out: torch.Tensor, ref: torch.Tensor, *, required: float = 0.9999) -> Comparison:
    """Compares with tolerance 2**-7 * |ref| + 2**-8 * rms(ref).

    Args:
        out: Any shape; judged in float64.
        ref: The same shape. The rms is over its finite elements; equal infinities agree.
        required: Fraction of elements that must be within tolerance; the rest may reach 8 times it.
    """
    if out.shape != ref.shape:
        is_, wanted = f"has shape {list(out.shape)}", f"{list(ref.shape)}, like 'ref'"
        raise BadArgument("out", is_, wanted, function="compare")
    if ref.numel() == 0:
        return Comparison(True, 1.0, 0.0, (), 0.0)
    a, b = out.double(), ref.double()
    finite = torch.isfinite(b)
    rms = torch.where(finite, b, 0.0).square().sum().div(finite.sum().clamp(min=1)).sqrt()
    same = a == b  # also equal infinities, whose difference is NaN
    difference = torch.where(same, 0.0, (a - b).abs())
    tolerance = b.abs() * 2.0**-7 + rms * 2.0**-8
    ratio = torch.where(same, 0.0, difference / tolerance).nan_to_num(nan=math.inf, posinf=math.inf)
    within = float((ratio <= 1).double().mean())
    at = int(ratio.argmax())
    worst = float(ratio.flatten()[at])
    index = []
    for size in reversed(ref.shape):
        at, rest = divmod(at, size)
        index.append(rest)
    norm = float(torch.where(finite, b, 0.0).norm())
    l2 = float(difference.norm()) / norm if norm else float(difference.norm())
    return Comparison(within >= required and worst <= 8, within, worst, tuple(index[::-1]), l2)


# ---- parts ---------------------------------------------------------------------------------------


def _token_chunks(tokens: int, elements_per_token: int) -> Iterator[slice]:
    """Slices of tokens whose per-slot results fit the chunk size; one empty slice for no tokens."""
    step = max(1, _CHUNK_ELEMENTS // elements_per_token)
    for start in range(0, max(tokens, 1), step):
        yield slice(start, min(start + step, tokens))


def _is_local(ids: torch.Tensor, offset: int, experts: int) -> torch.Tensor:
    return (ids >= offset) & (ids < offset + experts)


def _slots_by_expert(
    ids: torch.Tensor, offset: int, experts: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """(local expert, its slots in ascending order) for every local expert that has any.

    A slot is an index into the flattened [T, top_k] ids.
    """
    flat = ids.reshape(-1).long()
    slots = torch.nonzero(_is_local(flat, offset, experts)).flatten()
    expert_of_slot = flat[slots] - offset
    slots = slots[torch.argsort(expert_of_slot, stable=True)]
    start = 0
    for e, count in enumerate(torch.bincount(expert_of_slot, minlength=experts).tolist()):
        if count:
            yield e, slots[start : start + count]
            start += count


def _weight(packed: torch.Tensor, sf: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One expert's matrix (rows, K), decoded, from codes (rows, K/2) and swizzled scales."""
    rows, half_k = packed.shape
    return dequantize_nvfp4(packed, unswizzle_scales(sf, rows, 2 * half_k), dtype=dtype)


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (n, K) times b (m, K) transposed, without TF32 or bf16 shortcuts."""
    with _full_precision():
        return a @ b.T


@contextmanager
def _full_precision() -> Iterator[None]:
    """Switches reduced-precision fp32 products off, for the CPU and CUDA, and restores them.

    The switches are process-wide: do not run the reference beside threads that rely on TF32.
    """
    cuda, cpu = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
    switches: list[tuple[Any, str, Any]]
    if hasattr(cuda, "fp32_precision"):  # torch >= 2.9
        switches = [(cuda, "fp32_precision", "ieee")]
        if cpu is not None:
            switches.append((cpu, "fp32_precision", "ieee"))
    else:
        switches = [(cuda, "allow_tf32", False)]
    before = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, value in switches:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)
