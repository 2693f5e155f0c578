"""The PTX of real layers through the parser: nothing gets lost, everything is declared."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from layers import toy_layer

from moejit.codegen import ARCHS, MoeProblem, render, select
from moejit.emulator.ptx import (
    Function,
    Instruction,
    Label,
    Module,
    control_flow,
    parse,
    survey,
)
from moejit.runtime.compiler import compile_layer


@pytest.fixture(scope="module", params=ARCHS)
def ptx(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The PTX of one whole layer."""
    problem = MoeProblem(
        arch=request.param,
        hidden=512,
        intermediate=256,
        top_k=2,
        num_experts=8,
        num_local_experts=8,
        tokens=64,
    )
    folder = tmp_path_factory.mktemp("layer")
    compile_layer(render(problem, select(problem)), problem.arch, folder)
    return (folder / "kernel.ptx").read_text("utf-8")


@pytest.fixture(scope="module")
def layer(ptx: str) -> Module:
    return parse(ptx)


def without_space(text: str) -> str:
    return re.sub(r"\s+", "", text)


def instructions(module: Module) -> list[Instruction]:
    return [i for function in module.functions for i in function.instructions]


def test_module_is_described(ptx: str, layer: Module) -> None:
    assert f".target {layer.arch}" in ptx and layer.address_size == 64
    assert [k.name for k in layer.kernels] == re.findall(r"\.entry\s+([\w$]+)", ptx)
    assert len(layer.kernels) >= 3
    for kernel in layer.kernels:
        assert kernel.parameters and kernel.parameter_bytes > 0
        assert kernel.performance.reqntid is not None
        assert kernel.performance.reqntid[0] % 32 == 0
    assert any(v.space == "shared" and v.size is None for v in layer.variables)


def test_text_printed_from_the_records_is_the_text_of_the_file(ptx: str, layer: Module) -> None:
    """Instruction by instruction, and all together against the file without its declarations."""
    lines = ptx.split("\n")
    for instruction in instructions(layer):
        assert without_space(str(instruction)) == without_space(instruction.text)
        assert instruction.text.split("\n")[0] in lines[instruction.line - 1]
    printed = "".join(without_space(str(i)) for i in instructions(layer))
    # what the records do not print: comments, everything outside of the bodies, declarations
    plain = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL)
    # an empty line stands before the brace that ends a kernel
    bodies = "".join(re.findall(r"^\{\n(.*?)\n\n\}$", plain, flags=re.DOTALL | re.MULTILINE))
    bodies = re.sub(r"\.(reg|pragma|local|shared|param)\s[^;]*;", "", bodies)
    bodies = re.sub(r"(?<![\w:.$])[\w$]+:(?!:)", "", bodies)
    # braces of scopes and of vectors
    expected, found = (re.sub(r"[{}]", "", without_space(t)) for t in (bodies, printed))
    assert found == expected


def declared_at(function: Function, scope: int | None) -> dict[str, tuple[str, int]]:
    """Every register that can be named in a scope: name -> (type, the scope that has it)."""
    if scope is None:
        return {}
    found = declared_at(function, function.scopes[scope].parent)
    for declaration in function.declarations:
        if declaration.scope == scope:
            names = [declaration.name]
            if declaration.count is not None:
                names = [f"{declaration.name}{n}" for n in range(declaration.count)]
            found |= dict.fromkeys(names, (declaration.type, scope))
    return found


def test_every_register_is_declared(layer: Module) -> None:
    for kernel in layer.kernels:
        visible = {scope.index: declared_at(kernel, scope.index) for scope in kernel.scopes}
        for instruction in kernel.instructions:
            for register in instruction.registers():
                expected = visible[instruction.scope][register.name]
                assert (register.type, register.scope) == expected, instruction
        names = [register.unique_name for register in kernel.used_registers()]
        assert len(names) == len(set(names)) > 10


def test_every_branch_goes_to_the_place_of_its_label(ptx: str, layer: Module) -> None:
    lines = ptx.split("\n")
    for kernel in layer.kernels:
        branches = [i for i in kernel.instructions if i.opcode == "bra"]
        assert branches
        for branch in branches:
            (label,) = branch.operands
            assert isinstance(label, Label)
            target = kernel.instructions[kernel.labels[label]]
            before = kernel.instructions[target.index - 1]
            between = "\n".join(lines[before.line - 1 : target.line])
            assert re.search(rf"(?<![\w$]){re.escape(label.name)}\s*:", between), branch


def test_control_flow_covers_the_kernel(layer: Module) -> None:
    bounds: set[int] = set()
    for kernel in layer.kernels:
        graph = control_flow(kernel)
        assert sum(block.stop - block.start for block in graph.blocks) == len(kernel.instructions)
        assert graph.irreducible == ()
        bounds.update(len(loop.blocks) for loop in graph.loops)
        for block in graph.blocks:
            # every block ends or goes on, and branches inside a block would be a mistake
            assert block.successors or block.exits
            inner = kernel.instructions[block.start : block.stop - 1]
            assert not [i for i in inner if i.opcode in ("bra", "ret", "exit")]
            if len(block.successors) > 1 and not block.exits:
                meet = graph.reconvergence[block.index]
                assert meet is None or meet != block.index
    assert max(bounds) > 1  # the kernels loop over tiles


def test_survey_counts_every_instruction(layer: Module) -> None:
    counts = survey(layer)
    assert list(counts) == [kernel.name for kernel in layer.kernels]
    for kernel in layer.kernels:
        assert counts[kernel.name].total() == len(kernel.instructions)
    spellings = " ".join(spelling for count in counts.values() for spelling in count)
    assert ("tcgen05.mma." if layer.arch.startswith("sm_10") else "wgmma.mma_async.") in spellings


def test_small_layer(tmp_path: Path) -> None:
    compile_layer(toy_layer(), "sm_90a", tmp_path)
    module = parse((tmp_path / "kernel.ptx").read_text("utf-8"))
    first, second = module.kernels
    assert [p.type for p in first.parameters] == ["u64", "u32"]
    assert [p.offset for p in second.parameters] == [0, 8]
    assert survey(module)[first.name]["griddepcontrol.wait"] == 1
