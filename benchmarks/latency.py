"""How long does a warm layer take: on the host, on the GPU in a CUDA graph, and of that the floor.

Host: wall time of `runtime.moe_nvfp4` calls that are only queued (the queue never fills), with the
output given and not given, and of the bare call of the layer's host function. GPU: median over
replays of a CUDA graph of several layers with weights that together exceed L2, so that every layer
finds its weights cold. Floor: max(bytes / 4.3 TB/s, flops / 790 TFLOP/s), bytes = packed weights
and scales of the experts that were hit, plus x and the output.

    python benchmarks/latency.py [--out DIR] [--commit HASH] [--shapes A,B] [--tokens 1,16]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, SHAPES, Shape, random_codes_problem, write_results

from moejit import runtime

BYTES_PER_S, FLOPS_PER_S = 4.3e12, 790e12  # copy and bf16 matrix rates measured on an H200
L2_BYTES = 60e6


def host_us(call: dict[str, Any], calls: int = 200) -> float:
    """Median over 7 batches of the host time of one queued call."""
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            runtime.moe_nvfp4(**call)
        times.append((time.perf_counter() - start) / calls * 1e6)
        torch.cuda.synchronize()
    return statistics.median(times)


def replay_host_us(graph: torch.cuda.CUDAGraph, replays: int = 50) -> float:
    """Host time of one replay."""
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(replays):
            graph.replay()
        times.append((time.perf_counter() - start) / replays * 1e6)
        torch.cuda.synchronize()
    return statistics.median(times)


def graph_of(calls: list[dict[str, Any]]) -> torch.cuda.CUDAGraph:
    """These calls, one after the other, captured."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            runtime.moe_nvfp4(**call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            runtime.moe_nvfp4(**call)
    return graph


def gpu_us(graph: torch.cuda.CUDAGraph, layers: int, replays: int = 9) -> float:
    """Median time of one layer of the graph."""
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / layers * 1e3)
    return statistics.median(times)


def floor_us(shape: Shape, problem: dict[str, Any]) -> float:
    ids = problem["token_selected_experts"]
    tokens, hit = ids.shape[0], ids.unique().numel()
    weights = hit * 3 * shape.hidden * shape.intermediate * 9 / 16
    moved = weights + tokens * shape.hidden * (9 / 16 + 2)
    flops = 6 * tokens * shape.top_k * shape.hidden * shape.intermediate
    return max(moved / BYTES_PER_S, flops / FLOPS_PER_S) * 1e6


def measure(name: str, shape: Shape, tokens: int, fused: bool) -> dict[str, Any]:
    """One row of the table."""
    first = random_codes_problem(tokens, shape, seed=tokens)
    packed = sum(
        first[k].nbytes for k in ("w1_weight", "w1_weight_sf", "w2_weight", "w2_weight_sf")
    )
    hit = first["token_selected_experts"].unique().numel()
    # Layers with other weights (or other experts of them) until the bytes touched are 4x L2.
    layers = max(4, min(40, round(4 * L2_BYTES / (packed * hit / shape.experts))))
    calls = []
    for layer in range(layers):
        other = random_codes_problem(
            tokens,
            Shape(hidden=64, intermediate=64, experts=shape.experts, top_k=shape.top_k),
            seed=layer,
        )
        call = {**first, "use_fused_finalize": fused}
        call["token_selected_experts"] = other["token_selected_experts"]
        if packed < 4 * L2_BYTES and layer:
            for key in ("w1_weight", "w1_weight_sf", "w2_weight", "w2_weight_sf"):
                call[key] = first[key].clone()
        calls.append(call)
    given = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16, device="cuda")
    graph = graph_of(calls)
    row = {
        "shape": name,
        "T": tokens,
        "finalize": "fused" if fused else "deterministic",
        "GPU us, graph": round(gpu_us(graph, layers), 1),
        "floor us": round(floor_us(shape, first), 1),
    }
    row["GPU / floor"] = round(row["GPU us, graph"] / row["floor us"], 2)
    if tokens <= 64:
        row["host us"] = round(host_us(calls[0]), 1)
        row["host us, output given"] = round(host_us({**calls[0], "moe_output": given}), 1)
        row["host us, graph replay"] = round(replay_host_us(graph_of(calls[:1])), 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="", help="commit, where git is not at hand")
    parser.add_argument("--shapes", default="qwen3-30b-a3b,deepseek-r1")
    parser.add_argument("--tokens", default="1,4,16,64,256,1024,2048,8192")
    options = parser.parse_args()
    rows = []
    for name in options.shapes.split(","):
        for tokens in map(int, options.tokens.split(",")):
            for fused in (True, False):
                rows.append(measure(name, SHAPES[name], tokens, fused))
                print(" | ".join(str(v) for v in rows[-1].values()), flush=True)
                gc.collect()
                torch.cuda.empty_cache()
    device = torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")
    print(write_results(f"latency-{device}", rows, options.out, options.commit))


if __name__ == "__main__":
    main()
