"""`moejit demo`: one MoE layer, from bf16 weights to a checked output, step by step."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from moejit.runtime.cli import options
from moejit.runtime.cli.output import emit_json, human_bytes, human_time, notes, out, table

if TYPE_CHECKING:
    from moejit.runtime.demo import Demo, Trace

__all__ = ["demo"]


def demo(as_json: options.Json = False) -> None:
    """Make one MoE layer, quantize it, compile it, run it, check it. Exit code 1 if it is wrong."""
    from moejit.runtime.demo import run_demo

    with notes.status("loading torch") as status:
        done = run_demo(lambda text: status.update(text))
    if as_json:
        emit_json(asdict(done))
    else:
        _show(done)
    if not done.accuracy.right:
        typer.echo("moejit: the output is not that of the reference", err=True)
        raise typer.Exit(1)


def _show(done: Demo) -> None:
    shape = done.shape
    out.print(
        f"[bold]One MoE layer of Qwen3-30B-A3B's shapes[/]: H={shape.hidden} "
        f"I={shape.intermediate} E={shape.experts} top_k={shape.top_k}, {shape.tokens} tokens, "
        f"on {done.device}"
    )
    out.print(f"bf16 weights made     {human_bytes(done.bf16_bytes)}, {human_time(done.make_s)}")
    out.print(
        f"quantized to NVFP4    {human_bytes(done.nvfp4_bytes)}, {human_time(done.quantize_s)}\n"
    )
    for trace in done.traces:
        _show_trace(trace)
    _show_result(done)
    _show_cache(done)


def _show_trace(trace: Trace) -> None:
    launched = trace.backend == "cuda"
    state = (
        "warm: the layer was in the cache" if trace.warm else "cold: the layer was not in the cache"
    )
    problem, layer = trace.problem, trace.layer
    spills = "some spill" if layer.spills else "no spills"
    registers = max(kernel.registers for kernel in layer.kernels)
    compiled = f"{len(layer.kernels)} kernels, up to {registers} registers, {spills}"
    asked = f"H={problem.hidden} I={problem.intermediate} top_k={problem.top_k} T={problem.tokens}"
    published = f"verified {layer.key[:10]}" if trace.warm else f"published {layer.key[:10]}"
    steps = (
        ("1 call", "check", "arguments are right"),
        ("2 problem", "problem", asked),
        ("3 plan", "plan", str(layer.spec["plan"])),
        ("4 render", "render", f"{trace.source_lines} lines of CuTe DSL"),
        ("5 compile", "compile", compiled),
        ("6 cache", "hit" if trace.warm else "cache", published),
        ("7 load", "load", f"kernel.so, {human_bytes(layer.files['kernel.so'])}"),
        ("8 launch", "launch", "on the GPU" if launched else "left out: no GPU"),
    )
    rows = []
    for name, kind, text in steps:
        if kind in trace.seconds and (kind != "launch" or launched):
            rows.append((name, human_time(trace.seconds[kind]), text))
        else:
            rows.append((name, "-", f"not needed: {text}" if kind == "compile" else text))
    out.print(table(f"{trace.arch} ({state})", ("step", ">time", ""), rows))
    out.print(
        f"first call {human_time(trace.total_s)}, the same call again {human_time(trace.again_s)}"
        f"{'' if launched else ', both without the launch'}\n"
    )


def _show_result(done: Demo) -> None:
    accuracy, kernel = done.accuracy, done.accuracy.kernel
    verdict = "[green]right[/]" if accuracy.right else "[red]WRONG[/]"
    what = "the kernel on the GPU" if done.ran == "cuda" else "the reference on the CPU, fp32"
    out.print(f"[bold]Output[/] of {what}, {human_time(done.run_s)} (measured here)")
    out.print(
        f"against the reference with fp64 sums: {verdict}; {kernel.within:.4%} of the elements "
        f"within tolerance, relative error {kernel.relative_l2:.1e}"
    )
    out.print(
        f"what NVFP4 costs: relative error {accuracy.unquantized_l2:.1%}, cosine "
        f"{accuracy.cosine:.4f} against bf16 weights and activations in fp32; quantizing x alone "
        f"{accuracy.x_l2:.1%}\n"
    )


def _show_cache(done: Demo) -> None:
    if not all(trace.kept for trace in done.traces):
        out.print("[yellow]Nothing was kept[/]: the cache folder cannot be written.")
        out.print(f"`{_command()} doctor` says more; MOEJIT_CACHE_DIR names another folder.")
        return
    rows = [
        (trace.layer.key[:10], trace.arch, human_bytes(sum(trace.layer.files.values())))
        for trace in done.traces
    ]
    out.print(table("In the cache", ("key", "arch", ">size"), rows))
    out.print(f"folder {done.traces[0].layer.path.parents[2]}")
    key = done.traces[-1].layer.key[:10]
    command = _command()
    out.print("\n[bold]Look inside[/]")
    for flags, meaning in (
        ("", "registers, stack, plan, files"),
        (" --source", "the kernels that you have just run"),
        (" --ptx", "what the compiler made of them"),
    ):
        out.print(f"  {command} inspect {key}{flags:<10} {meaning}")
    if all(trace.warm for trace in done.traces):
        out.print(
            f"\nThis run was warm: nothing was compiled. `{command} cache clear` starts over.",
        )
    else:
        out.print("\nRun it again: the next run is warm.")


def _command() -> str:
    """How this program is called from here: by name where PATH has it, else by its place."""
    script = Path(sys.executable).parent / "moejit"
    found = shutil.which("moejit")
    if found is not None and Path(found).resolve() == script.resolve():
        return "moejit"
    if not script.exists():
        return f"{sys.executable} -m moejit"
    return str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)
