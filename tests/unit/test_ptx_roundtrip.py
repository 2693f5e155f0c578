"""Random instructions make a round trip through the records; random damage gives our errors."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from moejit.emulator.errors import PtxSyntaxError
from moejit.emulator.ptx import Instruction, parse, survey, unsupported

HEAD = """.version 8.8
.target sm_100a
.address_size 64
.extern .func (.param .b32 r) callee (.param .b64 a);
.extern .shared .align 16 .b8 smem[];
.global .align 4 .b8 $data$1[4] = {1, 2};
"""
DECLARATIONS = """.reg .pred %p<9>, P1; .reg .b32 %r<99>, a; .reg .b64 %rd<9>; .reg .f32 %f<5>;
$L__BB0_1: AGAIN:
"""


def compact(text: str) -> str:
    return re.sub(r"\s+", "", text)


hexadecimal = st.integers(0, 2**64 - 1).map(lambda n: f"0x{n:x}")
integers = st.one_of(
    st.integers(-(2**63), 2**64 - 1).map(str),
    hexadecimal,
    hexadecimal.map(lambda text: f"-{text}U"),
    st.integers(0, 255).map(lambda n: f"0b{n:b}"),
    st.integers(0, 511).map(lambda n: f"0{n:o}"),
)
floats = st.one_of(
    st.integers(0, 2**32 - 1).map(lambda n: f"0f{n:08X}"),
    st.integers(0, 2**64 - 1).map(lambda n: f"0D{n:016x}"),
    st.floats(0, 1e30, allow_nan=False).map(lambda x: f"{x:.6f}"),
    st.integers(0, 99).map(lambda n: f"-{n}.5e-{n}"),
)
registers = st.one_of(
    st.integers(0, 98).map("%r{}".format),
    st.integers(0, 8).map("%rd{}".format),
    st.integers(0, 4).map("%f{}".format),
    st.just("a"),
)
predicates = st.one_of(st.integers(0, 8).map("%p{}".format), st.just("P1"))
specials = st.sampled_from(["%tid.x", "%nctaid.z", "%laneid", "%clock64", "%cluster_ctarank"])
symbols = st.sampled_from(["smem", "$data$1", "callee", "k", "k_param_0"])
labels = st.sampled_from(["$L__BB0_1", "AGAIN"])
sinks = st.just("_")
scalars = st.one_of(registers, integers, floats, predicates, symbols, specials, sinks)


def listed(opening: str, closing: str, least: int) -> st.SearchStrategy[str]:
    elements = st.lists(scalars, min_size=least, max_size=9)
    return elements.map(lambda parts: opening + ", ".join(parts) + closing)


vectors = listed("{", "}", 1)
offsets = st.one_of(st.just(""), integers.map(" + {}".format), st.integers(0, 99).map("-{}".format))


@st.composite
def addresses(draw: st.DrawFn) -> str:
    base = draw(st.one_of(registers, symbols, st.integers(0, 999).map(str)))
    coordinates = draw(st.one_of(st.just(""), vectors.map(", {}".format)))
    return f"[{base}{draw(offsets)}{coordinates}]"


pairs = st.tuples(st.one_of(predicates, registers, sinks), st.one_of(predicates, sinks)).map(
    "|".join
)
operands = st.one_of(
    scalars,
    vectors,
    addresses(),
    pairs,
    labels,
    predicates.map("!{}".format),
    st.tuples(symbols, st.integers(0, 99).map(str)).map("+".join),
    listed("(", ")", 0),
)
names = st.from_regex(r"[a-z][a-z0-9_]{0,9}", fullmatch=True).filter(
    lambda name: name not in ("bra", "brx")  # these need a label
)
parts = st.from_regex(r"[A-Za-z0-9_]{1,9}(::[A-Za-z0-9_]{1,9})?", fullmatch=True)
opcodes = st.tuples(names, st.lists(parts, max_size=6)).map(lambda t: ".".join([t[0], *t[1]]))
guards = st.one_of(st.just(""), st.tuples(st.sampled_from(["@", "@!"]), predicates).map("".join))
spaces = st.sampled_from(["", " ", "\t", "\n", " // note\n", " /* note; { */ "])


@st.composite
def instructions(draw: st.DrawFn) -> str:
    guard, opcode = draw(guards), draw(opcodes)
    listing = ", ".join(draw(st.lists(operands, max_size=5)))
    return f"{guard}{' ' if guard else ''}{opcode}{' ' if listing else ''}{listing};"


def parsed(body: str) -> tuple[Instruction, ...]:
    text = f"{HEAD}.entry k(.param .u64 k_param_0)\n{{\n{DECLARATIONS}{body}\n}}\n"
    return parse(text).kernel("k").instructions


@given(st.lists(instructions(), min_size=1, max_size=8))
def test_instructions_come_back_as_they_were(texts: list[str]) -> None:
    found = parsed("\n".join(texts))
    assert [compact(str(i)) for i in found] == [compact(text) for text in texts]
    assert [i.text for i in found] == texts
    # and what was printed means the same
    for again, first in zip(parsed("\n".join(map(str, found))), found, strict=True):
        assert (again.guard, again.opcode, again.modifiers, again.operands) == (
            first.guard,
            first.opcode,
            first.modifiers,
            first.operands,
        )


@given(instructions(), st.data())
def test_white_space_and_comments_change_nothing(text: str, data: st.DataObject) -> None:
    """Between tokens of operands; the opcode, its modifiers and the guard stay together."""
    head, _, rest = text.partition(" ")
    spread = "".join(
        piece + (data.draw(spaces) if piece in ",{}[]()" else "")
        for piece in re.split(r"([,{}\[\]()])", rest)
    )
    (plain,), (wide,) = parsed(text), parsed(f"{head} {spread}")
    assert (plain.spelling, plain.guard, plain.operands) == (
        wide.spelling,
        wide.guard,
        wide.operands,
    )


@given(st.lists(instructions(), max_size=4), st.lists(instructions(), max_size=4))
def test_scopes_keep_their_registers(outer: list[str], inner: list[str]) -> None:
    """The same text once outside and twice in scopes that declare the same names."""
    block = "{ .reg .b32 a; .reg .pred P1; " + " ".join(inner) + " }\n"
    found = parsed("\n".join(outer) + block + block)
    first = found[len(outer) : len(outer) + len(inner)]
    second = found[len(outer) + len(inner) :]
    assert [str(i) for i in first] == [str(i) for i in second]
    for one, two in zip(first, second, strict=True):
        for mine, other in zip(one.registers(), two.registers(), strict=True):
            local = mine.name in ("a", "P1")
            assert (mine.scope, other.scope) == ((1, 2) if local else (0, 0))
            assert (mine == other) is not local


@settings(max_examples=300)
@given(st.lists(instructions(), min_size=1, max_size=3), st.data())
def test_damaged_text_parses_or_is_a_syntax_error(texts: list[str], data: st.DataObject) -> None:
    """Nothing else comes out, and the error names a place in the text."""
    text = f"{HEAD}.entry k() {{\n{DECLARATIONS}" + "\n".join(texts) + "\n}\n"
    text = text.replace("k_param_0", "smem")
    at = data.draw(st.integers(0, len(text) - 1))
    length = data.draw(st.integers(0, 5))
    put = data.draw(st.text(st.sampled_from('{}[]();,|@!+-.:<>="%$_aZ09 \n\\/*é\x00'), max_size=3))
    damaged = text[:at] + put + text[at + length :]
    try:
        parse(damaged)
    except PtxSyntaxError as error:
        lines = damaged.split("\n")
        assert lines[error.line - 1] == error.text
        assert 1 <= error.column <= len(error.text) + 1
        assert str(error.line) in str(error) and error.expected in str(error)


# ---- survey --------------------------------------------------------------------------------------

TWO = """.version 8.8 .target sm_90a
.entry first() { .reg .b32 a;
  mov.b32 a, 1; mov.b32 a, 2;
  add.s32 a, a, 3; }
.extern .func declared;
.entry second() { .reg .b32 b;
  mov.u32 b, %tid.x;
  mov.u32 b, %smid; ret; }
"""


def test_survey_counts_spellings_of_each_kernel() -> None:
    assert survey(parse(TWO)) == {
        "first": {"mov.b32": 2, "add.s32": 1},
        "second": {"mov.u32": 2, "ret": 1},
    }


def test_unsupported_asks_for_each_instruction() -> None:
    module = parse(TWO)
    assert unsupported(module, lambda instruction: True) == []
    found = unsupported(module, lambda i: i.opcode != "mov" or "%smid" in i.text)
    assert [str(case) for case in found] == [
        "first: mov.b32 (2 times, first in PTX line 3)",
        "second: mov.u32 (once, in PTX line 7)",
    ]
    assert found[1].text == "mov.u32 b, %tid.x;"
