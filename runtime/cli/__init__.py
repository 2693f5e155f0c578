"""The command line: `moejit demo | prewarm | inspect | cache | doctor`.

Each command lives in a module of its own and imports what it needs when it runs, so that
``moejit --help`` loads neither torch nor the compiler. Errors that moejit raises on purpose become
one message on standard error and exit code 2; anything else is our fault and keeps its traceback.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import moejit
from moejit.runtime.cli import cache, demo, doctor, inspect, prewarm

__all__ = ["app", "main"]

EXIT_FAILED = 1  # the command ran, and something that it checked or built is not right
EXIT_USAGE = 2  # the command could not run as asked

app = typer.Typer(
    name="moejit",
    help="JIT generator of NVFP4 fused mixture-of-experts kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("prewarm")(prewarm.prewarm)
app.command("inspect")(inspect.inspect)
app.command("doctor")(doctor.doctor)
app.add_typer(cache.app, name="cache")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"moejit {moejit.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """JIT generator of NVFP4 fused mixture-of-experts kernels."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        0; 1 if something that was checked or built is not right; 2 for a bad option, setting or
        argument, with the reason on standard error.
    """
    try:
        app(args=None if argv is None else list(argv), prog_name="moejit")
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BrokenPipeError:  # the reader of a pipe left, as in `moejit inspect --source | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as exc:
        # Imported here: codegen brings the template engine along, which `--help` does not need.
        from moejit.cache.errors import CacheError
        from moejit.codegen.errors import MoejitError

        if not isinstance(exc, (CacheError, MoejitError)):
            raise
        typer.echo(f"moejit: {exc}", err=True)
        if "--json" in (sys.argv[1:] if argv is None else argv):
            # Whoever reads JSON gets JSON, whatever happens.
            error = {"type": type(exc).__name__, "message": str(exc)}
            typer.echo(json.dumps({"error": error}, indent=2))
        return EXIT_USAGE
    return 0
