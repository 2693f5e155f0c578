"""`MoeProblem`: what the caller asked for. Nothing here says how it is computed."""

from __future__ import annotations

from dataclasses import dataclass

from .arch import arch_spec
from .errors import BadProblem

__all__ = ["MAX_EXPERTS", "MAX_SLOTS", "MAX_TOP_K", "MoeProblem"]

MAX_TOP_K = 32  # FlashInfer's limit; the finalize kernel keeps a token's slots in registers
MAX_EXPERTS = 4096  # local experts; the route kernel keeps one counter each in shared memory
# Slots of a call (tokens * top_k): with the padding of MAX_EXPERTS experts they stay below 2^31.
MAX_SLOTS = 2**31 - 2**20

_IDS = ("int32", "int64")
_SCALES = ("float32", "bfloat16", "float16")
_OUTPUTS = ("bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class MoeProblem:
    """One fused MoE layer call, as asked.

    Attributes:
        arch: compiler target the layer must run on, for example ``sm_90a``.
        hidden: H, elements of a token.
        intermediate: I, elements; w1 holds 2*I rows, up and gate interleaved by 64.
        top_k: experts per token.
        num_experts: experts of the whole layer.
        num_local_experts: experts whose weights are here (expert parallelism).
        tokens: T of the call, or the upper end of a token bucket. Chooses the plan, and is never
            part of a rendered source.
        ids_dtype: dtype of token_selected_experts.
        scales_dtype: dtype of token_final_scales.
        output_dtype: dtype of the result.
        deterministic: sum over top_k in slot order (``use_fused_finalize=False``); otherwise fp32
            additions in arrival order.
        pdl: chain the kernels by programmatic dependent launch.
    """

    arch: str
    hidden: int
    intermediate: int
    top_k: int
    num_experts: int
    num_local_experts: int
    tokens: int
    ids_dtype: str = "int32"
    scales_dtype: str = "float32"
    output_dtype: str = "bfloat16"
    deterministic: bool = False
    pdl: bool = True

    def __post_init__(self) -> None:
        arch_spec(self.arch)
        for name in (
            "hidden",
            "intermediate",
            "top_k",
            "num_experts",
            "num_local_experts",
            "tokens",
        ):
            value = getattr(self, name)
            _require(type(value) is int, name, value, "an int")
        for name in ("deterministic", "pdl"):
            value = getattr(self, name)
            _require(type(value) is bool, name, value, "a bool")
        for name in ("hidden", "intermediate"):
            value = getattr(self, name)
            # one 128x4 tile of scale factors spans 64 elements of K
            _require(value >= 64 and value % 64 == 0, name, value, "a positive multiple of 64")
        _require(1 <= self.top_k <= MAX_TOP_K, "top_k", self.top_k, f"1..{MAX_TOP_K}")
        _require(self.num_experts >= 1, "num_experts", self.num_experts, "at least 1")
        _require(
            1 <= self.num_local_experts <= min(self.num_experts, MAX_EXPERTS),
            "num_local_experts",
            self.num_local_experts,
            f"1..min(num_experts={self.num_experts}, {MAX_EXPERTS})",
        )
        _require(self.tokens >= 0, "tokens", self.tokens, "at least 0")
        # permuted rows, expanded slots and counters are 32-bit on the device
        most = MAX_SLOTS // self.top_k
        _require(
            self.tokens <= most, "tokens", self.tokens, f"at most {most} with top_k={self.top_k}"
        )
        for name, allowed in (
            ("ids_dtype", _IDS),
            ("scales_dtype", _SCALES),
            ("output_dtype", _OUTPUTS),
        ):
            value = getattr(self, name)
            _require(value in allowed, name, value, " or ".join(allowed))

    @property
    def rows_per_expert(self) -> float:
        """Expected rows an expert gets under uniform routing."""
        return self.tokens * self.top_k / self.num_experts

    @property
    def facts(self) -> dict[str, str | int | bool]:
        """The compile-time facts: all that a rendered source may depend on, besides the plan."""
        return {
            "arch": self.arch,
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "top_k": self.top_k,
            "ids_dtype": self.ids_dtype,
            "scales_dtype": self.scales_dtype,
            "output_dtype": self.output_dtype,
            "deterministic": self.deterministic,
            "pdl": self.pdl,
        }


def _require(holds: bool, field: str, value: object, rule: str) -> None:
    if not holds:
        raise BadProblem(field, value, rule)
