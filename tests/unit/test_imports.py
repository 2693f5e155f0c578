"""What an import costs: `import moejit` takes milliseconds and none of the heavy packages."""

from __future__ import annotations

import subprocess
import sys

import pytest

SECONDS = """
import time; start = time.perf_counter()
{statement}
spent = time.perf_counter() - start
heavy = "torch", "cutlass", "tvm_ffi", "jinja2"
import sys; print(spent, *[name for name in heavy if name in sys.modules])
"""


def spent(statement: str) -> tuple[float, list[str]]:
    """The best of three fresh processes: (seconds, heavy packages that came along)."""
    found = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", SECONDS.format(statement=statement)],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds, *heavy = done.stdout.split()
        found.append((float(seconds), heavy))
    return min(found)


@pytest.mark.parametrize("statement", ["import moejit", "import moejit.runtime"])
def test_import_takes_at_most_50_ms(statement: str) -> None:
    seconds, heavy = spent(statement)
    assert heavy == []
    assert seconds <= 0.05


@pytest.mark.parametrize(
    "module", ["settings", "build", "prewarming", "compiler", "events", "errors"]
)
def test_build_side_needs_neither_torch_nor_the_compiler(module: str) -> None:
    """A machine that only fills the cache imports torch in its compile workers, not before."""
    _, heavy = spent(f"import moejit.runtime.{module}")
    assert set(heavy) <= {"jinja2"}


def test_public_names_resolve() -> None:
    from moejit import runtime

    for name in runtime.__all__:
        assert getattr(runtime, name) is not None
        assert name in dir(runtime)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = runtime.nonsense


def test_helpers_that_the_readme_names_come_from_runtime() -> None:
    from moejit.runtime import (  # noqa: F401
        dequantize_nvfp4,
        interleave_up_gate,
        prepare_weights,
        quantize_activations,
        quantize_nvfp4,
        sf_6d_view,
        split_up_gate,
        swizzle_scales,
        unswizzle_scales,
    )


def test_no_public_name_is_a_module() -> None:
    """Importing a submodule binds its name in the package, over a function of the same name."""
    import pkgutil

    from moejit import runtime

    modules = {module.name for module in pkgutil.iter_modules(runtime.__path__)}
    assert not modules & set(runtime.__all__)
    assert callable(runtime.prewarm)
