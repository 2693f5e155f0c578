"""What every command shares for talking to people and to scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["emit_json", "human_bytes", "human_time", "notes", "out", "table"]

# Lines cut at 80 columns break what people copy, hence soft_wrap; a file or a pipe has no width to
# cut a table to.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
notes = Console(stderr=True, highlight=False, soft_wrap=True)


def emit_json(value: Any) -> None:
    """One JSON text on standard output; paths and other objects as their text."""
    typer.echo(json.dumps(value, indent=2, default=str))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table whose columns with a leading ``>`` in their name are right-aligned."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        made.add_column(column.lstrip(">"), justify=justify, overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def human_bytes(count: float) -> str:
    """``1536`` -> ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def human_time(seconds: float) -> str:
    """``0.0004`` -> ``0.40 ms``; ``2.5`` -> ``2.50 s``."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
