"""The layouts: index formulas, their tensor counterparts, and FlashInfer's documented contract."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moejit.codegen import layouts as formula
from moejit.runtime import layouts
from moejit.runtime.errors import BadArgument

MATRICES = st.tuples(st.integers(1, 300), st.integers(1, 5).map(lambda n: 64 * n))


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


# ---- formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "col", "offset"),
    [
        (0, 0, 0),
        (0, 3, 3),
        (1, 0, 16),
        (31, 0, 496),
        (32, 0, 4),
        (127, 3, 511),
        (0, 4, 512),
        (128, 0, 2 * 512),
    ],
)
def test_scale_offset_in_rows_of_128_elements(row: int, col: int, offset: int) -> None:
    assert formula.sf_offset(row, col, k=128) == offset


@given(MATRICES)
@settings(deadline=None, max_examples=20)
def test_scale_offsets_are_distinct_in_range_and_invertible(matrix: tuple[int, int]) -> None:
    rows, k = matrix
    cells = [(row, col) for row in range(rows) for col in range(formula.sf_cols(k))]
    offsets = [formula.sf_offset(row, col, k) for row, col in cells]
    assert len(set(offsets)) == len(cells)
    assert max(offsets) < formula.sf_storage_bytes(rows, k)
    assert [formula.sf_position(offset, k) for offset in offsets] == cells


def test_2880_rows_have_23_row_tiles_of_scales() -> None:
    assert formula.sf_tiles(2880, 2880) == (23, 45)
    assert formula.sf_storage_bytes(2880, 2880) == 23 * 45 * 512


def test_up_comes_first_in_every_128_rows_of_w1() -> None:
    assert [formula.source_row(row) for row in (0, 63, 64, 127, 128, 192)] == [
        (False, 0),
        (False, 63),
        (True, 0),
        (True, 63),
        (False, 64),
        (True, 64),
    ]


@given(st.integers(0, 10**6), st.booleans())
def test_row_map_is_invertible(row: int, is_gate: bool) -> None:
    assert formula.source_row(formula.interleaved_row(row, is_gate=is_gate)) == (is_gate, row)


def test_even_elements_are_in_the_low_nibble() -> None:
    assert [formula.nibble(k) for k in range(4)] == [(0, 0), (0, 4), (1, 0), (1, 4)]


@pytest.mark.parametrize(("value", "multiple", "expected"), [(0, 4, 0), (1, 4, 4), (8, 4, 8)])
def test_round_up(value: int, multiple: int, expected: int) -> None:
    assert formula.round_up(value, multiple) == expected
    assert formula.ceil_div(value, multiple) == expected // multiple


# ---- tensors against the formulas ----------------------------------------------------------------


@given(MATRICES, st.integers(1, 3))
@settings(deadline=None, max_examples=15)
def test_swizzled_scales_are_where_the_formula_says(matrix: tuple[int, int], experts: int) -> None:
    rows, k = matrix
    scales = random_bytes(experts, rows, k // 16)
    storage = layouts.swizzle_scales(scales)
    assert storage.shape == (experts, formula.sf_storage_bytes(rows, k))
    offsets = [[formula.sf_offset(r, c, k) for c in range(k // 16)] for r in range(rows)]
    assert torch.equal(storage[:, torch.tensor(offsets)], scales)


@given(MATRICES, st.sampled_from([(), (1,), (3,), (2, 2)]))
@settings(deadline=None, max_examples=30)
def test_swizzle_round_trip(matrix: tuple[int, int], batch: tuple[int, ...]) -> None:
    rows, k = matrix
    scales = random_bytes(*batch, rows, k // 16)
    storage = layouts.swizzle_scales(scales)
    assert torch.equal(layouts.unswizzle_scales(storage, rows, k), scales)


def test_scale_padding_is_zero() -> None:
    storage = layouts.swizzle_scales(torch.full((40, 5), 0x38, dtype=torch.uint8))
    assert storage.numel() == 2 * 512
    assert int((storage == 0x38).sum()) == 40 * 5
    assert int((storage == 0).sum()) == 2 * 512 - 40 * 5


def test_scales_keep_their_dtype() -> None:
    scales = random_bytes(128, 8).view(torch.float8_e4m3fn)
    storage = layouts.swizzle_scales(scales)
    assert storage.dtype is torch.float8_e4m3fn
    assert layouts.unswizzle_scales(storage, 128, 128).dtype is torch.float8_e4m3fn


def test_6d_view_shares_memory_and_has_the_documented_indices() -> None:
    rows, k, experts = 200, 192, 3
    scales = random_bytes(experts, rows, k // 16)
    storage = layouts.swizzle_scales(scales)
    view = layouts.sf_6d_view(storage, rows, k, experts)
    assert view.data_ptr() == storage.data_ptr()
    assert tuple(view.shape) == formula.sf_6d_shape(rows, k, experts) == (32, 4, 2, 4, 3, 3)
    assert tuple(view.stride()) == formula.sf_6d_strides(rows, k)
    for expert, row, col in [(0, 0, 0), (1, 37, 5), (2, 199, 11), (2, 130, 4)]:
        index = (row % 32, row % 128 // 32, row // 128, col % 4, col // 4, expert)
        assert view[index] == scales[expert, row, col]


@pytest.mark.parametrize("form", ["view", "flat", "by_expert", "padded_matrix"])
def test_storage_is_found_behind_every_form(form: str) -> None:
    rows, k, experts = 200, 128, 2
    storage = layouts.swizzle_scales(random_bytes(experts, rows, k // 16))
    given_as = {
        "view": layouts.sf_6d_view(storage, rows, k, experts),
        "flat": storage.flatten(),
        "by_expert": storage,
        "padded_matrix": storage.view(experts, 256, 8),
    }[form]
    found = layouts.sf_storage(given_as, rows, k, experts)
    assert found.data_ptr() == storage.data_ptr()
    assert torch.equal(found, storage)


@given(st.integers(1, 4), st.sampled_from([-2, 0, 1, 2]), st.booleans())
@settings(deadline=None, max_examples=30)
def test_interleave_round_trip(groups: int, dim: int, as_e4m3: bool) -> None:
    shape = [2, 3, 5]
    shape[dim] = 64 * groups
    up, gate = random_bytes(*shape), random_bytes(*shape)
    if as_e4m3:
        up, gate = up.view(torch.float8_e4m3fn), gate.view(torch.float8_e4m3fn)
    joined = layouts.interleave_up_gate(up, gate, dim)
    assert joined.dtype is up.dtype
    for was, now in zip((up, gate), layouts.split_up_gate(joined, dim), strict=True):
        assert torch.equal(was.view(torch.uint8), now.view(torch.uint8))


def test_interleave_puts_64_rows_of_up_before_64_of_gate() -> None:
    up = torch.arange(128).unsqueeze(1)
    joined = layouts.interleave_up_gate(up, up + 1000, dim=0).flatten().tolist()
    expected = [up_row + 1000 * gate for gate, up_row in map(formula.source_row, range(256))]
    assert joined == expected
    assert joined[:64] == list(range(64))
    assert joined[64:128] == list(range(1000, 1064))


@given(st.integers(0, 40), st.integers(1, 20))
@settings(deadline=None, max_examples=20)
def test_pack_round_trip(rows: int, pairs: int) -> None:
    codes = torch.randint(0, 16, (rows, 2 * pairs), dtype=torch.uint8)
    assert torch.equal(layouts.unpack_fp4(layouts.pack_fp4(codes)), codes)


def test_pack_puts_the_even_element_in_the_low_nibble() -> None:
    assert layouts.pack_fp4(torch.tensor([1, 2, 3, 15], dtype=torch.uint8)).tolist() == [0x21, 0xF3]


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no FP4 dtype")
def test_fp4_dtype_is_taken_like_bytes() -> None:
    packed = random_bytes(3, 8)
    assert torch.equal(
        layouts.unpack_fp4(packed.view(torch.float4_e2m1fn_x2)), layouts.unpack_fp4(packed)
    )


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        pytest.param(lambda: layouts.as_bytes(torch.zeros(2)), "tensor", id="dtype"),
        pytest.param(lambda: layouts.pack_fp4(random_bytes(3)), "codes", id="odd"),
        pytest.param(
            lambda: layouts.interleave_up_gate(torch.zeros(65, 2), torch.zeros(65, 2)),
            "up",
            id="groups",
        ),
        pytest.param(
            lambda: layouts.interleave_up_gate(torch.zeros(64, 2), torch.zeros(128, 2)),
            "gate",
            id="shapes",
        ),
        pytest.param(lambda: layouts.split_up_gate(torch.zeros(64, 2)), "rows", id="split"),
        pytest.param(
            lambda: layouts.unswizzle_scales(random_bytes(500), 128, 64), "storage", id="unswizzle"
        ),
        pytest.param(lambda: layouts.sf_6d_view(random_bytes(512), 129, 64, 1), "flat", id="view"),
    ],
)
def test_helpers_name_the_bad_argument(call: object, argument: str) -> None:
    assert callable(call)
    with pytest.raises(BadArgument) as caught:
        call()
    assert caught.value.argument == argument
    assert caught.value.function != "moe_nvfp4"
