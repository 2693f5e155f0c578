"""`moejit inspect`: a layer by its key or by its shape, and what it is made of."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from moejit.runtime.cli import options
from moejit.runtime.cli.output import emit_json, human_bytes, human_time, notes, out, table

if TYPE_CHECKING:
    from moejit.cache.entry import Entry
    from moejit.codegen.problem import MoeProblem
    from moejit.runtime.inspect import Inspection

__all__ = ["inspect"]


def inspect(
    key: Annotated[
        str | None, typer.Argument(help="First characters of a key; see `moejit cache list`.")
    ] = None,
    hidden: options.Hidden = None,
    intermediate: options.Intermediate = None,
    top_k: options.TopK = None,
    experts: options.Experts = None,
    local_experts: options.LocalExperts = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a call.", rich_help_panel="Shape")] = 64,
    arch: options.Arch = None,
    output_dtype: options.OutputDtype = "bf16",
    ids_dtype: options.IdsDtype = "int32",
    scales_dtype: options.ScalesDtype = "float32",
    finalize: Annotated[
        str, typer.Option(help="fused or deterministic.", rich_help_panel="Shape")
    ] = "fused",
    pdl: options.Pdl = True,
    source: Annotated[bool, typer.Option("--source", help="Print the rendered sources.")] = False,
    file: Annotated[
        str | None, typer.Option(help="With --source: one file, such as gemm1.py.")
    ] = None,
    ptx: Annotated[bool, typer.Option("--ptx", help="Print the PTX.")] = False,
    sass: Annotated[bool, typer.Option("--sass", help="Print the machine code.")] = False,
    why: Annotated[bool, typer.Option("--why", help="Print every plan with its verdict.")] = False,
    as_json: options.Json = False,
) -> None:
    """Show a layer: by default problem, plan, and the resources of each kernel."""
    from moejit.runtime import inspect as layers
    from moejit.runtime.build import open_store
    from moejit.runtime.cli.shapes import BadShape
    from moejit.runtime.settings import settings

    shape = {"hidden": hidden, "intermediate": intermediate, "top_k": top_k, "experts": experts}
    named = [f"--{name.replace('_', '-')}" for name, value in shape.items() if value is not None]
    if key is not None and named:
        raise BadShape(named[0], f"a key was given too ({key}); give one of them")
    if key is None and len(named) < len(shape):
        raise BadShape(
            "moejit inspect",
            "needs the first characters of a key, or a shape: --hidden, --intermediate, --top-k "
            "and --experts; `moejit cache list` shows the keys",
        )
    if sum((source, ptx, sass, why)) > 1:
        raise BadShape("moejit inspect", "takes one of --source, --ptx, --sass and --why")
    if file is not None and not source:
        raise BadShape("--file", "goes with --source")
    problem = None
    if key is None:
        problem = _problem(
            hidden=hidden,
            intermediate=intermediate,
            top_k=top_k,
            experts=experts,
            local_experts=local_experts,
            tokens=str(tokens),
            arch=(arch or options.default_archs()[0],),
            output_dtype=output_dtype,
            ids_dtype=ids_dtype,
            scales_dtype=scales_dtype,
            finalize=finalize,
            pdl=pdl,
        )
    if why:
        if problem is None:
            raise BadShape("--why", "needs a shape: a key does not say how many tokens and experts")
        _show_why(problem, as_json)
        return

    store = open_store(settings())

    def entry() -> Entry:
        if problem is None:
            return layers.entry_of_key(store, key or "")
        return layers.entry_for(store, problem)

    if source:
        if problem is None:
            files = layers.source_of_entry(entry())
        else:
            files = {f.name: f.text for f in layers.source_of_problem(problem).files}
        _show_source(files, file, as_json)
    elif ptx or sass:
        found = entry()
        text = layers.ptx_of(found) if ptx else layers.sass_of(found)
        if as_json:
            emit_json({"key": found.digest, "ptx" if ptx else "sass": text})
        else:
            typer.echo(text, nl=not text.endswith("\n"))
    else:
        facts = layers.inspect_entry(entry())
        if as_json:
            emit_json(asdict(facts))
        else:
            _show_summary(facts)


def _problem(**fields: object) -> MoeProblem:
    from moejit.runtime.build import token_bucket
    from moejit.runtime.cli.shapes import BadShape, LayerShape, problems_of

    if fields["finalize"] == "both":
        raise BadShape("--finalize", "is 'both'; one layer is fused or deterministic")
    tokens, top_k = int(str(fields["tokens"])), int(str(fields["top_k"]))
    # A call asks for the plan of its bucket, and so does this.
    bucket = token_bucket(tokens, top_k) if tokens >= 0 and top_k >= 1 else tokens
    (problem,) = problems_of(LayerShape(**{**fields, "tokens": str(bucket)}), ())  # type: ignore[arg-type]
    return problem


def _show_summary(facts: Inspection) -> None:
    from rich.markup import escape

    out.print(f"[bold]{escape(facts.name)}[/] for {facts.arch}")
    out.print(f"key   {facts.key}")
    out.print(f"path  {escape(str(facts.path))}")
    built = human_time(float(facts.created.get("build_seconds", 0.0)))
    at = facts.created.get("at", "")
    out.print(f"built {at} in {built}; driver {facts.min_driver} or newer\n")
    columns = ("kernel", ">registers", ">stack", ">static smem", ">threads", ">code")
    rows = [
        (
            kernel.name.removeprefix(f"moejit_{facts.name}_"),
            kernel.registers,
            f"{kernel.stack_bytes} B",
            f"{kernel.static_smem_bytes} B",
            kernel.threads or "",
            human_bytes(kernel.code_bytes),
        )
        for kernel in facts.kernels
    ]
    out.print(table("Kernels, from the machine code", columns, rows))
    out.print("Spills: yes" if facts.spills else "No spills: no kernel has a stack.")
    for name, size in facts.dynamic_smem_bytes.items():
        out.print(f"{name}: at most {human_bytes(size)} of dynamic shared memory a CTA (plan)")
    out.print()
    fields = sorted(facts.spec, key=lambda name: ("." in name, name))  # the plan's come last
    pairs = [(name, facts.spec[name]) for name in fields]
    out.print(table("Problem and plan", ("field", "value"), pairs))
    out.print()
    files = [(name, human_bytes(size)) for name, size in facts.files.items()]
    out.print(table("Files", ("file", ">size"), files))


def _show_source(files: dict[str, str], wanted: str | None, as_json: bool) -> None:
    from moejit.runtime.cli.shapes import BadShape

    files = {name: text for name, text in files.items() if text}
    if wanted is not None:
        if wanted not in files:
            raise BadShape("--file", f"there is no {wanted!r}; there are {', '.join(files)}")
        files = {wanted: files[wanted]}
    if as_json:
        emit_json(files)
        return
    for name, text in files.items():
        if len(files) > 1:
            typer.echo(f"# ==== {name} ====")
        typer.echo(text, nl=not text.endswith("\n"))


def _show_why(problem: MoeProblem, as_json: bool) -> None:
    from moejit.runtime.inspect import why

    found = why(problem)
    if as_json:
        records = [
            {"plan": c.plan.name, "modelled_us": c.cost_us, "reasons": list(c.reasons)}
            for c in found
        ]
        chosen = found[0].plan.name if found[0].cost_us is not None else None
        emit_json({"problem": asdict(problem), "chosen": chosen, "plans": records})
        return
    rows = [
        (
            "chosen" if index == 0 and candidate.cost_us is not None else "",
            candidate.plan.name,
            "" if candidate.cost_us is None else f"{candidate.cost_us:.1f} us",
            "; ".join(candidate.reasons),
        )
        for index, candidate in enumerate(found)
    ]
    title = f"Plans for up to {problem.tokens} tokens on {problem.arch}"
    out.print(table(title, ("", "plan", ">modelled", "why not"), rows))
    notes.print("Modelled: the whole layer, from tiles, pipeline steps and slots. Not measured.")
