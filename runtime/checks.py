"""Checks the twenty arguments of `moe_nvfp4` before anything is launched.

`check_arguments` runs on every call, so its good path is one straight condition over local names;
only when some part of it is false does `runtime.mistakes` look for the mistake and name it. Both
state the same rules: that one is the readable statement, and its verdict holds. Values on the
device (expert ids, scales) are never read.

The rules are FlashInfer's documented contract of ``cute_dsl_fused_moe_nvfp4``, made complete: it
left dtypes, strides, sizes and devices of most tensors unchecked.
"""

from __future__ import annotations

from typing import Any

import torch

from moejit.runtime.mistakes import CheckedCall, find_mistake

__all__ = ["CheckedCall", "check_arguments"]

_U8 = torch.uint8
_FP4 = getattr(torch, "float4_e2m1fn_x2", torch.uint8)
_E4M3 = torch.float8_e4m3fn
_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
_I32, _I64 = torch.int32, torch.int64
_new = tuple.__new__  # half the time of calling the NamedTuple


def check_arguments(
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
) -> CheckedCall:
    """Raises `BadArgument` for the first mistake, else returns the sizes of the call.

    Args:
        x: [T, H/2] uint8 or float4_e2m1fn_x2, contiguous; H a multiple of 64.
        x_sf: [T, H/16] or [T, H/16, 1] e4m3 or uint8, linear, contiguous.
        token_selected_experts: [T, top_k] int32 or int64, contiguous; global ids. Ids outside the
            local range, -1 included, contribute nothing.
        token_final_scales: [T, top_k] float32, bfloat16 or float16, contiguous.
        w1_weight: [L, 2I, H/2] like x; up and gate rows interleaved by 64; I a multiple of 64.
        w1_weight_sf: Swizzled e4m3 bytes: the 6-D view, or any contiguous shape of as many bytes.
        w1_alpha: [L] float32.
        fc2_input_scale: One float32.
        w2_weight: [L, H, I/2] like x.
        w2_weight_sf: Like ``w1_weight_sf``; rows padded to 128.
        w2_alpha: [L] float32.
        num_experts: 1..4096, over all ranks.
        top_k: 1..32, the columns of ``token_selected_experts``.
        num_local_experts: L; None means ``num_experts``.
        local_expert_offset: Global id of the first local expert.
        output_dtype: bfloat16 or float16.
        use_fused_finalize: bool.
        moe_output: None, or [T, H] of ``output_dtype``, contiguous, apart from every input.
        aux_stream: None or a torch.cuda.Stream.
        enable_pdl: bool.
    """
    try:
        tokens, half_h = x.shape
        w1_shape = w1_weight.shape
        intermediate = w1_shape[1] >> 1
        hidden = half_h << 1
        local = num_experts if num_local_experts is None else num_local_experts
        device = x.get_device()
        sf_row, h_tiles, i_tiles = hidden >> 4, hidden >> 6, intermediate >> 6
        w1_tile_row, w2_tile_row = h_tiles << 9, i_tiles << 9  # bytes of one row of scale tiles
        w1_tile_rows, w2_tile_rows = intermediate + 63 >> 6, hidden + 127 >> 7
        w1_sf_bytes, w2_sf_bytes = w1_tile_rows * w1_tile_row, w2_tile_rows * w2_tile_row
        slots, shape = (tokens, top_k), x_sf.shape
        w1_sf_shape, w2_sf_shape = w1_weight_sf.shape, w2_weight_sf.shape
        if (
            type(num_experts) is int
            and type(top_k) is int
            and type(local) is int
            and type(local_expert_offset) is int
            and 0 < top_k <= 32
            and 0 < local
            and 0 <= local_expert_offset
            and local_expert_offset + local <= num_experts <= 4096
            and (output_dtype is _BF16 or output_dtype is _F16)
            and (use_fused_finalize is True or use_fused_finalize is False)
            and (enable_pdl is True or enable_pdl is False)
            and (aux_stream is None or hasattr(aux_stream, "cuda_stream"))
            # shapes
            and hidden > 0
            and not hidden & 63
            and intermediate > 0
            and not intermediate & 63
            and tokens * top_k <= 0x7FFFFFFF
            and (shape == (tokens, sf_row) or shape == (tokens, sf_row, 1))
            and token_selected_experts.shape == slots
            and token_final_scales.shape == slots
            and w1_shape == (local, intermediate << 1, half_h)
            and w2_weight.shape == (local, hidden, intermediate >> 1)
            and w1_alpha.shape == (local,) == w2_alpha.shape
            and fc2_input_scale.numel() == 1
            # dtypes
            and ((dtype := x.dtype) is _U8 or dtype is _FP4)
            and ((dtype := x_sf.dtype) is _E4M3 or dtype is _U8)
            and ((dtype := token_selected_experts.dtype) is _I32 or dtype is _I64)
            and ((dtype := token_final_scales.dtype) is _F32 or dtype is _BF16 or dtype is _F16)
            and ((dtype := w1_weight.dtype) is _U8 or dtype is _FP4)
            and ((dtype := w2_weight.dtype) is _U8 or dtype is _FP4)
            and ((dtype := w1_weight_sf.dtype) is _E4M3 or dtype is _U8)
            and ((dtype := w2_weight_sf.dtype) is _E4M3 or dtype is _U8)
            and w1_alpha.dtype is _F32
            and w2_alpha.dtype is _F32
            and fc2_input_scale.dtype is _F32
            # devices
            and (
                x.is_cuda
                or (
                    _on_cpu(
                        x, x_sf, token_selected_experts, token_final_scales, w1_weight, w2_weight
                    )
                    and _on_cpu(w1_weight_sf, w2_weight_sf, w1_alpha, w2_alpha, fc2_input_scale)
                )
            )
            and device == x_sf.get_device() == token_selected_experts.get_device()
            and device == token_final_scales.get_device() == fc2_input_scale.get_device()
            and device == w1_weight.get_device() == w1_weight_sf.get_device()
            and device == w2_weight.get_device() == w2_weight_sf.get_device()
            and device == w1_alpha.get_device() == w2_alpha.get_device()
            # strides
            and x.is_contiguous()
            and x_sf.is_contiguous()
            and token_selected_experts.is_contiguous()
            and token_final_scales.is_contiguous()
            and w1_weight.is_contiguous()
            and w2_weight.is_contiguous()
            and w1_alpha.is_contiguous()
            and w2_alpha.is_contiguous()
            and (
                (
                    w1_weight_sf.stride() == (16, 4, w1_tile_row, 1, 512, w1_sf_bytes)
                    and w1_sf_shape == (32, 4, w1_tile_rows, 4, h_tiles, local)
                )
                or (
                    len(w1_sf_shape) != 6
                    and w1_weight_sf.numel() == local * w1_sf_bytes
                    and w1_weight_sf.is_contiguous()
                )
            )
            and (
                (
                    w2_weight_sf.stride() == (16, 4, w2_tile_row, 1, 512, w2_sf_bytes)
                    and w2_sf_shape == (32, 4, w2_tile_rows, 4, i_tiles, local)
                )
                or (
                    len(w2_sf_shape) != 6
                    and w2_weight_sf.numel() == local * w2_sf_bytes
                    and w2_weight_sf.is_contiguous()
                )
            )
            and (
                not tokens
                or (
                    x.data_ptr()
                    and x_sf.data_ptr()
                    and token_selected_experts.data_ptr()
                    and token_final_scales.data_ptr()
                )
            )
            and w1_weight.data_ptr()
            and w1_weight_sf.data_ptr()
            and w1_alpha.data_ptr()
            and w2_weight.data_ptr()
            and w2_weight_sf.data_ptr()
            and w2_alpha.data_ptr()
            and fc2_input_scale.data_ptr()
            and not 15
            & (
                (x_at := x.data_ptr())
                | (x_sf_at := x_sf.data_ptr())
                | (w1_at := w1_weight.data_ptr())
                | (w1_sf_at := w1_weight_sf.data_ptr())
                | (w2_at := w2_weight.data_ptr())
                | (w2_sf_at := w2_weight_sf.data_ptr())
            )
        ):
            if moe_output is None:
                return _new(CheckedCall, (tokens, hidden, intermediate, local, device))
            begin = moe_output.data_ptr()
            end = begin + (tokens * hidden << 1)
            if (
                moe_output.shape == (tokens, hidden)
                and moe_output.dtype is output_dtype
                and moe_output.get_device() == device
                and (device >= 0 or moe_output.is_cpu)
                and moe_output.is_contiguous()
                and (begin or not tokens)
                and not begin & 15
                # apart from every input: each is one range of bytes
                and (x_at >= end or x_at + tokens * half_h <= begin)
                and (x_sf_at >= end or x_sf_at + tokens * sf_row <= begin)
                and (w1_at >= end or w1_at + local * intermediate * hidden <= begin)
                and (w2_at >= end or w2_at + (local * intermediate * hidden >> 1) <= begin)
                and (w1_sf_at >= end or w1_sf_at + local * w1_sf_bytes <= begin)
                and (w2_sf_at >= end or w2_sf_at + local * w2_sf_bytes <= begin)
                and (
                    (at := token_selected_experts.data_ptr()) >= end
                    or at + (tokens * top_k << 3) <= begin
                )
                and (
                    (at := token_final_scales.data_ptr()) >= end
                    or at + (tokens * top_k << 2) <= begin
                )
                and ((at := w1_alpha.data_ptr()) >= end or at + (local << 2) <= begin)
                and ((at := w2_alpha.data_ptr()) >= end or at + (local << 2) <= begin)
                and ((at := fc2_input_scale.data_ptr()) >= end or at + 4 <= begin)
            ):
                return _new(CheckedCall, (tokens, hidden, intermediate, local, device))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        pass  # not even the right kind of thing; the search below says what
    return find_mistake(
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


def _on_cpu(*tensors: torch.Tensor) -> bool:
    """For tensors whose device index is -1, which the CPU shares with others (meta)."""
    return all([tensor.is_cpu for tensor in tensors])
