"""What every benchmark needs: shapes, random problems on the device, and who and where it ran."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["RESULTS", "SHAPES", "Shape", "environment", "random_codes_problem", "write_results"]

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A layer of a deployed model: hidden, intermediate, experts, experts a token."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int


SHAPES = {
    "qwen3-30b-a3b": Shape(hidden=2048, intermediate=768, experts=128, top_k=8),
    "qwen3-235b-a22b": Shape(hidden=4096, intermediate=1536, experts=128, top_k=8),
    "deepseek-r1": Shape(hidden=7168, intermediate=2048, experts=256, top_k=8),
    "mixtral-8x7b": Shape(hidden=4096, intermediate=14336, experts=8, top_k=2),
    "gpt-oss-120b": Shape(hidden=2880, intermediate=2880, experts=128, top_k=4),
}


def random_codes_problem(
    tokens: int,
    shape: Shape,
    *,
    local_experts: int | None = None,
    offset: int = 0,
    seed: int = 0,
    ids_dtype: torch.dtype = torch.int32,
    scales_dtype: torch.dtype = torch.float32,
    absent: float = 0.0,
) -> dict[str, Any]:
    """Keyword arguments of a call on the current GPU with random codes and random block scales.

    Weights are drawn as NVFP4 bytes, not quantized from floats: every code occurs, and a
    model-sized layer takes no more memory than its packed weights. Alphas bring the activations to
    order one.

    Args:
        absent: fraction of the ids that become -1.
    """
    hidden, inter = shape.hidden, shape.intermediate
    local = shape.experts if local_experts is None else local_experts
    g = torch.Generator(device="cuda").manual_seed(seed)

    def codes(*size: int) -> torch.Tensor:
        return torch.randint(0, 256, size, generator=g, device="cuda", dtype=torch.uint8)

    def scales(count: int) -> torch.Tensor:  # e4m3 of 2^-4 to 2^3, mantissas uniform
        return torch.randint(0x18, 0x50, (count,), generator=g, device="cuda", dtype=torch.uint8)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=g, device="cuda")

    padded = -(-hidden // 128) * 128  # rows of w2's scale storage
    ids = uniform(tokens, shape.experts).argsort(dim=1)[:, : shape.top_k]
    ids = torch.where(uniform(tokens, shape.top_k) < absent, -1, ids)
    return {
        "x": codes(tokens, hidden // 2),
        "x_sf": scales(tokens * hidden // 16).view(tokens, hidden // 16),
        "token_selected_experts": ids.to(ids_dtype).contiguous(),
        "token_final_scales": uniform(tokens, shape.top_k).softmax(dim=1).to(scales_dtype),
        "w1_weight": codes(local, 2 * inter, hidden // 2),
        "w1_weight_sf": scales(local * 2 * inter * hidden // 16),
        "w1_alpha": (0.5 + uniform(local)) * (0.075 / hidden**0.5),
        "fc2_input_scale": torch.tensor([20.0], device="cuda"),
        "w2_weight": codes(local, hidden, inter // 2),
        "w2_weight_sf": scales(local * padded * inter // 16),
        "w2_alpha": (0.5 + uniform(local)) * 0.002,
        "num_experts": shape.experts,
        "top_k": shape.top_k,
        "num_local_experts": local,
        "local_expert_offset": offset,
    }


def environment() -> dict[str, str]:
    """Device, driver, toolchain, commit, date: what would let someone doubt a figure."""

    def said(*command: str) -> str:
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "unknown"

    query = "--query-gpu=name,driver_version,clocks.max.sm,power.limit"
    folder = str(Path(__file__).parent)
    return {
        "source": "measured",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": said("git", "-C", folder, "rev-parse", "--short=12", "HEAD"),
        "device": said("nvidia-smi", query, "--format=csv,noheader"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nvidia-cutlass-dsl": version("nvidia-cutlass-dsl"),
        "apache-tvm-ffi": version("apache-tvm-ffi"),
    }


def write_results(name: str, rows: list[dict[str, Any]], folder: Path, commit: str = "") -> Path:
    """``NAME.json`` with the environment, and ``NAME.md`` with the same rows as a table."""
    folder.mkdir(parents=True, exist_ok=True)
    about = environment()
    if commit:
        about["commit"] = commit
    (folder / f"{name}.json").write_text(
        json.dumps({"environment": about, "rows": rows}, indent=1) + "\n"
    )
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"# {name}", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    lines.append("| " + " | ".join(columns) + " |")
    lines.append("|" + "---|" * len(columns))
    lines += ["| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in rows]
    path = folder / f"{name}.md"
    path.write_text("\n".join(lines) + "\n")
    return path
