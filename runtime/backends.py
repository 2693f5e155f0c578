"""Who runs a layer: the GPU, the reference on the CPU, or nobody.

A backend says which architecture a call is for and binds a call signature to what runs it. The
dispatcher, the cache, the compiler and the loader are the same for all of them; a backend that
needs a compiled layer asks the dispatcher for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Protocol

import torch

from moejit.codegen.arch import arch_for_capability
from moejit.codegen.problem import MoeProblem
from moejit.runtime.errors import BackendUnavailable
from moejit.runtime.launcher import Bound, Layer, Weights, bind
from moejit.runtime.settings import Settings
from moejit.runtime.workspace import Workspaces

__all__ = ["Backend", "Call", "backend_for"]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call signature after the check of its arguments: everything but the addresses.

    Attributes:
        device: of every tensor.
        extents: bytes of the output and of each input in launch order, where the output is the
            caller's; None where it is fresh.
        Others: as in `MoeProblem` and in `moe_nvfp4`.
    """

    device: torch.device
    tokens: int
    hidden: int
    intermediate: int
    top_k: int
    num_experts: int
    num_local_experts: int
    local_expert_offset: int
    ids_dtype: torch.dtype
    scales_dtype: torch.dtype
    output_dtype: torch.dtype
    deterministic: bool
    pdl: bool
    extents: tuple[int, ...] | None

    def problem(self, arch: str) -> MoeProblem:
        """What this call asks of code generation."""
        return MoeProblem(
            arch=arch,
            hidden=self.hidden,
            intermediate=self.intermediate,
            top_k=self.top_k,
            num_experts=self.num_experts,
            num_local_experts=self.num_local_experts,
            tokens=self.tokens,
            ids_dtype=_name(self.ids_dtype),
            scales_dtype=_name(self.scales_dtype),
            output_dtype=_name(self.output_dtype),
            deterministic=self.deterministic,
            pdl=self.pdl,
        )


LayerFor = Callable[[MoeProblem, "Backend"], Layer]


class Backend(Protocol):
    """How calls on one device are run."""

    name: str
    capability: tuple[int, int] | None  # of the device; None where there is none

    def bind(self, call: Call, layer_for: LayerFor) -> Bound:
        """Something that runs every call of this signature."""

    def capturing(self) -> bool:
        """Whether the current stream is being captured into a CUDA graph."""


class CudaBackend:
    """Runs compiled layers on one CUDA device."""

    name = "cuda"

    def __init__(self, device: torch.device, arch: str | None) -> None:
        if not torch.cuda.is_available():
            reason = "torch finds no CUDA device"
            hint = "`moejit doctor` says more; MOEJIT_BACKEND=reference runs on CPU tensors."
            raise BackendUnavailable(self.name, reason, hint)
        if device.type != "cuda":
            hint = "Move the tensors to a GPU, or use MOEJIT_BACKEND=reference."
            raise BackendUnavailable(self.name, f"the tensors are on {device}", hint)
        self.capability: tuple[int, int] | None = torch.cuda.get_device_capability(device)
        self._arch = arch or arch_for_capability(torch.cuda.get_device_capability(device))
        self._sms = torch.cuda.get_device_properties(device).multi_processor_count
        # The functions behind torch.cuda.current_stream and is_current_stream_capturing: the public
        # ones build objects, and these are asked at every call.
        self._capturing: Callable[[], bool] = torch._C._cuda_isCurrentStreamCapturing
        stream = partial(torch._C._cuda_getCurrentRawStream, device.index)
        self._workspaces = Workspaces(device, stream, self._capturing)

    def capturing(self) -> bool:
        return self._capturing()

    def bind(self, call: Call, layer_for: LayerFor) -> Bound:
        layer = layer_for(call.problem(self._arch), self)
        sizes = call.tokens, call.num_local_experts, call.local_expert_offset, self._sms
        return bind(layer, self._workspaces, sizes, call.extents)


class NullBackend:
    """Does everything but launch: plans, renders, compiles, loads. For machines without a GPU."""

    name = "null"
    capability: tuple[int, int] | None = None

    def __init__(self, device: torch.device, arch: str | None) -> None:
        if arch is None:
            hint = "Set MOEJIT_ARCH."
            raise BackendUnavailable(self.name, "no device says what to compile for", hint)
        self._arch = arch
        self._workspaces = Workspaces(torch.device("cpu"), int, bool)  # stream 0, no capture

    def capturing(self) -> bool:
        return False

    def bind(self, call: Call, layer_for: LayerFor) -> Bound:
        loaded = layer_for(call.problem(self._arch), self)
        layer = replace(loaded, function=_no_launch)
        sizes = call.tokens, call.num_local_experts, call.local_expert_offset, 1
        return bind(layer, self._workspaces, sizes, call.extents)


class ReferenceBackend:
    """Runs `runtime.reference` on the tensors' own device. Slow; right by definition."""

    name = "reference"
    capability: tuple[int, int] | None = None

    def __init__(self, device: torch.device, arch: str | None) -> None:
        from moejit.runtime.reference import moe_reference

        self._reference = moe_reference

    def capturing(self) -> bool:
        return False

    def bind(self, call: Call, layer_for: LayerFor) -> Bound:
        reference: Callable[..., Any] = self._reference
        options: dict[str, Any] = {
            "num_experts": call.num_experts,
            "top_k": call.top_k,
            "num_local_experts": call.num_local_experts,
            "local_expert_offset": call.local_expert_offset,
            "output_dtype": call.output_dtype,
        }

        def run(
            out: torch.Tensor,
            x: torch.Tensor,
            x_sf: torch.Tensor,
            ids: torch.Tensor,
            scales: torch.Tensor,
            weights: Weights,
            weights_at: tuple[int, ...],
        ) -> None:
            # As the kernels do it: no gradients, and any output tensor may be written to.
            with torch.inference_mode():
                reference(x, x_sf, ids, scales, *weights, moe_output=out, **options)

        return Bound(run)


def _emulator(device: torch.device, arch: str | None) -> Backend:
    """The emulator will run a layer's PTX on the CPU behind this same interface."""
    raise BackendUnavailable(
        "emulator",
        "it is not part of this version",
        "Use MOEJIT_BACKEND=reference for results without a GPU.",
    )


_BACKENDS: dict[str, Callable[[torch.device, str | None], Backend]] = {
    "cuda": CudaBackend,
    "null": NullBackend,
    "reference": ReferenceBackend,
    "emulator": _emulator,
}


def backend_for(device: torch.device, settings: Settings) -> Backend:
    """The backend that runs calls with tensors on ``device``; one object for each device.

    Raises:
        BackendUnavailable: the one that the settings ask for cannot run here.
        UnknownArch: there are no kernels for the device.
    """
    name = settings.backend
    if name == "auto":
        name = "cuda" if device.type == "cuda" else "reference"
    return _backend(name, device, settings.arch)


@lru_cache(maxsize=64)
def _backend(name: str, device: torch.device, arch: str | None) -> Backend:
    return _BACKENDS[name](device, arch)


def _no_launch(*arguments: object) -> None:
    pass


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
