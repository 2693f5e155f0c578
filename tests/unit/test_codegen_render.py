"""Rendered layers: what they depend on, where each line came from, and what a fault says."""

from __future__ import annotations

import getpass
import platform
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import pytest

import moejit
from moejit.codegen import (
    LayerSource,
    MoePlan,
    MoeProblem,
    SourceFile,
    TemplateError,
    arch_spec,
    candidates,
    render,
)
from moejit.codegen.problem import MAX_EXPERTS
from moejit.codegen.render import mark_origins

# `moejit.codegen.render` is the function of that name.
MODULE = sys.modules["moejit.codegen.render"]
TEMPLATES = Path(__file__).resolve().parents[2] / "templates"
TEXTS = {
    str(path.relative_to(TEMPLATES)): path.read_text("utf-8") for path in TEMPLATES.rglob("*.j2")
}
HEADER_LINES = 3
FILES = {"__init__.py", "route.py", "gemm1.py", "gemm2.py", "kernel.py"}

BASE: dict[str, Any] = {
    "hidden": 2048,
    "intermediate": 768,
    "top_k": 8,
    "num_experts": 128,
    "num_local_experts": 128,
    "tokens": 16,
}


def problem_of(arch: str = "sm_90a", **change: Any) -> MoeProblem:
    return MoeProblem(arch=arch, **{**BASE, **change})


@lru_cache(maxsize=64)
def rendered(problem: MoeProblem, index: int = 0) -> LayerSource:
    return render(problem, candidates(problem)[index])


# Every branch of every template is in one of these.
LAYERS = [
    pytest.param(problem_of(arch, **change), index, id=f"{arch}-{index}-{name}")
    for arch, indices in (("sm_90a", (0, 1, 4)), ("sm_100a", (0, 1)), ("sm_103a", (1,)))
    for index in indices
    for name, change in (
        ("fused", {}),
        ("det", {"deterministic": True, "pdl": False, "ids_dtype": "int64"}),
        ("odd", {"hidden": 2880, "intermediate": 2880, "output_dtype": "float16"}),
    )
]
every_layer = pytest.mark.parametrize(("problem", "index"), LAYERS)


# ---- what a source depends on --------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"tokens": 0}, id="tokens_0"),
        pytest.param({"tokens": 65536}, id="tokens_65536"),
        pytest.param({"num_experts": 4096}, id="num_experts"),
        pytest.param({"num_local_experts": 1}, id="num_local_experts"),
    ],
)
def test_sizes_of_a_call_are_not_in_the_source(arch: str, change: dict[str, Any]) -> None:
    problem = problem_of(arch)
    plan = candidates(problem)[0]
    assert render(replace(problem, **change), plan) == rendered(problem)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"hidden": 2112}, id="hidden"),
        pytest.param({"intermediate": 832}, id="intermediate"),
        pytest.param({"top_k": 7}, id="top_k"),
        pytest.param({"ids_dtype": "int64"}, id="ids_dtype"),
        pytest.param({"scales_dtype": "bfloat16"}, id="scales_bfloat16"),
        pytest.param({"scales_dtype": "float16"}, id="scales_float16"),
        pytest.param({"output_dtype": "float16"}, id="output_dtype"),
        pytest.param({"deterministic": True}, id="deterministic"),
        pytest.param({"pdl": False}, id="pdl"),
    ],
)
def test_each_fact_changes_code_and_names(arch: str, change: dict[str, Any]) -> None:
    """Beyond the header: a fact that no template used would not have to be a fact."""
    problem = problem_of(arch)
    source = rendered(problem)
    other = render(replace(problem, **change), candidates(problem)[0])
    assert code_of(source) != code_of(other)
    assert source.sha256 != other.sha256
    assert source.symbol_prefix != other.symbol_prefix
    assert source.name != other.name
    assert source.facts != other.facts


def code_of(source: LayerSource) -> list[list[str]]:
    """Lines without headers and symbol names."""
    return [
        line_list(file.text.replace(source.symbol_prefix, "PREFIX"))[HEADER_LINES:]
        for file in source.files
    ]


def line_list(text: str) -> list[str]:
    return text.split("\n")[:-1]


def test_the_facts_tested_above_are_all() -> None:
    tested = {"hidden", "intermediate", "top_k", "deterministic", "pdl"}
    tested |= {"ids_dtype", "scales_dtype", "output_dtype"}
    assert set(problem_of().facts) == tested | {"arch"}


def test_arch_changes_the_digest() -> None:
    problem = problem_of("sm_100a")
    assert rendered(problem).sha256 != rendered(replace(problem, arch="sm_103a")).sha256


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_each_plan_has_its_own_source(arch: str) -> None:
    problem = problem_of(arch)
    sources = [render(problem, plan) for plan in candidates(problem)]
    for what in ("name", "symbol_prefix", "sha256"):
        assert len({getattr(source, what) for source in sources}) == len(sources)


def test_digest_covers_names_and_texts() -> None:
    source = rendered(problem_of())
    digests = {source.sha256}
    for index, file in enumerate(source.files):
        for changed in (
            replace(file, text=file.text + " "),
            replace(file, name=file.name + "x"),
        ):
            files = (*source.files[:index], changed, *source.files[index + 1 :])
            digests.add(replace(source, files=files).sha256)
    assert len(digests) == 1 + 2 * len(source.files)


def test_digest_tells_where_one_file_ends() -> None:
    def layer(*files: tuple[str, str]) -> LayerSource:
        made = [SourceFile(name=n, template="", text=t, origins=()) for n, t in files]
        return LayerSource(name="", symbol_prefix="", arch="", files=tuple(made), facts={})

    assert layer(("a", "xb"), ("b", "y")).sha256 != layer(("a", "x"), ("b", "by")).sha256
    assert layer(("a", "x"), ("b", "y")).sha256 != layer(("b", "y"), ("a", "x")).sha256


# ---- what a source looks like --------------------------------------------------------------------


@every_layer
def test_files_are_python_and_of_readable_length(problem: MoeProblem, index: int) -> None:
    source = rendered(problem, index)
    inline = candidates(problem)[index].finalize.inline
    assert {file.name for file in source.files} == FILES | (set() if inline else {"finalize.py"})
    for file in source.files:
        compile(file.text, file.name, "exec")
        assert file.text.count("\n") <= 600
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", file.text)
        assert not re.search(r"[ \t]$", file.text, re.MULTILINE)
        if file.name != "__init__.py":
            assert file.text.endswith("\n") and not file.text.endswith("\n\n")
            header = line_list(file.text)[:HEADER_LINES]
            assert header[0] == f"# generated by moejit from templates/{file.template}"
            assert f"hidden={problem.hidden}" in header[1]
            assert header[2] == f"# plan: {candidates(problem)[index].name}"


@every_layer
def test_nothing_of_this_machine_or_this_day_is_in_a_source(
    problem: MoeProblem, index: int
) -> None:
    forbidden = [
        r"/(?:home|root|tmp|usr|opt|var|work|mnt)/",
        r"\b20\d\d-\d\d",
        r"\b\d+\.\d+\.\d+\b",
        r"\b0x[0-9a-f]{10,}",  # an address, from a repr
        rf"\b{re.escape(platform.node())}\b",
        rf"\b{re.escape(getpass.getuser())}\b",
        rf"\b{re.escape(moejit.__version__)}\b",
    ]
    for file in rendered(problem, index).files:
        for pattern in forbidden:
            assert not re.search(pattern, file.text), (file.name, pattern)


@every_layer
def test_symbols_are_short_and_say_nothing_of_cutlass(problem: MoeProblem, index: int) -> None:
    source = rendered(problem, index)
    assert "cutlass" not in source.symbol_prefix
    assert re.fullmatch(r"moejit_\w+", source.symbol_prefix)
    assert source.symbol_prefix == f"moejit_{source.name}"
    kernels = [file for file in source.files if file.name not in ("__init__.py", "kernel.py")]
    for file in kernels:
        assert f'set_name_prefix("{source.symbol_prefix}_{file.name[:-3]}"' in file.text
        assert file.text.count("set_name_prefix(") == file.text.count("@cute.kernel") == 1


def test_the_longest_symbol_prefix() -> None:
    problem = problem_of(
        hidden=1 << 20, intermediate=1 << 20, top_k=32, deterministic=True, pdl=False
    )
    for arch in ("sm_90a", "sm_100a"):
        for plan in candidates(problem_of(arch)):
            prefix = render(replace(problem, arch=arch), plan).symbol_prefix
            assert len(prefix) <= 150


# ---- agreement of templates and codegen ----------------------------------------------------------


def constants_of(text: str) -> dict[str, Any]:
    """Values of the upper-case names at the top level that plain arithmetic gives."""
    values: dict[str, Any] = {}
    for line in text.splitlines():
        if re.match(r"[A-Z][A-Z0-9_]*(, [A-Z][A-Z0-9_]*)* = ", line):
            try:
                exec(line, values)
            except (NameError, SyntaxError):  # of the compiler's, or of several lines
                continue
    return values


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a", "sm_103a"])
def test_kernels_fit_into_the_shared_memory_that_selection_counts(arch: str) -> None:
    problem = problem_of(arch)
    for plan in candidates(problem):
        files = {file.name: file.text for file in render(problem, plan).files}
        for name, gemm in (("gemm1", plan.gemm1), ("gemm2", plan.gemm2)):
            constants = constants_of(files[f"{name}.py"])
            assert constants["STAGES"] == gemm.stages
            assert constants["SMEM_BYTES"] == gemm.smem_bytes <= arch_spec(arch).smem_bytes
        assert constants_of(files["route.py"])["SMEM_BYTES"] == plan.route.smem_bytes


def test_route_has_a_counter_for_every_expert() -> None:
    (text,) = (f.text for f in rendered(problem_of()).files if f.name == "route.py")
    constants = constants_of(text)
    assert constants["MAX_EXPERTS"] == MAX_EXPERTS
    assert constants["SMEM_BYTES"] <= 48 * 1024  # more would need an opt-in


# ---- where each line came from -------------------------------------------------------------------

TAG = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}")


def pattern_of(line: str) -> str:
    """A regular expression for what a template line renders to.

    Text in a branch may be absent, text in a block may be another, and the blanks before a tag at
    the start of a line are dropped.
    """
    line = line.lstrip() if line.lstrip().startswith("{%") else line
    parts: list[str] = []
    inside, at = 0, 0
    for tag in TAG.finditer(line):
        text = re.escape(line[at : tag.start()])
        parts.append(f"(?:{text})?" if inside else text)
        at = tag.end()
        word = tag[0].strip("{%# }").split(" ")[0]
        if word in ("endif", "endfor") and not inside:  # opened on a line before
            parts = [f"(?:{''.join(parts)})?"]
        else:
            inside += {"if": 1, "for": 1, "endif": -1, "endfor": -1}.get(word, 0)
        if tag[0].startswith("{{") or word == "block":
            parts.append(".*")
        if word == "block":
            at = line.index("{% endblock %}", at)
    return "".join([*parts, re.escape(line[at:])])


def lines_of(source: LayerSource) -> Iterator[tuple[str, int, str]]:
    """(file, line, text) of every rendered line, headers left out."""
    for file in source.files:
        for number, text in enumerate(line_list(file.text), 1):
            if number > HEADER_LINES:
                yield file.name, number, text


@every_layer
def test_every_line_comes_from_the_template_line_it_maps_to(
    problem: MoeProblem, index: int
) -> None:
    source = rendered(problem, index)
    seen = set()
    for file, number, text in lines_of(source):
        origin = source.template_line(file, number)
        assert origin is not None
        template, line = origin
        static = line_list(TEXTS[template])[line - 1]
        where = f"{file}:{number} {text!r} <- {template}:{line} {static!r}"
        if static.strip():
            assert re.search(pattern_of(static) + "$", text), where
        else:
            assert text == "", where
        seen.add(template)
    family = "sm90" if problem.arch == "sm_90a" else "sm100"
    assert {"route.py.j2", "kernel.py.j2", "parts/ptx.py.j2", f"{family}/gemm1.py.j2"} <= seen
    assert ("sm90/gemm.py.j2" in seen) == (family == "sm90")


@every_layer
def test_a_line_that_stands_in_one_template_only_maps_there(
    problem: MoeProblem, index: int
) -> None:
    everywhere = Counter(line for text in TEXTS.values() for line in line_list(text))
    places = {
        line: (template, number)
        for template, text in TEXTS.items()
        for number, line in enumerate(line_list(text), 1)
        if everywhere[line] == 1 and not TAG.search(line)
    }
    source = rendered(problem, index)
    found = 0
    for file, number, text in lines_of(source):
        if text in places:
            assert source.template_line(file, number) == places[text], text
            found += 1
    assert found > 500


def test_lines_outside_a_file_are_unknown() -> None:
    source = rendered(problem_of())
    last = source.files[1].text.count("\n")
    assert source.template_line("route.py", last) is not None
    assert source.template_line("route.py", last + 1) is None
    assert source.template_line("route.py", 0) is None
    assert source.template_line("__init__.py", 1) is None
    assert source.template_line("no_such_file.py", 1) is None
    assert source.template_line("route.py", 1) == ("route.py.j2", 1)  # header


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        pytest.param("a\nb\n", [1, 2], id="plain"),
        pytest.param("a\nb", [1, 2], id="no_newline_at_the_end"),
        pytest.param("a\n{{ x }}\n", [1, 2], id="expression_alone"),
        pytest.param("{% if x %}\na\n{% else %}\nb\n{% endif %}\nc\n", [2, 6], id="branch"),
        pytest.param("  {% if x %}1{% endif %}, a\nb\nc\n", [1, 2, 3], id="tag_then_text"),
        pytest.param("a\n{% if x\n   and x %}\nb\n{% endif %}\n", [1, 4], id="tag_of_two_lines"),
        pytest.param("{# one\n   two #}\na\n", [3], id="comment_of_two_lines"),
        pytest.param("{# about {% if %} #}\na\n", [2], id="tag_in_a_comment"),
        pytest.param("{% set y = '%}' %}\na\n", [2], id="end_of_tag_in_a_string"),
        pytest.param("a {{ {'k': 1}['k'] }}\nb\n", [1, 2], id="braces_in_an_expression"),
        pytest.param("{% raw %}\n{{ x }}\n{% endraw %}\nb\n", [1, 2, 4], id="raw"),
        pytest.param("a\n{%- if x %} b{% endif %}\nc\n", [3], id="newline_eaten_from_the_right"),
        pytest.param("{% for i in (1, 2) %}\na\n{% endfor %}\nb\n", [2, 2, 4], id="loop"),
    ],
)
def test_marks_follow_the_lexer(text: str, lines: list[int]) -> None:
    """`lines` are the template lines that end in the output, in order."""
    environment = MODULE._environment()
    marked = mark_origins(environment, "t", text)
    assert re.sub("\x01.*?\x02", "", marked) == text
    output = environment.from_string(marked).render(x=1)
    assert [int(n) for n in re.findall("\x01t:([0-9]+)\x02", output)] == lines
    for line in output.split("\n")[:-1]:
        assert line.endswith("\x02")


# ---- faults in templates -------------------------------------------------------------------------


@pytest.fixture
def with_templates(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Renders a layer with some templates replaced."""

    def run(**texts: str) -> LayerSource:
        replaced = {name.replace("__", "/") + ".py.j2": text for name, text in texts.items()}
        real = MODULE._environment()

        class Loader(jinja2.BaseLoader):
            def get_source(self, environment: jinja2.Environment, template: str) -> Any:
                if template in replaced:
                    marked = mark_origins(environment, template, replaced[template])
                    return marked, template, None
                return real.loader.get_source(environment, template)

        overlay = real.overlay(loader=Loader())
        monkeypatch.setattr(MODULE, "_environment", lambda: overlay)
        problem = problem_of()
        plan: MoePlan = candidates(problem)[0]
        return render(problem, plan)

    return run


@pytest.mark.parametrize(
    ("texts", "template", "line", "says"),
    [
        pytest.param(
            {"route": "a = 1\nb = {{ tokens }}\n"}, "route.py.j2", 2, "'tokens'", id="undefined"
        ),
        pytest.param(
            {"route": "a = 1\n\n{% if num_experts %}\n{% endif %}\n"},
            "route.py.j2",
            3,
            "'num_experts'",
            id="undefined_in_a_condition",
        ),
        pytest.param(
            {"parts__gmem": "a = 1\n{% if pdl %}\nb = {{ v.nothing }}\n{% endif %}\n"},
            "parts/gmem.py.j2",
            3,
            "nothing",
            id="undefined_in_an_include",
        ),
        pytest.param(
            {
                "sm90__gemm": "a = 1\n{% block one %}{% endblock %}\n",
                "sm90__gemm1": '{% extends "sm90/gemm.py.j2" %}\n{% block one %}\n'
                "b = {{ missing }}\n{% endblock %}\n",
            },
            "sm90/gemm1.py.j2",
            3,
            "'missing'",
            id="undefined_in_a_block",
        ),
        pytest.param(
            {"route": "a = 1\n{% if pdl %}\nb = 2\n"}, "route.py.j2", 3, "endif", id="syntax"
        ),
        pytest.param(
            {"parts__ptx": "a = 1\n{{ 1 + }}\n"},
            "parts/ptx.py.j2",
            2,
            "print statement",
            id="syntax_include",
        ),
        pytest.param({"route": "a = 1\n\nb = {{\n"}, "route.py.j2", 3, "end of", id="unclosed"),
        pytest.param(
            {"route": "a = 1\nb = {{ hidden // 0 }}\n"},
            "route.py.j2",
            2,
            "ZeroDivisionError",
            id="other_exception",
        ),
        pytest.param(
            {"route": '\n\n{% include "parts/lost.py.j2" %}\n'},
            "route.py.j2",
            3,
            "there is no template parts/lost.py.j2",
            id="include_of_nothing",
        ),
        pytest.param(
            {"route": "{% if pdl %}\na = 1\n{% endif %}\ndef f(:\n    pass\n"},
            "route.py.j2",
            4,
            "not Python",
            id="not_python",
        ),
        pytest.param(
            {"parts__gmem": "a = 1\n{# about #}\nb = = {{ hidden }}\n"},
            "parts/gmem.py.j2",
            3,
            "not Python",
            id="not_python_in_an_include",
        ),
        pytest.param(
            {
                "sm90__gemm2": '{% extends "sm90/gemm.py.j2" %}\n{% block problem %}\nK = ?\n'
                "{% endblock %}\n{% set name = 'gemm2' %}\n"
            },
            "sm90/gemm2.py.j2",
            3,
            "not Python",
            id="not_python_in_a_block",
        ),
    ],
)
def test_fault_names_template_and_line(
    with_templates: Any, texts: dict[str, str], template: str, line: int, says: str
) -> None:
    with pytest.raises(TemplateError) as caught:
        with_templates(**texts)
    assert (caught.value.template, caught.value.line) == (template, line), caught.value.text
    assert says in caught.value.text
    assert f"templates/{template}:{line}: " in str(caught.value)


def test_replaced_templates_render(with_templates: Any) -> None:
    """The fixture does what the faults above stand on."""
    source = with_templates(route="a = {{ hidden }}\n")
    assert source.files[1].text.split("\n", HEADER_LINES)[-1] == "a = 2048\n"
    assert source.template_line("route.py", HEADER_LINES + 1) == ("route.py.j2", 1)


def test_missing_template_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = MODULE._environment().overlay(loader=jinja2.DictLoader({}))
    monkeypatch.setattr(MODULE, "_environment", lambda: overlay)
    problem = problem_of()
    with pytest.raises(TemplateError, match=r"route\.py\.j2:0: there is no template"):
        render(problem, candidates(problem)[0])
