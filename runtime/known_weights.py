"""Weight tensors that were looked at: a layer's weights are the same objects at every call.

A call's signature holds the shapes, strides, dtypes and devices of seven weight tensors. Reading
them all takes longer than the rest of the host side, so they are read once for each set of tensor
objects and kept as a small number, the set's kind: equal numbers mean equal facts. A set is
forgotten when one of its tensors dies, and read again when one has moved (`param.data = ...`). What
is not noticed is a tensor that gets another shape, stride or dtype in place and stays where it is
(`t_`, `resize_`).
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch

__all__ = ["Known", "KnownWeights"]


class Known(NamedTuple):
    """What is kept of one set of weights.

    Attributes:
        kind: equal for two sets with equal shapes, strides, dtypes and devices, all with memory.
        addresses: where the tensors were.
        watched: references that end the entry with the first tensor.
    """

    kind: int
    addresses: tuple[int, ...]
    watched: tuple[weakref.ref[torch.Tensor], ...]


class KnownWeights:
    """Sets of weight tensors by the identity of their objects. `get` takes no lock."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[object, ...], int] = {}
        self._sets: dict[tuple[int, ...], Known] = {}
        self.get = self._sets.get

    def __len__(self) -> int:
        return len(self._sets)

    def add(self, weights: tuple[torch.Tensor, ...], addresses: tuple[int, ...]) -> Known:
        """Look at a set of weights and keep what was found until one of them dies."""
        facts = (
            *((w.shape, w.stride(), w.dtype, w.device, w.is_contiguous()) for w in weights),
            0 in addresses,  # freed memory: of no kind that was found good
        )
        kind = self._kinds.setdefault(facts, len(self._kinds))
        identity = tuple(map(id, weights))
        sets = self._sets

        def forget(_: weakref.ref[torch.Tensor]) -> None:
            sets.pop(identity, None)

        known = Known(kind, addresses, tuple(weakref.ref(w, forget) for w in weights))
        sets[identity] = known
        return known
