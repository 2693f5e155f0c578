"""Device memory between the kernels of a layer: kept per stream, so that calls allocate nothing.

A `Workspaces` serves one device. Each (stream, thread) has a buffer of its own, shared by all
layers that run there one after the other. While a CUDA graph is being captured the buffer comes
from the graph's private pool instead: a replay must not share memory with calls outside the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident

import torch

from moejit.codegen.workspace import ALIGNMENT

__all__ = ["Workspaces"]


class Workspaces:
    """Workspace buffers of one device.

    Args:
        device: where they lie.
        stream: the raw handle of the current stream, 0 for the default one.
        capturing: whether the current stream is being captured.
    """

    def __init__(
        self, device: torch.device, stream: Callable[[], int], capturing: Callable[[], bool]
    ) -> None:
        self.device = device
        self._stream = stream
        self._capturing = capturing
        # By (stream, thread): a call releases the GIL, so that two threads on one stream could
        # otherwise interleave their kernels on one buffer. Value: (bytes, aligned address, buffer).
        self._kept: dict[tuple[int, int], tuple[int, int, torch.Tensor]] = {}

    def take(self, size: int) -> tuple[int, int, torch.Tensor]:
        """At least ``size`` bytes: (bytes, address, buffer). Valid until the next `take` of this
        thread on this stream; in a capture, while the buffer is referenced."""
        stream = self._stream()
        # The default stream cannot be captured, and asking costs 0.3 us.
        if stream and self._capturing():
            return self._allocate(size)
        place = stream, get_ident()
        kept = self._kept.get(place)
        if kept is None or kept[0] < size:
            grown = size if kept is None else max(size, kept[0] + kept[0] // 4)
            # The old buffer goes back to the allocator, which hands it out on this stream only
            # after the work that uses it.
            kept = self._kept[place] = self._allocate(grown)
        return kept

    def release(self) -> None:
        """Give every kept buffer back to the allocator."""
        self._kept.clear()

    @property
    def kept_bytes(self) -> int:
        """Bytes of all kept buffers."""
        return sum(kept[0] for kept in list(self._kept.values()))

    def _allocate(self, size: int) -> tuple[int, int, torch.Tensor]:
        buffer = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=self.device)
        return size, -(-buffer.data_ptr() // ALIGNMENT) * ALIGNMENT, buffer
