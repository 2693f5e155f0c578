"""Errors that codegen raises, and the base class of every error of moejit.

Lives in the lowest layer so that codegen and runtime can share the base; `runtime.errors`
re-exports all of them. Arguments stay in ``args``, so that an error comes out of a compile worker
whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["BadProblem", "MoejitError", "NoVariantFits", "TemplateError", "UnknownArch"]


class MoejitError(Exception):
    """Base of every error that moejit raises on purpose.

    Subclasses pass their fields to ``Exception.__init__`` so that they survive pickling on the way
    out of a compile worker, and build the message in ``__str__``: what, where, and what next.
    """


class BadProblem(MoejitError, ValueError):
    """A field of a `MoeProblem` is outside what the contract allows.

    Attributes:
        field: name of the field.
        value: what it is.
        rule: what it should be.
    """

    def __init__(self, field: str, value: object, rule: str) -> None:
        super().__init__(field, value, rule)
        self.field, self.value, self.rule = field, value, rule

    def __str__(self) -> str:
        return f"{self.field} is {self.value!r}; it must be {self.rule}"


class UnknownArch(MoejitError, ValueError):
    """There are no templates for this GPU architecture.

    Attributes:
        arch: the name or the compute capability that was asked for.
        known: the names that would work.
    """

    def __init__(self, arch: str, known: Sequence[str]) -> None:
        super().__init__(arch, tuple(known))
        self.arch, self.known = arch, tuple(known)

    def __str__(self) -> str:
        return (
            f"no kernels for GPU architecture {self.arch!r}; known: {', '.join(self.known)}. "
            "Set MOEJIT_ARCH or --arch to one of them, or use MOEJIT_BACKEND=reference."
        )


class NoVariantFits(MoejitError):
    """No variant in the table can run this problem.

    Attributes:
        problem: the `MoeProblem` as text.
        rejections: plan name -> every reason against it.
    """

    def __init__(self, problem: str, rejections: Mapping[str, Sequence[str]]) -> None:
        super().__init__(problem, {name: tuple(why) for name, why in rejections.items()})
        self.problem: str = problem
        self.rejections: dict[str, tuple[str, ...]] = self.args[1]

    def __str__(self) -> str:
        lines = [f"  {name}: {'; '.join(why)}" for name, why in self.rejections.items()]
        return "\n".join([f"no variant can run {self.problem}; tried {len(lines)}:", *lines])


class TemplateError(MoejitError):
    """A template could not be rendered, or rendered to text that is not Python.

    Attributes:
        template: the template's name under ``templates/``.
        line: line in the template, 0 where it is not known.
        text: what Jinja or Python said.
    """

    def __init__(self, template: str, line: int, text: str) -> None:
        super().__init__(template, line, text)
        self.template, self.line, self.text = template, line, text

    def __str__(self) -> str:
        return (
            f"templates/{self.template}:{self.line}: {self.text}. "
            "This is a fault in moejit, not in your call: please report it with the shape."
        )
