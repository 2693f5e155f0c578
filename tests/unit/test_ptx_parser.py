"""The PTX parser, one feature of the grammar at a time."""

from __future__ import annotations

import math
import pickle

import pytest

from moejit.emulator.errors import EmulatorError, PtxSyntaxError, UnknownKernel
from moejit.emulator.ptx import (
    Address,
    ArgumentList,
    FloatImmediate,
    Function,
    Guard,
    Instruction,
    IntImmediate,
    Label,
    Module,
    Negated,
    Operand,
    Pair,
    Register,
    Sink,
    SourceLocation,
    SpecialRegister,
    Symbol,
    Vector,
    parse,
)

HEAD = ".version 8.8\n.target sm_100a\n.address_size 64\n"
REGISTERS = ".reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<99>; .reg .b64 %rd<9>;"


def module(body: str, before: str = "", parameters: str = "") -> Module:
    return parse(f"{HEAD}{before}\n.visible .entry k({parameters})\n{{\n{REGISTERS}\n{body}\n}}\n")


def kernel(body: str, before: str = "", parameters: str = "") -> Function:
    return module(body, before, parameters).kernel("k")


def one(text: str, before: str = "") -> Instruction:
    (instruction,) = kernel(text, before).instructions
    return instruction


def operand(text: str, before: str = "") -> Operand:
    return one(f"mov.b32 {text};", before).operands[0]


def r(number: int, type_: str = "b32") -> Register:
    prefix = {"b32": "%r", "b64": "%rd", "pred": "%p", "b16": "%rs"}[type_]
    return Register(f"{prefix}{number}", type_, 0)


# ---- module --------------------------------------------------------------------------------------


def test_header() -> None:
    found = parse(".version 9.0\n.target sm_103a, debug\n.address_size 64")
    assert (found.version, found.target, found.address_size) == ((9, 0), ("sm_103a", "debug"), 64)
    assert found.arch == "sm_103a"
    assert found.functions == () and found.variables == ()


def test_variables_of_the_module() -> None:
    found = parse(
        HEAD
        + """
        .extern .shared .align 1024 .b8 dynamic[];
        .shared .align 16 .b8 fixed[64];
        .global .align 1 .b8 $str[6] = {104, 0x69, 0b1, 017, 10};
        .visible .global .u64 table[] = {fixed, $str+2};
        .const .f32 pi = 0f40490FDB;
        .global .align 8 .v2 .f32 grid[2][1] = {{1.0, 2.0}, {-3.5, 4e1}};
        .global .s32 a, b;
        """
    )
    by_name = {v.name: v for v in found.variables}
    assert list(by_name) == ["dynamic", "fixed", "$str", "table", "pi", "grid", "a", "b"]
    dynamic = by_name["dynamic"]
    assert (dynamic.space, dynamic.linkage, dynamic.align) == ("shared", "extern", 1024)
    assert (dynamic.size, dynamic.dimensions) == (None, (None,))
    assert (by_name["fixed"].size, by_name["fixed"].align, by_name["fixed"].line) == (64, 16, 6)
    values = by_name["$str"].initializer
    assert values is not None
    assert [v.value for v in values if isinstance(v, IntImmediate)] == [104, 105, 1, 15, 10]
    table = by_name["table"]
    assert table.size == 16 and table.linkage == "visible"
    assert table.initializer == (
        Symbol("fixed", "shared", -1),
        Symbol("$str", "global", -1, offset=2),
    )
    assert by_name["pi"].initializer == (FloatImmediate(0x40490FDB, 32, ""),)
    assert (by_name["grid"].vector, by_name["grid"].size) == (2, 16)
    assert by_name["grid"].initializer is not None
    floats = [v.value for v in by_name["grid"].initializer if isinstance(v, FloatImmediate)]
    assert floats == [1.0, 2.0, -3.5, 40.0]
    assert (by_name["a"].size, by_name["b"].align) == (4, 4)


def test_parameters_are_laid_out_as_a_c_struct() -> None:
    found = kernel(
        "ret;",
        parameters=".param .u32 n, .param .align 64 .b8 map[128], .param .u8 flag, "
        ".param .u64 .ptr .global .align 16 x, .param .f32 s",
    )
    layout = [(p.name, p.type, p.size, p.align, p.offset) for p in found.parameters]
    assert layout == [
        ("n", "u32", 4, 4, 0),
        ("map", "b8", 128, 64, 64),
        ("flag", "u8", 1, 1, 192),
        ("x", "u64", 8, 8, 200),
        ("s", "f32", 4, 4, 208),
    ]
    x = found.parameters[3]
    assert (x.pointer, x.pointer_space, x.pointer_align) == (True, "global", 16)
    assert found.parameter_bytes == 212
    assert kernel("ret;").parameter_bytes == 0


def test_performance_directives() -> None:
    found = parse(
        HEAD
        + """.visible .entry k()
        .reqntid 384
        .maxntid 384, 2
        .minnctapersm 1
        .maxnreg 168
        .explicitcluster
        .reqnctapercluster 2, 1, 1
        .pragma "used_bytes_smem 8";
        { ret; }"""
    ).kernel("k")
    performance = found.performance
    assert performance.reqntid == (384, 1, 1) and performance.maxntid == (384, 2, 1)
    assert (performance.minnctapersm, performance.maxnreg) == (1, 168)
    assert performance.explicitcluster and performance.reqnctapercluster == (2, 1, 1)
    assert not performance.blocksareclusters
    assert [p.text for p in found.pragmas] == ["used_bytes_smem 8"]


def test_several_functions() -> None:
    found = parse(
        HEAD
        + """
        .extern .func (.param .b32 ret0) vprintf (.param .b64 a, .param .b64 b);
        .extern .func __assertfail(.param .b64 a) .noreturn;
        .entry first() { ret; }
        .weak .func helper { ret; }
        .visible .entry second { exit; }
        """
    )
    assert [f.name for f in found.kernels] == ["first", "second"]
    facts = {f.name: (f.linkage, f.has_body, f.performance.noreturn) for f in found.functions}
    assert facts == {
        "vprintf": ("extern", False, False),
        "__assertfail": ("extern", False, True),
        "first": (None, True, False),
        "helper": ("weak", True, False),
        "second": ("visible", True, False),
    }
    printf = found.functions[0]
    assert ([p.name for p in printf.returns], len(printf.parameters)) == (["ret0"], 2)
    with pytest.raises(UnknownKernel, match=r"no kernel 'third'.*first, second"):
        found.kernel("third")


def test_module_comes_out_of_a_pickle_whole() -> None:
    first = module(WAIT + "mov.b32 %r1, 0f3F800000; ret;")
    again = pickle.loads(pickle.dumps(first))
    assert again.kernel("k").instructions == first.kernel("k").instructions
    assert again.kernel("k").labels == first.kernel("k").labels
    assert len({first.kernel("k"), again.kernel("k")}) == 2  # can be keys
    assert len(repr(first.kernel("k"))) < 400


def test_definition_replaces_its_declaration() -> None:
    found = parse(HEAD + ".func f();\n.func g { call f; ret; }\n.func f() { ret; }")
    assert [(f.name, f.has_body) for f in found.functions] == [("g", True), ("f", True)]


def test_debug_information() -> None:
    found = parse(
        HEAD
        + """
        .visible .entry k() {
            .reg .b32 %r<3>;
            .loc 1 12 5
            mov.b32 %r1, 0;
            .loc 2 7 0, function_name $L__info_string0, inlined_at 1 13 9
            { mov.b32 %r2, 1; }
            .loc 1 14 0
            { mov.b32 %r2, 2; }
        }
        .file 1 "/src/a.py"
        .file 2 "/src/b.py", 0, 17
        .section .debug_str { $L__info_string0: .b8 104,105,0 }
        """
    )
    assert found.files == {1: "/src/a.py", 2: "/src/b.py"}
    locations = [i.location for i in found.kernel("k").instructions]
    assert locations[0] == SourceLocation(1, 12, 5)
    assert locations[1] == SourceLocation(
        2, 7, 0, "$L__info_string0", inlined_at=SourceLocation(1, 13, 9)
    )
    assert locations[2] == SourceLocation(1, 14, 0)
    assert [s.name for s in found.sections] == [".debug_str"]


def test_comments_and_lines() -> None:
    found = kernel("// one\n/* two\n { */ mov.b32 %r1, /* inside */ 5; // ; after\nret;")
    assert [(i.opcode, i.line) for i in found.instructions] == [("mov", 10), ("ret", 11)]
    assert str(found.instructions[0]) == "mov.b32 %r1, 5;"


# ---- instructions --------------------------------------------------------------------------------


def test_record_of_an_instruction() -> None:
    found = one("@!%p3 ld.global.L1::no_allocate.v2.b32 {%r1, %r2}, [%rd4+-16];")
    assert found.opcode == "ld"
    assert found.modifiers == ("global", "L1::no_allocate", "v2", "b32")
    assert found.spelling == "ld.global.L1::no_allocate.v2.b32"
    assert found.types == ("b32",)
    assert found.guard == Guard(r(3, "pred"), negated=True)
    assert found.operands == (Vector((r(1), r(2))), Address(r(4, "b64"), -16))
    assert (found.index, found.scope, found.line) == (0, 0, 8)
    assert found.text == str(found)
    assert list(found.registers()) == [r(3, "pred"), r(1), r(2), r(4, "b64")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("%r1", r(1)),
        ("%p1|%p2", Pair(r(1, "pred"), r(2, "pred"))),
        ("_|%p2", Pair(Sink(), r(2, "pred"))),
        ("!%p1", Negated(r(1, "pred"))),
        ("_", Sink()),
        ("42", IntImmediate(42, "")),
        ("-42", IntImmediate(-42, "")),
        ("0x1fU", IntImmediate(31, "")),
        ("-0x10", IntImmediate(-16, "")),
        ("0b101", IntImmediate(5, "")),
        ("017", IntImmediate(15, "")),
        ("0f3F800000", FloatImmediate(0x3F800000, 32, "")),
        ("-0f3F800000", FloatImmediate(0xBF800000, 32, "")),
        ("0d3FF0000000000000", FloatImmediate(0x3FF0000000000000, 64, "")),
        ("1.5", FloatImmediate(0x3FF8000000000000, 64, "")),
        ("-1.5e1", FloatImmediate(0xC02E000000000000, 64, "")),
        ("%tid.x", SpecialRegister("%tid.x", "u32")),
        ("%globaltimer", SpecialRegister("%globaltimer", "u64")),
        ("WARP_SZ", SpecialRegister("WARP_SZ", "u32")),
        ("smem", Symbol("smem", "shared", -1)),
        ("smem+8", Symbol("smem", "shared", -1, 8)),
        ("k", Symbol("k", "func", -1)),
        ("[%rd1]", Address(r(1, "b64"))),
        ("[%rd1+16]", Address(r(1, "b64"), 16)),
        ("[ %rd1 + 0x10 ]", Address(r(1, "b64"), 16)),
        ("[%rd1-4]", Address(r(1, "b64"), -4)),
        ("[smem+4]", Address(Symbol("smem", "shared", -1), 4)),
        ("[16]", Address(IntImmediate(16, ""))),
        (
            "[%rd1, {%r1, %r2, 0}]",
            Address(r(1, "b64"), 0, Vector((r(1), r(2), IntImmediate(0, "")))),
        ),
        ("{%r1, _, 0x3}", Vector((r(1), Sink(), IntImmediate(3, "")))),
    ],
)
def test_operand(text: str, expected: Operand) -> None:
    found = operand(text, ".shared .b8 smem[64];")
    assert found == expected and type(found) is type(expected)
    assert str(found).replace(" ", "") == text.replace(" ", "")
    assert hash(found) == hash(expected)


def test_values_of_float_constants() -> None:
    def value(text: str) -> float:
        found = operand(text)
        assert isinstance(found, FloatImmediate)
        return found.value

    assert value("0f40490FDB") == pytest.approx(math.pi, abs=1e-7)
    assert value("0d400921FB54442D18") == math.pi
    assert value("0fFF800000") == -math.inf
    assert math.isnan(value("0f7FFFFFFF"))
    assert math.copysign(1, value("-0.0")) == -1


@pytest.mark.parametrize(
    ("spelling", "opcode", "types"),
    [
        ("cvt.rn.satfinite.e2m1x2.f32", "cvt", ("e2m1x2", "f32")),
        ("cvt.rn.f16x2.e4m3x2", "cvt", ("f16x2", "e4m3x2")),
        ("setp.lt.and.s32", "setp", ("s32",)),
        ("tcgen05.fence::after_thread_sync", "tcgen05", ()),
        ("tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X", "tcgen05", ()),
        ("tcgen05.cp.cta_group::1.64x128b.warpx2::02_13", "tcgen05", ()),
        ("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16", "wgmma", ("f32", "bf16", "bf16")),
        ("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16", "cp", ("bf16",)),
        ("no_such_opcode.with.b32", "no_such_opcode", ("b32",)),
    ],
)
def test_opcode(spelling: str, opcode: str, types: tuple[str, ...]) -> None:
    """An opcode that does not exist parses, too: only who executes it can tell."""
    found = one(f"{spelling} %r1;")
    assert (found.opcode, found.spelling, found.types) == (opcode, spelling, types)


def test_modifiers_may_stand_apart() -> None:
    assert one("mad .lo .s32 %r1, %r2, %r3, 4;").modifiers == ("lo", "s32")


def test_empty_statements_and_no_operands() -> None:
    assert [i.spelling for i in kernel(";; griddepcontrol.wait;; ret;").instructions] == [
        "griddepcontrol.wait",
        "ret",
    ]


def test_call_of_a_device_function() -> None:
    found = kernel(
        """{ // callseq 0, 0
        .param .b64 param0;
        .param .align 8 .b8 param1[16];
        .param .b32 retval0;
        st.param.b64 [param0], %rd1;
        call.uni (retval0), vprintf, (param0, param1);
        ld.param.b32 %r1, [retval0];
        }""",
        before=".extern .func (.param .b32 r) vprintf (.param .b64 a, .param .b64 b);",
    )
    assert [(v.name, v.size, v.scope) for v in found.variables] == [
        ("param0", 8, 1),
        ("param1", 16, 1),
        ("retval0", 4, 1),
    ]
    store, call, _ = found.instructions
    assert store.operands[0] == Address(Symbol("param0", "param", 1))
    assert call.operands == (
        ArgumentList((Symbol("retval0", "param", 1),)),
        Symbol("vprintf", "func", -1),
        ArgumentList((Symbol("param0", "param", 1), Symbol("param1", "param", 1))),
    )


def test_indirect_branches_and_calls() -> None:
    found = kernel(
        """
        table: .branchtargets $A, $B;
        callees: .calltargets f, g;
        proto: .callprototype (.param .b32 _) _ (.param .b64 _, .param .b8 _[4]) .noreturn;
        brx.idx %r1, table;
        $A: call (%r1), %rd1, (%rd2), proto;
        $B: ret;
        """,
        before=".func f; .func g;",
    )
    table, a, b = Label("table", 0), Label("$A", 0), Label("$B", 0)
    assert found.branch_targets == {table: (a, b)}
    assert found.call_targets == {
        Label("callees", 0): (Symbol("f", "func", -1), Symbol("g", "func", -1))
    }
    prototype = found.prototypes[Label("proto", 0)]
    assert [p.size for p in prototype.parameters] == [8, 4] and prototype.noreturn
    assert found.labels == {a: 1, b: 2}
    assert found.instructions[0].operands == (r(1), table)


def test_parameters_of_one_name_in_a_prototype() -> None:
    """`_` twice is fine in a prototype, but a function needs names."""
    kernel("p: .callprototype _ (.param .b32 _, .param .b32 _);")
    with pytest.raises(PtxSyntaxError, match="parameters of different names"):
        parse(HEAD + ".func f(.param .b32 a, .param .b32 a) { ret; }")


def test_pragma_in_a_body() -> None:
    found = kernel('mov.b32 %r1, 0;\n$L: .pragma "nounroll";\nbra.uni $L;')
    assert [(p.text, p.index) for p in found.pragmas] == [("nounroll", 1)]
    assert found.labels == {Label("$L", 0): 1}


# ---- scopes --------------------------------------------------------------------------------------

WAIT = """{
    .reg .pred P1;
    LAB_WAIT:
    mbarrier.try_wait.parity.shared.b64 P1, [%r1], %r2, 10000000;
    @P1 bra.uni DONE;
    bra.uni LAB_WAIT;
    DONE:
}
"""


def test_names_of_two_expansions_do_not_clash() -> None:
    found = kernel(WAIT + WAIT + "ret;")
    assert [(s.index, s.parent) for s in found.scopes] == [(0, None), (1, 0), (2, 0)]
    first, second = found.instructions[0], found.instructions[3]
    assert first.operands[0] == Register("P1", "pred", 1)
    assert second.operands[0] == Register("P1", "pred", 2)
    assert first.operands[0] != second.operands[0]
    assert [reg.unique_name for reg in found.used_registers()] == [
        "P1@1",
        "%r1",
        "%r2",
        "P1@2",
    ]
    assert found.labels == {
        Label("LAB_WAIT", 1): 0,
        Label("DONE", 1): 3,
        Label("LAB_WAIT", 2): 3,
        Label("DONE", 2): 6,
    }
    assert found.instructions[4].operands == (Label("DONE", 2),)


def test_inner_names_hide_outer_ones() -> None:
    found = kernel(
        """.reg .b32 a;
        mov.b32 a, 1;
        { mov.b32 a, 2; .reg .b64 a; mov.b64 a, 3; { mov.b64 a, 4; } }
        mov.b32 a, 5;"""
    )
    outer, inner = Register("a", "b32", 0), Register("a", "b64", 1)
    assert [i.operands[0] for i in found.instructions] == [outer, outer, inner, inner, outer]
    assert [i.scope for i in found.instructions] == [0, 1, 1, 2, 0]


def test_inner_branch_to_a_later_outer_label() -> None:
    found = kernel("{ bra OUT; }\n{ OUT: bra OUT; }\nOUT: ret;")
    assert [i.operands for i in found.instructions[:2]] == [
        (Label("OUT", 0),),
        (Label("OUT", 2),),
    ]


def test_braces_of_vectors_open_no_scope() -> None:
    found = kernel(
        "tcgen05.ld.x2.b32 {%r1,\n%r2}, [%r3];\nst.v2.b32 [%rd1], {%r1, %r2};\nL: {ret;}"
    )
    assert len(found.scopes) == 2
    assert [i.opcode for i in found.instructions] == ["tcgen05", "st", "ret"]


def test_variables_of_a_scope() -> None:
    found = kernel(
        ".local .align 16 .b8 depot[64];\n.shared .b32 x[2] = {1, 2};\n"
        "{ .reg .b64 %SP; mov.b64 %SP, depot; }"
    )
    assert [(v.name, v.space, v.size, v.scope) for v in found.variables] == [
        ("depot", "local", 64, 0),
        ("x", "shared", 8, 0),
    ]
    assert found.instructions[0].operands[1] == Symbol("depot", "local", 0)


def test_ranges_of_registers() -> None:
    found = parse(
        HEAD + ".entry k() { .reg .b32 %r<11>; .reg .f32 %r1<3>, one; mov.b32 %r10, %r9;"
        " mov.b32 %r12, one; }"
    ).kernel("k")
    first, second = found.instructions
    # %r10 is in both ranges; the shorter number comes first. NVVM never does that
    assert [str(reg) for reg in first.operands] == ["%r10", "%r9"]
    assert second.operands == (Register("%r12", "f32", 0), Register("one", "f32", 0))
    assert [(d.name, d.type, d.count) for d in found.declarations] == [
        ("%r", "b32", 11),
        ("%r1", "f32", 3),
        ("one", "f32", None),
    ]


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "line", "column", "expected"),
    [
        ("mov.b32 %r1, %r99;", 8, 14, "the name of a declared register"),
        ("mov.b32 %r1, %r01;", 8, 14, "the name of a declared register"),
        ("mov.b32 %r1, %nosuch.x;", 8, 14, "the name of a declared register"),
        ("bra nowhere;", 8, 5, "the name of a declared register"),
        ("bra IN; { IN: ret; }", 8, 5, "the name of a declared register"),
        ("ld.b32 %r1, [nothing];", 8, 14, "a declared register or variable"),
        ("ld.b32 %r1, [0f3F800000];", 8, 14, "a declared register or variable"),
        ("ld.b32 %r1, [%tid.x];", 8, 14, "a declared register or variable"),
        ("ld.b32 %r1, [%rd1+%r2];", 8, 19, "a constant"),
        ("ld.b32 %r1, [%rd1+1.5];", 8, 19, "an offset in bytes"),
        ("ld.b32 %r1, [%rd1*2];", 8, 18, "`]`"),
        ("ld.b32 %r1, [%rd1, %r2];", 8, 20, "the coordinates in a tensor"),
        ("ld.b32 %r1, [%rd1;", 8, 18, "`]`"),
        ("mov.b32 %r1 %r2;", 8, 13, "`,` or `;`"),
        ("mov.b32 %r1, ;", 8, 14, "an operand"),
        ("mov.b32 %r1, {};", 8, 14, "a vector of at least one element"),
        ("mov.b32 {%r1, {%r2}}, 1;", 8, 15, "a register, a constant"),
        ("mov.b32 {%r1 %r2}, 1;", 8, 14, "`,` or `}`"),
        ('mov.b32 %r1, "text";', 8, 14, "an operand"),
        ("mov.b32 %r1, -%r2;", 8, 15, "a number after the minus sign"),
        ("mov.b32 %r1, 089;", 8, 14, "a number"),
        ("mov.b32 %r1, 0x1ffffffffffffffff;", 8, 14, "a number of at most 64 bits"),
        ("mov.b32 %r1, 18446744073709551616;", 8, 14, "a number of at most 64 bits"),
        (f"mov.b32 %r1, {'9' * 5000};", 8, 14, "a number of at most 64 bits"),
        (f"mov.b32 %r1, %r{'9' * 5000};", 8, 14, "the name of a declared register"),
        (f"call {'(' * 5000};", 8, 7, "a register, a constant"),
        (f"mov.b32 %r1, {'{' * 5000};", 8, 15, "a register, a constant"),
        ("mov.b32 %r1, 0f3F80;", 8, 14, "PTX"),
        ("mov.b32 %r1, 12abc;", 8, 14, "PTX"),
        ("setp.eq.b32 %p1|3, 1, 2;", 8, 17, "a register"),
        ("@%r1 ret;", 8, 2, "a predicate register"),
        ("@nothing ret;", 8, 2, "a predicate register"),
        ("@%p1 %r1;", 8, 6, "an instruction"),
        ("mov.b32 %r1, !%r2;", 8, 15, "a predicate register"),
        ("Mov.b32 %r1, 1;", 8, 1, "an instruction"),
        (".tex .u64 t;", 8, 1, "`.reg`, `.loc`, `.pragma` or a state space"),
        (".reg .b33 x;", 8, 6, "a register type"),
        (".reg .b32 x, x;", 8, 14, "a name that this scope does not have yet"),
        (".reg .b32 %r<9>;", 8, 11, "a name that this scope does not have yet"),
        (".local .b8 a[4]; .local .b8 a;", 8, 18, "names that this scope does not have yet"),
        (".shared .pred x;", 8, 9, "a type"),
        ("L: ret; L: ret;", 8, 9, "a label that this scope does not have yet"),
        ("t: .branchtargets %r1;", 8, 19, "a label that is declared"),
        ("bra %r1;", 8, 1, "a branch to one label in the code"),
        ("L: @%p1 bra L, L;", 8, 9, "a branch to one label in the code"),
        ("bra;", 8, 1, "a branch to one label in the code"),
        ("L: T: .branchtargets L;\nbra T;", 9, 1, "a branch to one label in the code"),
        ("L: brx.idx %r1, L;", 8, 4, "a branch with an index and a table of labels"),
        ("T: .branchtargets T; brx.idx %r1, T;", 8, 22, "a table of labels in the code"),
        (".loc 1 2;", 8, 9, "an integer"),
        ("ret", 9, 1, "an operand"),
        ("= 4;", 8, 1, "an instruction, a label, a directive or `}`"),
        ("{ ret;", 10, 1, "`}`"),
    ],
)
def test_mistake_in_a_body(body: str, line: int, column: int, expected: str) -> None:
    with pytest.raises(PtxSyntaxError) as caught:
        kernel(body)
    error = caught.value
    assert (error.line, error.column) == (line, column), str(error)
    assert expected in error.expected, str(error)


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("", 1, "`.version`"),
        (".version 8\n", 1, "a version such as 8.8"),
        (".version 8.8\n.entry k {}", 2, "`.target`"),
        (HEAD + ".alias a, b;", 4, "a function, a variable"),
        (HEAD + "mov.b32 %r1, 2;", 4, "a function, a variable"),
        (HEAD + ".global .b8 x[2]", 4, "`,`, `=` or `;`"),
        (HEAD + ".global .b8 x; .shared .b8 x;", 4, "names that the module does not have yet"),
        (HEAD + ".global .u64 x = nothing;", 4, "a constant or a symbol"),
        (HEAD + ".global .b8 x[2] = {1, 2, 3};", 4, "at most 2 values"),
        (HEAD + ".global .b8 x[2][2] = {{1}, {2, 3}};", 4, "4 values"),
        (HEAD + ".global .b8 x[2] = " + "{" * 5000, 4, "a value, not one more list"),
        (HEAD + ".global .attribute(.managed) .b8 x;", 4, "a type"),
        (HEAD + ".entry k() { ret; } .entry k() { ret; }", 4, "not defined before"),
        (HEAD + ".func k(.reg .b32 x) { ret; }", 4, "`.param`"),
        (HEAD + ".entry k(.b32 x) { ret; }", 4, "`.param`"),
        (HEAD + ".entry k(.param .b32 x[]) { ret; }", 4, "a parameter with a size"),
        (HEAD + ".entry k() .maxregisters 5 { ret; }", 4, "a performance directive"),
        (HEAD + ".entry k() .reqntid { ret; }", 4, "an integer"),
        (HEAD + ".entry k()\n{\nret;\n", 7, "`}`"),
        (HEAD + ".file 1 a.py", 4, "a path in quotes"),
        (HEAD + ".section .debug_str { .b8 1", 4, "`}`"),
        (HEAD + "/* never closed", 4, "PTX"),
        (HEAD + '.pragma "open;\n', 4, "PTX"),
        ("\x00\x01", 1, "PTX"),
    ],
)
def test_mistake_in_a_module(text: str, line: int, expected: str) -> None:
    with pytest.raises(PtxSyntaxError) as caught:
        parse(text)
    assert caught.value.line == line, str(caught.value)
    assert expected in caught.value.expected, str(caught.value)


def test_error_shows_the_place() -> None:
    with pytest.raises(PtxSyntaxError) as caught:
        kernel("\tmov.b32 \t%r1, %undeclared;")
    assert str(caught.value) == (
        "PTX line 8, column 16: expected the name of a declared register, variable, function or "
        "label, found %undeclared\n"
        "        mov.b32     %r1, %undeclared;\n"
        "                         ^"
    )
    assert isinstance(caught.value, EmulatorError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)


def test_error_in_a_long_line_shows_its_part() -> None:
    registers = ", ".join(["%r1"] * 200)
    with pytest.raises(PtxSyntaxError) as caught:
        kernel(f"mov.b32 {{{registers}, %oops}}, 1;")
    _, shown, caret = str(caught.value).split("\n")
    assert shown[caret.index("^") :].startswith("%oops")
    assert len(shown) <= 124


def test_error_at_the_end_of_a_line() -> None:
    with pytest.raises(PtxSyntaxError, match="found the end of the line"):
        parse(".version 8.8\n.target")
