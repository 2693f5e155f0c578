"""The last step of a call: read the addresses, call the layer's host function.

`bind` is done once for a call signature (shapes, strides, dtypes, devices, flags), so sizes are
computed there, and a call only reads what may change: addresses and the stream. No lock, no
environment, no formatting, no import here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moejit.codegen.plan import MoePlan
from moejit.codegen.workspace import WorkspaceLayout
from moejit.runtime.workspace import Workspaces

__all__ = ["Bound", "Layer", "NeedsCheck", "Runner", "Weights", "bind"]


class NeedsCheck(Exception):
    """The addresses of a call break a rule; the full check of the arguments says which."""


# w1, its scale factors and alphas, fc2_input_scale, w2, its scale factors and alphas.
Weights = tuple[torch.Tensor, ...]
# Runs one call signature: (output, x, x_sf, ids, routing scales, weights, addresses of the
# weights).
Runner = Callable[..., None]


@dataclass(kw_only=True)
class Layer:
    """A compiled layer that is loaded into this process.

    Attributes:
        name: readable name, as in the cache.
        arch: what it was compiled for.
        plan: the kernel variants in it.
        layout: its workspace.
        function: its host function.
        launched: it ran once, so the driver holds its code: it may be captured into a CUDA graph.
    """

    name: str
    arch: str
    plan: MoePlan
    layout: WorkspaceLayout
    function: Callable[..., Any]
    launched: bool = False


@dataclass(frozen=True)
class Bound:
    """One call signature with what runs it.

    Attributes:
        run: takes the output and the inputs.
        layer: the compiled layer behind it, None where there is none.
    """

    run: Runner
    layer: Layer | None = None


def bind(
    layer: Layer,
    workspaces: Workspaces,
    sizes: tuple[int, int, int, int],
    extents: tuple[int, ...] | None,
) -> Bound:
    """Bind one call signature to one layer.

    Args:
        layer: what to call.
        workspaces: memory of the device.
        sizes: tokens, local experts, local expert offset, SMs.
        extents: bytes of the output and of each input, where the output is the caller's and so
            might overlap an input; None where it is fresh.
    """
    function, take = layer.function, workspaces.take
    workspace_bytes = layer.layout.bytes(sizes[0], sizes[1])

    # A closure, not an object with __call__: the interpreter enters it without building a tuple.
    def launch(
        out: torch.Tensor,
        x: torch.Tensor,
        x_sf: torch.Tensor,
        ids: torch.Tensor,
        scales: torch.Tensor,
        weights: Weights,
        weights_at: tuple[int, ...],
    ) -> None:
        x_at, x_sf_at = x.data_ptr(), x_sf.data_ptr()
        ids_at, scales_at = ids.data_ptr(), scales.data_ptr()
        w1_at, w1_sf_at, w1_alpha_at, fc2_scale_at, w2_at, w2_sf_at, w2_alpha_at = weights_at
        # Address 0: a meta tensor, or one whose storage was freed.
        if not (x_at and x_sf_at and ids_at and scales_at):
            raise NeedsCheck
        if (x_at | x_sf_at | w1_at | w1_sf_at | w2_at | w2_sf_at) & 15:
            raise NeedsCheck
        if extents is not None:
            begin = out.data_ptr()
            size, x_n, x_sf_n, ids_n, scales_n, w1_n, w1_sf_n, a1_n, fc2_n, w2_n, w2_sf_n, a2_n = (
                extents
            )
            low = -size
            if (
                not begin
                or begin & 15
                # [at, at + n) and [begin, begin + size) overlap
                or low < begin - x_at < x_n
                or low < begin - x_sf_at < x_sf_n
                or low < begin - ids_at < ids_n
                or low < begin - scales_at < scales_n
                or low < begin - w1_at < w1_n
                or low < begin - w1_sf_at < w1_sf_n
                or low < begin - w1_alpha_at < a1_n
                or low < begin - fc2_scale_at < fc2_n
                or low < begin - w2_at < w2_n
                or low < begin - w2_sf_at < w2_sf_n
                or low < begin - w2_alpha_at < a2_n
            ):
                raise NeedsCheck
        # The buffer of the workspace stays referenced until the launches are queued.
        _, workspace_at, _buffer = take(workspace_bytes)
        function(out, x_at, x_sf_at, ids_at, scales_at, *weights_at, workspace_at, *sizes)

    return Bound(launch, layer)
