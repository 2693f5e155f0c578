"""Which instructions a module uses, and which of them somebody cannot execute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from moejit.emulator.ptx.ir import Instruction, Module

__all__ = ["Unsupported", "survey", "unsupported"]


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Instructions of one spelling in one kernel that cannot be executed."""

    kernel: str
    spelling: str
    count: int
    line: int  # in the PTX, of the first of them
    text: str  # of the first of them

    def __str__(self) -> str:
        times = f"{self.count} times, first" if self.count > 1 else "once,"
        return f"{self.kernel}: {self.spelling} ({times} in PTX line {self.line})"


def survey(module: Module) -> dict[str, Counter[str]]:
    """For each function with a body: how often each opcode with its modifiers stands in it."""
    return {
        function.name: Counter(instruction.spelling for instruction in function.instructions)
        for function in module.functions
        if function.has_body
    }


def unsupported(module: Module, supported: Callable[[Instruction], bool]) -> list[Unsupported]:
    """What `supported` says no to, one record for each spelling and function, in the PTX's order.

    Two instructions of one spelling may differ in their operands, so each one is asked about.
    """
    found = []
    for function in module.functions:
        refused: dict[str, list[Instruction]] = {}
        for instruction in function.instructions:
            if not supported(instruction):
                refused.setdefault(instruction.spelling, []).append(instruction)
        for spelling, cases in refused.items():
            first = cases[0]
            found.append(Unsupported(function.name, spelling, len(cases), first.line, first.text))
    return found
