"""Problem and plan in, `LayerSource` out: the files of one layer, and where each line came from.

Templates choose, Python computes: the context holds compile-time facts only (never tokens, experts
or offsets), `StrictUndefined` refuses anything else, and templates hold no arithmetic on
configurations.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from importlib import resources
from typing import Any

import jinja2

from .errors import TemplateError
from .plan import MoePlan, Sm90Gemm, Sm100Gemm
from .problem import MoeProblem
from .workspace import ALIGNMENT, workspace_layout

__all__ = ["ENTRY", "LayerSource", "SourceFile", "render"]

ENTRY = "moe_layer"  # the host function in kernel.py

# A rendered line carries its origin at its end until the text is finished: \x01template:line\x02.
_MARK = re.compile("\x01([^\x01\x02]*):([0-9]+)\x02")
_CUTE_TYPE = {
    "int32": "Int32",
    "int64": "Int64",
    "float32": "Float32",
    "bfloat16": "BFloat16",
    "float16": "Float16",
}
_SHORT = {"int32": "i32", "int64": "i64", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One rendered file.

    Attributes:
        name: file name inside the layer's package, for example ``gemm1.py``.
        template: the template it came from, relative to ``templates/``.
        text: the source.
        origins: for each line of ``text``, in order, the (template, line) it came from.
    """

    name: str
    template: str
    text: str
    origins: tuple[tuple[str, int], ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class LayerSource:
    """The files of one layer: a Python package that is compiled as one unit.

    Attributes:
        name: readable name of the layer, part of the cache entry's folder name.
        symbol_prefix: prefix of every kernel symbol in it.
        arch: compiler target.
        files: host file and kernels.
        facts: problem and plan in clear text, for the manifest and the key.
    """

    name: str
    symbol_prefix: str
    arch: str
    files: tuple[SourceFile, ...]
    facts: dict[str, str | int | bool]

    @cached_property
    def sha256(self) -> str:
        """Digest of every file's name and text: what the cache key stands on."""
        digest = hashlib.sha256()
        for file in self.files:
            data = file.text.encode()
            digest.update(f"{file.name}\0{len(data)}\0".encode())
            digest.update(data)
        return digest.hexdigest()

    def template_line(self, file: str, line: int) -> tuple[str, int] | None:
        """The (template, line) that ``line`` (from 1) of ``file`` came from; None if unknown.

        The header, which no template holds, maps to line 1 of the file's template.
        """
        for source in self.files:
            if source.name == file and 1 <= line <= len(source.origins):
                return source.origins[line - 1]
        return None


def render(problem: MoeProblem, plan: MoePlan) -> LayerSource:
    """Render every file of the layer that runs ``problem`` by ``plan``.

    Raises:
        TemplateError: a template is broken, or rendered to text that is not Python; names template
            and line.
    """
    kind = "det" if problem.deterministic else "fused"
    dtypes = (problem.ids_dtype, problem.scales_dtype, problem.output_dtype)
    name = "_".join(
        [
            f"h{problem.hidden}_i{problem.intermediate}_k{problem.top_k}",
            plan.name,
            *(_SHORT[d] for d in dtypes),
            kind,
            *([] if problem.pdl else ["nopdl"]),
        ]
    )
    prefix = f"moejit_{name}"
    layout = workspace_layout(problem, plan)
    context: dict[str, Any] = {
        **problem.facts,
        "ids_type": _CUTE_TYPE[problem.ids_dtype],
        "scales_type": _CUTE_TYPE[problem.scales_dtype],
        "output_type": _CUTE_TYPE[problem.output_dtype],
        "prefix": prefix,
        "family": plan.family,
        "token_tile": plan.token_tile,
        "finalize_inline": plan.finalize.inline,
        "gemm2_row_tile": getattr(plan.gemm2, "row_tile", None),
        "sections": layout.sections,
        "workspace_alignment": ALIGNMENT,
    }
    hidden, intermediate = problem.hidden, problem.intermediate
    tails1 = _tails(plan.gemm1, n=2 * intermediate, k=hidden)
    tails2 = _tails(plan.gemm2, n=hidden, k=intermediate)
    parts: list[tuple[str, str, dict[str, Any]]] = [
        ("route.py", "route.py.j2", {"v": plan.route}),
        ("gemm1.py", f"{plan.family}/gemm1.py.j2", {"v": plan.gemm1, **tails1}),
        ("gemm2.py", f"{plan.family}/gemm2.py.j2", {"v": plan.gemm2, **tails2}),
        ("kernel.py", "kernel.py.j2", {"v": plan}),
    ]
    if not plan.finalize.inline:
        parts.append(("finalize.py", "finalize.py.j2", {"v": plan.finalize}))
    problem_line = " ".join(f"{k}={v}" for k, v in problem.facts.items())
    files = [SourceFile(name="__init__.py", template="", text="", origins=())]
    for file_name, template, own in parts:
        header = [
            f"# generated by moejit from templates/{template}",
            f"# problem: {problem_line}",
            f"# plan: {plan.name}",
        ]
        files.append(_render_file(file_name, template, header, {**context, **own}))
    facts: dict[str, str | int | bool] = {**problem.facts, "plan": plan.name}
    for kernel in ("route", "gemm1", "gemm2", "finalize"):
        for key, value in asdict(getattr(plan, kernel)).items():
            facts[f"{kernel}.{key}"] = value
    return LayerSource(
        name=name,
        symbol_prefix=prefix,
        arch=problem.arch,
        files=tuple(files),
        facts=facts,
    )


def _tails(gemm: Sm90Gemm | Sm100Gemm, *, n: int, k: int) -> dict[str, bool]:
    """Whether the last tiles of a GEMM are not full; the SM90 templates do not ask."""
    if isinstance(gemm, Sm90Gemm):
        return {}
    return {"k_tail": k % gemm.tile_k != 0, "n_tail": n % gemm.tile_n != 0}


def _render_file(
    name: str, template: str, header: list[str], context: dict[str, Any]
) -> SourceFile:
    try:
        marked = _environment().get_template(template).render(context)
    except jinja2.TemplateSyntaxError as exc:
        raise TemplateError(exc.name or template, exc.lineno, exc.message or str(exc)) from exc
    except Exception as exc:  # an expression in a template may raise anything
        where, line = _failing_line(exc, template)
        text = str(exc)
        if isinstance(exc, jinja2.TemplateNotFound):
            text = f"there is no template {exc}"
        elif not isinstance(exc, jinja2.TemplateError):
            text = f"{type(exc).__name__}: {text}"
        raise TemplateError(where, line, text) from exc
    lines, origins = list(header), [(template, 1)] * len(header)
    last = (template, 1)
    for text in marked.split("\n"):
        marks = _MARK.findall(text)
        if marks:
            last = (marks[-1][0], int(marks[-1][1]))
        lines.append(_MARK.sub("", text))
        origins.append(last)
    while lines and not lines[-1].strip():
        lines.pop()
        origins.pop()
    source = "\n".join(lines) + "\n"
    try:
        compile(source, name, "exec")
    except SyntaxError as exc:
        where, line = origins[min((exc.lineno or 1) - 1, len(origins) - 1)]
        raise TemplateError(where, line, f"renders to text that is not Python: {exc.msg}") from exc
    return SourceFile(name=name, template=template, text=source, origins=tuple(origins))


def _failing_line(exc: BaseException, template: str) -> tuple[str, int]:
    """Innermost template frame of a failure while rendering (jinja rewrites its tracebacks)."""
    found, tb = (template, 0), exc.__traceback__
    while tb is not None:
        file = tb.tb_frame.f_code.co_filename
        if file.endswith(".j2"):
            found = (file, tb.tb_lineno)
        tb = tb.tb_next
    return found


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=_MarkingLoader(),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the output is Python, not HTML
    )


class _MarkingLoader(jinja2.BaseLoader):
    """Loads `moejit.templates` and marks each line of text with where it stands."""

    def get_source(
        self, environment: jinja2.Environment, template: str
    ) -> tuple[str, str | None, Callable[[], bool] | None]:
        try:
            text = resources.files("moejit.templates").joinpath(template).read_text("utf-8")
        except (FileNotFoundError, IsADirectoryError):
            raise jinja2.TemplateNotFound(template) from None
        return mark_origins(environment, template, text), template, None


def mark_origins(environment: jinja2.Environment, template: str, text: str) -> str:
    """Append an origin mark to each line of ``text`` whose end Jinja copies to its output.

    Jinja's own lexer says which ends those are: not the ones inside a tag or a comment, nor the one
    after a tag, which ``trim_blocks`` removes. Lines keep their numbers.
    """
    ends: set[int] = set()
    for line, token, value in environment.lex(text, template, template):
        if token == "data":
            ends.update(range(line, line + value.count("\n")))
    lines = text.split("\n")
    if lines[-1]:  # no newline at the end of the file
        ends.add(len(lines))
    return "\n".join(
        f"{line}\x01{template}:{number}\x02" if number in ends else line
        for number, line in enumerate(lines, 1)
    )
