"""Problem in, source text out: pure Python, imports only `moejit.templates`' files.

`MoeProblem` says what was asked, `select` answers with a `MoePlan` that says how it is done, and
`render` turns both into a `LayerSource`: the Python package of CuTe-DSL files that is compiled as
one unit. Never imports torch, CUDA or cutlass.
"""

from __future__ import annotations

from .arch import ARCHS, ArchSpec, arch_for_capability, arch_spec
from .errors import BadProblem, MoejitError, NoVariantFits, TemplateError, UnknownArch
from .plan import MoePlan
from .problem import MoeProblem
from .render import LayerSource, SourceFile, render
from .select import Candidate, candidates, explain, select, why_not
from .workspace import WorkspaceLayout, workspace_layout

__all__ = [
    "ARCHS",
    "ArchSpec",
    "BadProblem",
    "Candidate",
    "LayerSource",
    "MoePlan",
    "MoeProblem",
    "MoejitError",
    "NoVariantFits",
    "SourceFile",
    "TemplateError",
    "UnknownArch",
    "WorkspaceLayout",
    "arch_for_capability",
    "arch_spec",
    "candidates",
    "explain",
    "render",
    "select",
    "why_not",
    "workspace_layout",
]
