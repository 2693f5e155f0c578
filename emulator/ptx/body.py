"""The body of a function: statements, instructions and operands.

An operand is parsed once for each spelling and scope; instructions then share the record. That and
the short path for operands of a single token make the parser fast enough to run at every launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moejit.emulator.ptx.declarations import (
    parse_location,
    parse_number,
    parse_pragma,
    parse_prototype,
    parse_variables,
)
from moejit.emulator.ptx.ir import (
    Body,
    Guard,
    Instruction,
    Pragma,
    RegisterDeclaration,
    Scope,
    SourceLocation,
)
from moejit.emulator.ptx.lexer import DOT, LABEL, NUMBER, WORD, TokenStream
from moejit.emulator.ptx.names import Names, labels_of_scopes
from moejit.emulator.ptx.operands import (
    Address,
    ArgumentList,
    IntImmediate,
    Label,
    Negated,
    Operand,
    Pair,
    Register,
    Sink,
    Symbol,
    Vector,
)
from moejit.emulator.ptx.types import SCALAR_BYTES, SPACES

__all__ = ["parse_body"]

_SINK = Sink()
_BRANCHES = {"bra": 1, "brx": 2}  # and how many operands they have


def parse_body(tokens: TokenStream, symbols: Mapping[str, Symbol]) -> Body:
    """Parses ``{ ... }``.

    Args:
        tokens: stands at the opening brace.
        symbols: variables and functions of the module, and the function's parameters.
    """
    return _BodyParser(tokens, symbols).parse()


class _BodyParser:
    def __init__(self, tokens: TokenStream, symbols: Mapping[str, Symbol]) -> None:
        self.tokens = tokens
        self.symbols = symbols
        self.body = Body()
        self.names = Names(0, None, set(), symbols)
        self.location: SourceLocation | None = None
        self.opcodes: dict[str, tuple[str, tuple[str, ...]]] = {}
        self.numbers: dict[str, Operand] = {}
        self.branches: list[int] = []  # places of the tokens of `bra` and `brx`
        self.guards: dict[tuple[Register, bool], Guard] = {}
        self.scope_labels = labels_of_scopes(tokens)

    def parse(self) -> Body:
        tokens = self.tokens
        self._open()
        depth = 1
        while depth:
            kind, text = tokens.kinds[tokens.position], tokens.texts[tokens.position]
            if kind == WORD or text == "@":
                self._instruction()
            elif kind == LABEL:
                self._label()
            elif kind == DOT:
                self._directive()
            elif text == "{":
                self._open()
                depth += 1
            elif text == "}":
                tokens.position += 1
                depth -= 1
                if self.names.parent is not None:
                    self.names = self.names.parent
            elif text == ";":
                tokens.position += 1  # an empty statement, left by inline assembly
            else:
                tokens.fail("an instruction, a label, a directive or `}`")
        self._check_branches()
        return self.body

    def _check_branches(self) -> None:
        """Every branch goes to a place in the code; only now are all labels and tables known."""
        branches = (i for i in self.body.instructions if i.opcode in _BRANCHES)
        for at, branch in zip(self.branches, branches, strict=True):
            target = (
                branch.operands[-1] if len(branch.operands) == _BRANCHES[branch.opcode] else None
            )
            if branch.opcode == "bra":
                if target not in self.body.labels:
                    self.tokens.fail("a branch to one label in the code", at)
            elif target not in self.body.branch_targets:
                self.tokens.fail("a branch with an index and a table of labels", at)
            elif not all(t in self.body.labels for t in self.body.branch_targets[target]):
                self.tokens.fail("a branch to a table of labels in the code", at)

    def _open(self) -> None:
        index = len(self.body.scopes)
        parent = self.names if index else None
        line = self.tokens.line()
        labels = self.scope_labels.get(self.tokens.position, set())
        self.body.scopes.append(Scope(index, None if parent is None else parent.index, line))
        self.names = Names(index, parent, labels, self.symbols)
        self.tokens.expect("{")

    # ---- statements ------------------------------------------------------------------------------

    def _label(self) -> None:
        tokens, body = self.tokens, self.body
        at = tokens.position
        label = Label(tokens.take(LABEL, "a label"), self.names.index)
        tables = (body.labels, body.branch_targets, body.call_targets, body.prototypes)
        if any(label in table for table in tables):
            tokens.fail("a label that this scope does not have yet", at)
        if tokens.text == ".branchtargets":
            targets = self._table()
            body.branch_targets[label] = tuple(t for t in targets if isinstance(t, Label))
        elif tokens.text == ".calltargets":
            targets = self._table()
            body.call_targets[label] = tuple(t for t in targets if isinstance(t, Symbol))
        elif tokens.text == ".callprototype":
            body.prototypes[label] = parse_prototype(tokens)
        else:
            body.labels[label] = len(body.instructions)

    def _table(self) -> list[Label | Symbol]:
        """The labels after ``.branchtargets`` or the functions after ``.calltargets``."""
        tokens = self.tokens
        wanted, what = (Label, "a label") if tokens.text == ".branchtargets" else (Symbol, "a name")
        tokens.position += 1
        found: list[Label | Symbol] = []
        while True:
            name = tokens.take(WORD, what)
            target = self.names.find(name)
            if not isinstance(target, Label | Symbol) or not isinstance(target, wanted):
                tokens.fail(f"{what} that is declared", tokens.position - 1)
            found.append(target)
            if tokens.accept(";"):
                return found
            if not tokens.accept(","):
                tokens.fail("`,` or `;`")

    def _directive(self) -> None:
        tokens, body = self.tokens, self.body
        text, line = tokens.text, tokens.line()
        if text == ".loc":
            self.location = parse_location(tokens)
        elif text == ".reg":
            self._registers()
        elif text == ".pragma":
            here = len(body.instructions)
            body.pragmas += [Pragma(pragma, here, line) for pragma in parse_pragma(tokens)]
        elif text[1:] in SPACES:
            at = tokens.position
            find = self._symbol
            for variable in parse_variables(tokens, None, self.names.index, find):
                if not self.names.declare(variable.name, variable.symbol):
                    tokens.fail("names that this scope does not have yet", at)
                body.variables.append(variable)
        else:
            tokens.fail("`.reg`, `.loc`, `.pragma` or a state space")

    def _symbol(self, name: str) -> Symbol | None:
        found = self.names.find(name)
        return found if isinstance(found, Symbol) else None

    def _registers(self) -> None:
        """``.reg .b32 %r<61>, other;``"""
        tokens, scope = self.tokens, self.names.index
        line = tokens.line()
        tokens.expect(".reg")
        type_ = tokens.take(DOT, "a register type")[1:]
        if type_ not in SCALAR_BYTES and type_ != "pred":
            tokens.fail("a register type", tokens.position - 1)
        while True:
            at = tokens.position
            name = tokens.take(WORD, "the name of a register")
            count = None
            if tokens.accept("<"):
                count = tokens.integer()
                tokens.expect(">")
                new = self.names.declare_range(name, count, type_)
            else:
                new = self.names.declare(name, Register(name, type_, scope))
            if not new or "." in name:
                tokens.fail("a name that this scope does not have yet", at)
            self.body.declarations.append(RegisterDeclaration(name, type_, count, scope, line))
            if tokens.accept(";"):
                return
            if not tokens.accept(","):
                tokens.fail("`,` or `;`")

    def _instruction(self) -> None:
        tokens = self.tokens
        kinds, texts = tokens.kinds, tokens.texts
        start = tokens.position
        guard = self._guard() if texts[start] == "@" else None
        word = texts[tokens.position]
        known = self.opcodes.get(word)
        if known is None:
            if kinds[tokens.position] != WORD or not word[0].islower():
                tokens.fail("an instruction")
            opcode, *parts = word.split(".")
            known = self.opcodes[word] = (opcode, tuple(parts))
        opcode, modifiers = known
        if opcode in _BRANCHES:
            self.branches.append(tokens.position)
        tokens.position += 1
        while kinds[tokens.position] == DOT:  # `mad .lo.s32`
            modifiers += (texts[tokens.position][1:],)
            tokens.position += 1
        operands: list[Operand] = []
        if texts[tokens.position] != ";":
            known_names = self.names.known
            while True:
                at = tokens.position
                after = texts[at + 1]
                if kinds[at] == WORD and (after == "," or after == ";"):
                    # most operands are one name
                    operand: Operand | None = known_names.get(texts[at])
                    if operand is None:
                        operand = self._operand()
                    else:
                        tokens.position = at + 1
                else:
                    operand = self._operand()
                operands.append(operand)
                after = texts[tokens.position]
                if after == ";":
                    break
                if after != ",":
                    tokens.fail("`,` or `;`")
                tokens.position += 1
        end = tokens.starts[tokens.position] + 1
        tokens.position += 1
        instructions = self.body.instructions
        instructions.append(
            Instruction(
                opcode,
                modifiers,
                tuple(operands),
                guard,
                len(instructions),
                self.names.index,
                tokens.line(start),
                tokens.source[tokens.starts[start] : end],
                self.location,
            )
        )

    def _guard(self) -> Guard:
        self.tokens.expect("@")
        negated = self.tokens.accept("!")
        register = self._predicate()
        guard = self.guards.get((register, negated))
        if guard is None:
            guard = self.guards[register, negated] = Guard(register, negated)
        return guard

    def _predicate(self) -> Register:
        name = self.tokens.take(WORD, "a predicate register")
        found = self.names.find(name)
        if not isinstance(found, Register) or found.type != "pred":
            self.tokens.fail("a predicate register that was declared", self.tokens.position - 1)
        return found

    # ---- operands --------------------------------------------------------------------------------

    def _operand(self) -> Operand:
        """An operand, with the second of a pair if there is one."""
        operand = self._single_operand()
        if self.tokens.accept("|"):
            if not isinstance(operand, Register | Sink):
                self.tokens.fail("a pair of registers", self.tokens.position - 2)
            second = self._single_operand()
            if not isinstance(second, Register | Sink):
                self.tokens.fail("a register", self.tokens.position - 1)
            return Pair(operand, second)
        return operand

    def _single_operand(self) -> Operand:
        tokens = self.tokens
        kind, text = tokens.kinds[tokens.position], tokens.texts[tokens.position]
        if kind == WORD:
            return self._name()
        if kind == NUMBER:
            number = self.numbers.get(text)
            if number is None:
                number = self.numbers[text] = parse_number(tokens)
            else:
                tokens.position += 1
            return number
        if text == "-":
            return parse_number(tokens)
        if text == "[":
            return self._address()
        if text == "{":
            return self._vector()
        if text == "!":
            tokens.position += 1
            return Negated(self._predicate())
        if text == "(":
            return ArgumentList(self._elements("(", ")"))
        tokens.fail("an operand")

    def _name(self) -> Operand:
        tokens = self.tokens
        at = tokens.position
        name = tokens.take(WORD, "a name")
        if name == "_":
            return _SINK
        found = self.names.find(name)
        if found is None:
            tokens.fail("the name of a declared register, variable, function or label", at)
        if isinstance(found, Symbol) and tokens.texts[tokens.position] in ("+", "-"):
            offset, text = self._offset()
            return replace(found, offset=offset, offset_text=text)
        return found

    def _offset(self) -> tuple[int, str]:
        """``+16``, ``+-16`` or ``-16``: its value and its spelling."""
        tokens = self.tokens
        sign = "+" if tokens.accept("+") else ""
        number = parse_number(tokens)
        if not isinstance(number, IntImmediate):
            tokens.fail("an offset in bytes", tokens.position - 1)
        return number.value, sign + number.text

    def _address(self) -> Address:
        tokens = self.tokens
        tokens.expect("[")
        at = tokens.position
        base: Operand | None
        if tokens.kinds[at] == WORD:
            # not _name(): there the offset belongs to the symbol, here to the address
            tokens.position += 1
            base = self.names.find(tokens.texts[at])
        else:
            base = self._single_operand()
        if not isinstance(base, Register | Symbol | IntImmediate):
            tokens.fail("a declared register or variable, or an absolute address", at)
        offset, text = self._offset() if tokens.texts[tokens.position] in ("+", "-") else (0, "")
        coordinates = None
        if tokens.accept(","):
            if tokens.text != "{":
                tokens.fail("the coordinates in a tensor, `{...}`")
            coordinates = self._vector()
        if not tokens.accept("]"):
            tokens.fail("`]`, an offset or coordinates")
        return Address(base, offset, coordinates, text)

    def _vector(self) -> Vector:
        at = self.tokens.position
        elements = self._elements("{", "}")
        if not elements:
            self.tokens.fail("a vector of at least one element", at)
        return Vector(elements)

    def _elements(self, opening: str, closing: str) -> tuple[Operand, ...]:
        """A list in brackets of names and constants."""
        tokens = self.tokens
        tokens.expect(opening)
        found: list[Operand] = []
        while not tokens.accept(closing):
            if found and not tokens.accept(","):
                tokens.fail(f"`,` or `{closing}`")
            at = tokens.position
            nested = tokens.texts[at] in ("{", "[", "(", "!")
            element = None if nested else self._single_operand()
            if element is None or isinstance(element, Label):
                tokens.fail("a register, a constant, a variable or `_`", at)
            found.append(element)
        return tuple(found)
