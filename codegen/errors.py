"""Errors that codegen raises, and the base class of every error of moejit.

Lives in the lowest layer so that codegen, cache and runtime can share the base; `runtime.errors`
re-exports all of them.
"""

from __future__ import annotations

__all__ = ["MoejitError"]


class MoejitError(Exception):
    """Base of every error that moejit raises on purpose.

    Subclasses pass their fields to ``Exception.__init__`` so that they survive pickling on the way
    out of a compile worker, and build the message in ``__str__``: what, where, and what next.
    """
