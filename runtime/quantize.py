"""NVFP4 quantization: tensors of floats into FP4 codes, e4m3 block scales and one global scale.

Two directions of a scale exist in the wild, so each name says which it is:

* ``global_scale`` (and ``fc2_input_scale``) *multiplies* before encoding: ideally
  448 * 6 / amax, so that the largest block scale is 448. This is FlashInfer's convention.
* ``alpha`` *multiplies* after decoding: 1 / (product of the global scales of both operands).
  ModelOpt's ``weight_scale_2`` and ``input_scale`` are of this kind: amax / (448 * 6).

The recipe is ModelOpt's, in fp32 steps, with g the global scale::

    sf   = e4m3( min( (amax_of_16 / 6) * g, 448 ) )      rounded to nearest, ties to even
    step = sf / g                                         the value of one FP4 unit
    q    = e2m1( x / step )                               ties to even, saturated at 6; 0 if sf == 0
    x'   = q * sf / g                                     decoded

Sources: NVIDIA ModelOpt's NVFP4 quantizer (public), FlashInfer's ``nvfp4_quantize`` documentation,
PTX ISA ``cvt.rn.satfinite.e2m1x2`` and ``.e4m3x2``. The kernels requantize the intermediate with
the slightly different steps of `runtime.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from moejit.codegen.layouts import SF_VEC, sf_storage_bytes
from moejit.runtime.errors import BadArgument
from moejit.runtime.layouts import (
    as_bytes,
    interleave_up_gate,
    pack_fp4,
    sf_6d_view,
    swizzle_scales,
    unpack_fp4,
    unswizzle_scales,
)

__all__ = [
    "E2M1_MAX",
    "E2M1_VALUES",
    "E4M3_MAX",
    "MoeWeights",
    "QuantizedActivations",
    "decode_e2m1",
    "decode_e4m3",
    "dequantize_nvfp4",
    "e2m1_codes",
    "e4m3_bytes",
    "ideal_global_scale",
    "prepare_weights",
    "quantize_activations",
    "quantize_nvfp4",
]

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # code 0..7; bit 3 is the sign
_MAX_GLOBAL_SCALE = 2.0**100  # keeps 1/g and sf/g normal fp32 numbers, also for a tensor of ~0


# ---- single formats ------------------------------------------------------------------------------


def e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """Rounds to FP4 e2m1 like ``cvt.rn.satfinite.e2m1x2``.

    To nearest, ties to the even code; beyond 6 saturates; the sign is kept, also of zero; NaN
    becomes +6 as in the PTX ISA.

    Args:
        values: Any shape, float32 or float64 (narrower floats are widened exactly).

    Returns:
        The same shape, uint8 codes 0..15.
    """
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    size = values.abs()
    # the ties 0.25, 1.25, 2.5 and 5 round down to an even code, 0.75, 1.75 and 3.5 up to one
    codes = (size > 0.25).to(torch.uint8)
    for tie in (1.25, 2.5, 5.0):
        codes += size > tie
    for tie in (0.75, 1.75, 3.5):
        codes += size >= tie
    codes |= torch.signbit(values).to(torch.uint8) << 3
    return codes.masked_fill_(torch.isnan(values), 7)


def decode_e2m1(codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """FP4 codes 0..15 (any shape, uint8) to their values, exactly; 8 is -0.0."""
    table = torch.tensor(
        [*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=dtype, device=codes.device
    )
    return table[codes.int()]


def e4m3_bytes(values: torch.Tensor) -> torch.Tensor:
    """Rounds to e4m3 like ``cvt.rn.satfinite.e4m3x2``: ties to even, saturated at 448, NaN kept.

    Args:
        values: Any shape, float32.

    Returns:
        The same shape, ``torch.float8_e4m3fn``. The clamp makes it the same in torch versions whose
        own cast gives NaN beyond 448.
    """
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode_e4m3(scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Block-scale bytes (uint8 or float8_e4m3fn) to values, exactly, as tensor cores read them.

    Block scales are unsigned: the top bit is ignored; 0x7F and 0xFF are NaN.
    """
    return (as_bytes(scales) & 0x7F).view(torch.float8_e4m3fn).to(dtype)


# ---- tensors -------------------------------------------------------------------------------------


def ideal_global_scale(x: torch.Tensor) -> torch.Tensor:
    """448 * 6 / max|x| as an fp32 scalar tensor on x's device; 1 for a tensor of zeros.

    Not more than 2**100, so that its reciprocal stays a normal number.
    """
    if x.numel() == 0:
        return torch.ones((), device=x.device)
    amax = x.abs().amax().float()
    # torch computes number / tensor as number * reciprocal, which rounds twice
    scale = (torch.full_like(amax, E4M3_MAX * E2M1_MAX) / amax).clamp(max=_MAX_GLOBAL_SCALE)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def quantize_nvfp4(
    x: torch.Tensor,
    global_scale: torch.Tensor | float | None = None,
    *,
    swizzle: bool = False,
    check_finite: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantizes along the last dimension, 16 elements to a block scale.

    Args:
        x: [..., K] floats, K a multiple of 16; at least 2-D when ``swizzle`` is set.
        global_scale: Encode scale, multiplies; None takes `ideal_global_scale` of the tensor.
        swizzle: Block scales in 128x4-swizzled storage instead of linear.
        check_finite: Raise on NaN or infinity (one device-to-host read). Off: a NaN makes its
            block scale NaN, an infinity saturates; both need an explicit ``global_scale``.

    Returns:
        (packed, scales, global_scale): uint8 [..., K/2], low nibble first; float8_e4m3fn
        [..., K/16], or [..., bytes] when swizzled; fp32 scalar tensor. An all-zero block has scale
        0 and codes 0.

    Raises:
        BadArgument: x is not floating point, K is not a multiple of 16, or x is not finite.
    """
    if not x.is_floating_point() or x.dim() < 1 or x.shape[-1] % SF_VEC:
        raise BadArgument(
            "x",
            f"has shape {tuple(x.shape)} and dtype {x.dtype}",
            f"a float tensor whose last dimension is a multiple of {SF_VEC}",
            function="quantize_nvfp4",
        )
    if check_finite:
        _require_finite(x, "x", "quantize_nvfp4")
    if global_scale is None:
        used = ideal_global_scale(x)
    else:
        used = torch.as_tensor(global_scale, dtype=torch.float32, device=x.device)
    if used.numel() != 1:
        raise BadArgument(
            "global_scale",
            f"has {used.numel()} elements",
            "one number for the whole tensor",
            function="quantize_nvfp4",
        )
    used = used.reshape(())
    blocks = x.float().reshape(*x.shape[:-1], x.shape[-1] // SF_VEC, SF_VEC)
    # a divisor on the device: CUDA divides by a host number as a product with its reciprocal
    six = torch.full((), E2M1_MAX, device=x.device)
    scales = e4m3_bytes(blocks.abs().amax(dim=-1) / six * used)
    step = (scales.float() / used).unsqueeze(-1)
    scaled = torch.where(step == 0, torch.zeros_like(blocks), blocks / step)
    packed = pack_fp4(e2m1_codes(scaled).flatten(-2))
    return packed, swizzle_scales(scales) if swizzle else scales, used


def dequantize_nvfp4(
    packed: torch.Tensor,
    scales: torch.Tensor,
    global_scale: torch.Tensor | float | None = None,
    *,
    swizzled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Inverse of `quantize_nvfp4`: code * block scale / global_scale.

    code * block scale is exact in float32 (and in bfloat16: at most six significant bits); the
    division by a ``global_scale`` rounds once. None does not divide.

    Args:
        packed: [..., K/2] bytes.
        scales: [..., K/16] e4m3 bytes, or swizzled storage [..., bytes].
        global_scale: The encode scale that was used.
        swizzled: Whether ``scales`` is swizzled storage.
        dtype: float32 or float64.

    Returns:
        [..., K] of ``dtype``.
    """
    codes = unpack_fp4(packed)
    if swizzled:
        scales = unswizzle_scales(scales, codes.shape[-2], codes.shape[-1])
    blocks = codes.reshape(*codes.shape[:-1], codes.shape[-1] // SF_VEC, SF_VEC)
    out = decode_e2m1(blocks, dtype).mul_(decode_e4m3(scales, dtype).unsqueeze(-1)).flatten(-2)
    if global_scale is None:
        return out
    return out / torch.as_tensor(global_scale, dtype=dtype, device=out.device)


# ---- the arguments of moe_nvfp4 ------------------------------------------------------------------


class QuantizedActivations(NamedTuple):
    """What `quantize_activations` gives.

    Attributes:
        x: [T, H/2] uint8.
        x_sf: [T, H/16] float8_e4m3fn, linear.
        x_global_scale: fp32 scalar tensor, encode direction; goes into `prepare_weights`.
    """

    x: torch.Tensor
    x_sf: torch.Tensor
    x_global_scale: torch.Tensor


@dataclass(frozen=True)
class MoeWeights:
    """The weight arguments of `moe_nvfp4` for E experts, and the scales they were made with.

    Attributes:
        w1_weight: [E, 2I, H/2] uint8, up and gate rows interleaved by 64.
        w1_weight_sf: float8_e4m3fn, 6-D view (32, 4, 2I/128, 4, H/64, E) of swizzled storage.
        w1_alpha: [E] fp32, 1 / (x_global_scale * w1_global_scale).
        w2_weight: [E, H, I/2] uint8.
        w2_weight_sf: float8_e4m3fn, 6-D view (32, 4, ceil(H/128), 4, I/64, E).
        w2_alpha: [E] fp32, 1 / (fc2_input_scale * w2_global_scale).
        fc2_input_scale: [1] fp32, encode scale of the intermediate; multiplies.
        w1_global_scale: [E] fp32, encode scale that up and gate of an expert share.
        w2_global_scale: [E] fp32, encode scale.
    """

    w1_weight: torch.Tensor
    w1_weight_sf: torch.Tensor
    w1_alpha: torch.Tensor
    w2_weight: torch.Tensor
    w2_weight_sf: torch.Tensor
    w2_alpha: torch.Tensor
    fc2_input_scale: torch.Tensor
    w1_global_scale: torch.Tensor
    w2_global_scale: torch.Tensor

    def arguments(self) -> dict[str, torch.Tensor]:
        """The seven keyword arguments of `moe_nvfp4` that the weights decide."""
        return {
            "w1_weight": self.w1_weight,
            "w1_weight_sf": self.w1_weight_sf,
            "w1_alpha": self.w1_alpha,
            "fc2_input_scale": self.fc2_input_scale,
            "w2_weight": self.w2_weight,
            "w2_weight_sf": self.w2_weight_sf,
            "w2_alpha": self.w2_alpha,
        }


def quantize_activations(
    x: torch.Tensor, global_scale: torch.Tensor | float | None = None
) -> QuantizedActivations:
    """Quantizes the layer's input: [T, H] floats, linear block scales.

    Args:
        x: [T, H] floats, H a multiple of 64.
        global_scale: Encode scale; None takes the ideal one of this tensor. A deployment uses a
            calibrated constant, because ``w1_alpha`` is made from it.
    """
    packed, scales, used = quantize_nvfp4(x, global_scale)
    return QuantizedActivations(packed, scales, used)


def prepare_weights(
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    x_global_scale: torch.Tensor | float = 1.0,
    fc2_input_scale: torch.Tensor | float = 1.0,
) -> MoeWeights:
    """Quantizes and lays out the weights of E experts for `moe_nvfp4`. One expert at a time.

    Every expert has its own ideal global scale for each of its two matrices; gate and up share one,
    since they share ``w1_alpha``.

    Args:
        gate: [E, I, H] floats, the projection that goes through the activation.
        up: [E, I, H] floats, the linear projection.
        down: [E, H, I] floats.
        x_global_scale: Encode scale that the input x was quantized with; folded into ``w1_alpha``.
        fc2_input_scale: Encode scale for the intermediate, ideally 448 * 6 / its largest magnitude;
            folded into ``w2_alpha``.

    Raises:
        BadArgument: shapes disagree, H or I is not a multiple of 64, or a weight is not finite.
    """
    if gate.dim() != 3 or gate.shape[1] % 64 or gate.shape[2] % 64 or 0 in gate.shape:
        raise BadArgument(
            "gate",
            f"has shape {tuple(gate.shape)}",
            "[E, I, H] with I and H multiples of 64",
            function="prepare_weights",
        )
    experts, inter, hidden = gate.shape
    for name, tensor, shape in (
        ("up", up, (experts, inter, hidden)),
        ("down", down, (experts, hidden, inter)),
    ):
        if tuple(tensor.shape) != shape:
            raise BadArgument(
                name,
                f"has shape {tuple(tensor.shape)}",
                f"{list(shape)} to fit 'gate' {list(gate.shape)}",
                function="prepare_weights",
            )
    device = gate.device

    def bytes_of(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.uint8, device=device)

    w1, w2 = bytes_of(experts, 2 * inter, hidden // 2), bytes_of(experts, hidden, inter // 2)
    w1_sf = bytes_of(experts, sf_storage_bytes(2 * inter, hidden))
    w2_sf = bytes_of(experts, sf_storage_bytes(hidden, inter))
    w1_gs = torch.empty(experts, dtype=torch.float32, device=device)
    w2_gs = torch.empty_like(w1_gs)
    for e in range(experts):
        _require_finite(gate[e], "gate", "prepare_weights")
        _require_finite(up[e], "up", "prepare_weights")
        _require_finite(down[e], "down", "prepare_weights")
        rows = interleave_up_gate(up[e], gate[e])
        for matrix, codes, sf, scale in (
            (rows, w1[e], w1_sf[e], w1_gs[e]),
            (down[e], w2[e], w2_sf[e], w2_gs[e]),
        ):
            packed, swizzled, used = quantize_nvfp4(matrix, swizzle=True, check_finite=False)
            codes.copy_(packed)
            sf.copy_(as_bytes(swizzled))
            scale.copy_(used)
    x_gs = torch.as_tensor(x_global_scale, dtype=torch.float32, device=device)
    fc2 = torch.as_tensor(fc2_input_scale, dtype=torch.float32, device=device).reshape(1)
    e4m3 = torch.float8_e4m3fn
    return MoeWeights(
        w1_weight=w1,
        w1_weight_sf=sf_6d_view(w1_sf.view(e4m3), 2 * inter, hidden, experts),
        w1_alpha=1.0 / (x_gs.reshape(()) * w1_gs),
        w2_weight=w2,
        w2_weight_sf=sf_6d_view(w2_sf.view(e4m3), hidden, inter, experts),
        w2_alpha=1.0 / (fc2 * w2_gs),
        fc2_input_scale=fc2.clone(),
        w1_global_scale=w1_gs,
        w2_global_scale=w2_gs,
    )


def _require_finite(x: torch.Tensor, name: str, function: str) -> None:
    if not bool(torch.isfinite(x).all()):
        raise BadArgument(
            name,
            "holds NaN or infinity",
            "finite",
            "Such a value would poison the scale of the whole tensor.",
            function,
        )
