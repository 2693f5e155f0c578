"""What a PTX module holds, as frozen records: variables, functions, instructions.

The parser makes them, everything else in the emulator reads them. There is no meaning here: an
instruction is its opcode, its modifiers and its operands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from moejit.emulator.errors import UnknownKernel
from moejit.emulator.ptx.operands import (
    Address,
    ArgumentList,
    Label,
    Negated,
    Operand,
    Pair,
    Register,
    Symbol,
    Vector,
)
from moejit.emulator.ptx.types import types_of

__all__ = [
    "Body",
    "Function",
    "Guard",
    "Instruction",
    "Module",
    "Parameter",
    "Performance",
    "Pragma",
    "Prototype",
    "RegisterDeclaration",
    "Scope",
    "Section",
    "SourceLocation",
    "Variable",
]


@dataclass(frozen=True, slots=True)
class SourceLocation:
    """What a ``.loc`` says of the instructions after it."""

    file: int  # key of `Module.files`
    line: int
    column: int
    function: str | None = None  # label of the inlined function's name in .debug_str
    inlined_at: SourceLocation | None = None


@dataclass(frozen=True, slots=True)
class Guard:
    """``@p`` or ``@!p`` before an instruction."""

    register: Register
    negated: bool = False

    def __str__(self) -> str:
        return f"@!{self.register}" if self.negated else f"@{self.register}"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction. ``str`` is its PTX text, made from the record."""

    opcode: str  # "cp"
    modifiers: tuple[str, ...]  # ("async", "bulk", "shared::cluster", ...)
    operands: tuple[Operand, ...]
    guard: Guard | None
    index: int  # in `Function.instructions`
    scope: int  # index in `Function.scopes`
    line: int  # in the PTX, from 1
    text: str  # as it stands in the PTX
    location: SourceLocation | None = None

    @property
    def spelling(self) -> str:
        """Opcode and modifiers: ``ld.global.b32``."""
        return ".".join((self.opcode, *self.modifiers))

    @property
    def types(self) -> tuple[str, ...]:
        """The types among the modifiers: destination first where there are several."""
        return types_of(self.modifiers)

    def registers(self) -> Iterator[Register]:
        """Every register in it, the guard's first, in the order of the text."""
        if self.guard is not None:
            yield self.guard.register
        for operand in self.operands:
            yield from registers_in(operand)

    def __str__(self) -> str:
        guard = "" if self.guard is None else f"{self.guard} "
        operands = ", ".join(map(str, self.operands))
        return f"{guard}{self.spelling}{' ' if operands else ''}{operands};"


def registers_in(operand: Operand) -> Iterator[Register]:
    """Every register in an operand, in the order of the text."""
    if isinstance(operand, Register):
        yield operand
    elif isinstance(operand, Address):
        if isinstance(operand.base, Register):
            yield operand.base
        if operand.coordinates is not None:
            yield from registers_in(operand.coordinates)
    elif isinstance(operand, Vector | ArgumentList):
        for element in operand.elements:
            yield from registers_in(element)
    elif isinstance(operand, Pair):
        yield from registers_in(operand.first)
        yield from registers_in(operand.second)
    elif isinstance(operand, Negated):
        yield operand.register


@dataclass(frozen=True, slots=True)
class Variable:
    """``.shared .align 16 .b8 name[64];`` and the like, of the module or of a scope."""

    name: str
    space: str
    type: str
    align: int
    size: int | None  # bytes; None for `name[]`, whose size the launch decides
    linkage: str | None  # "extern", "visible", "weak", "common"
    scope: int  # -1: of the module
    line: int
    vector: int = 1  # 2 or 4 for .v2 and .v4
    dimensions: tuple[int | None, ...] = ()
    # integers, float constants, `Symbol`s, inner braces gone; may be short: the rest is zero
    initializer: tuple[Operand, ...] | None = None

    @property
    def symbol(self) -> Symbol:
        return Symbol(self.name, self.space, self.scope)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter; `offset` is its place in the block of all of them, laid out as a C struct."""

    name: str
    type: str
    size: int  # bytes
    align: int
    offset: int
    pointer: bool = False  # .ptr
    pointer_space: str | None = None
    pointer_align: int | None = None


@dataclass(frozen=True, slots=True)
class RegisterDeclaration:
    """``.reg .b32 %r<61>`` declares %r0 to %r60; without a count, one register."""

    name: str
    type: str
    count: int | None
    scope: int
    line: int


@dataclass(frozen=True, slots=True)
class Scope:
    """A ``{ ... }`` inside a function, or the function itself (index 0)."""

    index: int
    parent: int | None
    line: int


@dataclass(frozen=True, slots=True)
class Pragma:
    text: str
    index: int  # of the instruction that it stands before; 0 for those of a module
    line: int


@dataclass(frozen=True, slots=True)
class Performance:
    """The performance and cluster directives of a kernel."""

    reqntid: tuple[int, int, int] | None = None
    maxntid: tuple[int, int, int] | None = None
    reqnctapercluster: tuple[int, int, int] | None = None
    minnctapersm: int | None = None
    maxnctapersm: int | None = None
    maxnreg: int | None = None
    maxclusterrank: int | None = None
    explicitcluster: bool = False
    blocksareclusters: bool = False
    noreturn: bool = False


@dataclass(frozen=True, slots=True)
class Prototype:
    """``.callprototype``: what an indirect call's function takes and gives."""

    returns: tuple[Parameter, ...]
    parameters: tuple[Parameter, ...]
    noreturn: bool
    line: int


@dataclass(frozen=True, eq=False)
class Function:
    """A kernel (``.entry``) or a function (``.func``), with a body or only declared.

    Equal only to itself, so that it can be a key. ``repr`` is short: it ends up in messages.
    """

    name: str
    is_kernel: bool
    linkage: str | None
    parameters: tuple[Parameter, ...] = field(repr=False)
    returns: tuple[Parameter, ...] = field(repr=False)
    performance: Performance
    line: int
    has_body: bool
    pragmas: tuple[Pragma, ...] = field(default=(), repr=False)
    variables: tuple[Variable, ...] = field(default=(), repr=False)
    declarations: tuple[RegisterDeclaration, ...] = field(default=(), repr=False)
    scopes: tuple[Scope, ...] = field(default=(), repr=False)
    instructions: tuple[Instruction, ...] = field(default=(), repr=False)
    # index of the instruction that follows the label; len(instructions) at the end
    labels: Mapping[Label, int] = field(default_factory=dict, repr=False)
    branch_targets: Mapping[Label, tuple[Label, ...]] = field(default_factory=dict, repr=False)
    call_targets: Mapping[Label, tuple[Symbol, ...]] = field(default_factory=dict, repr=False)
    prototypes: Mapping[Label, Prototype] = field(default_factory=dict, repr=False)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the parameter block, up to the end of the last parameter."""
        return max((p.offset + p.size for p in self.parameters), default=0)

    def used_registers(self) -> tuple[Register, ...]:
        """Every register that an instruction names, in the order of the first use."""
        found = dict.fromkeys(r for i in self.instructions for r in i.registers())
        return tuple(found)


@dataclass
class Body:
    """The fields of a `Function` that its body fills, while it is read."""

    scopes: list[Scope] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    declarations: list[RegisterDeclaration] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    pragmas: list[Pragma] = field(default_factory=list)
    labels: dict[Label, int] = field(default_factory=dict)
    branch_targets: dict[Label, tuple[Label, ...]] = field(default_factory=dict)
    call_targets: dict[Label, tuple[Symbol, ...]] = field(default_factory=dict)
    prototypes: dict[Label, Prototype] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Section:
    """A ``.section``: debug information, kept as text."""

    name: str
    text: str = field(repr=False)
    line: int


@dataclass(frozen=True, eq=False)
class Module:
    """One PTX file. Equal only to itself, as its functions are."""

    version: tuple[int, int]
    target: tuple[str, ...]  # ("sm_100a",) or ("sm_100a", "debug")
    address_size: int
    variables: tuple[Variable, ...]
    functions: tuple[Function, ...]
    files: Mapping[int, str] = field(default_factory=dict)
    pragmas: tuple[Pragma, ...] = ()
    sections: tuple[Section, ...] = ()

    @property
    def arch(self) -> str:
        return self.target[0]

    @property
    def kernels(self) -> tuple[Function, ...]:
        return tuple(f for f in self.functions if f.is_kernel and f.has_body)

    def kernel(self, name: str) -> Function:
        """The kernel of this name.

        Raises:
            UnknownKernel: there is none.
        """
        for function in self.kernels:
            if function.name == name:
                return function
        raise UnknownKernel(name, [function.name for function in self.kernels])
