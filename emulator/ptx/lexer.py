"""PTX text to tokens.

One regular expression does it, because the lexer is half of the time of a parse. Tokens lie in
three parallel lists (kind, text, start); a token stream is a position in them. Comments and white
space leave nothing behind.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import NoReturn

from moejit.emulator.errors import PtxSyntaxError

__all__ = ["TokenStream", "parse_integer"]

LABEL, WORD, DOT, NUMBER, STRING, PUNCT, END = (
    "label",  # `name:`
    "word",  # a name, a register, or an opcode with all its modifiers
    "dot",  # `.align`: a directive, or a modifier that stands alone
    "number",
    "string",
    "punct",
    "end",
)

_TOKEN = re.compile(
    r"""(?:\s+|//[^\n]*|/\*.*?\*/)*
    (?:(?P<label>[A-Za-z_$%][\w$]*)\s*:(?!:)
      |(?P<word>[A-Za-z_$%][\w$]*(?:::\w+)*(?:\.\w+(?:::\w+)*)*)
      |(?P<punct>[][{}(),;|@!+*\-=<>])
      |(?P<dot>\.\w+(?:::\w+)*)
      |(?P<number>0[fF][0-9a-fA-F]{8}\b|0[dD][0-9a-fA-F]{16}\b|0[xX][0-9a-fA-F]+U?\b|0[bB][01]+U?\b
        |\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|\d+U?\b)
      |(?P<string>"(?:[^"\\\n]|\\.)*")
      |(?P<end>\Z))""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)


class TokenStream:
    """The tokens of one PTX file and the place where the parser stands.

    The parser's inner loops read ``kinds`` and ``texts`` at ``position`` themselves. The last token
    has the kind ``end``, so that a look at the next one is always possible.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.kinds: list[str] = []
        self.texts: list[str] = []
        self.starts: list[int] = []
        self.position = 0
        self._lines = [0, *(match.end() for match in re.finditer("\n", source))]
        self._scan()

    def _scan(self) -> None:
        kinds, texts, starts = self.kinds, self.texts, self.starts
        match_next = _TOKEN.scanner(self.source).match  # type: ignore[attr-defined]
        kind = ""
        while kind != END:
            match = match_next()
            if match is None:
                end = starts[-1] + len(texts[-1]) if starts else 0
                if kind == LABEL:
                    end = self.source.index(":", end) + 1
                rest = re.compile(r"(?:\s+|//[^\n]*|/\*.*?\*/)*", re.DOTALL).match(self.source, end)
                starts.append(rest.end() if rest else end)
                self.fail("PTX", len(starts) - 1)
            kind = match.lastgroup
            kinds.append(kind)
            texts.append(match[kind])
            starts.append(match.start(kind))

    def line(self, at: int | None = None) -> int:
        """The line, from 1, of a token."""
        return bisect_right(self._lines, self.starts[self.position if at is None else at])

    def fail(self, expected: str, at: int | None = None) -> NoReturn:
        """Raises the syntax error for a token, by default the next one."""
        at = self.position if at is None else at
        line = self.line(at)
        start = self._lines[line - 1]
        end = self._lines[line] - 1 if line < len(self._lines) else len(self.source)
        column = self.starts[at] - start + 1
        raise PtxSyntaxError(line, column, self.source[start:end], expected)

    @property
    def text(self) -> str:
        """The next token's text."""
        return self.texts[self.position]

    @property
    def kind(self) -> str:
        """The next token's kind."""
        return self.kinds[self.position]

    def accept(self, text: str) -> bool:
        """Whether the next token is this one; if so, it is taken."""
        if self.texts[self.position] != text:
            return False
        self.position += 1
        return True

    def expect(self, text: str) -> None:
        if not self.accept(text):
            self.fail(f"`{text}`")

    def take(self, kind: str, expected: str) -> str:
        """The next token's text, which must be of this kind."""
        if self.kinds[self.position] != kind:
            self.fail(expected)
        self.position += 1
        return self.texts[self.position - 1]

    def integer(self) -> int:
        """A non-negative integer constant."""
        text = self.take(NUMBER, "an integer")
        value = parse_integer(text)
        if value is None:
            self.fail("an integer", self.position - 1)
        return value


def parse_integer(text: str) -> int | None:
    """The value of an integer constant of at most 64 bits; None for any other number."""
    digits = text.rstrip("U")
    if digits[:2] in ("0x", "0X"):
        value = int(digits, 16)
    elif digits[:2] in ("0b", "0B"):
        value = int(digits, 2)
    elif digits.strip("0123456789") or len(digits) > 22:
        return None  # a float; 22 octal digits hold 64 bits
    elif digits[0] == "0" and len(digits) > 1:
        if digits.strip("01234567"):
            return None
        value = int(digits, 8)
    else:
        value = int(digits)
    return value if value < 2**64 else None
