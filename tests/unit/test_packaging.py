"""What is installed: the links, the wheel, the sdist, a fresh environment made from the wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import moejit

REPO = Path(__file__).resolve().parents[2]
FOLDERS = ("cache", "codegen", "emulator", "runtime", "templates")
SHIPPED = (*FOLDERS, "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "src")


def run(*command: str | Path, cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_CONFIG_FILE")}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def package_files() -> set[str]:
    """Every file that belongs into a wheel, as its name there."""
    names = {"moejit/__init__.py", "moejit/__main__.py", "moejit/py.typed"}
    for folder in FOLDERS:
        for suffix in ("*.py", "*.j2", "*.json"):
            found = (REPO / folder).rglob(suffix)
            names |= {f"moejit/{p.relative_to(REPO).as_posix()}" for p in found}
    return names


@pytest.mark.skipif(not (REPO / ".git").exists(), reason="an sdist holds real folders, no links")
def test_links_point_to_the_code_folders() -> None:
    links = {p.name: os.readlink(p) for p in (REPO / "src/moejit").iterdir() if p.is_symlink()}
    assert links == {name: f"../../{name}" for name in FOLDERS}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and, built from that sdist, the wheel."""
    pytest.importorskip("build", reason="comes with the extra `test`")
    tree = tmp_path_factory.mktemp("tree")
    for name in SHIPPED:
        if (REPO / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(REPO / name, tree / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(REPO / name, tree / name)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=tree)
    return out


def wheel_of(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


def test_wheel_holds_each_file_under_one_name(built: Path) -> None:
    with zipfile.ZipFile(wheel_of(built)) as wheel:
        names = set(wheel.namelist())
    assert {n.split("/")[0] for n in names} == {"moejit", f"moejit-{moejit.__version__}.dist-info"}
    ours = {n for n in names if n.startswith("moejit/")}
    assert ours == package_files()


def test_sdist_holds_real_files(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        members = {m.name.partition("/")[2]: m for m in tar.getmembers()}
    assert all(f"src/{name}" in members for name in package_files())
    assert not [name for name, member in members.items() if member.issym()]


@pytest.fixture(scope="module")
def fresh_python(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with our wheel in it.

    It sees the packages that we depend on, through the running interpreter's folders, and no
    editable install: a folder named in a .pth file does not get its own .pth files read.
    """
    root = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", root, cwd=root)
    python = root / "bin/python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", where, cwd=root).strip())
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(ours)) + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", wheel_of(built), cwd=root)
    return python


def test_installed_wheel_runs(fresh_python: Path, tmp_path: Path) -> None:
    version = f"moejit {moejit.__version__}"
    assert run(fresh_python, "-m", "moejit", "--version", cwd=tmp_path).strip() == version
    assert run(fresh_python.parent / "moejit", "--version", cwd=tmp_path).strip() == version


def test_installed_wheel_is_the_one_imported_and_finds_its_templates(
    fresh_python: Path, tmp_path: Path
) -> None:
    code = (
        "import importlib.resources as r, moejit, sys;"
        "print(moejit.__file__.startswith(sys.prefix));"
        "count = lambda d: sum(map(count, d.iterdir())) if d.is_dir() else d.name.endswith('.j2');"
        "print(count(r.files('moejit.templates')))"
    )
    inside, count = run(fresh_python, "-c", code, cwd=tmp_path).split()
    assert inside == "True"
    assert int(count) == len(list((REPO / "templates").rglob("*.j2")))


def test_installed_wheel_leaks_no_other_name(fresh_python: Path, tmp_path: Path) -> None:
    code = (
        "import sysconfig, pathlib;"
        "site = pathlib.Path(sysconfig.get_path('purelib'));"
        "print(*sorted(p.name for p in site.iterdir()))"
    )
    names = run(fresh_python, "-c", code, cwd=tmp_path).split()
    assert [n for n in names if not n.startswith("moejit")] == ["dependencies.pth"]


def test_tests_pass_against_the_installed_wheel(fresh_python: Path, tmp_path: Path) -> None:
    """A part of the suite, from another folder, with no source folder on the path."""
    tests = [REPO / "tests/unit" / name for name in ("test_codegen_problem.py", "test_layouts.py")]
    options = ("-q", "-p", "no:cacheprovider", "-c", REPO / "pyproject.toml")
    done = run(fresh_python, "-m", "pytest", *options, *tests, cwd=tmp_path)
    assert " passed" in done
