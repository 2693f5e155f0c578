"""What every plan's kernels need: registers, spills, shared memory, code bytes, seconds to compile.

Needs no GPU. Writes docs/notes/kernel-resources.md.

    python benchmarks/resources.py
"""

from __future__ import annotations

import datetime
import platform
import tempfile
from importlib import metadata
from pathlib import Path

from moejit.codegen import ARCHS, MoeProblem, candidates, render
from moejit.runtime.compiler import compile_layer

NOTE = Path(__file__).parent.parent / "docs" / "notes" / "kernel-resources.md"
HEAD = """# Registers, spills and shared memory of every plan

Qwen3-30B-A3B's shapes (H=2048, I=768, top_k=8), int32 ids, fp32 routing scales, bf16 output, PDL.
Compiled without a GPU. Registers and stack are the cubins' (a stack of 0 bytes means no spills),
shared memory is what the launch asks for. Seconds are trace, LLVM, ptxas, export and link of the
whole layer in a warm process on a 2-core x86-64 machine: *measured* {date},
nvidia-cutlass-dsl {dsl}, Python {python}. Written by `python benchmarks/resources.py`.

"""
COLUMNS = (
    "arch",
    "plan",
    "finalize",
    "kernel",
    "registers",
    "stack, bytes",
    "smem, bytes",
    "code, bytes",
    "layer, s",
    "s a kernel",
)


def main() -> None:
    rows = []
    for arch in ARCHS:
        for deterministic in (False, True):
            asked = MoeProblem(
                arch=arch,
                hidden=2048,
                intermediate=768,
                top_k=8,
                num_experts=128,
                num_local_experts=128,
                tokens=64,
                deterministic=deterministic,
            )
            for plan in candidates(asked):
                source = render(asked, plan)
                for _ in range(1 if rows else 2):  # the first of a process also loads the compiler
                    with tempfile.TemporaryDirectory() as folder:
                        report = compile_layer(source, arch, Path(folder))
                times = f"{report.seconds:.1f} | {report.seconds / len(report.kernels):.2f}"
                for kernel in report.kernels:
                    name = kernel.name.removeprefix(source.symbol_prefix + "_").rsplit("_", 1)[0]
                    smem = {
                        "route": plan.route.smem_bytes,
                        "gemm1": plan.gemm1.smem_bytes,
                        "gemm2": plan.gemm2.smem_bytes,
                    }
                    rows.append(
                        f"| {arch} | {plan.name} | {'det' if deterministic else 'fused'} | {name} "
                        f"| {kernel.registers} | {kernel.stack_bytes} "
                        f"| {smem.get(name, 0)} | {kernel.code_bytes} "
                        f"| {times} |"
                    )
                    times = " | "
                print(rows[-1], flush=True)
    head = HEAD.format(
        date=datetime.datetime.now(datetime.timezone.utc).date(),
        dsl=metadata.version("nvidia-cutlass-dsl"),
        python=platform.python_version(),
    )
    table = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *rows]
    NOTE.write_text(head + "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
