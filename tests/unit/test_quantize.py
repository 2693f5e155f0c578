"""Quantization: every code, ties, the recipe against torch's own casts, and the weights."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import E2M1, E4M3, nearest_code

from moejit.runtime import quantize as q
from moejit.runtime.errors import BadArgument
from moejit.runtime.layouts import (
    as_bytes,
    sf_storage,
    split_up_gate,
    unpack_fp4,
    unswizzle_scales,
)

FLOATS = st.floats(-1e4, 1e4, width=32)


# ---- single formats ------------------------------------------------------------------------------


def test_all_16_fp4_codes_round_trip() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = q.decode_e2m1(codes)
    assert values.tolist() == [*E2M1, *(-v for v in E2M1)]
    assert torch.signbit(values[8])
    assert torch.equal(q.e2m1_codes(values), codes)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0.25, 0),
        (0.2500001, 1),
        (0.75, 2),
        (1.25, 2),
        (1.75, 4),
        (2.5, 4),
        (3.5, 6),
        (5.0, 6),
        (5.000001, 7),
        (6.5, 7),
        (math.inf, 7),
        (-0.1, 8),
        (-0.0, 8),
        (-5.5, 15),
        (-math.inf, 15),
        (math.nan, 7),
        (-math.nan, 7),
    ],
)
def test_fp4_rounding(value: float, code: int) -> None:
    assert q.e2m1_codes(torch.tensor([value])).tolist() == [code]
    assert q.e2m1_codes(torch.tensor([value], dtype=torch.float64)).tolist() == [code]


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=50))
@settings(deadline=None, max_examples=100)
def test_fp4_rounds_to_the_nearest_even(values: list[float]) -> None:
    codes = q.e2m1_codes(torch.tensor(values)).tolist()
    expected = [nearest_code(abs(v), E2M1) | (8 * (math.copysign(1, v) < 0)) for v in values]
    assert codes == expected


def test_all_256_scale_bytes_decode_without_their_sign() -> None:
    values = q.decode_e4m3(torch.arange(256, dtype=torch.uint8))
    expected = torch.tensor([*E4M3, math.nan] * 2)
    assert torch.equal(values.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))
    own = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(values[:127], own[:127])


def test_all_127_finite_scales_round_trip() -> None:
    codes = torch.arange(127, dtype=torch.uint8)
    assert torch.equal(q.e4m3_bytes(q.decode_e4m3(codes)).view(torch.uint8), codes)


@given(st.lists(st.floats(0, 600, width=32), min_size=1, max_size=50))
@settings(deadline=None, max_examples=100)
def test_scales_round_to_the_nearest_even_and_saturate(values: list[float]) -> None:
    found = q.e4m3_bytes(torch.tensor(values)).view(torch.uint8).tolist()
    assert found == [nearest_code(min(v, 448.0), E4M3) for v in values]


def test_nan_scale_stays_nan() -> None:
    assert q.e4m3_bytes(torch.tensor([math.nan])).view(torch.uint8).tolist()[0] & 0x7F == 0x7F


# ---- tensors -------------------------------------------------------------------------------------


@given(
    st.lists(FLOATS, min_size=16, max_size=16), st.sampled_from([None, 1.0, 0.37]), st.booleans()
)
@settings(deadline=None, max_examples=100)
def test_recipe_step_by_step(values: list[float], scale: float | None, swizzle: bool) -> None:
    x = torch.tensor([values])
    packed, scales, used = q.quantize_nvfp4(x, scale, swizzle=swizzle)
    if swizzle:
        scales = unswizzle_scales(scales, 1, 16)
    amax = np.float32(np.abs(np.array(values, np.float32)).max())
    if scale is None:
        with np.errstate(over="ignore"):
            wanted = np.float32(448 * 6) / amax if amax else np.float32(1)
        wanted = min(wanted, np.float32(2.0**100))
        assert used.item() == wanted
    sf = min(float(amax / np.float32(6) * np.float32(used.item())), 448.0)
    assert scales.view(torch.uint8).item() == nearest_code(sf, E4M3)
    own = torch.tensor(sf).to(torch.float8_e4m3fn)
    assert scales.float().item() == own.float().item()
    step = np.float32(own.float().item()) / np.float32(used.item())
    for value, code in zip(values, unpack_fp4(packed)[0].tolist(), strict=True):
        exact = float(np.float32(value) / step) if step else 0.0
        assert code & 7 == nearest_code(min(abs(exact), 6.0), E2M1)
        assert code >> 3 == (step > 0 and math.copysign(1, value) < 0)


@given(st.integers(0, 2**31), st.sampled_from([1e-6, 0.02, 1.0, 3e4]))
@settings(deadline=None, max_examples=30)
def test_round_trip_is_within_half_a_step(seed: int, size: float) -> None:
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(seed)) * size
    packed, scales, scale = q.quantize_nvfp4(x)
    back = q.dequantize_nvfp4(packed, scales, scale)
    sf = scales.float().repeat_interleave(16, dim=1) / scale
    # the gap between FP4 values is 0.5 up to 2, 1 up to 4, 2 up to 6; sf itself is within 1/16
    gap = torch.where(back.abs() >= 4 * sf, 2.0, torch.where(back.abs() >= 2 * sf, 1.0, 0.5))
    slack = (x.abs() - 6 * sf).clamp(min=0)  # saturated because sf was rounded down
    assert bool(((x - back).abs() <= gap * sf / 2 * 1.0001 + slack).all())
    assert bool((slack <= x.abs() / 16 * 1.0001).all())


def test_quantizing_twice_changes_nothing() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    packed, scales, scale = q.quantize_nvfp4(x)
    again, _, _ = q.quantize_nvfp4(q.dequantize_nvfp4(packed, scales, scale), scale)
    first, second = unpack_fp4(packed), unpack_fp4(again)
    same_scale = (first & 7).view(4, 4, 16).amax(-1) == 7
    assert bool((first.view(4, 4, 16) == second.view(4, 4, 16))[same_scale].all())


def test_zero_block_has_zero_scale_and_zero_codes() -> None:
    x = torch.ones(1, 32)
    x[0, :16] = 0
    packed, scales, _ = q.quantize_nvfp4(x)
    assert scales.view(torch.uint8)[0, 0] == 0
    assert packed[0, :8].tolist() == [0] * 8


def test_zero_tensor_has_global_scale_1() -> None:
    packed, scales, scale = q.quantize_nvfp4(torch.zeros(2, 64))
    assert scale.item() == 1.0
    assert not packed.any()
    assert not scales.view(torch.uint8).any()


def test_tiny_tensor_keeps_a_finite_global_scale() -> None:
    packed, scales, scale = q.quantize_nvfp4(torch.full((1, 64), 1e-40))
    assert scale.item() == 2.0**100
    assert bool(torch.isfinite(q.dequantize_nvfp4(packed, scales, scale)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_widened_exactly(dtype: torch.dtype) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    for narrow, wide in zip(q.quantize_nvfp4(x), q.quantize_nvfp4(x.float()), strict=True):
        assert torch.equal(as_or_same(narrow), as_or_same(wide))


def as_or_same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_floating_point() and tensor.element_size() > 1 else as_bytes(tensor)


def test_without_the_check_nan_poisons_only_its_block() -> None:
    x = torch.ones(1, 48)
    x[0, 3], x[0, 20] = math.nan, math.inf
    packed, scales, _ = q.quantize_nvfp4(x, 1.0, check_finite=False)
    assert scales.view(torch.uint8)[0].tolist()[:2] == [0x7F, 0x7E]
    assert bool(q.dequantize_nvfp4(packed, scales)[0, :16].isnan().all())
    assert q.dequantize_nvfp4(packed, scales)[0, 20] == 448 * 6
    assert bool(torch.isfinite(q.dequantize_nvfp4(packed, scales)[0, 16:]).all())


def test_no_rows() -> None:
    packed, scales, scale = q.quantize_nvfp4(torch.zeros(0, 64))
    assert packed.shape == (0, 32)
    assert scales.shape == (0, 4)
    assert q.dequantize_nvfp4(packed, scales, scale).shape == (0, 64)


def test_decoding_ignores_the_sign_of_a_scale() -> None:
    packed, scales, _ = q.quantize_nvfp4(torch.randn(2, 64))
    signed = as_bytes(scales) | 0x80
    assert torch.equal(q.dequantize_nvfp4(packed, signed), q.dequantize_nvfp4(packed, scales))


def test_decoded_products_are_exact_in_bfloat16() -> None:
    codes, scales = torch.arange(8, dtype=torch.uint8), torch.arange(127, dtype=torch.uint8)
    products = q.decode_e2m1(codes)[:, None] * q.decode_e4m3(scales)[None]
    assert torch.equal(products.bfloat16().float(), products)


# ---- the weights ---------------------------------------------------------------------------------


def test_prepared_weights_decode_to_the_originals() -> None:
    experts, inter, hidden = 3, 128, 192
    generator = torch.Generator().manual_seed(3)
    gate, up = (torch.randn(experts, inter, hidden, generator=generator) * s for s in (0.01, 0.05))
    down = torch.randn(experts, hidden, inter, generator=generator) * 0.02
    gate[1] *= 100  # experts get scales of their own
    w = q.prepare_weights(gate, up, down, x_global_scale=4.0, fc2_input_scale=8.0)
    assert torch.equal(w.w1_alpha, 1 / (4.0 * w.w1_global_scale))
    assert torch.equal(w.w2_alpha, 1 / (8.0 * w.w2_global_scale))
    assert w.fc2_input_scale.tolist() == [8.0]
    sf1 = sf_storage(w.w1_weight_sf, 2 * inter, hidden, experts)
    sf2 = sf_storage(w.w2_weight_sf, hidden, inter, experts)
    for e in range(experts):
        rows = q.dequantize_nvfp4(w.w1_weight[e], sf1[e], w.w1_global_scale[e], swizzled=True)
        got_up, got_gate = split_up_gate(rows)
        got_down = q.dequantize_nvfp4(w.w2_weight[e], sf2[e], w.w2_global_scale[e], swizzled=True)
        for got, was in ((got_up, up[e]), (got_gate, gate[e]), (got_down, down[e])):
            assert float((got - was).norm() / was.norm()) < 0.12
        assert float(w.w1_global_scale[e]) == pytest.approx(
            2688 / max(float(gate[e].abs().max()), float(up[e].abs().max())), rel=1e-6
        )


def test_the_seven_arguments_are_fields() -> None:
    weights = q.prepare_weights(torch.ones(1, 64, 64), torch.ones(1, 64, 64), torch.ones(1, 64, 64))
    arguments = weights.arguments()
    fields = {f.name for f in dataclasses.fields(weights)}
    assert set(arguments) == fields - {"w1_global_scale", "w2_global_scale"}
    assert weights.w1_weight.dtype is torch.uint8
    assert weights.w1_weight_sf.dtype is torch.float8_e4m3fn
    with pytest.raises(dataclasses.FrozenInstanceError):
        weights.w1_alpha = torch.ones(1)  # type: ignore[misc]


def test_activations_are_linear() -> None:
    made = q.quantize_activations(torch.randn(3, 128))
    assert made.x.shape == (3, 64)
    assert made.x_sf.shape == (3, 8)
    assert made.x_sf.is_contiguous()


# ---- mistakes ------------------------------------------------------------------------------------

W = torch.ones(1, 64, 64)


@pytest.mark.parametrize(
    ("call", "argument", "is_"),
    [
        pytest.param(lambda: q.quantize_nvfp4(torch.ones(2, 24)), "x", "shape (2, 24)", id="k"),
        pytest.param(
            lambda: q.quantize_nvfp4(torch.ones(2, 16, dtype=torch.int32)), "x", "int32", id="int"
        ),
        pytest.param(
            lambda: q.quantize_nvfp4(torch.full((1, 16), math.inf)), "x", "infinity", id="inf"
        ),
        pytest.param(
            lambda: q.quantize_nvfp4(torch.ones(1, 16), torch.ones(2)),
            "global_scale",
            "2 elements",
            id="scale",
        ),
        pytest.param(
            lambda: q.prepare_weights(torch.ones(1, 63, 64), W, W), "gate", "63", id="inter"
        ),
        pytest.param(lambda: q.prepare_weights(W, torch.ones(1, 128, 64), W), "up", "128", id="up"),
        pytest.param(
            lambda: q.prepare_weights(W, W, torch.ones(1, 128, 64)), "down", "128", id="down"
        ),
        pytest.param(lambda: q.prepare_weights(W * math.nan, W, W), "gate", "NaN", id="nan"),
    ],
)
def test_helpers_name_the_bad_argument(call: object, argument: str, is_: str) -> None:
    assert callable(call)
    with pytest.raises(BadArgument) as caught:
        call()
    assert caught.value.argument == argument
    assert is_ in caught.value.is_
