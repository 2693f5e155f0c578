"""The compiler is recognised by its files, without importing it."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import pytest

from moejit.cache import find_compiler, fingerprint, native_cpu, toolchain

DSO = "_cutlass_ir.cu12.cpython-311-x86_64-linux-gnu.so"
CODE = b"\x7fELF compiler"
DIGEST = f"{len(CODE)}:{hashlib.sha256(CODE).hexdigest()}"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages with a small compiler in it, and nothing else on the path."""
    site = tmp_path / "site"
    folder = site / "nvidia_cutlass_dsl" / "dsl_packages" / "cutlass" / "_mlir" / "_mlir_libs"
    folder.mkdir(parents=True)
    (folder / DSO).write_bytes(CODE)
    for name in (
        "nvidia_cutlass_dsl-4.8.1",
        "nvidia_cutlass_dsl_libs_cu12-4.8.1",
        "apache_tvm_ffi-0.1.15.post2",
        "nvidia_cublas-13.0",
    ):
        (site / f"{name}.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [str(site)])
    for name in [
        m for m in sys.modules if m.partition(".")[0] in ("cutlass", "nvidia_cutlass_dsl")
    ]:
        monkeypatch.delitem(sys.modules, name)
    return site


def dso(site: Path) -> Path:
    (path,) = site.rglob("_cutlass_ir*.so")
    return path


def test_toolchain_names_each_distribution_and_the_compiler(site: Path) -> None:
    found = toolchain()
    assert found.dsl == ("nvidia-cutlass-dsl-libs-cu12==4.8.1", "nvidia-cutlass-dsl==4.8.1")
    assert found.tvm_ffi == "0.1"
    assert found.compiler_digest == DIGEST
    assert find_compiler() == [dso(site)]
    assert "cutlass" not in sys.modules


@pytest.mark.parametrize(
    "layout",
    [
        "cutlass",  # dsl_packages itself on PYTHONPATH
        "nvidia_cutlass_dsl/python_packages/cutlass",  # where 4.2 wheels unpack to
        "nvidia_cutlass_dsl/some/new/place/cutlass",
    ],
)
def test_compiler_is_found_without_records_in_other_layouts(site: Path, layout: str) -> None:
    data = dso(site).read_bytes()
    shutil.rmtree(site / "nvidia_cutlass_dsl")
    (site / layout / "_mlir" / "_mlir_libs").mkdir(parents=True)
    (site / layout / "_mlir" / "_mlir_libs" / DSO).write_bytes(data)
    if layout == "cutlass":
        (site / layout / "__init__.py").write_text("raise AssertionError('imported')")
    assert toolchain().compiler_digest == DIGEST


def test_both_flavours_count_if_both_are_installed(site: Path) -> None:
    dso(site).with_name(DSO.replace("cu12", "cu13")).write_bytes(b"other")
    other = f"5:{hashlib.sha256(b'other').hexdigest()}"
    assert toolchain().compiler_digest == f"{DIGEST},{other}"


def test_same_version_with_another_compiler_is_told_apart(site: Path, tmp_path: Path) -> None:
    """A nightly build reinstalled over itself: one byte in the middle, all else alike."""
    before = toolchain([tmp_path / "root"])
    dso(site).write_bytes(CODE.replace(b"p", b"q"))
    os.utime(dso(site), ns=(0, 1))
    after = toolchain([tmp_path / "root"])
    assert (before.dsl, before.tvm_ffi) == (after.dsl, after.tvm_ffi)
    assert before.compiler_digest != after.compiler_digest


def test_failed_probes_have_labels_of_their_own(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path / "empty")])
    nothing = toolchain([tmp_path / "root"])
    assert all(t.startswith("unprobed:") for t in (*nothing.dsl, nothing.compiler_digest))
    assert nothing.tvm_ffi.startswith("unprobed:")
    assert not (tmp_path / "root").exists()

    monkeypatch.setattr(sys, "path", [str(site)])

    def unreadable(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(fingerprint, "_sha256", unreadable)
    closed = toolchain([tmp_path / "root"])
    assert closed.compiler_digest == f"unprobed: {DSO}: Permission denied"
    assert closed.dsl == ("nvidia-cutlass-dsl-libs-cu12==4.8.1", "nvidia-cutlass-dsl==4.8.1")


def test_compiler_is_hashed_once(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, shipped = tmp_path / "user", tmp_path / "shipped"
    assert toolchain([shipped]).compiler_digest == DIGEST

    def again(path: Path) -> str:
        raise AssertionError("hashed again")

    monkeypatch.setattr(fingerprint, "_sha256", again)
    assert toolchain([shipped]).compiler_digest == DIGEST
    assert toolchain([user, shipped]).compiler_digest == DIGEST
    assert not user.exists()
    with pytest.raises(AssertionError, match="hashed again"):
        toolchain([user])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0",
        "null",
        "[]",
        "[" * 99999,
        '{"schema": 1}',
        '{"schema": 1, "files": [3]}',
        '{"schema": 1, "files": [{"path": 1}]}',
        '{"schema": 2, "files": []}',
    ],
)
def test_a_damaged_memo_is_written_anew(site: Path, tmp_path: Path, text: str) -> None:
    memo = tmp_path / "compiler.json"
    memo.write_text(text)
    assert toolchain([tmp_path]).compiler_digest == DIGEST
    assert DIGEST.partition(":")[2] in memo.read_text()


def test_memo_does_not_grow_without_end(site: Path, tmp_path: Path) -> None:
    for mtime in range(40):
        os.utime(dso(site), ns=(0, mtime))
        toolchain([tmp_path])
    assert (tmp_path / "compiler.json").read_text().count("sha256") == fingerprint._MEMO_KEEP
    assert [p.name for p in tmp_path.iterdir() if "compiler" in p.name] == ["compiler.json"]


def test_a_memo_that_cannot_be_written_is_done_without(site: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert toolchain([tmp_path / "file"]).compiler_digest == DIGEST


def test_native_cpu_is_steady_and_follows_the_instruction_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert native_cpu() == native_cpu()
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr("builtins.open", lambda *a, real=open, **k: real(info, *a[1:], **k))
    texts = []
    for flags in (
        "flags : sse avx",
        "flags : avx sse",
        "flags : sse avx avx512f",
        "Features : asimd",
    ):
        info.write_text(f"processor : 0\n{flags}\n")
        texts.append(native_cpu())
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    info.write_text("processor : 0\n")
    assert native_cpu().startswith("unprobed:")
