"""Names that the PTX ISA fixes: types, state spaces, special registers.

From the PTX ISA, sections "Types", "State Spaces" and "Special Registers". Pure tables.
"""

from __future__ import annotations

from functools import lru_cache

__all__ = [
    "LINKAGES",
    "SCALAR_BYTES",
    "SPACES",
    "TYPE_NAMES",
    "special_register_type",
    "types_of",
]

# Types that a variable, a parameter or a register can have, and the bytes of one element.
SCALAR_BYTES: dict[str, int] = {
    **dict.fromkeys(("b8", "u8", "s8"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 8),
    "b128": 16,
}

# Every type that can stand among the modifiers of an instruction.
TYPE_NAMES: frozenset[str] = frozenset(
    [*SCALAR_BYTES, "pred", "tf32", "b1", "u4", "s4", "u16x2", "s16x2", "u8x4", "s8x4"]
    + ["f32x2", "e4m3", "e5m2", "e2m1", "e2m3", "e3m2", "ue4m3", "ue8m0", "ue8m0x2", "s2f6x2"]
    + [f"{kind}x{n}" for kind in ("e4m3", "e5m2", "e2m1", "e2m3", "e3m2") for n in (2, 4)]
    + ["b8x16", "b4x16", "b4x16_p64", "b6x16_p32", "b6p2x16"]
)

SPACES: frozenset[str] = frozenset({"const", "global", "local", "param", "shared"})

LINKAGES: frozenset[str] = frozenset({"extern", "visible", "weak", "common"})

_VECTOR_SPECIALS = (
    "%tid %ntid %ctaid %nctaid %clusterid %nclusterid %cluster_ctaid %cluster_nctaid".split()
)
_SPECIALS: dict[str, str] = {
    **{f"{name}.{axis}": "u32" for name in _VECTOR_SPECIALS for axis in "xyzw"},
    **dict.fromkeys(
        "%laneid %warpid %nwarpid %smid %nsmid %cluster_ctarank %cluster_nctarank "
        "%lanemask_eq %lanemask_le %lanemask_lt %lanemask_ge %lanemask_gt %clock %clock_hi "
        "%globaltimer_lo %globaltimer_hi %total_smem_size %aggr_smem_size %dynamic_smem_size "
        "%reserved_smem_offset_begin %reserved_smem_offset_end %reserved_smem_offset_cap "
        "%reserved_smem_offset_0 %reserved_smem_offset_1 WARP_SZ".split(),
        "u32",
    ),
    **dict.fromkeys("%clock64 %globaltimer %gridid %current_graph_exec".split(), "u64"),
    **{f"%envreg{n}": "b32" for n in range(32)},
    **{f"%pm{n}": "u32" for n in range(8)},
    **{f"%pm{n}_64": "u64" for n in range(8)},
    "%is_explicit_cluster": "pred",
}


def special_register_type(name: str) -> str | None:
    """The type of a special register (or of the constant ``WARP_SZ``); None where there is none."""
    return _SPECIALS.get(name)


@lru_cache(maxsize=4096)
def types_of(modifiers: tuple[str, ...]) -> tuple[str, ...]:
    """The modifiers that are types, in order: ``cvt.rn.f16x2.e4m3x2`` has f16x2 and e4m3x2."""
    return tuple(modifier for modifier in modifiers if modifier in TYPE_NAMES)
