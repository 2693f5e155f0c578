"""A PTX file to a `Module`: the grammar of the module level.

The grammar is that of the PTX ISA, as far as compilers use it for kernels. Whatever is not known
is a `PtxSyntaxError` with its place; only opcodes are not judged here, because that is for whoever
executes them.
"""

from __future__ import annotations

import re

from moejit.emulator.ptx.body import parse_body
from moejit.emulator.ptx.declarations import (
    parse_file,
    parse_linkage,
    parse_parameters,
    parse_performance,
    parse_pragma,
    parse_variables,
)
from moejit.emulator.ptx.ir import Body, Function, Module, Pragma, Section, Variable
from moejit.emulator.ptx.lexer import DOT, END, NUMBER, WORD, TokenStream
from moejit.emulator.ptx.operands import Symbol
from moejit.emulator.ptx.types import SPACES

__all__ = ["parse"]


def parse(source: str) -> Module:
    """Parses the text of a PTX file.

    Raises:
        PtxSyntaxError: the text is not PTX, or PTX that this parser does not know.
    """
    return _ModuleParser(TokenStream(source)).parse()


class _ModuleParser:
    def __init__(self, tokens: TokenStream) -> None:
        self.tokens = tokens
        self.symbols: dict[str, Symbol] = {}
        self.variables: list[Variable] = []
        self.functions: dict[str, Function] = {}
        self.files: dict[int, str] = {}
        self.pragmas: list[Pragma] = []
        self.sections: list[Section] = []

    def parse(self) -> Module:
        tokens = self.tokens
        version = self._version()
        target = self._target()
        address_size = tokens.integer() if tokens.accept(".address_size") else 64
        while tokens.kind != END:
            self._item()
        return Module(
            version,
            target,
            address_size,
            tuple(self.variables),
            tuple(self.functions.values()),
            self.files,
            tuple(self.pragmas),
            tuple(self.sections),
        )

    def _version(self) -> tuple[int, int]:
        self.tokens.expect(".version")
        text = self.tokens.take(NUMBER, "a version such as 8.8")
        if not re.fullmatch(r"\d+\.\d+", text):
            self.tokens.fail("a version such as 8.8", self.tokens.position - 1)
        major, minor = text.split(".")
        return int(major), int(minor)

    def _target(self) -> tuple[str, ...]:
        self.tokens.expect(".target")
        found = [self.tokens.take(WORD, "an architecture such as sm_90a")]
        while self.tokens.accept(","):
            found.append(self.tokens.take(WORD, "an option of .target"))
        return tuple(found)

    def _item(self) -> None:
        """One declaration or definition of the module level."""
        tokens = self.tokens
        at, line = tokens.position, tokens.line()
        if tokens.text == ".file":
            number, path = parse_file(tokens)
            self.files[number] = path
        elif tokens.text == ".pragma":
            self.pragmas += [Pragma(text, 0, line) for text in parse_pragma(tokens)]
        elif tokens.text == ".section":
            self._section()
        else:
            linkage = parse_linkage(tokens)
            if tokens.text in (".entry", ".func"):
                self._function(linkage, line)
            elif tokens.kind == DOT and tokens.text[1:] in SPACES:
                for variable in parse_variables(tokens, linkage, -1, self.symbols.get):
                    self._declare(variable.symbol, at)
                    self.variables.append(variable)
            else:
                tokens.fail("a function, a variable, `.file`, `.pragma` or `.section`")

    def _declare(self, symbol: Symbol, at: int) -> None:
        if symbol.name in self.symbols:
            self.tokens.fail("names that the module does not have yet", at)
        self.symbols[symbol.name] = symbol

    def _section(self) -> None:
        """``.section .debug_str { ... }``: kept as text, nothing that runs needs it."""
        tokens = self.tokens
        line = tokens.line()
        tokens.expect(".section")
        name = tokens.text
        tokens.position += 1
        start = tokens.starts[tokens.position]
        tokens.expect("{")
        while tokens.text != "}":
            if tokens.kind == END or tokens.text == "{":
                tokens.fail("`}`")
            tokens.position += 1
        end = tokens.starts[tokens.position] + 1
        tokens.position += 1
        self.sections.append(Section(name, tokens.source[start:end], line))

    def _function(self, linkage: str | None, line: int) -> None:
        tokens = self.tokens
        is_kernel = tokens.accept(".entry")
        if not is_kernel:
            tokens.expect(".func")
        returns = parse_parameters(tokens) if tokens.text == "(" and not is_kernel else ()
        at = tokens.position
        name = tokens.take(WORD, "the name of a function")
        before = self.functions.get(name)
        if before is None:
            self._declare(Symbol(name, "func", -1), at)
        elif before.has_body:
            tokens.fail("a function that was not defined before", at)
        parameters = parse_parameters(tokens) if tokens.text == "(" else ()
        performance = parse_performance(tokens)
        pragmas = []
        while tokens.text == ".pragma":
            pragmas += [Pragma(text, 0, line) for text in parse_pragma(tokens)]
        has_body = tokens.text == "{"
        if has_body:
            local = {p.name: Symbol(p.name, "param", 0) for p in (*returns, *parameters)}
            if len(local) < len(returns) + len(parameters):
                tokens.fail("parameters of different names", at)
            body = parse_body(tokens, {**self.symbols, **local})
        else:
            tokens.expect(";")
            body = Body()
        # the definition takes the place of an earlier declaration
        self.functions.pop(name, None)
        self.functions[name] = Function(
            name=name,
            is_kernel=is_kernel,
            linkage=linkage,
            parameters=parameters,
            returns=returns,
            performance=performance,
            line=line,
            has_body=has_body,
            pragmas=(*pragmas, *body.pragmas),
            variables=tuple(body.variables),
            declarations=tuple(body.declarations),
            scopes=tuple(body.scopes),
            instructions=tuple(body.instructions),
            labels=body.labels,
            branch_targets=body.branch_targets,
            call_targets=body.call_targets,
            prototypes=body.prototypes,
        )
