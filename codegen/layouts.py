"""NVFP4 storage as plain index formulas: bytes, scale factors, interleaved rows. No torch.

The physical layouts are the public contract of FlashInfer's ``cute_dsl_fused_moe_nvfp4`` and of
the 128x4 block-scale layout in the PTX ISA (``tcgen05.mma`` block scaling) and in the cuBLAS
documentation ("1D block scaling factors layout").

One FP4 tensor of R rows and K columns is three things:

* codes: (R, K/2) uint8, row-major; byte j of a row holds element 2j in its low nibble and element
  2j+1 in its high nibble;
* scale factors, logically (R, K/16) e4m3 bytes: one for 16 elements along K;
* physically either *linear* (row-major, no padding) or *swizzled*: rows padded to 128 and columns
  to 4, one tile of 128 x 4 scales being 512 contiguous bytes.
"""

from __future__ import annotations

__all__ = [
    "SF_TILE_BYTES",
    "SF_TILE_COLS",
    "SF_TILE_ROWS",
    "SF_VEC",
    "UP_GATE_GROUP",
    "ceil_div",
    "interleaved_row",
    "nibble",
    "round_up",
    "sf_6d_shape",
    "sf_6d_strides",
    "sf_cols",
    "sf_offset",
    "sf_position",
    "sf_storage_bytes",
    "sf_tiles",
    "source_row",
]

SF_VEC = 16  # elements of K that share one scale factor
SF_TILE_ROWS = 128  # rows of a scale-factor tile
SF_TILE_COLS = 4  # scale factors of a tile along K: 64 elements
SF_TILE_BYTES = 512  # 128 * 4 scales of one byte
UP_GATE_GROUP = 64  # rows of `up`, then as many of `gate`, in w1


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for a >= 0 and b > 0."""
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is >= a."""
    return -(-a // multiple) * multiple


def nibble(k: int) -> tuple[int, int]:
    """Where element k of a row is: (byte in the row, shift in bits within that byte)."""
    return k >> 1, (k & 1) << 2


def sf_cols(k: int) -> int:
    """Scale factors of a row of k elements."""
    return ceil_div(k, SF_VEC)


def sf_tiles(rows: int, k: int) -> tuple[int, int]:
    """Tiles of 128 x 4 scale factors: (tiles along rows, tiles along K)."""
    return ceil_div(rows, SF_TILE_ROWS), ceil_div(k, SF_VEC * SF_TILE_COLS)


def sf_storage_bytes(rows: int, k: int) -> int:
    """Bytes of the swizzled scale factors of one (rows, k) matrix, padding included.

    For example 2880 rows are 22.5 tiles, stored as 23.
    """
    row_tiles, col_tiles = sf_tiles(rows, k)
    return row_tiles * col_tiles * SF_TILE_BYTES


def sf_offset(row: int, col: int, k: int) -> int:
    """Byte offset of the scale factor (row, col) in the swizzled storage of one (rows, k) matrix.

    Args:
        row: Row of the matrix; rows of `w1` are counted in interleaved order.
        col: Scale-factor column: elements 16*col .. 16*col + 15 of K.
        k: Elements in a row of the matrix.

    Returns:
        Byte offset from the start of that matrix (of that expert).
    """
    tile = (row // 128) * ceil_div(k, 64) + col // 4
    return tile * SF_TILE_BYTES + (row % 32) * 16 + (row % 128) // 32 * 4 + col % 4


def sf_position(offset: int, k: int) -> tuple[int, int]:
    """Inverse of `sf_offset`: the (row, col) that a byte of the swizzled storage belongs to.

    Rows and columns beyond the matrix are padding.
    """
    tile, inner = divmod(offset, SF_TILE_BYTES)
    row_tile, col_tile = divmod(tile, ceil_div(k, 64))
    row = row_tile * 128 + inner % 16 // 4 * 32 + inner // 16
    return row, col_tile * 4 + inner % 4


def sf_6d_shape(rows: int, k: int, experts: int) -> tuple[int, int, int, int, int, int]:
    """Shape of FlashInfer's 6-D view of swizzled scales: (32, 4, rows/128, 4, K/64, experts)."""
    row_tiles, col_tiles = sf_tiles(rows, k)
    return 32, 4, row_tiles, 4, col_tiles, experts


def sf_6d_strides(rows: int, k: int) -> tuple[int, int, int, int, int, int]:
    """Strides in bytes of the 6-D view over storage (experts, rows/128, K/64, 32, 4, 4)."""
    row_tiles, col_tiles = sf_tiles(rows, k)
    row_tile = col_tiles * SF_TILE_BYTES
    return 16, 4, row_tile, 1, SF_TILE_BYTES, row_tiles * row_tile


def interleaved_row(row: int, *, is_gate: bool) -> int:
    """Row of `w1` that holds row ``row`` of the up (or gate) projection.

    Groups of 64 alternate: [up 0:64, gate 0:64, up 64:128, gate 64:128, ...].
    """
    group, inner = divmod(row, UP_GATE_GROUP)
    return (2 * group + is_gate) * UP_GATE_GROUP + inner


def source_row(row: int) -> tuple[bool, int]:
    """Inverse of `interleaved_row`: (is_gate, row of that projection) for a row of `w1`."""
    group, inner = divmod(row, UP_GATE_GROUP)
    return bool(group % 2), group // 2 * UP_GATE_GROUP + inner
