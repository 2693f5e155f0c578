"""The parts of the grammar that declare: variables with initialisers, parameters, performance
directives, source locations. Each function starts at the next token of the stream.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from math import prod

from moejit.emulator.ptx.ir import Parameter, Performance, Prototype, SourceLocation, Variable
from moejit.emulator.ptx.lexer import DOT, NUMBER, PUNCT, STRING, WORD, TokenStream, parse_integer
from moejit.emulator.ptx.operands import IntImmediate, Operand, Symbol, parse_float
from moejit.emulator.ptx.types import LINKAGES, SCALAR_BYTES, SPACES

__all__ = [
    "parse_file",
    "parse_linkage",
    "parse_location",
    "parse_parameters",
    "parse_performance",
    "parse_pragma",
    "parse_prototype",
    "parse_variables",
]

FindSymbol = Callable[[str], Symbol | None]

_FLOAT = re.compile(r"0[fFdD][0-9a-fA-F]+|\d+\.\d*([eE][+-]?\d+)?|\d+[eE][+-]?\d+", re.ASCII)

_TRIPLES = {".reqntid", ".maxntid", ".reqnctapercluster"}
_SINGLES = {".minnctapersm", ".maxnctapersm", ".maxnreg", ".maxclusterrank"}
_FLAGS = {".explicitcluster", ".blocksareclusters", ".noreturn"}


def parse_linkage(tokens: TokenStream) -> str | None:
    if tokens.kind == DOT and tokens.text[1:] in LINKAGES:
        tokens.position += 1
        return tokens.texts[tokens.position - 1][1:]
    return None


def _scalar_type(tokens: TokenStream) -> str:
    name = tokens.take(DOT, "a type")[1:]
    if name not in SCALAR_BYTES:
        tokens.fail("a type", tokens.position - 1)
    return name


def _dimensions(tokens: TokenStream) -> tuple[int | None, ...]:
    """``[4][8]``; only the first may be empty."""
    found: list[int | None] = []
    while tokens.accept("["):
        if not found and tokens.accept("]"):
            found.append(None)
            continue
        found.append(tokens.integer())
        tokens.expect("]")
    return tuple(found)


def parse_variables(
    tokens: TokenStream, linkage: str | None, scope: int, find: FindSymbol
) -> list[Variable]:
    """``.shared .align 16 .b8 a[4], b;`` up to and with the semicolon.

    Args:
        find: a symbol that an initialiser names.
    """
    line = tokens.line()
    space = tokens.take(DOT, "a state space")[1:]
    if space not in SPACES:
        tokens.fail("a state space", tokens.position - 1)
    align = tokens.integer() if tokens.accept(".align") else None
    vector = 1
    for width in (2, 4):
        if tokens.accept(f".v{width}"):
            vector = width
    scalar = _scalar_type(tokens)
    element = SCALAR_BYTES[scalar] * vector
    found = []
    while True:
        name = tokens.take(WORD, "the name of a variable")
        dimensions = _dimensions(tokens)
        at = tokens.position
        depth = len(dimensions) + (vector > 1)
        initializer = tuple(_initializer(tokens, find, depth)) if tokens.accept("=") else None
        inner = vector * prod(d for d in dimensions if d is not None)
        count: int | None = inner
        if dimensions and dimensions[0] is None:
            # as many as the initialiser has; without one, the launch decides
            count = None if initializer is None else -(-len(initializer) // inner) * inner
        if initializer is not None and count is not None:
            # only a plain list may be shorter: with inner ones it would not be clear which is
            nested = "{" in tokens.texts[at + 2 : tokens.position]
            if len(initializer) > count or (nested and len(initializer) < count):
                tokens.fail(f"{'' if nested else 'at most '}{count} values", at)
        size = None if count is None else count * SCALAR_BYTES[scalar]
        found.append(
            Variable(
                name,
                space,
                scalar,
                align or element,
                size,
                linkage,
                scope,
                line,
                vector,
                dimensions,
                initializer,
            )
        )
        if tokens.accept(";"):
            return found
        if not tokens.accept(","):
            tokens.fail("`,`, `=` or `;`")


def _initializer(tokens: TokenStream, find: FindSymbol, depth: int) -> list[Operand]:
    if tokens.text == "{" and not depth:
        tokens.fail("a value, not one more list")
    if not tokens.accept("{"):
        return [_initial_value(tokens, find)]
    values = _initializer(tokens, find, depth - 1)
    while tokens.accept(","):
        values += _initializer(tokens, find, depth - 1)
    tokens.expect("}")
    return values


def _initial_value(tokens: TokenStream, find: FindSymbol) -> Operand:
    if tokens.kind == WORD:
        symbol = find(tokens.text)
        if symbol is None:
            tokens.fail("a constant or a symbol that was declared before")
        tokens.position += 1
        if tokens.accept("+"):
            offset = tokens.integer()
            return replace(symbol, offset=offset, offset_text=f"+{offset}")
        return symbol
    return parse_number(tokens)


def parse_number(tokens: TokenStream) -> Operand:
    """A constant, with or without a minus sign."""
    sign = "-" if tokens.accept("-") else ""
    text = tokens.take(NUMBER, "a constant" if not sign else "a number after the minus sign")
    value = parse_integer(text)
    if value is not None:
        return IntImmediate(-value if sign else value, sign + text)
    if not _FLOAT.fullmatch(text):
        tokens.fail("a number of at most 64 bits", tokens.position - 1)
    return parse_float(sign + text)


def parse_parameters(tokens: TokenStream) -> tuple[Parameter, ...]:
    """``( .param ..., .param ... )``, parentheses included."""
    tokens.expect("(")
    found: list[Parameter] = []
    offset = 0
    while not tokens.accept(")"):
        if found:
            tokens.expect(",")
        tokens.expect(".param")
        align = tokens.integer() if tokens.accept(".align") else None
        scalar = _scalar_type(tokens)
        pointer, pointer_space, pointer_align = tokens.accept(".ptr"), None, None
        if pointer:
            if tokens.kind == DOT and tokens.text[1:] in SPACES:
                pointer_space = tokens.take(DOT, "a state space")[1:]
            if tokens.accept(".align"):
                pointer_align = tokens.integer()
        name = tokens.take(WORD, "the name of a parameter")
        dimensions = _dimensions(tokens)
        if None in dimensions:
            tokens.fail("a parameter with a size", tokens.position - 1)
        align = align or SCALAR_BYTES[scalar]
        size = SCALAR_BYTES[scalar] * prod(d for d in dimensions if d is not None)
        offset = -(-offset // align) * align
        found.append(
            Parameter(name, scalar, size, align, offset, pointer, pointer_space, pointer_align)
        )
        offset += size
    return tuple(found)


def parse_performance(tokens: TokenStream) -> Performance:
    """The directives between a function's parameters and its body."""
    found: dict[str, object] = {}
    while tokens.kind == DOT and tokens.text != ".pragma":
        directive = tokens.text
        if directive not in _TRIPLES | _SINGLES | _FLAGS:
            tokens.fail("a performance directive, `{` or `;`")
        tokens.position += 1
        if directive in _FLAGS:
            found[directive[1:]] = True
            continue
        values = [tokens.integer()]
        while directive in _TRIPLES and len(values) < 3 and tokens.accept(","):
            values.append(tokens.integer())
        values += [1] * (3 - len(values))
        found[directive[1:]] = tuple(values) if directive in _TRIPLES else values[0]
    return Performance(**found)  # type: ignore[arg-type]


def parse_pragma(tokens: TokenStream) -> list[str]:
    """``.pragma "a", "b";``"""
    tokens.expect(".pragma")
    found = [tokens.take(STRING, "a string")[1:-1]]
    while tokens.accept(","):
        found.append(tokens.take(STRING, "a string")[1:-1])
    tokens.expect(";")
    return found


def parse_file(tokens: TokenStream) -> tuple[int, str]:
    """``.file 1 "path"``, with or without a time stamp and a size."""
    tokens.expect(".file")
    number = tokens.integer()
    path = tokens.take(STRING, "a path in quotes")[1:-1]
    if tokens.accept(","):
        tokens.integer()
        tokens.expect(",")
        tokens.integer()
    return number, path


def parse_location(tokens: TokenStream) -> SourceLocation:
    """``.loc file line column``, with or without what it was inlined into."""
    tokens.expect(".loc")
    file, line, column = tokens.integer(), tokens.integer(), tokens.integer()
    if not (tokens.kind == PUNCT and tokens.accept(",")):
        return SourceLocation(file, line, column)
    if tokens.take(WORD, "`function_name`") != "function_name":
        tokens.fail("`function_name`", tokens.position - 1)
    if tokens.kind not in (WORD, DOT):
        tokens.fail("a label")
    function = tokens.text
    tokens.position += 1
    if tokens.accept("+"):
        function += f"+{tokens.integer()}"
    tokens.expect(",")
    if tokens.take(WORD, "`inlined_at`") != "inlined_at":
        tokens.fail("`inlined_at`", tokens.position - 1)
    outer = SourceLocation(tokens.integer(), tokens.integer(), tokens.integer())
    return SourceLocation(file, line, column, function, outer)


def parse_prototype(tokens: TokenStream) -> Prototype:
    """``.callprototype (.param .b32 _) _ (.param .b64 _);``"""
    line = tokens.line()
    tokens.expect(".callprototype")
    returns = parse_parameters(tokens) if tokens.text == "(" else ()
    tokens.expect("_")
    parameters = parse_parameters(tokens) if tokens.text == "(" else ()
    noreturn = tokens.accept(".noreturn")
    tokens.expect(";")
    return Prototype(returns, parameters, noreturn, line)
