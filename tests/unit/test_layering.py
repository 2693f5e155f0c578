"""The layers of the code are pinned here: who may import whom, and what stays lazy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

# Folders of ours that each folder may import, besides itself.
LAYERS: dict[str, set[str]] = {
    "templates": set(),
    "codegen": {"templates"},
    "cache": set(),
    "emulator": set(),
    "runtime": {"cache", "codegen", "emulator", "templates"},
}
# Third-party packages that each folder may import.
PACKAGES: dict[str, set[str]] = {
    "templates": set(),
    "codegen": {"jinja2"},
    "cache": {"filelock"},
    "emulator": {"numpy"},
    "runtime": {"filelock", "numpy", "rich", "tomli", "tomllib", "torch", "tvm_ffi", "typer"},
}
# The only module that may touch the compiler; rendered kernels do too, but they are not imported.
COMPILER = Path("runtime/compiler.py")


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of each import in a file, at any depth, relative ones resolved."""
    package = ["moejit", *path.relative_to(REPO).parent.parts]
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "moejit" or (node.level and not node.module):
                found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, module))
        elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func):
            args = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
            found += [(node.lineno, str(name)) for name in args if not str(name).startswith(".")]
    return found


def files_of(folder: str) -> list[Path]:
    return sorted((REPO / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", LAYERS)
def test_folder_imports_only_the_layers_below(folder: str) -> None:
    wrong = []
    for path in files_of(folder):
        for line, name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "moejit" and len(parts) > 1 and parts[1] in LAYERS:
                if parts[1] not in LAYERS[folder] | {folder}:
                    wrong.append(f"{path.relative_to(REPO)}:{line} imports {name}")
            elif parts[0] in LAYERS:
                wrong.append(f"{path.relative_to(REPO)}:{line}: write moejit.{name}")
    assert wrong == []


@pytest.mark.parametrize("folder", LAYERS)
def test_folder_imports_only_its_third_party_packages(folder: str) -> None:
    wrong = []
    for path in files_of(folder):
        allowed = PACKAGES[folder] | set(sys.stdlib_module_names) | {"moejit", "__future__"}
        if path.relative_to(REPO) == COMPILER:
            allowed |= {"cutlass"}
        for line, name in imports_of(path):
            top = name.split(".")[0]
            if top not in allowed | set(LAYERS):
                wrong.append(f"{path.relative_to(REPO)}:{line} imports {name}")
    assert wrong == []


def test_every_code_folder_has_a_layer() -> None:
    linked = {p.name for p in (REPO / "src/moejit").iterdir() if p.is_dir()} - {"__pycache__"}
    assert linked == set(LAYERS)


def test_only_settings_reads_the_environment() -> None:
    """Settings are read once, in one place; everything else gets them handed in."""
    readers = set()
    for folder in LAYERS:
        for path in files_of(folder):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                    readers.add(str(path.relative_to(REPO)))
    assert readers <= ENVIRONMENT_READERS


# A reason for each. compiler.py hides the GPU from its workers; store.py has a default for its lock
# folder that runtime never uses.
ENVIRONMENT_READERS = {"cache/store.py", "runtime/compiler.py", "runtime/settings.py"}


@pytest.mark.parametrize(
    "statement",
    [
        "import moejit",
        "import moejit.runtime",
        "import moejit.codegen",
        "import moejit.cache",
        "import moejit.emulator",
        "import moejit.runtime.cli",
    ],
)
def test_import_is_light(statement: str) -> None:
    """None of these may import torch or the compiler: they cost seconds."""
    heavy = ("torch", "cutlass", "tvm_ffi")
    code = f"import sys; {statement}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
