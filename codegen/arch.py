"""What codegen needs to know of a GPU architecture, and nothing that only a device can tell."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UnknownArch

__all__ = ["ARCHS", "ArchSpec", "arch_for_capability", "arch_spec"]


@dataclass(frozen=True, kw_only=True)
class ArchSpec:
    """One GPU architecture that there are templates for.

    Attributes:
        name: compiler target, for example ``sm_90a``.
        family: folder of its templates: ``sm90`` or ``sm100``.
        capability: CUDA compute capability (major, minor).
        smem_bytes: shared memory one CTA can opt in to, bytes (CUDA programming guide, table
            "Technical Specifications per Compute Capability": 227 KB on 9.0, 10.0 and 10.3).
        min_driver: first driver branch that loads cubins of this target (CUDA 12.3 for sm_90a code
            of this toolchain's PTX 8.x, CUDA 12.8 for 10.0, CUDA 12.9 for 10.3).
    """

    name: str
    family: str
    capability: tuple[int, int]
    smem_bytes: int
    min_driver: str


ARCHS: dict[str, ArchSpec] = {
    spec.name: spec
    for spec in (
        ArchSpec(
            name="sm_90a", family="sm90", capability=(9, 0), smem_bytes=232448, min_driver="545"
        ),
        ArchSpec(
            name="sm_100a", family="sm100", capability=(10, 0), smem_bytes=232448, min_driver="570"
        ),
        ArchSpec(
            name="sm_103a", family="sm100", capability=(10, 3), smem_bytes=232448, min_driver="575"
        ),
    )
}


def arch_spec(name: str) -> ArchSpec:
    """The `ArchSpec` called ``name``.

    Raises:
        UnknownArch: there are no templates for it.
    """
    try:
        return ARCHS[name]
    except KeyError:
        raise UnknownArch(name, tuple(ARCHS)) from None


def arch_for_capability(capability: tuple[int, int]) -> str:
    """The compiler target for a device of this compute capability.

    Raises:
        UnknownArch: no target of ours runs on such a device.
    """
    for spec in ARCHS.values():
        if spec.capability == capability:
            return spec.name
    raise UnknownArch(f"compute capability {capability[0]}.{capability[1]}", tuple(ARCHS))
