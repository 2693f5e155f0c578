"""The shape options that `moejit prewarm` and `moejit inspect` share, and what they default to."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "Arch",
    "Experts",
    "Hidden",
    "IdsDtype",
    "Intermediate",
    "Json",
    "LocalExperts",
    "OutputDtype",
    "Pdl",
    "ScalesDtype",
    "TopK",
    "default_archs",
]

_PANEL = "Shape"

Hidden = Annotated[int | None, typer.Option(help="Hidden size H.", rich_help_panel=_PANEL)]
Intermediate = Annotated[
    int | None, typer.Option(help="Intermediate size I of an expert.", rich_help_panel=_PANEL)
]
TopK = Annotated[
    int | None, typer.Option("--top-k", help="Experts of a token.", rich_help_panel=_PANEL)
]
Experts = Annotated[int | None, typer.Option(help="Experts of the layer.", rich_help_panel=_PANEL)]
LocalExperts = Annotated[
    int | None,
    typer.Option(help="Experts on one rank; all by default.", rich_help_panel=_PANEL),
]
Arch = Annotated[
    str | None,
    typer.Option(help="Targets: sm_90a, sm_100a, sm_103a, or a list.", rich_help_panel=_PANEL),
]
OutputDtype = Annotated[str, typer.Option(help="bf16 or fp16.", rich_help_panel=_PANEL)]
IdsDtype = Annotated[str, typer.Option(help="Expert ids: int32 or int64.", rich_help_panel=_PANEL)]
ScalesDtype = Annotated[
    str,
    typer.Option(help="Routing scales: float32, bfloat16, float16.", rich_help_panel=_PANEL),
]
Pdl = Annotated[
    bool,
    typer.Option("--pdl/--no-pdl", help="Overlap the kernels' starts.", rich_help_panel=_PANEL),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def default_archs() -> list[str]:
    """MOEJIT_ARCH, else what the GPUs here need, else every target that there are kernels for."""
    from moejit.codegen.arch import ARCHS, arch_for_capability
    from moejit.codegen.errors import UnknownArch
    from moejit.runtime.settings import settings

    if arch := settings().arch:
        return [arch]
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        try:
            found.append(arch_for_capability(torch.cuda.get_device_capability(index)))
        except UnknownArch:
            continue
    return list(dict.fromkeys(found)) or list(ARCHS)
