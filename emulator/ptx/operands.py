"""Operands of an instruction, as typed records.

All are frozen and can be compared and hashed; where the same value has several spellings
(``16``, ``0x10``) the spelling is kept beside it and takes no part in a comparison. ``str`` of an
operand is PTX text.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Union

__all__ = [
    "Address",
    "ArgumentList",
    "FloatImmediate",
    "IntImmediate",
    "Label",
    "Negated",
    "Operand",
    "Pair",
    "Register",
    "Sink",
    "SpecialRegister",
    "Symbol",
    "Vector",
    "parse_float",
]


@dataclass(frozen=True, slots=True)
class Register:
    """A declared register. Two of one name in different scopes are different registers."""

    name: str
    type: str  # "b32", "pred", ...
    scope: int  # index in `Function.scopes`; 0 is the function itself

    def __str__(self) -> str:
        return self.name

    @property
    def unique_name(self) -> str:
        """A name that no other register of the function has."""
        return f"{self.name}@{self.scope}" if self.scope else self.name


@dataclass(frozen=True, slots=True)
class SpecialRegister:
    """``%tid.x`` and the like; the constant ``WARP_SZ`` counts as one."""

    name: str
    type: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class IntImmediate:
    value: int
    text: str = field(compare=False)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class FloatImmediate:
    """A floating-point constant as bits: ``0f3F800000`` has 32, ``0d...`` and ``1.0`` have 64."""

    bits: int
    width: int
    text: str = field(compare=False)

    @property
    def value(self) -> float:
        integer, floating = ("<I", "<f") if self.width == 32 else ("<Q", "<d")
        return float(struct.unpack(floating, struct.pack(integer, self.bits))[0])

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Label:
    """A place in the code, or a table of labels, functions or a prototype."""

    name: str
    scope: int

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Symbol:
    """A variable, a parameter or a function; `offset` bytes into it."""

    name: str
    space: str  # "shared", "global", "const", "local", "param" or "func"
    scope: int  # -1: of the module
    offset: int = 0
    offset_text: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.name + self.offset_text


@dataclass(frozen=True, slots=True)
class Vector:
    elements: tuple[Operand, ...]

    def __str__(self) -> str:
        return "{" + ", ".join(map(str, self.elements)) + "}"


@dataclass(frozen=True, slots=True)
class Address:
    """``[base+offset]``, or ``[base, {coordinates}]`` of a tensor."""

    base: Register | Symbol | IntImmediate
    offset: int = 0
    coordinates: Vector | None = None
    offset_text: str = field(default="", compare=False)

    def __str__(self) -> str:
        inner = f"{self.base}{self.offset_text}"
        return f"[{inner}]" if self.coordinates is None else f"[{inner}, {self.coordinates}]"


@dataclass(frozen=True, slots=True)
class Pair:
    """``p|q``: two destinations."""

    first: Operand
    second: Operand

    def __str__(self) -> str:
        return f"{self.first}|{self.second}"


@dataclass(frozen=True, slots=True)
class Negated:
    """``!p`` of a source operand."""

    register: Register

    def __str__(self) -> str:
        return f"!{self.register}"


@dataclass(frozen=True, slots=True)
class Sink:
    """``_``: a destination that is thrown away."""

    def __str__(self) -> str:
        return "_"


@dataclass(frozen=True, slots=True)
class ArgumentList:
    """``(a, b)`` of a call."""

    elements: tuple[Operand, ...]

    def __str__(self) -> str:
        return "(" + ", ".join(map(str, self.elements)) + ")"


# `Union`, because `|` does not take the names of classes as text on Python 3.10.
Operand = Union[  # noqa: UP007
    Register,
    SpecialRegister,
    IntImmediate,
    FloatImmediate,
    Label,
    Symbol,
    Vector,
    Address,
    Pair,
    Negated,
    Sink,
    ArgumentList,
]


def parse_float(text: str) -> FloatImmediate:
    """A constant as the lexer found it, with or without a minus sign before it."""
    digits = text.lstrip("-")
    negative = digits != text
    if digits[:2] in ("0f", "0F"):
        return FloatImmediate(int(digits[2:], 16) ^ (negative << 31), 32, text)
    if digits[:2] in ("0d", "0D"):
        return FloatImmediate(int(digits[2:], 16) ^ (negative << 63), 64, text)
    bits = struct.unpack("<Q", struct.pack("<d", float(digits)))[0]
    return FloatImmediate(bits ^ (negative << 63), 64, text)
