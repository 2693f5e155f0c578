"""`python -m moejit` and the console script `moejit`: hands over to `moejit.runtime.cli`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    from moejit.runtime.cli import main as run

    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
