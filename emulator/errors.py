"""Errors of the emulator.

Arguments stay in ``args``, so that an error comes out of a worker whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["EmulatorError", "PtxSyntaxError", "UnknownKernel"]


class EmulatorError(Exception):
    """Base of every error that the emulator raises on purpose."""


class PtxSyntaxError(EmulatorError):
    """PTX text that the parser does not know. It never guesses.

    Attributes:
        line: line in the PTX, from 1.
        column: column in that line, from 1.
        text: the whole line.
        expected: what would have been right at this place.
    """

    def __init__(self, line: int, column: int, text: str, expected: str) -> None:
        super().__init__(line, column, text, expected)
        self.line, self.column, self.text, self.expected = line, column, text, expected

    @property
    def found(self) -> str:
        """The word or the character at the place of the error."""
        word = re.match(r'[%.]?[\w$]+(?:(?:\.|::)\w+)*|"[^"]*"|\S', self.text[self.column - 1 :])
        return word.group() if word else "the end of the line"

    def __str__(self) -> str:
        text = self.text.expandtabs(4)
        caret = len(self.text[: self.column - 1].expandtabs(4))
        if len(text) > 120:  # a vector of 128 registers is one line
            start = max(0, caret - 60)
            text, caret = text[start : start + 120], caret - start
        return (
            f"PTX line {self.line}, column {self.column}: expected {self.expected}, "
            f"found {self.found}\n    {text.rstrip()}\n    {' ' * caret}^"
        )


class UnknownKernel(EmulatorError, KeyError):
    """The module has no kernel of this name.

    Attributes:
        name: the name that was asked for.
        known: the kernels that are there.
    """

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(name, tuple(known))
        self.name, self.known = name, tuple(known)

    def __str__(self) -> str:
        return f"no kernel {self.name!r} in this PTX module; it has: {', '.join(self.known)}"
