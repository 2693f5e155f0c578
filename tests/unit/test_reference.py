"""The reference against an independent float64 loop, its edge cases, and the comparison."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import decode_row, e4m3_value, quantize_block, random_problem

from moejit.codegen.layouts import interleaved_row, sf_offset, sf_storage_bytes
from moejit.runtime import reference
from moejit.runtime.errors import BadArgument
from moejit.runtime.layouts import sf_storage, unpack_fp4
from moejit.runtime.quantize import dequantize_nvfp4
from moejit.runtime.reference import compare, gemm2_from_codes, moe_reference, run_reference

Call = dict[str, Any]


# ---- the layer in numpy loops --------------------------------------------------------------------


def weight_matrix(packed: torch.Tensor, sf: torch.Tensor, expert: int) -> np.ndarray:
    """One expert's (rows, K) matrix in float64, with scales picked by the offset formula."""
    rows, k = packed.shape[1], 2 * packed.shape[2]
    storage = sf_storage(sf.view(torch.uint8), rows, k, packed.shape[0]).numpy()[expert]
    assert storage.size == sf_storage_bytes(rows, k)
    return np.stack(
        [
            decode_row(
                packed[expert, row].numpy(),
                np.array([storage[sf_offset(row, col, k)] for col in range(k // 16)]),
            )
            for row in range(rows)
        ]
    )


def layer_in_loops(
    c: Call,
) -> tuple[np.ndarray, dict[tuple[int, int], tuple[list[int], list[int]]]]:
    """(T, H) float64 before rounding, and (codes, scale bytes) of every local slot."""
    tokens, hidden = c["x"].shape[0], 2 * c["x"].shape[1]
    local, inter = c["w2_weight"].shape[0], 2 * c["w2_weight"].shape[2]
    encode = np.float32(c["fc2_input_scale"].item())
    w1 = [weight_matrix(c["w1_weight"], c["w1_weight_sf"], e) for e in range(local)]
    w2 = [weight_matrix(c["w2_weight"], c["w2_weight_sf"], e) for e in range(local)]
    up_rows = [interleaved_row(i, is_gate=False) for i in range(inter)]
    gate_rows = [interleaved_row(i, is_gate=True) for i in range(inter)]
    x_sf = c["x_sf"].reshape(tokens, -1).view(torch.uint8).numpy()
    out, middle = np.zeros((tokens, hidden)), {}
    for t in range(tokens):
        row = decode_row(c["x"][t].numpy(), x_sf[t])
        for j in range(c["top_k"]):
            e = int(c["token_selected_experts"][t, j]) - c["local_expert_offset"]
            if not 0 <= e < local:
                continue
            first = w1[e] @ row * float(c["w1_alpha"][e])
            up, gate = first[up_rows], first[gate_rows]
            y = (up * gate / (1 + np.exp(-gate))).astype(np.float32)
            codes, scales = [], []
            for start in range(0, inter, 16):
                block, sf = quantize_block(y[start : start + 16], encode)
                codes += block
                scales.append(sf)
            middle[t, j] = codes, scales
            table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
            values = np.array(
                [
                    (-1 if q & 8 else 1) * table[q & 7] * e4m3_value(scales[i // 16])
                    for i, q in enumerate(codes)
                ]
            )
            weight = float(c["w2_alpha"][e]) * float(c["token_final_scales"][t, j])
            out[t] += w2[e] @ values * weight
    return out, middle


PROBLEMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_slot": {"top_k": 1},
    "all_experts": {"top_k": 4, "tokens": 3},
    "rows_not_128": {"hidden": 192, "intermediate": 192, "tokens": 2},
    "int64_bf16": {"ids_dtype": torch.int64, "scales_dtype": torch.bfloat16},
    "fp16_scales_and_output": {"scales_dtype": torch.float16, "output_dtype": torch.float16},
    "expert_parallel": {
        "num_experts": 8,
        "num_local_experts": 3,
        "local_expert_offset": 2,
        "top_k": 3,
        "tokens": 6,
    },
}


@pytest.mark.parametrize("accumulate", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PROBLEMS)
def test_agrees_with_loops(name: str, accumulate: torch.dtype) -> None:
    call = random_problem(**{"hidden": 64, "seed": 7, **PROBLEMS[name]})
    wanted, middle = layer_in_loops(call)
    out, inner = moe_reference(**call, accumulate=accumulate, return_intermediate=True)
    assert inner is not None
    assert out.dtype is call["output_dtype"]
    codes = unpack_fp4(inner.packed)
    for t in range(out.shape[0]):
        for j in range(call["top_k"]):
            assert bool(inner.local[t, j]) == ((t, j) in middle)
            if accumulate is torch.float64:
                slot = middle.get((t, j), ([0] * codes.shape[-1], [0] * inner.sf.shape[-1]))
                assert (codes[t, j].tolist(), inner.sf[t, j].tolist()) == slot
    if accumulate is torch.float64:
        assert torch.equal(out, torch.from_numpy(wanted).to(out.dtype))
    verdict = compare(out, torch.from_numpy(wanted))
    assert verdict.passed, verdict


def test_problem_is_worth_comparing() -> None:
    """The random problem uses the range of both formats: neither saturated nor flushed to zero."""
    call = random_problem(tokens=64, hidden=256, intermediate=128)
    out, inner = moe_reference(**call, return_intermediate=True)
    assert inner is not None
    assert 8 < float(inner.sf.float().mean())
    assert int((inner.sf == 0x7E).sum()) < 0.01 * inner.sf.numel()
    assert len(torch.unique(unpack_fp4(inner.packed))) >= 15
    assert bool(out.isfinite().all())


# ---- edges ---------------------------------------------------------------------------------------


def test_no_tokens() -> None:
    call = random_problem(tokens=4)
    for name in ("x", "x_sf", "token_selected_experts", "token_final_scales"):
        call[name] = call[name][:0]
    out, inner = moe_reference(**call, return_intermediate=True)
    assert inner is not None
    assert out.shape == (0, 128)
    assert inner.packed.shape == (0, 2, 32)


def test_token_without_a_local_expert_is_zero() -> None:
    call = random_problem(num_experts=8, num_local_experts=2, local_expert_offset=4)
    call["token_selected_experts"][:] = torch.tensor([3, 6], dtype=torch.int32)
    call["token_selected_experts"][1] = torch.tensor([-1, 5], dtype=torch.int32)
    call["token_selected_experts"][2] = torch.tensor([-(2**31), 2**31 - 1])
    out = run_reference(**call)
    assert bool((out[[0, 2, 3, 4]] == 0).all())
    assert bool((out[1] != 0).any())


def test_foreign_slots_change_nothing() -> None:
    call = random_problem(top_k=1)
    wanted = run_reference(**call)
    ids, scales = call["token_selected_experts"], call["token_final_scales"]
    call["token_selected_experts"] = torch.cat((torch.full_like(ids, -1), ids), dim=1)
    call["token_final_scales"] = torch.cat((torch.full_like(scales, math.nan), scales), dim=1)
    assert torch.equal(run_reference(**call | {"top_k": 2}), wanted)


def test_duplicate_ids_count_twice() -> None:
    call = random_problem(top_k=1, output_dtype=torch.float16)
    single, _ = moe_reference(**call, accumulate=torch.float64)
    for name in ("token_selected_experts", "token_final_scales"):
        call[name] = call[name].repeat(1, 2)
    double, _ = moe_reference(**call | {"top_k": 2}, accumulate=torch.float64)
    assert compare(double, 2 * single).passed


def test_ranks_add_up_to_the_whole() -> None:
    call = random_problem(num_experts=4, top_k=3, tokens=7)
    whole, _ = moe_reference(**call, accumulate=torch.float64)
    total = torch.zeros(whole.shape, dtype=torch.float64)
    for rank in range(2):
        part = random_problem(num_experts=4, top_k=3, tokens=7)
        for name in ("w1_weight", "w1_alpha", "w2_weight", "w2_alpha"):
            part[name] = part[name][2 * rank : 2 * rank + 2]
        for name in ("w1_weight_sf", "w2_weight_sf"):
            rows, k = (128, 128) if name == "w1_weight_sf" else (128, 64)
            part[name] = sf_storage(part[name], rows, k, 4)[2 * rank : 2 * rank + 2]
        part |= {"num_local_experts": 2, "local_expert_offset": 2 * rank}
        total += moe_reference(**part, accumulate=torch.float64)[0].double()
    assert compare(whole, total).passed


def test_given_output_is_written_and_returned() -> None:
    call = random_problem()
    wanted = run_reference(**call)
    call["moe_output"] = torch.full_like(wanted, math.nan)
    assert run_reference(**call) is call["moe_output"]
    assert torch.equal(call["moe_output"], wanted)


def test_fp16_output_overflows_to_infinity() -> None:
    call = random_problem(output_dtype=torch.float16)
    call["w2_alpha"] = call["w2_alpha"] * 1e9
    out = run_reference(**call)
    assert bool(out.isinf().any())
    assert not out.isnan().any()


def test_chunks_of_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    call = random_problem(tokens=9)
    whole, inner = moe_reference(**call, accumulate=torch.float64, return_intermediate=True)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 2 * 128 * 2)
    parts, pieces = moe_reference(**call, accumulate=torch.float64, return_intermediate=True)
    assert torch.equal(whole, parts)
    assert inner is not None
    assert pieces is not None
    assert all(torch.equal(getattr(inner, n), getattr(pieces, n)) for n in vars(inner))


def test_second_gemm_from_codes_is_the_layer() -> None:
    call = random_problem(num_experts=6, num_local_experts=4, local_expert_offset=1)
    out, inner = moe_reference(**call, return_intermediate=True)
    assert inner is not None
    names = ("token_selected_experts", "token_final_scales")
    weights = ("w2_weight", "w2_weight_sf", "w2_alpha")
    again = gemm2_from_codes(
        inner.packed,
        inner.sf,
        *(call[name] for name in names + weights),
        local_expert_offset=1,
    )
    assert torch.equal(out, again)


def test_precision_switches_are_restored() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        run_reference(**random_problem())
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_checks_its_arguments() -> None:
    with pytest.raises(BadArgument, match="'top_k' is 99"):
        run_reference(**random_problem() | {"top_k": 99})


# ---- the intermediate's quantization -------------------------------------------------------------


@given(
    st.lists(st.floats(-1e5, 1e5, width=32), min_size=16, max_size=16),
    st.floats(2.0**-20, 2.0**20, width=32),
)
@settings(deadline=None, max_examples=200)
def test_quantization_formula(values: list[float], encode: float) -> None:
    packed, sf = reference.quantize_intermediate(torch.tensor([values]), torch.tensor([encode]))
    wanted = quantize_block(np.array(values, np.float32), np.float32(encode))
    assert (unpack_fp4(packed)[0].tolist(), sf.item()) == wanted


def test_scale_of_zero_saturates_codes_and_decodes_to_zero() -> None:
    y = torch.zeros(1, 16)
    y[0, 1], y[0, 2] = 1e-6, -1e-6
    packed, sf = reference.quantize_intermediate(y, torch.ones(1))
    assert sf.item() == 0
    assert unpack_fp4(packed)[0].tolist()[:4] == [0, 7, 15, 0]
    assert bool((dequantize_nvfp4(packed, sf) == 0).all())


def test_nan_makes_its_scale_nan() -> None:
    y = torch.ones(1, 32)
    y[0, 20] = math.nan
    _, sf = reference.quantize_intermediate(y, torch.ones(1))
    assert sf[0, 1].item() == 0x7F
    assert sf[0, 0].item() < 0x7F


# ---- comparison ----------------------------------------------------------------------------------


def ones(n: int = 100_000) -> torch.Tensor:
    return torch.ones(n)


TOLERANCE = 2.0**-7 + 2.0**-8  # of a tensor of ones


@pytest.mark.parametrize(
    ("wrong", "by", "passed"),
    [
        pytest.param(0, 0.0, True, id="equal"),
        pytest.param(100_000, 0.99 * TOLERANCE, True, id="all_within"),
        pytest.param(10, 7.9 * TOLERANCE, True, id="few_beyond"),
        pytest.param(11, 1.1 * TOLERANCE, False, id="too_many_beyond"),
        pytest.param(1, 8.1 * TOLERANCE, False, id="one_far_beyond"),
        pytest.param(1, math.nan, False, id="nan"),
        pytest.param(1, math.inf, False, id="infinity"),
    ],
)
def test_comparison(wrong: int, by: float, passed: bool) -> None:
    out = ones()
    out[:wrong] += by
    verdict = compare(out, ones())
    assert verdict.passed is passed
    assert ("passed" in str(verdict)) is passed
    if wrong and not math.isfinite(by):
        assert (verdict.worst, verdict.worst_index) == (math.inf, (0,))


def test_nan_in_the_reference_never_passes() -> None:
    ref = ones(10)
    ref[3] = math.nan
    assert not compare(ref, ref).passed
    assert not compare(ones(10), ref).passed


def test_infinities_agree_only_with_themselves() -> None:
    ref = ones(10)
    ref[3] = math.inf
    assert compare(ref, ref).passed
    assert not compare(ones(10), ref).passed
    assert not compare(-ref, ref).passed
    other = ref.clone()
    other[4] = 100
    assert not compare(other, ref).passed


def test_comparison_with_zeros() -> None:
    assert compare(torch.zeros(3), torch.zeros(3)).passed
    assert not compare(torch.ones(3) * 1e-30, torch.zeros(3)).passed
    assert compare(torch.zeros(0, 4), torch.zeros(0, 4)).passed


def test_comparison_finds_the_worst_element() -> None:
    ref = torch.ones(3, 4, 5)
    out = ref.clone()
    out[2, 1, 3] = 2
    assert compare(out, ref).worst_index == (2, 1, 3)


def test_comparison_needs_equal_shapes() -> None:
    with pytest.raises(BadArgument, match="'out' has shape"):
        compare(torch.ones(2, 1), torch.ones(2))
