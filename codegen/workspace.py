"""The device workspace of a layer: one list of sections, read by Python and by the host template.

A section's size is ``count * bytes_each``, where the count is known only at the call. Sections
start at multiples of 1024 bytes, so that each may hold swizzled TMA tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

from .plan import MoePlan, Sm90Gemm
from .problem import MoeProblem

__all__ = ["ALIGNMENT", "Section", "WorkspaceLayout", "workspace_layout"]

ALIGNMENT = 1024  # bytes; a 128B-swizzled TMA box repeats every 1024


@dataclass(frozen=True, kw_only=True)
class Section:
    """One array in the workspace.

    Attributes:
        name: name of the pointer in the host template.
        count: what there is one of: ``one``, ``tokens``, ``slots`` (T * top_k), ``tiles`` (token
            tiles).
        bytes_each: bytes for each of them.
        holds: shape, dtype and layout, for people.
    """

    name: str
    count: str
    bytes_each: int
    holds: str


@dataclass(frozen=True, kw_only=True)
class WorkspaceLayout:
    """Sections in address order, and the arithmetic from call sizes to bytes."""

    plan: MoePlan
    top_k: int
    sections: tuple[Section, ...]

    def offsets(self, tokens: int, num_local_experts: int) -> dict[str, int]:
        """Byte offset of each section, and under ``"end"`` the bytes in all."""
        counts = {
            "one": 1,
            "tokens": tokens,
            "slots": tokens * self.top_k,
            "tiles": self.plan.max_tiles(tokens, self.top_k, num_local_experts),
        }
        at, found = 0, {}
        for section in self.sections:
            found[section.name] = at
            size = counts[section.count] * section.bytes_each
            at += -(-size // ALIGNMENT) * ALIGNMENT
        found["end"] = at
        return found

    def bytes(self, tokens: int, num_local_experts: int) -> int:
        """Workspace bytes for a call with ``tokens`` tokens."""
        return self.offsets(tokens, num_local_experts)["end"]


def workspace_layout(problem: MoeProblem, plan: MoePlan) -> WorkspaceLayout:
    """The sections that ``plan`` needs for ``problem``, bookkeeping first."""
    hidden, intermediate, tile = problem.hidden, problem.intermediate, plan.token_tile
    sections = [
        Section(name="num_tiles", count="one", bytes_each=4, holds="int32: token tiles in use"),
        Section(name="tile_expert", count="tiles", bytes_each=4, holds="int32: local expert"),
        Section(name="slot_row", count="slots", bytes_each=4, holds="int32: permuted row, or -1"),
        Section(name="row_slot", count="tiles", bytes_each=4 * tile, holds="int32: slot, or -1"),
        Section(name="row_scale", count="tiles", bytes_each=4 * tile, holds="fp32: routing scale"),
    ]
    if plan.family == "sm90":
        k1, k2 = padded_k(hidden), padded_k(intermediate)
        sections += [
            Section(
                name="x_bf16",
                count="tokens",
                bytes_each=2 * k1,
                holds=f"bf16 (T, {k1}), K-permuted",
            ),
            Section(
                name="act",
                count="tiles",
                bytes_each=2 * k2 * tile,
                holds=f"bf16 (rows, {k2}), NVFP4 values, K-permuted",
            ),
        ]
    else:
        sections += [
            Section(
                name="act",
                count="tiles",
                bytes_each=tile * intermediate // 2,
                holds=f"e2m1 (rows, {intermediate}), two a byte",
            ),
            Section(
                name="act_sf",
                count="tiles",
                bytes_each=tile * intermediate // 16,
                holds="e4m3, 128x4 tiles",
            ),
        ]
    if plan.finalize.inline and isinstance(plan.gemm2, Sm90Gemm):
        row_blocks = -(-hidden // plan.gemm2.row_tile)
        sections += [
            Section(
                name="token_slots", count="tokens", bytes_each=4, holds="int32: local slots of it"
            ),
            Section(
                name="arrivals",
                count="tokens",
                bytes_each=4 * row_blocks,
                holds=f"int32 (T, {row_blocks}): slots whose columns are in",
            ),
        ]
    if problem.deterministic:
        sections.append(
            Section(
                name="sums", count="slots", bytes_each=4 * hidden, holds=f"fp32 (T * k, {hidden})"
            )
        )
    else:
        sections.append(
            Section(name="sums", count="tokens", bytes_each=4 * hidden, holds=f"fp32 (T, {hidden})")
        )
    return WorkspaceLayout(plan=plan, top_k=problem.top_k, sections=tuple(sections))


def padded_k(k: int) -> int:
    """K rounded up to the 128 elements that the SM90 K-permutation works in."""
    return -(-k // 128) * 128
