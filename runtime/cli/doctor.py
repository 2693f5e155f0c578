"""`moejit doctor`: what is there, what is missing, and each setting with its source."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from moejit.runtime.cli.output import emit_json, out, table

__all__ = ["doctor"]

_STYLE = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[red]missing[/]"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check versions, device, compiler, cache and settings. Exit code 1 if something is missing."""
    from rich.markup import escape

    from moejit.runtime.doctor import MISSING, examine
    from moejit.runtime.settings import settings

    current = settings()
    checks = examine(current)
    described = current.describe()
    if as_json:
        found = [asdict(check) for check in checks]
        emit_json({"checks": found, "settings": [asdict(one) for one in described]})
    else:
        rows = [(_STYLE[c.status], c.what, escape(c.found)) for c in checks]
        out.print(table("What moejit stands on", ("", "what", "found"), rows))
        for check in checks:
            if check.hint:
                out.print(f"  {_STYLE[check.status]} {check.what}: {escape(check.hint)}")
        out.print()
        columns = ("setting", "value", "from", "variable")
        lines = [(d.name, escape(d.value), d.source, d.variable) for d in described]
        out.print(table("Settings", columns, lines))
    if any(c.status == MISSING for c in checks):
        raise typer.Exit(1)
