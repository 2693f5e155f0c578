"""`MoePlan`: how a layer is computed, a frozen variant a kernel. Nothing repeats the problem."""

from __future__ import annotations

from dataclasses import dataclass

from .problem import MAX_EXPERTS

__all__ = [
    "FinalizeVariant",
    "MoePlan",
    "RouteVariant",
    "Sm90Gemm",
    "Sm100Gemm",
]


@dataclass(frozen=True, kw_only=True)
class RouteVariant:
    """The kernel that sorts slots by expert and prepares activations and accumulators.

    Attributes:
        threads: threads of a CTA.
        token_tile: rows an expert's segment is padded to.
        decode_x: also write x as bf16, K-permuted for register operands (SM90).
    """

    threads: int = 512
    token_tile: int
    decode_x: bool

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA: a counter for each local expert, a partial sum for each warp."""
        return 4 * MAX_EXPERTS + 4 * self.threads // 32


@dataclass(frozen=True, kw_only=True)
class Sm90Gemm:
    """RS-wgmma GEMM: weights are operand A, decoded to bf16 in registers; rows of tokens are N.

    Attributes:
        token_tile: token rows of a tile (wgmma N).
        row_tile: weight rows of a tile: two consumer warpgroups of 128.
        k_tile: elements of K in a pipeline stage.
        stages: pipeline stages.
    """

    token_tile: int
    row_tile: int = 256
    k_tile: int = 128
    stages: int

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one stage: weights, their scale factors, bf16 activations."""
        weights = self.row_tile * self.k_tile // 2
        scales = self.row_tile * self.k_tile // 16
        return weights + scales + self.token_tile * self.k_tile * 2

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA: barriers and the list of finished rows, then the stages."""
        return 2048 + self.stages * self.stage_bytes

    @property
    def name(self) -> str:
        return f"t{self.token_tile}r{self.row_tile}s{self.stages}"


@dataclass(frozen=True, kw_only=True)
class Sm100Gemm:
    """tcgen05 block-scaled GEMM, 1 CTA: 128 token rows by ``tile_n`` weight rows.

    Attributes:
        tile_m: token rows of a tile.
        tile_n: weight rows of a tile, 128 or 256.
        tile_k: elements of K in a pipeline stage.
        stages: pipeline stages.
        out_buffers: 64-column slices of the output that gemm2 can have on their way to memory.
    """

    tile_m: int = 128
    tile_n: int
    tile_k: int = 256
    stages: int
    out_buffers: int = 0

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one stage: A, B and the scale factors of both."""
        rows = self.tile_m + self.tile_n
        return rows * self.tile_k // 2 + rows * self.tile_k // 16

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA: barriers, stages, output slices of 64 fp32 and 16 bytes a row."""
        return (
            1024 + self.stages * self.stage_bytes + self.out_buffers * self.tile_m * (4 * 64 + 16)
        )

    @property
    def name(self) -> str:
        out = f"b{self.out_buffers}" if self.out_buffers else ""
        return f"m{self.tile_m}n{self.tile_n}s{self.stages}{out}"


@dataclass(frozen=True, kw_only=True)
class FinalizeVariant:
    """How a token's slots are summed (or the fp32 sums taken) and rounded once.

    Attributes:
        inline: gemm2 does it: whoever adds the last part of a token's columns rounds them. Saves
            a launch, and costs every tile of gemm2 a pass through two barriers, so it is for few
            tiles.
        threads: threads of a CTA of the kernel of its own; each handles 8 output columns.
    """

    inline: bool = False
    threads: int = 128


@dataclass(frozen=True, kw_only=True)
class MoePlan:
    """Which kernel variants run, in launch order.

    Attributes:
        family: folder of the GEMM templates, ``sm90`` or ``sm100``.
        token_tile: rows an expert's segment is padded to; equal in all kernels.
    """

    family: str
    token_tile: int
    route: RouteVariant
    gemm1: Sm90Gemm | Sm100Gemm
    gemm2: Sm90Gemm | Sm100Gemm
    finalize: FinalizeVariant

    @property
    def name(self) -> str:
        """Unique among `candidates`: part of the kernels' symbols and of the entry's name."""
        inline = "_fin" if self.finalize.inline else ""
        return f"{self.family}_{self.gemm1.name}_{self.gemm2.name}{inline}"

    def max_tiles(self, tokens: int, top_k: int, num_local_experts: int) -> int:
        """Most token tiles that any routing of ``tokens`` can need.

        Every expert pads by at most ``token_tile - 1`` rows, and a tile holds at least one row.
        """
        slots = tokens * top_k
        padded = (slots + (self.token_tile - 1) * num_local_experts) // self.token_tile
        return min(slots, padded)
