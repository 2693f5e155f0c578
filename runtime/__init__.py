"""What a user of moejit touches. Importing this imports neither torch nor the compiler.

`moe_nvfp4` runs a layer. `prewarm` fills the cache ahead of time. `prepare_weights` and
`quantize_activations` make the operands, the helpers beside them put a checkpoint that is quantized
already into the layouts. `runtime.settings.settings` says what is in force, `runtime.reference`
what the result should be. Public names are loaded when they are first used.
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
        NotKept,
    )
    from moejit.runtime.events import counters, hook
    from moejit.runtime.layouts import (
        interleave_up_gate,
        sf_6d_view,
        split_up_gate,
        swizzle_scales,
        unswizzle_scales,
    )
    from moejit.runtime.prewarming import Outcome, PrewarmReport, prewarm
    from moejit.runtime.quantize import (
        dequantize_nvfp4,
        prepare_weights,
        quantize_activations,
        quantize_nvfp4,
    )
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
    "NotKept",
    "Outcome",
    "PrewarmReport",
    "Settings",
    "TemplateError",
    "UnknownArch",
    "counters",
    "cute_dsl_fused_moe_nvfp4",
    "dequantize_nvfp4",
    "hook",
    "interleave_up_gate",
    "moe_nvfp4",
    "prepare_weights",
    "prewarm",
    "quantize_activations",
    "quantize_nvfp4",
    "scope",
    "sf_6d_view",
    "split_up_gate",
    "swizzle_scales",
    "unswizzle_scales",
]

_ERRORS = "moejit.runtime.errors"
_HOME = {
    **dict.fromkeys(("BackendUnavailable", "BadArgument", "CaptureWouldCompile"), _ERRORS),
    **dict.fromkeys(("CompileFailed", "JitDisabled", "LinkerMissing", "LoadFailed"), _ERRORS),
    **dict.fromkeys(("MoejitError", "NotKept"), _ERRORS),
    **dict.fromkeys(
        ("BadProblem", "NoVariantFits", "TemplateError", "UnknownArch"), "moejit.codegen.errors"
    ),
    "MoeProblem": "moejit.codegen.problem",
    **dict.fromkeys(("cute_dsl_fused_moe_nvfp4", "moe_nvfp4"), "moejit.runtime.api"),
    **dict.fromkeys(("BadSetting", "Settings", "scope"), "moejit.runtime.settings"),
    **dict.fromkeys(("counters", "hook"), "moejit.runtime.events"),
    **dict.fromkeys(
        (
            "interleave_up_gate",
            "sf_6d_view",
            "split_up_gate",
            "swizzle_scales",
            "unswizzle_scales",
        ),
        "moejit.runtime.layouts",
    ),
    # The module has another name than the function: importing a submodule binds its name here.
    **dict.fromkeys(("Outcome", "PrewarmReport", "prewarm"), "moejit.runtime.prewarming"),
    **dict.fromkeys(
        ("dequantize_nvfp4", "prepare_weights", "quantize_activations", "quantize_nvfp4"),
        "moejit.runtime.quantize",
    ),
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
