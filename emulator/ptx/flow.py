"""Control flow of a function: basic blocks, where a divergent warp comes together again, loops.

Immediate dominators after Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm" (2001);
post-dominators are dominators of the reversed graph from one exit that all ``ret``, ``exit`` and
``trap`` lead to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from moejit.emulator.ptx.ir import Function, Instruction
from moejit.emulator.ptx.operands import Label

__all__ = ["Block", "ControlFlow", "Loop", "control_flow"]

_ENDS = frozenset({"ret", "exit", "trap"})


@dataclass(frozen=True, slots=True)
class Block:
    """Instructions `start` to `stop` - 1, entered only at the first, left only at the last."""

    index: int
    start: int
    stop: int
    successors: tuple[int, ...]  # a branch's targets in order, then the block that follows
    predecessors: tuple[int, ...]
    exits: bool  # may leave the function here


@dataclass(frozen=True, slots=True)
class Loop:
    """A natural loop: `header` dominates every block in it."""

    header: int
    blocks: frozenset[int]
    latches: tuple[int, ...]  # blocks that jump back to the header
    parent: int | None  # index of the innermost loop around it in `ControlFlow.loops`


@dataclass(frozen=True)
class ControlFlow:
    """The graph of one function."""

    blocks: tuple[Block, ...]
    block_of: tuple[int, ...]  # instruction -> block

    @cached_property
    def dominators(self) -> tuple[int | None, ...]:
        """Immediate dominator of each block; None for the entry and for dead blocks."""
        successors = [block.successors for block in self.blocks]
        return tuple(_immediate_dominators(successors, 0)) if self.blocks else ()

    @cached_property
    def reconvergence(self) -> tuple[int | None, ...]:
        """Immediate post-dominator of each block: where paths that part there meet at the latest.

        None where they meet only after the function, or never because one of them does not end.
        """
        exit_ = len(self.blocks)
        backwards = [list(block.predecessors) for block in self.blocks]
        backwards.append([block.index for block in self.blocks if block.exits])
        found = _immediate_dominators(backwards, exit_)
        return tuple(None if node == exit_ else node for node in found[:exit_])

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """Natural loops, outer ones before those inside them."""
        latches: dict[int, list[int]] = {}
        for block in self.blocks:
            for successor in block.successors:
                if self.dominates(successor, block.index):
                    latches.setdefault(successor, []).append(block.index)
        bodies = {header: self._loop_body(header, ends) for header, ends in latches.items()}
        headers = sorted(bodies, key=lambda header: (-len(bodies[header]), header))
        found: list[Loop] = []
        for header in headers:
            around = [n for n, loop in enumerate(found) if header in loop.blocks]
            parent = around[-1] if around else None
            found.append(Loop(header, bodies[header], tuple(latches[header]), parent))
        return tuple(found)

    @cached_property
    def irreducible(self) -> tuple[tuple[int, int], ...]:
        """Edges that close a cycle without being the back edge of a natural loop."""
        order = _postorder([block.successors for block in self.blocks], 0) if self.blocks else []
        place = {block: n for n, block in enumerate(order)}
        return tuple(
            (block, successor)
            for block in order
            for successor in self.blocks[block].successors
            if place[successor] >= place[block] and not self.dominates(successor, block)
        )

    def dominates(self, first: int, second: int) -> bool:
        """Whether every path from the entry to `second` goes through `first`."""
        node: int | None = second
        while node is not None and node != first:
            node = self.dominators[node]
        return node == first and (second == 0 or self.dominators[second] is not None)

    def _loop_body(self, header: int, latches: Sequence[int]) -> frozenset[int]:
        body, waiting = {header}, list(latches)
        while waiting:
            block = waiting.pop()
            if block not in body:
                body.add(block)
                waiting += [
                    p
                    for p in self.blocks[block].predecessors
                    if p == 0 or self.dominators[p] is not None
                ]
        return frozenset(body)


def control_flow(function: Function) -> ControlFlow:
    """The blocks of a function with a body. Falling off its end counts as ``ret``."""
    instructions = function.instructions
    count = len(instructions)
    starts = {0, *function.labels.values()}
    for instruction in instructions:
        if instruction.opcode in ("bra", "brx") or instruction.opcode in _ENDS:
            starts.add(instruction.index + 1)
    edges = sorted(start for start in starts if start < count)
    spans = list(zip(edges, [*edges[1:], count], strict=False))  # both empty without code
    block_of = [0] * count
    for index, (start, stop) in enumerate(spans):
        block_of[start:stop] = [index] * (stop - start)

    successors: list[tuple[int, ...]] = []
    exits = []
    for _, stop in spans:
        last = instructions[stop - 1]
        targets = [function.labels[label] for label in _targets(function, last)]
        leaves = last.opcode in _ENDS
        if last.guard is not None or not (leaves or last.opcode in ("bra", "brx")):
            targets.append(stop)
        successors.append(tuple(dict.fromkeys(block_of[t] for t in targets if t < count)))
        exits.append(leaves or count in targets)
    predecessors: list[list[int]] = [[] for _ in spans]
    for index, following in enumerate(successors):
        for successor in following:
            predecessors[successor].append(index)
    blocks = tuple(
        Block(index, start, stop, successors[index], tuple(predecessors[index]), exits[index])
        for index, (start, stop) in enumerate(spans)
    )
    return ControlFlow(blocks, tuple(block_of))


def _targets(function: Function, instruction: Instruction) -> tuple[Label, ...]:
    """The labels that a branch may go to; none for other instructions."""
    labels = tuple(o for o in instruction.operands if isinstance(o, Label))
    if instruction.opcode == "bra":
        return labels
    if instruction.opcode == "brx":
        return tuple(t for table in labels for t in function.branch_targets[table])
    return ()


def _postorder(successors: Sequence[Sequence[int]], root: int) -> list[int]:
    """Nodes that can be reached, each after all that it leads to, but for cycles."""
    order: list[int] = []
    seen = {root}
    stack = [(root, iter(successors[root]))]
    while stack:
        node, following = stack[-1]
        for successor in following:
            if successor not in seen:
                seen.add(successor)
                stack.append((successor, iter(successors[successor])))
                break
        else:
            order.append(node)
            stack.pop()
    return order


def _immediate_dominators(successors: Sequence[Sequence[int]], root: int) -> list[int | None]:
    """For each node; None for the root and for nodes that it does not reach."""
    order = _postorder(successors, root)
    place = {node: n for n, node in enumerate(order)}
    predecessors: dict[int, list[int]] = {node: [] for node in order}
    for node in order:
        for successor in successors[node]:
            predecessors[successor].append(node)
    found: dict[int, int] = {root: root}
    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            new = -1
            for before in predecessors[node]:
                if before in found:
                    new = before if new < 0 else _meet(before, new, found, place)
            if found.get(node) != new:
                found[node] = new
                changed = True
    return [found.get(node) if node != root else None for node in range(len(successors))]


def _meet(first: int, second: int, found: dict[int, int], place: dict[int, int]) -> int:
    """The nearest node that dominates both."""
    while first != second:
        while place[first] < place[second]:
            first = found[first]
        while place[second] < place[first]:
            second = found[second]
    return first
