"""Is every result right? Runs `moe_nvfp4` on model shapes on a GPU and judges it in float64.

For each case: moe_output is filled with NaN before every run; the result is compared with the
reference (tolerance: |out - ref| <= 2^-7 |ref| + 2^-8 rms(ref) for 99.99 % of the elements,
none beyond 8x). A kernel adds products in another order than the reference, so an intermediate
value next to a rounding boundary may get the neighbouring FP4 code, which moves a whole output row
by more than that. So each case is judged in two stages as well: the intermediate's codes and scale
factors must be equal but for such ties (their distance from the tie is printed), and the output
must be right for the codes that the kernel chose. The deterministic mode runs ten times and must
give equal bits.

    python benchmarks/accuracy.py [--out DIR] [--only TEXT] [--commit HASH]
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, SHAPES, Shape, random_codes_problem, write_results

from moejit import runtime
from moejit.runtime.layouts import as_bytes, sf_storage, unswizzle_scales
from moejit.runtime.quantize import dequantize_nvfp4
from moejit.runtime.reference import compare, moe_reference
from moejit.runtime.trace import LayerTrace, intermediate_differences, trace_layer

# A value may fall to the other side of a tie only if it is this near to it: fp32 accumulation in
# the tensor cores over K <= 14336 terms moves a sum by a few 2^-20 of its terms' magnitude.
CODE_GAP = 2.0**-9  # in units of the block scale, where the largest code is 6
SCALE_GAP = 2.0**-12  # relative

TOKENS = (0, 1, 7, 64, 515, 2048)


def cases() -> list[tuple[str, Shape, dict[str, Any], tuple[int, ...]]]:
    """(name, shape, problem options, token counts)."""
    small = {"hidden": 1024, "intermediate": 512}
    slices = {"local_experts": 8, "offset": 24}
    absent = {"absent": 0.4, "ids_dtype": torch.int64, "scales_dtype": torch.bfloat16}
    gpt_oss = Shape(hidden=2880, intermediate=2880, experts=32, top_k=4)
    tails = Shape(hidden=320, intermediate=192, experts=8, top_k=2)
    return [
        ("qwen3-30b-a3b", SHAPES["qwen3-30b-a3b"], {}, TOKENS),
        ("deepseek-r1", SHAPES["deepseek-r1"], {}, TOKENS),
        ("gpt-oss H=I=2880", gpt_oss, {}, (1, 130, 600)),
        ("mixtral k=2", SHAPES["mixtral-8x7b"], {}, (1, 33, 300)),
        ("top_k=1", Shape(experts=16, top_k=1, **small), {}, (1, 5, 200)),
        ("EP 8 of 64 at 24", Shape(experts=64, top_k=8, **small), slices, (1, 65, 500)),
        ("-1 ids, int64, bf16 scales", Shape(experts=32, top_k=4, **small), absent, (3, 300)),
        ("H=320 I=192, fp16 scales", tails, {"scales_dtype": torch.float16}, (1, 17, 257)),
    ]


def output_from_values(traced: LayerTrace, problem: dict[str, Any]) -> torch.Tensor:
    """GEMM2 and the sum over top_k in float64, from the intermediate that the kernel wrote."""
    w2, ids = problem["w2_weight"], problem["token_selected_experts"].long()
    local = ids - problem["local_expert_offset"]
    experts, hidden, half = w2.shape
    scales = sf_storage(as_bytes(problem["w2_weight_sf"]), hidden, 2 * half, experts)
    out = torch.zeros(ids.shape[0], hidden, dtype=torch.float64, device=w2.device)
    for e in range(experts):
        token, j = (local == e).nonzero().unbind(-1)
        if token.numel():
            matrix = dequantize_nvfp4(
                w2[e], unswizzle_scales(scales[e], hidden, 2 * half), dtype=torch.float64
            )
            weight = (
                problem["w2_alpha"][e].double() * problem["token_final_scales"][token, j].double()
            )
            terms = (traced.values[token, j].double() @ matrix.T) * weight.unsqueeze(-1)
            out.index_add_(0, token, terms)
    return out.to(traced.output.dtype)


def judge(
    name: str, shape: Shape, options: dict[str, Any], tokens: int, fused: bool
) -> dict[str, Any]:
    """One row of the table."""
    problem = random_codes_problem(tokens, shape, seed=tokens + 7 * fused, **options)
    output_dtype = torch.float16 if tokens == 7 else torch.bfloat16
    call = {**problem, "use_fused_finalize": fused, "output_dtype": output_dtype}

    def run() -> torch.Tensor:
        out = torch.full((tokens, shape.hidden), float("nan"), dtype=output_dtype, device="cuda")
        return runtime.moe_nvfp4(**call, moe_output=out)

    first = run()
    repeats = 2 if fused else 10
    equal = all(torch.equal(first, run()) for _ in range(repeats - 1))
    row: dict[str, Any] = {
        "case": name,
        "T": tokens,
        "finalize": "fused" if fused else "deterministic",
        "output": str(output_dtype).removeprefix("torch."),
    }
    if tokens == 0:
        return {**row, "verdict": "ok" if tuple(first.shape) == (0, shape.hidden) else "FAILED"}
    traced = trace_layer(**call)
    reference, inter = moe_reference(**call, accumulate=torch.float64, return_intermediate=True)
    assert inter is not None
    whole = compare(first, reference)
    own = compare(traced.output, output_from_values(traced, problem))
    gap = intermediate_differences(traced, inter, problem["fc2_input_scale"])
    right = own.passed and gap.code_gap <= CODE_GAP and gap.scale_gap <= SCALE_GAP
    right = right and (whole.passed or gap.codes + gap.scales > 0) and (equal or fused)
    return {
        **row,
        "plan": traced.plan.name,
        "verdict": "ok" if right else "FAILED",
        "within vs reference": f"{whole.within:.5%}",
        "worst / tolerance": f"{whole.worst:.2f}",
        "within, kernel's codes": f"{own.within:.5%}",
        "worst, kernel's codes": f"{own.worst:.2f}",
        "codes at ties": f"{gap.codes} of {gap.elements}",
        "furthest from tie": f"{gap.code_gap:.1e}",
        "scales at ties": gap.scales,
        "bits": f"equal in {repeats} runs" if equal else "differ",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="run only cases whose name holds this text")
    parser.add_argument("--commit", default="", help="commit, where git is not at hand")
    options = parser.parse_args()
    rows = []
    for name, shape, choices, counts in cases():
        if options.only not in name:
            continue
        for tokens in counts:
            for fused in (True, False):
                rows.append(judge(name, shape, choices, tokens, fused))
                print(" | ".join(str(v) for v in rows[-1].values()), flush=True)
                gc.collect()
                torch.cuda.empty_cache()
    device = torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")
    path = write_results(f"accuracy-{device}", rows, options.out, options.commit)
    failed = [row for row in rows if row["verdict"] != "ok"]
    print(f"{len(rows) - len(failed)} ok, {len(failed)} failed; {path}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
