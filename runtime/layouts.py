"""Rearranges tensors into the layouts that `moe_nvfp4` reads, and back.

The formulas are in `codegen.layouts`; here they are tensor operations that run on any device. Scale
factors are bytes: ``torch.float8_e4m3fn`` and ``torch.uint8`` are taken alike and the dtype that
came in goes out. Sources of the layouts: FlashInfer's documentation of
``cute_dsl_fused_moe_nvfp4`` and the PTX ISA's 128x4 scale-factor layout.
"""

from __future__ import annotations

import torch

from moejit.codegen.layouts import (
    SF_TILE_BYTES,
    UP_GATE_GROUP,
    ceil_div,
    sf_6d_shape,
    sf_storage_bytes,
    sf_tiles,
)
from moejit.runtime.errors import BadArgument

__all__ = [
    "as_bytes",
    "interleave_up_gate",
    "pack_fp4",
    "sf_6d_view",
    "sf_storage",
    "split_up_gate",
    "swizzle_scales",
    "unpack_fp4",
    "unswizzle_scales",
]

_FP4X2 = getattr(torch, "float4_e2m1fn_x2", torch.uint8)
_BYTE_DTYPES = (torch.uint8, torch.float8_e4m3fn, _FP4X2)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as ``torch.uint8``; for uint8, float8_e4m3fn and float4_e2m1fn_x2."""
    if tensor.dtype not in _BYTE_DTYPES:
        raise BadArgument(
            "tensor",
            f"has dtype {tensor.dtype}",
            "torch.uint8, torch.float8_e4m3fn or torch.float4_e2m1fn_x2",
            function="as_bytes",
        )
    return tensor.view(torch.uint8)


def pack_fp4(codes: torch.Tensor) -> torch.Tensor:
    """Packs FP4 codes two a byte, the even element in the low nibble.

    Args:
        codes: [..., K] uint8, values 0..15, K even.

    Returns:
        [..., K/2] uint8, contiguous.
    """
    if codes.shape[-1] % 2:
        raise BadArgument(
            "codes", f"has {codes.shape[-1]} columns", "an even number of them", function="pack_fp4"
        )
    return (codes[..., 1::2] << 4) | codes[..., 0::2]


def unpack_fp4(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_fp4`: [..., K/2] bytes -> [..., K] uint8 codes 0..15."""
    data = as_bytes(packed)
    return torch.stack((data & 0xF, data >> 4), dim=-1).flatten(-2)


def interleave_up_gate(up: torch.Tensor, gate: torch.Tensor, dim: int = -2) -> torch.Tensor:
    """Interleaves the up and gate projections in groups of 64 rows, as `w1` is stored.

    In every 128 rows of the result, rows 0..63 are `up` and rows 64..127 `gate`. Scale factors
    (not yet swizzled) are interleaved with the same call.

    Args:
        up: Any shape whose ``dim`` has I entries; I a multiple of 64.
        gate: The same shape and dtype.
        dim: The dimension of the rows; -2 for [E, I, K].

    Returns:
        A contiguous tensor whose ``dim`` has 2*I entries.
    """
    rows = up.shape[dim]
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise BadArgument(
            "gate",
            f"has shape {tuple(gate.shape)} and dtype {gate.dtype}",
            f"like 'up': shape {tuple(up.shape)} and dtype {up.dtype}",
            function="interleave_up_gate",
        )
    if rows % UP_GATE_GROUP:
        raise BadArgument(
            "up",
            f"has {rows} rows along dim {dim}",
            f"a multiple of {UP_GATE_GROUP} rows",
            "Pad the intermediate size with zero rows.",
            "interleave_up_gate",
        )
    dim %= up.dim()
    grouped = (*up.shape[:dim], rows // UP_GATE_GROUP, UP_GATE_GROUP, *up.shape[dim + 1 :])
    # stack of float8 tensors is not implemented everywhere; bytes always are
    restore = up.dtype
    if restore in _BYTE_DTYPES:
        up, gate = as_bytes(up), as_bytes(gate)
    pair = torch.stack((up.reshape(grouped), gate.reshape(grouped)), dim=dim + 1)
    joined = pair.flatten(dim, dim + 2)
    return joined.view(restore) if restore in _BYTE_DTYPES else joined


def split_up_gate(rows: torch.Tensor, dim: int = -2) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact inverse of `interleave_up_gate`: (up, gate), both contiguous."""
    total = rows.shape[dim]
    if total % (2 * UP_GATE_GROUP):
        raise BadArgument(
            "rows",
            f"has {total} rows along dim {dim}",
            f"a multiple of {2 * UP_GATE_GROUP} rows",
            function="split_up_gate",
        )
    dim %= rows.dim()
    restore = rows.dtype
    if restore in _BYTE_DTYPES:
        rows = as_bytes(rows)
    groups = (total // (2 * UP_GATE_GROUP), 2, UP_GATE_GROUP)
    grouped = rows.reshape(*rows.shape[:dim], *groups, *rows.shape[dim + 1 :])
    up = grouped.select(dim + 1, 0).flatten(dim, dim + 1).contiguous()
    gate = grouped.select(dim + 1, 1).flatten(dim, dim + 1).contiguous()
    if restore in _BYTE_DTYPES:
        return up.view(restore), gate.view(restore)
    return up, gate


def swizzle_scales(scales: torch.Tensor) -> torch.Tensor:
    """Linear scale factors into 128x4-swizzled storage, padded with zeros.

    Args:
        scales: [..., R, C] e4m3 bytes, C = K/16 scales a row.

    Returns:
        [..., ceil(R/128) * ceil(C/4) * 512] contiguous bytes of the same dtype; scale (row, col) is
        at `codegen.layouts.sf_offset`. Padding rows and columns are zero.
    """
    rows, cols = scales.shape[-2:]
    batch = scales.shape[:-2]
    row_tiles, col_tiles = ceil_div(rows, 128), ceil_div(cols, 4)
    padded = torch.zeros(
        (*batch, row_tiles * 128, col_tiles * 4), dtype=torch.uint8, device=scales.device
    )
    padded[..., :rows, :cols] = as_bytes(scales)
    # row = row_tile*128 + quarter*32 + lane; col = col_tile*4 + inner
    tiles = padded.view(*batch, row_tiles, 4, 32, col_tiles, 4)
    n = len(batch)
    order = (*range(n), n, n + 3, n + 2, n + 1, n + 4)  # row_tile, col_tile, lane, quarter, inner
    storage = tiles.permute(order).reshape(*batch, row_tiles * col_tiles * SF_TILE_BYTES)
    return storage.contiguous().view(scales.dtype)


def unswizzle_scales(storage: torch.Tensor, rows: int, k: int) -> torch.Tensor:
    """Exact inverse of `swizzle_scales`; the padding is dropped.

    Args:
        storage: [..., bytes] swizzled e4m3 bytes of (rows, k) matrices, as `swizzle_scales` or
            `sf_storage` give them.
        rows: Rows of one matrix.
        k: Elements in a row (not scales).

    Returns:
        [..., rows, k/16] of the same dtype, contiguous.
    """
    row_tiles, col_tiles = sf_tiles(rows, k)
    expected = sf_storage_bytes(rows, k)
    if storage.shape[-1] != expected:
        raise BadArgument(
            "storage",
            f"has {storage.shape[-1]} bytes in its last dimension",
            f"{expected}: {row_tiles} x {col_tiles} tiles of {SF_TILE_BYTES}",
            function="unswizzle_scales",
        )
    batch = storage.shape[:-1]
    tiles = as_bytes(storage).reshape(*batch, row_tiles, col_tiles, 32, 4, 4)
    n = len(batch)
    order = (*range(n), n, n + 3, n + 2, n + 1, n + 4)  # row_tile, quarter, lane, col_tile, inner
    linear = tiles.permute(order).reshape(*batch, row_tiles * 128, col_tiles * 4)
    return linear[..., :rows, : ceil_div(k, 16)].contiguous().view(storage.dtype)


def sf_6d_view(flat: torch.Tensor, rows: int, k: int, experts: int) -> torch.Tensor:
    """FlashInfer's 6-D view of swizzled scales; no copy.

    Args:
        flat: Contiguous swizzled storage of ``experts`` matrices, any shape.
        rows: Rows of one matrix (2*I for w1, H for w2).
        k: Elements in a row (H for w1, I for w2).
        experts: Matrices in the storage.

    Returns:
        A view of shape (32, 4, ceil(rows/128), 4, k/64, experts).
    """
    row_tiles, col_tiles = sf_tiles(rows, k)
    expected = experts * sf_storage_bytes(rows, k)
    if flat.numel() != expected or not flat.is_contiguous():
        raise BadArgument(
            "flat",
            f"has {flat.numel()} elements, {'' if flat.is_contiguous() else 'not '}contiguous",
            f"contiguous with {expected} elements ({experts} experts of {rows} x {k})",
            function="sf_6d_view",
        )
    return flat.view(experts, row_tiles, col_tiles, 32, 4, 4).permute(3, 4, 1, 5, 2, 0)


def sf_storage(scales: torch.Tensor, rows: int, k: int, experts: int) -> torch.Tensor:
    """The storage behind any form of swizzled scales that `moe_nvfp4` accepts; no copy.

    Args:
        scales: The 6-D view, or any contiguous shape with the same bytes.
        rows: Rows of one matrix.
        k: Elements in a row.
        experts: Matrices in the storage.

    Returns:
        [experts, bytes of one matrix], contiguous, same dtype.
    """
    if tuple(scales.shape) == sf_6d_shape(rows, k, experts):
        scales = scales.permute(5, 2, 4, 0, 1, 3)
    return scales.view(experts, sf_storage_bytes(rows, k))
