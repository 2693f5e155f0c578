"""Random arguments for `moe_nvfp4`, and NVFP4 written a second time in numpy.

The second writing shares no code with `runtime`: the tests that compare the two would not notice a
mistake that both had from one source.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moejit.runtime.quantize import E2M1_MAX, E4M3_MAX, prepare_weights, quantize_activations

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def random_problem(
    tokens: int = 5,
    hidden: int = 128,
    intermediate: int = 64,
    num_experts: int = 4,
    top_k: int = 2,
    *,
    num_local_experts: int | None = None,
    local_expert_offset: int = 0,
    ids_dtype: torch.dtype = torch.int32,
    scales_dtype: torch.dtype = torch.float32,
    output_dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of a valid call: distinct random experts a token, weights of std 0.02.

    All randomness comes from a CPU generator, so that a seed is one problem on every device.
    """
    local = num_experts if num_local_experts is None else num_local_experts
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(std).to(device)

    activations = quantize_activations(normal(tokens, hidden))
    weights = prepare_weights(
        normal(local, intermediate, hidden, std=0.02),
        normal(local, intermediate, hidden, std=0.02),
        normal(local, hidden, intermediate, std=0.02),
        x_global_scale=activations.x_global_scale,
        # gate and up have a std of 0.02 * sqrt(H); y peaks at some ten times its square
        fc2_input_scale=E4M3_MAX * E2M1_MAX / (10 * 0.02**2 * hidden),
    )
    order = torch.rand(tokens, num_experts, generator=generator).argsort(dim=1)
    routing = torch.rand(tokens, top_k, generator=generator).softmax(dim=1)
    return {
        "x": activations.x,
        "x_sf": activations.x_sf,
        "token_selected_experts": order[:, :top_k].to(ids_dtype).contiguous().to(device),
        "token_final_scales": routing.to(scales_dtype).to(device),
        **weights.arguments(),
        "num_experts": num_experts,
        "top_k": top_k,
        "num_local_experts": num_local_experts,
        "local_expert_offset": local_expert_offset,
        "output_dtype": output_dtype,
        "use_fused_finalize": True,
        "moe_output": None,
        "aux_stream": None,
        "enable_pdl": True,
    }


# ---- NVFP4 in numpy ------------------------------------------------------------------------------


def e4m3_value(byte: int) -> float:
    """An unsigned e4m3 byte: 4 bits of exponent with bias 7, 3 of mantissa, 0x7F is NaN."""
    exponent, mantissa = (byte >> 3) & 0xF, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)


def nearest_code(value: float, table: list[float]) -> int:
    """Index of the nearest entry of an ascending table; a tie goes to the even index."""
    best = 0
    for code, entry in enumerate(table):
        gap, least = abs(value - entry), abs(value - table[best])
        if gap < least or (gap == least and code % 2 == 0):
            best = code
    return best


E4M3 = [e4m3_value(byte) for byte in range(127)]


def quantize_block(values: np.ndarray, encode: np.float32) -> tuple[list[int], int]:
    """16 fp32 values as the second half of gemm1 quantizes them: (FP4 codes, e4m3 byte)."""
    peak = np.float32(np.abs(values).max())
    sf = nearest_code(min(float(peak * np.float32(0.16666667) * encode), 448.0), E4M3)
    if sf == 0:
        step = np.finfo(np.float32).max
    else:
        step = np.float32(1) / np.float32(E4M3[sf]) * encode
    codes = []
    for value in values:
        with np.errstate(over="ignore"):
            scaled = float(np.float32(value) * step)
        code = nearest_code(min(abs(scaled), 6.0), E2M1)
        codes.append(code | (8 if np.signbit(scaled) else 0))
    return codes, sf


def decode_row(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """One row: (K/2,) bytes and (K/16,) e4m3 bytes to (K,) float64."""
    values = []
    for k in range(2 * len(packed)):
        nibble = packed[k // 2] >> 4 if k % 2 else packed[k // 2] & 15
        sign = -1.0 if nibble & 8 else 1.0
        values.append(sign * E2M1[nibble & 7] * e4m3_value(int(scales[k // 16])))
    return np.array(values)
