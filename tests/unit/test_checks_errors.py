"""The error classes: text, fields, pickling, and the table in docs/errors.md."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from moejit.codegen import errors as codegen_errors
from moejit.runtime import errors

DOCS = Path(__file__).resolve().parents[2] / "docs" / "errors.md"

EXAMPLES = {
    "bad_argument": (
        errors.BadArgument("x", "has dtype torch.float32", "torch.uint8", "Quantize it."),
        "moe_nvfp4: argument 'x' has dtype torch.float32; it should be torch.uint8. Quantize it.",
    ),
    "bad_argument_of_a_helper": (
        errors.BadArgument("x", "is 3", "4", function="quantize_nvfp4"),
        "quantize_nvfp4: argument 'x' is 3; it should be 4.",
    ),
    "backend": (
        errors.BackendUnavailable("cuda", "no GPU is visible", "Use MOEJIT_BACKEND=reference."),
        "backend 'cuda' is not available: no GPU is visible. Use MOEJIT_BACKEND=reference.",
    ),
    "compile": (
        errors.CompileFailed("gemm1", "sm_100a", "sm100/gemm1.py.j2", 12, "bad operand"),
        "compiling gemm1 for sm_100a failed at sm100/gemm1.py.j2:12:\nbad operand",
    ),
    "compile_anywhere": (
        errors.CompileFailed("gemm1", "sm_90a"),
        "compiling gemm1 for sm_90a failed",
    ),
    "jit": (
        errors.JitDisabled("H=7168", "error"),
        "no compiled kernel for H=7168, and MOEJIT_JIT=error forbids compiling. "
        "Build it ahead of time with `moejit prewarm`.",
    ),
    "load": (
        errors.LoadFailed("layer-1f", "wrong CPU", "Compile it here."),
        "cannot load layer-1f: wrong CPU. Compile it here.",
    ),
    "capture": (
        errors.CaptureWouldCompile("H=64"),
        "a CUDA graph is being captured and H=64 is not loaded; compiling or loading now would "
        "break the capture. Call the layer once with these shapes, or prewarm it, before the "
        "capture.",
    ),
    "linker": (
        errors.LinkerMissing(("cc", "ld")),
        "no linker found (looked for cc, ld). Install one of them, or use a cache that was built "
        "on another machine.",
    ),
}


@pytest.mark.parametrize("case", EXAMPLES)
def test_text(case: str) -> None:
    error, text = EXAMPLES[case]
    assert str(error) == text


@pytest.mark.parametrize("case", EXAMPLES)
def test_pickle_keeps_fields_and_text(case: str) -> None:
    error, text = EXAMPLES[case]
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert vars(back) == vars(error)
    assert back.args == error.args
    assert (str(back), repr(back)) == (text, repr(error))


@pytest.mark.parametrize("case", EXAMPLES)
def test_base_class(case: str) -> None:
    assert isinstance(EXAMPLES[case][0], errors.MoejitError)


def test_bad_argument_is_a_value_error() -> None:
    assert issubclass(errors.BadArgument, ValueError)
    assert errors.MoejitError is codegen_errors.MoejitError


def test_repr_shows_the_fields() -> None:
    assert repr(errors.JitDisabled("H=64", "off")) == "JitDisabled('H=64', 'off', '')"


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, value in vars(codegen_errors).items()
        if isinstance(value, type) and issubclass(value, errors.MoejitError)
    ],
)
def test_errors_of_codegen_are_here_too(name: str) -> None:
    assert getattr(errors, name) is getattr(codegen_errors, name)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="NoSuchError"):
        errors.NoSuchError  # noqa: B018


@pytest.mark.parametrize(
    "name",
    sorted({*errors.__all__, *codegen_errors.__all__} - {"MoejitError"}),
)
def test_every_class_is_documented(name: str) -> None:
    assert f"`{name}`" in DOCS.read_text("utf-8")
