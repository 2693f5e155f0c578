"""Finds the mistake in the arguments of `moe_nvfp4` and names it: the readable rules.

Called by `runtime.checks` only when its quick test fails. One message for one mistake: the
argument, what it is, what it should be.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch

from moejit.codegen.layouts import sf_6d_shape, sf_6d_strides, sf_storage_bytes
from moejit.runtime.errors import BadArgument

__all__ = [
    "ALIGNMENT_BYTES",
    "MAX_EXPERTS",
    "MAX_SLOTS",
    "MAX_TOP_K",
    "CheckedCall",
    "find_mistake",
]

MAX_TOP_K = 32
MAX_EXPERTS = 4096
MAX_SLOTS = 2**31 - 1  # tokens * top_k; kernels count slots in int32
ALIGNMENT_BYTES = 16  # of x, x_sf, the weights, their scales and the output: TMA and 16-byte loads

_U8 = torch.uint8
_FP4 = getattr(torch, "float4_e2m1fn_x2", torch.uint8)
_E4M3 = torch.float8_e4m3fn
_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
_I32, _I64 = torch.int32, torch.int64
_SF_NAMES = "torch.float8_e4m3fn or torch.uint8, one e4m3 byte for 16 elements"
_FP4_NAMES = "torch.uint8 or torch.float4_e2m1fn_x2, two FP4 codes a byte"
_SWIZZLE_HINT = "Make them with moejit.runtime.quantize.prepare_weights, or swizzle_scales."


class CheckedCall(NamedTuple):
    """What the check learned about a call.

    Attributes:
        tokens: T; may be 0.
        hidden: H, elements.
        intermediate: I, elements; w1 has 2*I rows.
        num_local_experts: L, experts whose weights are here.
        device_index: CUDA ordinal of every tensor; -1 for CPU tensors.
    """

    tokens: int
    hidden: int
    intermediate: int
    num_local_experts: int
    device_index: int


def _fail(argument: str, is_: str, should_be: str, hint: str = "") -> NoReturn:
    raise BadArgument(argument, is_, should_be, hint)


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _integer(name: str, value: Any, low: int, high: int, why: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        _fail(name, f"has type {_type_name(value)}", f"an int, {why}")
    if not low <= value <= high:
        _fail(name, f"is {value}", why)
    return value


def _tensor(
    name: str,
    value: Any,
    dtypes: Sequence[torch.dtype],
    dtype_names: str,
    device: torch.device | None,
    hint: str = "",
) -> torch.Tensor:
    """Kind, dtype, device and layout of one tensor."""
    if not isinstance(value, torch.Tensor):
        _fail(name, f"has type {_type_name(value)}", "a torch.Tensor", hint)
    if value.dtype not in dtypes:
        _fail(name, f"has dtype {value.dtype}", dtype_names, hint)
    if value.layout is not torch.strided:
        _fail(name, f"has layout {value.layout}", "a dense (strided) tensor")
    if device is None:
        if value.device.type not in ("cuda", "cpu"):
            _fail(name, f"is on device {value.device}", "on a CUDA device, or on the CPU")
    elif value.device != device:
        _fail(name, f"is on device {value.device}", f"on {device}, where 'x' is")
    if value.numel() and not _address(value):
        _fail(
            name,
            "has no memory: its storage was freed, or it is a fake tensor",
            "a tensor with data",
        )
    return value


def _address(value: torch.Tensor) -> int:
    """Where the data is; 0 where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fake tensors warn, and answer 0
            return value.data_ptr()
    except RuntimeError:
        return 0


def _placed(name: str, value: torch.Tensor, *, align: bool) -> None:
    """Contiguity, and alignment where kernels load 16 bytes at a time."""
    if not value.is_contiguous():
        _fail(
            name,
            f"has strides {tuple(value.stride())} for shape {tuple(value.shape)}",
            "contiguous (row-major, no gaps)",
            "Call .contiguous() on it; kernels read the memory in order.",
        )
    if align:
        _aligned(name, value)


def _aligned(name: str, value: torch.Tensor) -> None:
    if value.data_ptr() % ALIGNMENT_BYTES:
        _fail(
            name,
            f"starts at an address {value.data_ptr() % ALIGNMENT_BYTES} bytes past a multiple of "
            f"{ALIGNMENT_BYTES}",
            f"aligned to {ALIGNMENT_BYTES} bytes",
            "A slice of a larger tensor can start anywhere; .clone() it.",
        )


def _shape(name: str, value: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(value.shape) != shape:
        _fail(name, f"has shape {list(value.shape)}", f"{list(shape)}, that is {meaning}")


def _swizzled(
    name: str, value: torch.Tensor, rows: int, k: int, experts: int, meaning: str
) -> None:
    """Size and strides of the block scales of one weight tensor."""
    expected = experts * sf_storage_bytes(rows, k)
    view = sf_6d_shape(rows, k, experts)
    wanted = f"{expected} swizzled bytes: {meaning}, as the 6-D view {list(view)} or contiguous"
    if value.numel() != expected:
        hint = _SWIZZLE_HINT
        if value.numel() == experts * rows * k // 16:
            hint = f"These look like linear, unpadded scales. {hint}"
        _fail(name, f"has {value.numel()} elements, shape {list(value.shape)}", wanted, hint)
    if tuple(value.shape) == view:
        strides = sf_6d_strides(rows, k)
        actual = zip(value.stride(), strides, view, strict=True)
        if any(have != want and size > 1 for have, want, size in actual):
            _fail(
                name,
                f"has strides {tuple(value.stride())} for the 6-D shape {list(view)}",
                f"the view with strides {strides} of storage (experts, rows/128, K/64, 32, 4, 4)",
                "A .contiguous() copy of the view has its bytes in another order; pass the view.",
            )
    elif not value.is_contiguous():
        _fail(
            name,
            f"has strides {tuple(value.stride())} for shape {list(value.shape)}",
            wanted,
            _SWIZZLE_HINT,
        )
    _aligned(name, value)


def find_mistake(
    x: Any,
    x_sf: Any,
    ids: Any,
    scales: Any,
    w1: Any,
    w1_sf: Any,
    w1_alpha: Any,
    fc2_input_scale: Any,
    w2: Any,
    w2_sf: Any,
    w2_alpha: Any,
    num_experts: Any,
    top_k: Any,
    num_local_experts: Any,
    local_expert_offset: Any,
    output_dtype: Any,
    use_fused_finalize: Any,
    moe_output: Any,
    aux_stream: Any,
    enable_pdl: Any,
) -> CheckedCall:
    """Goes through the rules one by one; returns when the arguments are good after all."""
    # numbers and flags
    experts = _integer("num_experts", num_experts, 1, MAX_EXPERTS, f"from 1 to {MAX_EXPERTS}")
    k = _integer("top_k", top_k, 1, MAX_TOP_K, f"from 1 to {MAX_TOP_K}")
    if num_local_experts is None:
        local = experts
    else:
        why = f"from 1 to num_experts = {experts}"
        local = _integer("num_local_experts", num_local_experts, 1, experts, why)
    last = experts - local
    why = f"from 0 to num_experts - num_local_experts = {last}"
    _integer("local_expert_offset", local_expert_offset, 0, last, why)
    if output_dtype is not _BF16 and output_dtype is not _F16:
        _fail("output_dtype", f"is {output_dtype}", "torch.bfloat16 or torch.float16")
    for name, flag in (("use_fused_finalize", use_fused_finalize), ("enable_pdl", enable_pdl)):
        if not isinstance(flag, bool):
            _fail(name, f"has type {_type_name(flag)}", "True or False")
    if aux_stream is not None and not hasattr(aux_stream, "cuda_stream"):
        _fail("aux_stream", f"has type {_type_name(aux_stream)}", "None or a torch.cuda.Stream")

    # activations
    fp4, e4m3 = (_U8, _FP4), (_E4M3, _U8)
    hint = "Quantize with moejit.runtime.quantize.quantize_activations."
    _tensor("x", x, fp4, _FP4_NAMES, None, hint)
    device = x.device
    if x.dim() != 2 or x.shape[1] == 0 or x.shape[1] % 32:
        wanted = "[T, H/2] with H a positive multiple of 64"
        _fail("x", f"has shape {list(x.shape)}", wanted, "Pad the hidden size with zeros.")
    tokens, hidden = x.shape[0], 2 * x.shape[1]
    if tokens * k > MAX_SLOTS:
        _fail("x", f"has {tokens} tokens", f"at most {MAX_SLOTS // k} tokens at top_k = {k}")
    _placed("x", x, align=True)

    _tensor("x_sf", x_sf, e4m3, _SF_NAMES, device, hint)
    if tuple(x_sf.shape) not in ((tokens, hidden // 16), (tokens, hidden // 16, 1)):
        linear = f"[{tokens}, {hidden // 16}], that is linear [T, H/16], for x of [T, H/2]"
        swizzled = "x_sf is row-major without padding; unlike the weights' it is not swizzled."
        _fail("x_sf", f"has shape {list(x_sf.shape)}", linear, swizzled)
    _placed("x_sf", x_sf, align=True)

    # routing
    slots = (tokens, k)
    name = "token_selected_experts"
    _tensor(name, ids, (_I32, _I64), "torch.int32 or torch.int64", device)
    _shape(name, ids, slots, "[T, top_k]")
    _placed(name, ids, align=False)
    name, names = "token_final_scales", "torch.float32, torch.bfloat16 or torch.float16"
    _tensor(name, scales, (_F32, _BF16, _F16), names, device)
    _shape(name, scales, slots, "[T, top_k]")
    _placed(name, scales, align=False)

    # weights
    hint = "Quantize with moejit.runtime.quantize.prepare_weights."
    _tensor("w1_weight", w1, fp4, _FP4_NAMES, device, hint)
    if w1.dim() != 3 or w1.shape[1] == 0 or w1.shape[1] % 128:
        wanted = "[num_local_experts, 2*I, H/2] with I a positive multiple of 64"
        _fail("w1_weight", f"has shape {list(w1.shape)}", wanted)
    inter = w1.shape[1] // 2
    _shape("w1_weight", w1, (local, 2 * inter, hidden // 2), "[num_local_experts, 2*I, H/2]")
    _placed("w1_weight", w1, align=True)
    _tensor("w1_weight_sf", w1_sf, e4m3, _SF_NAMES, device, hint)
    _swizzled("w1_weight_sf", w1_sf, 2 * inter, hidden, local, f"{local} experts of 2*I x H/16")
    _tensor("w1_alpha", w1_alpha, (_F32,), "torch.float32", device)
    _shape("w1_alpha", w1_alpha, (local,), "[num_local_experts]")
    _placed("w1_alpha", w1_alpha, align=False)

    name, names = "fc2_input_scale", "torch.float32, one number on the device"
    _tensor(name, fc2_input_scale, (_F32,), names, device)
    if fc2_input_scale.numel() != 1:
        _fail(name, f"has {fc2_input_scale.numel()} elements", "one number, the encode scale")

    _tensor("w2_weight", w2, fp4, _FP4_NAMES, device, hint)
    _shape("w2_weight", w2, (local, hidden, inter // 2), "[num_local_experts, H, I/2]")
    _placed("w2_weight", w2, align=True)
    _tensor("w2_weight_sf", w2_sf, e4m3, _SF_NAMES, device, hint)
    meaning = f"{local} experts of H x I/16, H padded to a multiple of 128"
    _swizzled("w2_weight_sf", w2_sf, hidden, inter, local, meaning)
    _tensor("w2_alpha", w2_alpha, (_F32,), "torch.float32", device)
    _shape("w2_alpha", w2_alpha, (local,), "[num_local_experts]")
    _placed("w2_alpha", w2_alpha, align=False)

    # output
    if moe_output is not None:
        name = "moe_output"
        _tensor(name, moe_output, (output_dtype,), f"{output_dtype}, the output_dtype", device)
        _shape(name, moe_output, (tokens, hidden), "[T, H]")
        _placed(name, moe_output, align=True)
        inputs = {
            "x": x,
            "x_sf": x_sf,
            "token_selected_experts": ids,
            "token_final_scales": scales,
            "w1_weight": w1,
            "w1_weight_sf": w1_sf,
            "w1_alpha": w1_alpha,
            "fc2_input_scale": fc2_input_scale,
            "w2_weight": w2,
            "w2_weight_sf": w2_sf,
            "w2_alpha": w2_alpha,
        }
        begin = moe_output.data_ptr()
        end = begin + moe_output.nbytes
        for other, tensor in inputs.items():
            start = tensor.data_ptr()
            if start < end and begin < start + tensor.nbytes:
                _fail(name, f"shares memory with '{other}'", "apart from every input")
    return CheckedCall(tokens, hidden, inter, local, x.get_device())
