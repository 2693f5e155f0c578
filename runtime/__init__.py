"""What a user of moejit touches. Importing this imports neither torch nor the compiler.

`moe_nvfp4` runs a layer. `runtime.prewarm.prewarm` fills the cache ahead of time,
`runtime.settings.settings` says what is in force, `runtime.quantize` makes the operands,
`runtime.reference` says what they should give. Public names are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moejit.codegen.errors import BadProblem, NoVariantFits, TemplateError, UnknownArch
    from moejit.codegen.problem import MoeProblem
    from moejit.runtime.api import cute_dsl_fused_moe_nvfp4, moe_nvfp4
    from moejit.runtime.errors import (
        BackendUnavailable,
        BadArgument,
        CaptureWouldCompile,
        CompileFailed,
        JitDisabled,
        LinkerMissing,
        LoadFailed,
        MoejitError,
    )
    from moejit.runtime.events import counters, hook
    from moejit.runtime.settings import BadSetting, Settings, scope

__all__ = [
    "BackendUnavailable",
    "BadArgument",
    "BadProblem",
    "BadSetting",
    "CaptureWouldCompile",
    "CompileFailed",
    "JitDisabled",
    "LinkerMissing",
    "LoadFailed",
    "MoeProblem",
    "MoejitError",
    "NoVariantFits",
    "Settings",
    "TemplateError",
    "UnknownArch",
    "counters",
    "cute_dsl_fused_moe_nvfp4",
    "hook",
    "moe_nvfp4",
    "scope",
]

_ERRORS = "moejit.runtime.errors"
_HOME = {
    **dict.fromkeys(("BackendUnavailable", "BadArgument", "CaptureWouldCompile"), _ERRORS),
    **dict.fromkeys(("CompileFailed", "JitDisabled", "LinkerMissing", "LoadFailed"), _ERRORS),
    "MoejitError": _ERRORS,
    **dict.fromkeys(
        ("BadProblem", "NoVariantFits", "TemplateError", "UnknownArch"), "moejit.codegen.errors"
    ),
    "MoeProblem": "moejit.codegen.problem",
    **dict.fromkeys(("cute_dsl_fused_moe_nvfp4", "moe_nvfp4"), "moejit.runtime.api"),
    **dict.fromkeys(("BadSetting", "Settings", "scope"), "moejit.runtime.settings"),
    **dict.fromkeys(("counters", "hook"), "moejit.runtime.events"),
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOME:
        # Kept, as looking it up anew costs 1 us at each `runtime.moe_nvfp4(...)`.
        value = globals()[name] = getattr(import_module(_HOME[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
