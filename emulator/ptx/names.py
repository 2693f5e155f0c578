"""What a name in a function's body means: nested scopes of registers, variables and labels.

Inline assembly is pasted into the PTX between braces, each time with the same local names. A name
is looked up from the innermost scope outwards; what was found is kept, so that a name costs one
dictionary look-up after its first use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Union

from moejit.emulator.ptx.lexer import LABEL, NUMBER, TokenStream
from moejit.emulator.ptx.operands import Label, Register, SpecialRegister, Symbol
from moejit.emulator.ptx.types import special_register_type

__all__ = ["Names", "labels_of_scopes"]

Named = Union[Register, SpecialRegister, Symbol, Label]  # noqa: UP007


class Names:
    """The names of one scope.

    Args:
        index: the scope's index in its function.
        parent: the scope around it.
        labels: every label of this scope, also those further down.
        module: symbols of the module; only for the outermost scope.
    """

    def __init__(
        self,
        index: int,
        parent: Names | None,
        labels: set[str],
        module: Mapping[str, Symbol],
    ) -> None:
        self.index, self.parent = index, parent
        self.known: dict[str, Named] = {label: Label(label, index) for label in labels}
        self._own: set[str] = set(labels)
        self._ranges: dict[str, tuple[int, str]] = {}
        self._module = module

    def declare(self, name: str, named: Register | Symbol) -> bool:
        """Adds a name; False if this scope has it already."""
        if name in self._own or self._in_range(name):
            return False
        self._own.add(name)
        self.known[name] = named
        return True

    def declare_range(self, prefix: str, count: int, type_: str) -> bool:
        """``%r<61>``; False if this scope has such a range already."""
        if prefix in self._ranges:
            return False
        self._ranges[prefix] = (count, type_)
        return True

    def find(self, name: str) -> Named | None:
        """What the name means here; None where nothing of that name is declared."""
        found = self.known.get(name)
        if found is None:
            found = self._in_range(name)
            if found is None:
                if self.parent is not None:
                    found = self.parent.find(name)
                else:
                    found = self._module.get(name) or _special(name)
            if found is not None:
                self.known[name] = found
        return found

    def _in_range(self, name: str) -> Register | None:
        # `%r1<8>` declares %r10 to %r17, so every split of the trailing digits counts
        for split in range(len(name) - 1, 0, -1):
            number = name[split:]
            if number[0] not in "0123456789" or len(number) > 9:
                return None
            if number[0] == "0" and number != "0":
                continue  # %r01 is not %r1
            count, type_ = self._ranges.get(name[:split], (0, ""))
            if int(number) < count:
                return Register(name, type_, self.index)
        return None


def _special(name: str) -> SpecialRegister | None:
    type_ = special_register_type(name)
    return None if type_ is None else SpecialRegister(name, type_)


def labels_of_scopes(tokens: TokenStream) -> dict[int, set[str]]:
    """The labels of each scope of the body that starts here, by the place of the opening brace.

    Labels must be known before the branches to them are read: a branch in an inner scope may go to
    a label of an outer one that comes later.
    """
    kinds, texts = tokens.kinds, tokens.texts
    found: dict[int, set[str]] = {}
    inside: list[int | None] = []  # places of braces; None for those of vectors and initialisers
    for at in range(tokens.position, len(kinds)):
        text = texts[at]
        if text == "{":
            # a scope's brace starts a statement, the others do not. A number ends a `.loc`
            starts = texts[at - 1] in (";", "{", "}") or kinds[at - 1] in (LABEL, NUMBER)
            if not inside or (inside[-1] is not None and starts):
                inside.append(at)
                found[at] = set()
            else:
                inside.append(None)
        elif text == "}":
            inside.pop()
            if not inside:
                break
        elif kinds[at] == LABEL and inside[-1] is not None:
            found[inside[-1]].add(text)
    return found
