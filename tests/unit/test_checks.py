# ruff: noqa: E501, E741 -- one line a case in the table of mistakes; I is the intermediate size
"""Validation of the twenty arguments: one test a message, and what must be accepted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import random_problem

from moejit.runtime import checks
from moejit.runtime.checks import CheckedCall, check_arguments
from moejit.runtime.errors import BadArgument
from moejit.runtime.layouts import sf_storage
from moejit.runtime.mistakes import find_mistake

Call = dict[str, Any]
T, H, I, E, K = 4, 192, 128, 4, 2

BASE = random_problem(T, H, I, E, K)


@pytest.fixture
def call() -> Call:
    """A good call; tests may replace its entries."""
    return dict(BASE)


def gapped(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with a gap after every row."""
    raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    wide = torch.cat((raw, raw), dim=-1).view(tensor.dtype)
    return wide[..., : tensor.shape[-1]]


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that starts 4 bytes past a multiple of 16."""
    n, size = tensor.numel(), tensor.element_size()
    room = torch.zeros(n * size + 16, dtype=torch.uint8)
    start = (4 - room.data_ptr()) % 16
    moved = room[start : start + n * size].view(tensor.dtype).view(tensor.shape)
    return moved


def flat_sf(name: str, call: Call) -> torch.Tensor:
    rows, k = (2 * I, H) if name == "w1_weight_sf" else (H, I)
    return sf_storage(call[name], rows, k, E)


def linear_sf(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def test_good_call_is_described(call: Call) -> None:
    assert check_arguments(**call) == CheckedCall(T, H, I, E, -1)


# Each case: what to replace, by what, and the message's parts.
# fmt: off
MISTAKES: dict[str, tuple[str, Callable[[Call], Any], str, str]] = {
    # kinds
    "x_kind": ("x", lambda c: None, "has type NoneType", "a torch.Tensor"),
    "x_sf_kind": ("x_sf", lambda c: None, "has type NoneType", "a torch.Tensor"),
    "ids_kind": ("token_selected_experts", lambda c: [[0, 1]], "has type list", "a torch.Tensor"),
    "fc2_kind": ("fc2_input_scale", lambda c: 1.0, "has type float", "a torch.Tensor"),
    "w1_kind": ("w1_weight", lambda c: "w1", "has type str", "a torch.Tensor"),
    "output_kind": ("moe_output", lambda c: 3, "has type int", "a torch.Tensor"),
    # dtypes
    "x_dtype": ("x", lambda c: torch.zeros(T, H, dtype=torch.bfloat16), "has dtype torch.bfloat16", "torch.uint8 or torch.float4_e2m1fn_x2"),
    "x_sf_dtype": ("x_sf", lambda c: torch.zeros(T, H // 16), "has dtype torch.float32", "torch.float8_e4m3fn or torch.uint8"),
    "ids_dtype": ("token_selected_experts", lambda c: torch.zeros(T, K, dtype=torch.int16), "has dtype torch.int16", "torch.int32 or torch.int64"),
    "scales_dtype": ("token_final_scales", lambda c: torch.zeros(T, K, dtype=torch.float64), "has dtype torch.float64", "torch.float32, torch.bfloat16 or torch.float16"),
    "w1_dtype": ("w1_weight", lambda c: c["w1_weight"].view(torch.int8), "has dtype torch.int8", "torch.uint8 or"),
    "w1_sf_dtype": ("w1_weight_sf", lambda c: c["w1_weight_sf"].view(torch.float8_e5m2), "has dtype torch.float8_e5m2", "torch.float8_e4m3fn or torch.uint8"),
    "w1_alpha_dtype": ("w1_alpha", lambda c: c["w1_alpha"].half(), "has dtype torch.float16", "torch.float32"),
    "fc2_dtype": ("fc2_input_scale", lambda c: c["fc2_input_scale"].double(), "has dtype torch.float64", "torch.float32, one number"),
    "w2_dtype": ("w2_weight", lambda c: c["w2_weight"].int(), "has dtype torch.int32", "torch.uint8 or"),
    "w2_sf_dtype": ("w2_weight_sf", lambda c: c["w2_weight_sf"].float(), "has dtype torch.float32", "torch.float8_e4m3fn or torch.uint8"),
    "w2_alpha_dtype": ("w2_alpha", lambda c: c["w2_alpha"].bfloat16(), "has dtype torch.bfloat16", "torch.float32"),
    "output_tensor_dtype": ("moe_output", lambda c: torch.zeros(T, H), "has dtype torch.float32", "torch.bfloat16, the output_dtype"),
    "sparse": ("w1_alpha", lambda c: c["w1_alpha"].to_sparse(), "has layout torch.sparse_coo", "a dense (strided) tensor"),
    # shapes
    "x_rank": ("x", lambda c: c["x"].unsqueeze(0), f"has shape [1, {T}, {H // 2}]", "[T, H/2] with H a positive multiple of 64"),
    "x_hidden": ("x", lambda c: torch.zeros(T, 50, dtype=torch.uint8), f"has shape [{T}, 50]", "multiple of 64"),
    "x_no_hidden": ("x", lambda c: torch.zeros(T, 0, dtype=torch.uint8), f"has shape [{T}, 0]", "multiple of 64"),
    "x_sf_swizzled": ("x_sf", lambda c: linear_sf(128, H // 16), f"has shape [128, {H // 16}]", f"[{T}, {H // 16}]"),
    "x_sf_rank": ("x_sf", lambda c: linear_sf(T, H // 64, 4), f"has shape [{T}, {H // 64}, 4]", f"[{T}, {H // 16}]"),
    "ids_tokens": ("token_selected_experts", lambda c: torch.zeros(T + 1, K, dtype=torch.int32), f"has shape [{T + 1}, {K}]", f"[{T}, {K}], that is [T, top_k]"),
    "ids_top_k": ("token_selected_experts", lambda c: torch.zeros(T, K + 1, dtype=torch.int32), f"has shape [{T}, {K + 1}]", f"[{T}, {K}]"),
    "scales_shape": ("token_final_scales", lambda c: torch.zeros(T, K, 1), f"has shape [{T}, {K}, 1]", f"[{T}, {K}], that is [T, top_k]"),
    "w1_rank": ("w1_weight", lambda c: c["w1_weight"][0], f"has shape [{2 * I}, {H // 2}]", "[num_local_experts, 2*I, H/2]"),
    "w1_inter": ("w1_weight", lambda c: torch.zeros(E, 192, H // 2, dtype=torch.uint8), f"has shape [{E}, 192, {H // 2}]", "I a positive multiple of 64"),
    "w1_experts": ("w1_weight", lambda c: c["w1_weight"][:3], f"has shape [3, {2 * I}, {H // 2}]", f"[{E}, {2 * I}, {H // 2}]"),
    "w1_hidden": ("w1_weight", lambda c: torch.zeros(E, 2 * I, 32, dtype=torch.uint8), f"has shape [{E}, {2 * I}, 32]", f"[{E}, {2 * I}, {H // 2}]"),
    "w1_alpha_shape": ("w1_alpha", lambda c: torch.ones(1), "has shape [1]", f"[{E}], that is [num_local_experts]"),
    "fc2_numel": ("fc2_input_scale", lambda c: torch.ones(E), f"has {E} elements", "one number"),
    "w2_shape": ("w2_weight", lambda c: torch.zeros(E, I, H // 2, dtype=torch.uint8), f"has shape [{E}, {I}, {H // 2}]", f"[{E}, {H}, {I // 2}], that is [num_local_experts, H, I/2]"),
    "w2_alpha_shape": ("w2_alpha", lambda c: torch.ones(E, 1), f"has shape [{E}, 1]", f"[{E}]"),
    "output_shape": ("moe_output", lambda c: torch.zeros(T + 1, H, dtype=torch.bfloat16), f"has shape [{T + 1}, {H}]", f"[{T}, {H}], that is [T, H]"),
    # scale-factor storage
    "w1_sf_numel": ("w1_weight_sf", lambda c: linear_sf(E, 2 * I, 8), f"has {E * 2 * I * 8} elements", f"{E * 2 * I * H // 16} swizzled bytes"),
    "w2_sf_unpadded": ("w2_weight_sf", lambda c: linear_sf(E, H, I // 16), "look like linear, unpadded scales", f"{E * 256 * I // 16} swizzled bytes"),
    "w1_sf_copied_view": ("w1_weight_sf", lambda c: c["w1_weight_sf"].contiguous(), "for the 6-D shape [32, 4, 2, 4, 3, 4]", "the view with strides (16, 4, 1536, 1, 512, 3072)"),
    "w2_sf_copied_view": ("w2_weight_sf", lambda c: c["w2_weight_sf"].contiguous(), "for the 6-D shape [32, 4, 2, 4, 2, 4]", "the view with strides (16, 4, 1024, 1, 512, 2048)"),
    "w1_sf_gaps": ("w1_weight_sf", lambda c: gapped(flat_sf("w1_weight_sf", c)), "has strides (6144, 1)", "swizzled bytes"),
    "w2_sf_gaps": ("w2_weight_sf", lambda c: gapped(flat_sf("w2_weight_sf", c)), "has strides (4096, 1)", "swizzled bytes"),
    "w2_sf_permuted": ("w2_weight_sf", lambda c: c["w2_weight_sf"].permute(5, 4, 2, 0, 1, 3), "has strides", "swizzled bytes"),
    # strides
    "x_strides": ("x", lambda c: gapped(c["x"]), f"has strides ({H}, 1)", "contiguous"),
    "x_sf_strides": ("x_sf", lambda c: gapped(c["x_sf"]), f"has strides ({H // 8}, 1)", "contiguous"),
    "ids_strides": ("token_selected_experts", lambda c: c["token_selected_experts"].t().contiguous().t(), f"has strides (1, {T})", "contiguous"),
    "scales_strides": ("token_final_scales", lambda c: gapped(c["token_final_scales"]), f"has strides ({2 * K}, 1)", "contiguous"),
    "w1_strides": ("w1_weight", lambda c: gapped(c["w1_weight"]), "has strides", "contiguous"),
    "w2_strides": ("w2_weight", lambda c: gapped(c["w2_weight"]), "has strides", "contiguous"),
    "w1_alpha_expanded": ("w1_alpha", lambda c: torch.ones(1).expand(E), "has strides (0,)", "contiguous"),
    "w2_alpha_expanded": ("w2_alpha", lambda c: torch.ones(1).expand(E), "has strides (0,)", "contiguous"),
    "output_strides": ("moe_output", lambda c: gapped(torch.zeros(T, H, dtype=torch.bfloat16)), f"has strides ({2 * H}, 1)", "contiguous"),
    # alignment
    **{
        f"{name}_alignment": (name, lambda c, n=name: shifted(c[n]), "starts at an address 4 bytes past a multiple of 16", "aligned to 16 bytes")
        for name in ("x", "x_sf", "w1_weight", "w2_weight")
    },
    **{
        f"{name}_alignment": (name, lambda c, n=name: shifted(flat_sf(n, c)), "starts at an address 4 bytes past a multiple of 16", "aligned to 16 bytes")
        for name in ("w1_weight_sf", "w2_weight_sf")
    },
    "output_alignment": ("moe_output", lambda c: shifted(torch.zeros(T, H, dtype=torch.bfloat16)), "starts at an address 4 bytes", "aligned to 16 bytes"),
    # devices
    "x_device": ("x", lambda c: c["x"].to("meta"), "is on device meta", "on a CUDA device, or on the CPU"),
    **{
        f"{name}_device": (name, lambda c, n=name: c[n].to("meta"), "is on device meta", "on cpu, where 'x' is")
        for name in (
            "x_sf", "token_selected_experts", "token_final_scales", "w1_weight", "w1_weight_sf", "w1_alpha",
            "fc2_input_scale", "w2_weight", "w2_weight_sf", "w2_alpha",
        )
    },
    "output_device": ("moe_output", lambda c: torch.zeros(T, H, dtype=torch.bfloat16, device="meta"), "is on device meta", "on cpu, where 'x' is"),
    # numbers and flags
    "num_experts_kind": ("num_experts", lambda c: 4.0, "has type float", "an int, from 1 to 4096"),
    "num_experts_bool": ("num_experts", lambda c: True, "has type bool", "an int"),
    "num_experts_0": ("num_experts", lambda c: 0, "is 0", "from 1 to 4096"),
    "num_experts_many": ("num_experts", lambda c: 4097, "is 4097", "from 1 to 4096"),
    "top_k_0": ("top_k", lambda c: 0, "is 0", "from 1 to 32"),
    "top_k_many": ("top_k", lambda c: 33, "is 33", "from 1 to 32"),
    "top_k_kind": ("top_k", lambda c: None, "has type NoneType", "an int, from 1 to 32"),
    "local_0": ("num_local_experts", lambda c: 0, "is 0", "from 1 to num_experts = 4"),
    "local_many": ("num_local_experts", lambda c: 5, "is 5", "from 1 to num_experts = 4"),
    "local_kind": ("num_local_experts", lambda c: "4", "has type str", "an int"),
    "offset_negative": ("local_expert_offset", lambda c: -1, "is -1", "from 0 to num_experts - num_local_experts = 0"),
    "offset_past_end": ("local_expert_offset", lambda c: 1, "is 1", "from 0 to num_experts - num_local_experts = 0"),
    "offset_kind": ("local_expert_offset", lambda c: None, "has type NoneType", "an int"),
    "output_dtype": ("output_dtype", lambda c: torch.float32, "is torch.float32", "torch.bfloat16 or torch.float16"),
    "output_dtype_text": ("output_dtype", lambda c: "bfloat16", "is bfloat16", "torch.bfloat16 or torch.float16"),
    "finalize": ("use_fused_finalize", lambda c: 1, "has type int", "True or False"),
    "pdl": ("enable_pdl", lambda c: None, "has type NoneType", "True or False"),
    "stream": ("aux_stream", lambda c: 0, "has type int", "None or a torch.cuda.Stream"),
}
# fmt: on


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake(case: str, call: Call) -> None:
    argument, make, is_, should_be = MISTAKES[case]
    call[argument] = make(call)
    with pytest.raises(BadArgument) as caught:
        check_arguments(**call)
    error = caught.value
    assert error.argument == argument
    assert is_ in f"{error.is_} {error.hint}"
    assert should_be in error.should_be
    assert str(error).startswith(f"moe_nvfp4: argument '{argument}' {error.is_}; it should be ")
    assert re.search(r"\.$", str(error))


SHARED = (
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


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("where", ["begin", "end"])
def test_output_apart_from(name: str, where: str, call: Call) -> None:
    # the output takes the middle of a room; the input straddles its begin or its end
    size = T * H * 2
    old = flat_sf(name, call) if name.endswith("weight_sf") else call[name]
    room = torch.zeros(size + 2 * old.nbytes + 64, dtype=torch.uint8)
    first = -room.data_ptr() % 16
    begin = first + -(-old.nbytes // 16) * 16
    output = room[begin : begin + size].view(torch.bfloat16).view(T, H)
    step = 16 if old.nbytes >= 16 else 4
    at = begin + step - old.nbytes if where == "begin" else begin + size - step
    at = first + (at - first) // step * step
    call[name] = room[at : at + old.nbytes].view(old.dtype).view(old.shape)
    call["moe_output"] = output
    with pytest.raises(BadArgument, match=f"'moe_output' shares memory with '{name}'; it should"):
        check_arguments(**call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_touching_output_is_apart(dtype: torch.dtype, call: Call) -> None:
    room = torch.zeros(16 + T * H // 2 + T * H * 2, dtype=torch.uint8)
    first = -room.data_ptr() % 16
    call["x"] = room[first : first + T * H // 2].view(T, H // 2)
    end = first + T * H // 2
    call["moe_output"] = room[end : end + T * H * 2].view(dtype).view(T, H)
    call["output_dtype"] = dtype
    assert check_arguments(**call).tokens == T


# Each case: replacements that make another valid call.
VARIATIONS: dict[str, Callable[[Call], Call]] = {
    "as_built": lambda c: {},
    "x_sf_with_a_last_1": lambda c: {"x_sf": c["x_sf"].unsqueeze(-1)},
    "scales_as_bytes": lambda c: {
        name: c[name].view(torch.uint8) for name in ("x_sf", "w1_weight_sf", "w2_weight_sf")
    },
    "int64_ids": lambda c: {"token_selected_experts": c["token_selected_experts"].long()},
    "wild_ids": lambda c: {"token_selected_experts": c["token_selected_experts"] * 1000 - 1},
    "bf16_scales": lambda c: {"token_final_scales": c["token_final_scales"].bfloat16()},
    "fp16_scales": lambda c: {"token_final_scales": c["token_final_scales"].half()},
    "flat_sf": lambda c: {"w1_weight_sf": flat_sf("w1_weight_sf", c).flatten()},
    "sf_by_expert": lambda c: {"w2_weight_sf": flat_sf("w2_weight_sf", c)},
    "sf_padded_matrix": lambda c: {
        "w2_weight_sf": flat_sf("w2_weight_sf", c).view(E, 256, I // 16)
    },
    "fc2_0d": lambda c: {"fc2_input_scale": c["fc2_input_scale"].reshape(())},
    "fp16_output": lambda c: {"output_dtype": torch.float16},
    "output": lambda c: {"moe_output": torch.zeros(T, H, dtype=torch.bfloat16)},
    "local_given": lambda c: {"num_local_experts": E, "local_expert_offset": 0},
    "expert_parallel": lambda c: {
        "num_experts": 64,
        "num_local_experts": E,
        "local_expert_offset": 60,
    },
    "flags": lambda c: {"use_fused_finalize": False, "enable_pdl": False},
    "stream": lambda c: {"aux_stream": type("Stream", (), {"cuda_stream": 0})()},
    "no_tokens": lambda c: {
        name: c[name][:0] for name in ("x", "x_sf", "token_selected_experts", "token_final_scales")
    },
    "small_ones_unaligned": lambda c: {
        name: shifted(c[name])
        for name in ("token_final_scales", "w1_alpha", "fc2_input_scale", "w2_alpha")
    },
}
if hasattr(torch, "float4_e2m1fn_x2"):
    VARIATIONS["fp4_dtype"] = lambda c: {
        name: c[name].view(torch.float4_e2m1fn_x2) for name in ("x", "w1_weight", "w2_weight")
    }


@pytest.mark.parametrize("case", VARIATIONS)
def test_variation_is_accepted_on_the_quick_path(
    case: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    call |= VARIATIONS[case](call)
    slow = find_mistake(*call.values())

    def unexpected(*_: Any) -> CheckedCall:
        raise AssertionError("a common good call took the slow path")

    monkeypatch.setattr(checks, "find_mistake", unexpected)
    assert check_arguments(**call) == slow
    assert slow.tokens == call["x"].shape[0]


def test_six_dimensional_storage_is_accepted(call: Call) -> None:
    call["w2_weight_sf"] = call["w2_weight_sf"].permute(5, 2, 4, 0, 1, 3)
    assert call["w2_weight_sf"].is_contiguous()
    assert check_arguments(**call).hidden == H


def test_view_of_one_expert_may_have_any_stride_where_the_size_is_1() -> None:
    call = random_problem(2, 64, 64, 1, 1)
    view = call["w1_weight_sf"]
    call["w1_weight_sf"] = view.as_strided(view.shape, (16, 4, 7, 1, 7, 7))
    assert check_arguments(**call) == CheckedCall(2, 64, 64, 1, -1)


def test_too_many_slots(call: Call) -> None:
    # meta tensors carry the size without the memory; the size is looked at before x_sf's device
    tokens = 2**27
    huge = torch.zeros(1, 32, dtype=torch.uint8).expand(tokens, 32)
    call |= {"x": huge, "top_k": 32}
    with pytest.raises(BadArgument, match=r"'x' has 134217728 tokens; it should be at most 671"):
        check_arguments(**call)


def test_defaults_are_those_of_the_layer(call: Call) -> None:
    required = list(call)[:13]
    assert check_arguments(*(call[name] for name in required)) == check_arguments(**call)
