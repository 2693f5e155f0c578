"""`moejit prewarm`: compiles the layers of a deployment ahead of time, with or without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moejit.runtime.cli import options
from moejit.runtime.cli.output import emit_json, human_time, notes, out, table

if TYPE_CHECKING:
    from moejit.codegen.problem import MoeProblem
    from moejit.runtime.cli.shapes import LayerShape
    from moejit.runtime.prewarming import PrewarmReport

__all__ = ["prewarm"]


def prewarm(
    hidden: options.Hidden = None,
    intermediate: options.Intermediate = None,
    top_k: options.TopK = None,
    experts: options.Experts = None,
    local_experts: options.LocalExperts = None,
    tokens: Annotated[
        str,
        typer.Option(help="Token counts: 64, 1-8192, or 1,8,64-512.", rich_help_panel="Shape"),
    ] = "1-8192",
    arch: options.Arch = None,
    output_dtype: options.OutputDtype = "bf16",
    ids_dtype: options.IdsDtype = "int32",
    scales_dtype: options.ScalesDtype = "float32",
    finalize: Annotated[
        str, typer.Option(help="fused, deterministic or both.", rich_help_panel="Shape")
    ] = "both",
    pdl: options.Pdl = True,
    shapes: Annotated[
        Path | None, typer.Option(help="A TOML file of layers, instead of the shape options.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Compile processes.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Compile every layer that a deployment can ask for. Exit code 1 if one failed."""
    from moejit.runtime.cli.shapes import BadShape, LayerShape, problems_of, read_shapes, split_list

    given = {"hidden": hidden, "intermediate": intermediate, "top_k": top_k, "experts": experts}
    missing = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is None]
    archs = split_list(arch) if arch else []
    layers: list[LayerShape]
    if shapes is not None:
        if len(missing) < len(given):
            raise BadShape("--shapes", "replaces the shape options; give one or the other")
        layers = read_shapes(shapes)
    elif missing:
        raise BadShape("moejit prewarm", f"needs {', '.join(missing)}, or --shapes FILE")
    else:
        layers = [
            LayerShape(
                hidden=hidden or 0,
                intermediate=intermediate or 0,
                top_k=top_k or 0,
                experts=experts or 0,
                local_experts=local_experts,
                tokens=tokens,
                output_dtype=output_dtype,
                ids_dtype=ids_dtype,
                scales_dtype=scales_dtype,
                finalize=finalize,
                pdl=pdl,
            )
        ]
    fallback = [] if all(layer.arch for layer in layers) or archs else options.default_archs()
    # --arch on the command line is said last, so it wins over the file.
    problems = [p for layer in layers for p in problems_of(layer, fallback, only=archs)]
    report = _run(problems, jobs, quiet=as_json)
    failures = _failures(report)
    if as_json:
        emit_json(_record(report, failures))
    else:
        _show(report, failures, len(problems))
    if failures:
        raise typer.Exit(1)


def _run(problems: list[MoeProblem], jobs: int | None, *, quiet: bool) -> PrewarmReport:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from moejit.runtime.prewarming import Outcome, distinct_sources
    from moejit.runtime.prewarming import prewarm as run

    total = len(distinct_sources(problems)[0])
    columns = (
        TextColumn("prewarm"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    hidden = quiet or not notes.is_terminal  # a log does not want a bar
    with Progress(*columns, console=notes, transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=total)

        def done(outcome: Outcome) -> None:
            text = f"{outcome.arch} {outcome.name}"
            progress.update(task, advance=1, description=text)

        try:
            return run(problems, jobs=jobs, on_compile=done)
        except KeyboardInterrupt:
            progress.stop()
            text = "interrupted; finished layers are in the cache, and the same command goes on"
            typer.echo(f"moejit: {text}", err=True)
            raise typer.Exit(130) from None


def _failures(report: PrewarmReport) -> list[dict[str, str]]:
    """What is not in the cache now: refused problems, failed or lost compiles."""
    rejected = [(_short(problem), error) for problem, error in report.rejected]
    failed = [(f"{outcome.arch} {outcome.name}", outcome.error) for outcome in report.failed]
    return [{"layer": layer, "error": str(error)} for layer, error in [*rejected, *failed]]


def _short(problem: MoeProblem) -> str:
    return (
        f"{problem.arch} H={problem.hidden} I={problem.intermediate} top_k={problem.top_k} "
        f"E={problem.num_local_experts}/{problem.num_experts} T={problem.tokens}"
    )


def _record(report: PrewarmReport, failures: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "layers": [
            {"arch": o.arch, "name": o.name, "state": o.state, "seconds": round(o.seconds, 4)}
            for o in report.outcomes
        ],
        "failures": failures,
        "seconds": round(report.seconds, 4),
    }


def _show(report: PrewarmReport, failures: list[dict[str, str]], problems: int) -> None:
    rows = [(o.arch, o.name, o.state, human_time(o.seconds)) for o in report.outcomes]
    if rows:
        out.print(table("Layers", ("arch", "layer", "state", ">time"), rows))
    out.print(
        f"{problems} shapes need {len(report.outcomes)} layers: {len(report.built)} built, "
        f"{len(report.warm)} were there, {len(failures)} failed; {human_time(report.seconds)}"
    )
    for failure in failures:
        typer.echo(f"failed: {failure['layer']}: {failure['error']}", err=True)
