"""The PTX front end: text to typed records, control flow, and which instructions a file uses.

    module = parse(path.read_text())
    for kernel in module.kernels:
        graph = control_flow(kernel)

`parse` takes any PTX that CuTe-DSL or NVVM writes for kernels; what it does not know is a
`PtxSyntaxError` with line and text. Imports nothing but the standard library.
"""

from __future__ import annotations

from moejit.emulator.ptx.flow import Block, ControlFlow, Loop, control_flow
from moejit.emulator.ptx.ir import (
    Function,
    Guard,
    Instruction,
    Module,
    Parameter,
    Performance,
    Pragma,
    Prototype,
    RegisterDeclaration,
    Scope,
    Section,
    SourceLocation,
    Variable,
)
from moejit.emulator.ptx.operands import (
    Address,
    ArgumentList,
    FloatImmediate,
    IntImmediate,
    Label,
    Negated,
    Operand,
    Pair,
    Register,
    Sink,
    SpecialRegister,
    Symbol,
    Vector,
)
from moejit.emulator.ptx.parser import parse
from moejit.emulator.ptx.survey import Unsupported, survey, unsupported

__all__ = [
    "Address",
    "ArgumentList",
    "Block",
    "ControlFlow",
    "FloatImmediate",
    "Function",
    "Guard",
    "Instruction",
    "IntImmediate",
    "Label",
    "Loop",
    "Module",
    "Negated",
    "Operand",
    "Pair",
    "Parameter",
    "Performance",
    "Pragma",
    "Prototype",
    "Register",
    "RegisterDeclaration",
    "Scope",
    "Section",
    "Sink",
    "SourceLocation",
    "SpecialRegister",
    "Symbol",
    "Unsupported",
    "Variable",
    "Vector",
    "control_flow",
    "parse",
    "survey",
    "unsupported",
]
