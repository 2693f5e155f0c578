"""The public call. A signature that was seen before runs at once; a new one is checked in full."""

from __future__ import annotations

from typing import Any

import torch

from moejit.runtime import dispatcher
from moejit.runtime.backends import Call
from moejit.runtime.checks import check_arguments
from moejit.runtime.launcher import NeedsCheck

__all__ = ["cute_dsl_fused_moe_nvfp4", "moe_nvfp4"]


def moe_nvfp4(
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
) -> torch.Tensor:
    """One NVFP4 fused mixture-of-experts layer: route, GEMM1, SwiGLU, quantize, GEMM2, combine.

    Takes the arguments of FlashInfer's ``cute_dsl_fused_moe_nvfp4`` with the same names, order and
    defaults. For each token t and each of its experts e that is on this rank::

        up, gate  = (x[t] @ w1[e].T) * w1_alpha[e]
        y         = nvfp4(up * gate * sigmoid(gate), fc2_input_scale)
        out[t]   += (y @ w2[e].T) * w2_alpha[e] * token_final_scales[t, slot]

    T tokens, H hidden size, I intermediate size (both multiples of 64), L local experts. FP4 values
    lie two to a byte, the even element in the low nibble; a scale is one e4m3 byte for 16 elements.
    `moejit.runtime.quantize` makes all of these from ordinary tensors.

    Args:
        x: [T, H/2] uint8 or float4_e2m1fn_x2. Activations.
        x_sf: [T, H/16] or [T, H/16, 1] float8_e4m3fn or uint8. Their scales, row-major.
        token_selected_experts: [T, top_k] int32 or int64. Global expert ids. An id outside the
            local range, -1 included, contributes nothing; an id that occurs twice counts twice.
        token_final_scales: [T, top_k] float32, bfloat16 or float16. Routing weights.
        w1_weight: [L, 2I, H/2] like x. Rows in groups of 64: up 0-63, gate 0-63, up 64-127, ...
        w1_weight_sf: e4m3 bytes in 128x4 tiles: the 6-D view (32, 4, 2I/128, 4, H/64, L) of storage
            (L, 2I/128, H/64, 32, 4, 4), or any contiguous shape of that storage.
        w1_alpha: [L] float32. Factor on GEMM1's result of each expert.
        fc2_input_scale: one float32. Encode scale of the activations between the GEMMs; it
            multiplies, so ``w2_alpha`` must hold its inverse.
        w2_weight: [L, H, I/2] like x.
        w2_weight_sf: like ``w1_weight_sf`` with H rows, padded to a multiple of 128, and I columns.
        w2_alpha: [L] float32. Factor on GEMM2's result of each expert.
        num_experts: experts on all ranks, 1 to 4096.
        top_k: experts of a token, 1 to 32.
        num_local_experts: L; None means ``num_experts``.
        local_expert_offset: global id of the first local expert.
        output_dtype: torch.bfloat16 or torch.float16.
        use_fused_finalize: True adds a token's experts in the order in which they finish, in fp32;
            False adds them in slot order, so that equal inputs give equal bits.
        moe_output: [T, H] of ``output_dtype`` to write to; apart from every input.
        aux_stream: accepted for compatibility; a layer needs one stream only.
        enable_pdl: start each kernel while the one before it drains.

    Returns:
        [T, H] of ``output_dtype``, ``moe_output`` itself when given. Work is queued on the current
        stream. With T = 0 nothing is launched.

    Raises:
        BadArgument: names the argument, what it is and what it should be. Nothing was launched.
        NoVariantFits, UnknownArch, BackendUnavailable: this call cannot run on this machine.
        JitDisabled: the layer is not in the cache, and MOEJIT_JIT forbids compiling it.
        CaptureWouldCompile: a CUDA graph is being captured, and the layer never ran before.
        CompileFailed, LinkerMissing, LoadFailed: the layer could not be built or loaded.
    """
    active = dispatcher.current or dispatcher.active()
    weights = (
        w1_weight,
        w1_weight_sf,
        w1_alpha,
        fc2_input_scale,
        w2_weight,
        w2_weight_sf,
        w2_alpha,
    )
    signature: tuple[object, ...] = ()
    ready = None
    try:
        weights_at = (
            w1_weight.data_ptr(),
            w1_weight_sf.data_ptr(),
            w1_alpha.data_ptr(),
            fc2_input_scale.data_ptr(),
            w2_weight.data_ptr(),
            w2_weight_sf.data_ptr(),
            w2_alpha.data_ptr(),
        )
        # A layer's weights are the same objects at every call: they are looked at once.
        known = active.weights.get(
            (
                id(w1_weight),
                id(w1_weight_sf),
                id(w1_alpha),
                id(fc2_input_scale),
                id(w2_weight),
                id(w2_weight_sf),
                id(w2_alpha),
            )
        )
        if known is None or known.addresses != weights_at:
            known = active.weights.add(weights, weights_at)
        signature = (
            known.kind,
            num_experts,
            top_k,
            num_local_experts,
            local_expert_offset,
            output_dtype,
            use_fused_finalize,
            aux_stream is None,
            enable_pdl,
            x.shape,
            x.dtype,
            x.get_device(),
            x_sf.shape,
            x_sf.dtype,
            x_sf.get_device(),
            token_selected_experts.shape,
            token_selected_experts.dtype,
            token_selected_experts.get_device(),
            token_final_scales.shape,
            token_final_scales.dtype,
            token_final_scales.get_device(),
            x.is_contiguous()
            and x_sf.is_contiguous()
            and token_selected_experts.is_contiguous()
            and token_final_scales.is_contiguous(),
            moe_output is None
            or (
                moe_output.shape,
                moe_output.dtype,
                moe_output.get_device(),
                moe_output.is_contiguous(),
            ),
        )
        ready = active.runners.get(signature)
    except (AttributeError, TypeError, RuntimeError):
        pass  # not even tensors: the check says what is wrong
    if ready is not None:
        runner, template = ready
        # torch makes a tensor like another one in two thirds of the time it takes for a shape.
        output = torch.empty_like(template) if moe_output is None else moe_output
        try:
            runner(output, x, x_sf, token_selected_experts, token_final_scales, weights, weights_at)
            return output
        except NeedsCheck:
            pass
    checked = check_arguments(
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
    inputs = (x, x_sf, token_selected_experts, token_final_scales)
    call = Call(
        device=x.device,
        tokens=checked.tokens,
        hidden=checked.hidden,
        intermediate=checked.intermediate,
        top_k=top_k,
        num_experts=num_experts,
        num_local_experts=checked.num_local_experts,
        local_expert_offset=local_expert_offset,
        ids_dtype=token_selected_experts.dtype,
        scales_dtype=token_final_scales.dtype,
        output_dtype=output_dtype,
        deterministic=not use_fused_finalize,
        pdl=enable_pdl,
        extents=None
        if moe_output is None
        else (moe_output.nbytes, *(tensor.nbytes for tensor in (*inputs, *weights))),
    )
    first = active.prepare(signature, call)
    out = moe_output
    if out is None:
        out = torch.empty((checked.tokens, checked.hidden), dtype=output_dtype, device=x.device)
    first(out, *inputs, weights, weights_at)
    return out


cute_dsl_fused_moe_nvfp4 = moe_nvfp4
