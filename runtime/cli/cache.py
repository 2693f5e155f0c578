"""`moejit cache list | verify | clear | path`: what is on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moejit.runtime.cli.output import emit_json, human_bytes, human_time, notes, out, table

if TYPE_CHECKING:
    from moejit.cache.entry import Entry
    from moejit.cache.store import Store

__all__ = ["app"]

app = typer.Typer(name="cache", help="List, check or clear the kernel cache.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("path")
def path() -> None:
    """Print the cache folder."""
    from moejit.runtime.settings import settings

    typer.echo(str(settings().cache_dir))


@app.command("list")
def list_entries(as_json: Json = False) -> None:
    """List every compiled layer."""
    store = _store()
    entries = sorted(store.list(), key=lambda e: (e.manifest.key.arch, e.manifest.key.name))
    if as_json:
        emit_json([_record(entry) for entry in entries])
        return
    if not entries:
        notes.print(f"The cache {store.root} holds no layer; `moejit prewarm` fills it.")
        return
    rows: list[tuple[object, ...]] = [
        (
            entry.digest[:10],
            entry.manifest.key.arch,
            entry.manifest.key.name,
            human_bytes(entry.size_bytes),
            human_time(float(entry.manifest.created.get("build_seconds", 0.0))),
            entry.manifest.created.get("at", ""),
        )
        for entry in entries
    ]
    columns = ["key", "arch", "layer", ">size", ">built in", "at"]
    if len(store.roots) > 1:
        columns.append("root")
        rows = [(*row, _root(store, entry)) for row, entry in zip(rows, entries, strict=True)]
    out.print(table(":".join(map(str, store.roots)), columns, rows))
    total = sum(entry.size_bytes for entry in entries)
    out.print(f"{len(entries)} layers, {human_bytes(total)}")


@app.command("verify")
def verify(as_json: Json = False) -> None:
    """Compare each file of each layer with its checksum. Exit code 1 if any differs."""
    store = _store()
    verdicts = store.verify()
    bad = [v for v in verdicts if v.problems]
    if as_json:
        emit_json([{"path": str(v.path), "problems": list(v.problems)} for v in verdicts])
    else:
        for verdict in bad:
            typer.echo(f"{verdict.path}: {'; '.join(verdict.problems)}", err=True)
        out.print(f"{len(verdicts) - len(bad)} layers are sound, {len(bad)} are damaged.")
        if bad:
            notes.print("A damaged layer is never loaded; the next call builds it again.")
    if bad:
        raise typer.Exit(1)


@app.command("clear")
def clear(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove every compiled layer. Processes that have loaded one keep it."""
    store = _store()
    count = _writable(store)
    if count and not yes:
        typer.confirm(f"Remove {count} layers from {store.root}?", abort=True, err=True)
    removed = store.clear()
    left = _writable(store)
    if as_json:
        emit_json({"removed": removed, "left": left})
    else:
        out.print(f"Removed {removed} layers from {store.root}.")
    if left:
        typer.echo(f"{left} layers could not be removed; check the folder's rights.", err=True)
        raise typer.Exit(1)


def _store() -> Store:
    from moejit.runtime.build import open_store
    from moejit.runtime.settings import settings

    return open_store(settings())


def _writable(store: Store) -> int:
    """Entries under the root that is written to; the other roots are not ours to clear."""
    return sum(entry.path.is_relative_to(store.root) for entry in store.list())


def _root(store: Store, entry: Entry) -> str:
    return next(str(root) for root in store.roots if entry.path.is_relative_to(root))


def _record(entry: Entry) -> dict[str, Any]:
    key = entry.manifest.key
    return {
        "key": entry.digest,
        "arch": key.arch,
        "name": key.name,
        "path": str(entry.path),
        "size_bytes": entry.size_bytes,
        "created": dict(entry.manifest.created),
        "spec": dict(key.spec),
        "files": sorted(entry.manifest.files),
    }
