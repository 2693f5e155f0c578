"""The compiler: what it leaves behind, that this is reproducible and portable, and how it fails."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from layers import TEMPLATE_OFFSET, toy_layer

from moejit.codegen import MoeProblem, render, select
from moejit.runtime import compiler
from moejit.runtime.build import build_entry, layer_key, open_store
from moejit.runtime.compiler import CompileOptions, compile_layer, find_linker, kernel_names
from moejit.runtime.errors import CompileFailed, LinkerMissing
from moejit.runtime.settings import Settings, scope

HERE = Path(__file__).parent


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def compiled(source: object, folder: Path) -> compiler.CompileReport:
    folder.mkdir()
    return compile_layer(source, source.arch, folder)  # type: ignore[attr-defined, arg-type]


def test_folder_holds_sources_ptx_and_library(tmp_path: Path) -> None:
    source = toy_layer()
    report = compiled(source, tmp_path / "out")
    assert set(digests(tmp_path / "out")) == {
        "__init__.py",
        "first.py",
        "second.py",
        "kernel.py",
        "kernel.ptx",
        "kernel.so",
    }
    assert ".target sm_90a" in (tmp_path / "out/kernel.ptx").read_text()
    names = [kernel.name for kernel in report.kernels]
    assert names == ["moejit_toy_first_0", "moejit_toy_second_1"]
    assert all(k.registers > 0 and k.stack_bytes == 0 and k.threads == 64 for k in report.kernels)
    assert not any("cutlass" in name for name in names)  # ptxas treats such names differently
    assert kernel_names(source) == ("moejit_toy_first", "moejit_toy_second")


def test_nothing_stays_in_the_process(tmp_path: Path) -> None:
    bytecode, path = sys.dont_write_bytecode, list(sys.path)
    compiled(toy_layer(), tmp_path / "out")
    assert not [name for name in sys.modules if name.startswith("moejit_layer")]
    assert (sys.dont_write_bytecode, sys.path) == (bytecode, path)


CHILD = """
import sys; from pathlib import Path
sys.path[:0] = {path!r}
from layers import toy_layer
from moejit.runtime.compiler import compile_layer
out = Path(sys.argv[1]); out.mkdir(parents=True)
{first}
compile_layer(toy_layer(), "sm_90a", out)
"""


def test_bytes_are_the_same_in_another_process_and_folder(tmp_path: Path) -> None:
    """Also after another compile, with another hash seed, and from another working directory."""
    compiled(toy_layer(), tmp_path / "here")
    other = "(out / 'x').mkdir(); compile_layer(toy_layer('sm_100a'), 'sm_100a', out / 'x')"
    other += "; import shutil; shutil.rmtree(out / 'x')"
    code = CHILD.format(path=[str(HERE), str(HERE.parents[1] / "src")], first=other)
    (tmp_path / "cwd").mkdir()
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "deeper/there")],
        cwd=tmp_path / "cwd",
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
    )
    assert digests(tmp_path / "here") == digests(tmp_path / "deeper/there")


def test_library_knows_nothing_of_the_build_machine(tmp_path: Path) -> None:
    compiled(toy_layer(), tmp_path / "out")
    library = (tmp_path / "out/kernel.so").read_bytes()
    for trace in (str(tmp_path), "site-packages", "first.py", "libc.so", "GLIBC_"):
        assert trace.encode() not in library, trace


@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
def test_library_uses_nothing_of_the_c_library(tmp_path: Path) -> None:
    """Why the C library is no part of the cache key."""
    compiled(toy_layer(), tmp_path / "out")
    command = ["nm", "-D", "--undefined-only", str(tmp_path / "out/kernel.so")]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in listed.splitlines()]
    known = ("TVMFFI", "CuteDSLRT", "_cu", "cuda_dialect")
    assert names and [name for name in names if not name.startswith(known)] == []


def test_host_code_runs_on_any_cpu_of_the_machine_type(tmp_path: Path) -> None:
    """No AVX: this host code also runs on the oldest server that takes such a GPU."""
    report = compiled(toy_layer(), tmp_path / "out")
    if report.host["machine"] != "x86_64":
        pytest.skip("looks for x86 instructions")
    assert report.host["cpu"] == "x86-64-v2"
    if not shutil.which("objdump"):
        pytest.skip("no objdump")
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", tmp_path / "out/kernel.so"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "%rsp" in listing
    assert "%ymm" not in listing and "%zmm" not in listing


@pytest.mark.parametrize("arch", ["sm_100a", "sm_103a"])
def test_other_architectures_compile_here(tmp_path: Path, arch: str) -> None:
    assert compiled(toy_layer(arch), tmp_path / "out").arch == arch
    assert f".target {arch}" in (tmp_path / "out/kernel.ptx").read_text()


@pytest.mark.parametrize(
    ("edit", "line", "says"),
    [
        (("= tid\n", "= tid + nonsense\n"), 13, "nonsense"),
        (("griddepcontrol_wait()", "griddepcontrol_wait(5)"), 9, "griddepcontrol_wait"),
        (("make_layout(64)", "make_layout(64, stride=7.5)"), 11, "7.5"),
        (("import cutlass\n", "import no_such_module\n"), 1, "no_such_module"),
    ],
    ids=["undefined name", "wrong arguments", "wrong layout", "missing module"],
)
def test_error_names_the_rendered_and_the_template_line(
    tmp_path: Path, edit: tuple[str, str], line: int, says: str
) -> None:
    with pytest.raises(CompileFailed) as caught:
        compiled(toy_layer(first=edit), tmp_path / "out")
    error = caught.value
    assert (error.template, error.line) == (
        "templates/toy/first.py.j2",
        line + TEMPLATE_OFFSET,
    )
    text = str(error)
    assert f"first.py:{line}" in text and says in text and "toy for sm_90a" in text
    assert "\x1b" not in text and str(tmp_path) not in text


def test_next_compile_is_fine_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(CompileFailed):
        compiled(toy_layer(first=("= tid\n", "= nonsense\n")), tmp_path / "bad")
    compiled(toy_layer(), tmp_path / "good")
    with pytest.raises(CompileFailed):
        compiled(toy_layer("sm_100a", kernel=("Int32(0)", "object()")), tmp_path / "worse")
    compiled(toy_layer(), tmp_path / "again")
    assert digests(tmp_path / "good") == digests(tmp_path / "again")


def test_missing_linker_says_what_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LinkerMissing, match="gcc"):
        find_linker(None)
    for command in ("nonsense-cc -v", "cc 'nonsense"):  # not there; a quotation mark too few
        with pytest.raises(LinkerMissing, match=r"CC is .*nonsense.*unset it"):
            find_linker(command)


@pytest.mark.parametrize("linker", ["ld", "gcc"])
def test_each_linker_gives_a_library_with_the_function(tmp_path: Path, linker: str) -> None:
    if not shutil.which(linker):
        pytest.skip(f"no {linker}")
    with scope(linker=linker):
        compiled(toy_layer(), tmp_path / "out")
    assert b"__tvm_ffi_moe_layer" in (tmp_path / "out/kernel.so").read_bytes()


def test_failing_linker_shows_its_text(tmp_path: Path) -> None:
    with scope(linker="ld --no-such-option"), pytest.raises(CompileFailed, match="no-such-option"):
        compiled(toy_layer(), tmp_path / "out")


def test_disk_that_fills_up_at_the_library_is_not_a_linker_error(
    private_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer is built once more in a temporary folder, and the call goes on."""
    copy = shutil.copyfile

    def full(source: Path, target: Path) -> object:
        if target.is_relative_to(private_settings.cache_dir):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return copy(source, target)

    monkeypatch.setattr("moejit.runtime.compiler.shutil.copyfile", full)
    source, store = toy_layer(), open_store(private_settings)
    entry = build_entry(store, layer_key(source), source)
    assert entry.private and b"__tvm_ffi_moe_layer" in entry.read("kernel.so")
    assert "No space left" in store.write_problem


def test_dsl_variables_that_would_change_the_code_are_refused(tmp_path: Path) -> None:
    with (
        scope(dsl_overrides=("CUTE_DSL_LINEINFO=1",)),
        pytest.raises(CompileFailed, match="CUTE_DSL_LINEINFO=1"),
    ):
        compiled(toy_layer(), tmp_path / "out")


def test_missing_compiler_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CompileFailed, match="pip install 'nvidia-cutlass-dsl"):
        compiled(toy_layer(), tmp_path / "out")


def test_key_follows_source_options_and_architecture() -> None:
    source = toy_layer()
    key = layer_key(source)
    assert layer_key(toy_layer()) == key
    others = [
        layer_key(toy_layer(first=("= tid\n", "= tid + 1\n"))),
        layer_key(toy_layer("sm_100a")),
        layer_key(source, CompileOptions(opt_level=2)),
        layer_key(source, CompileOptions(line_info=True)),
        layer_key(replace(source, symbol_prefix="moejit_toy_f")),
    ]
    assert len({k.digest() for k in (key, *others)}) == 6


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a", "sm_103a"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "deterministic"])
def test_real_layer_compiles_without_spills(tmp_path: Path, arch: str, deterministic: bool) -> None:
    problem = MoeProblem(
        arch=arch,
        hidden=256,
        intermediate=128,
        top_k=2,
        num_experts=8,
        num_local_experts=8,
        tokens=16,
        deterministic=deterministic,
    )
    report = compiled(render(problem, select(problem)), tmp_path / "out")
    assert len(report.kernels) == 4
    spilled = {k.name: k.stack_bytes for k in report.kernels if k.stack_bytes}
    assert spilled == {}
