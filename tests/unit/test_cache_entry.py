"""Manifests and the folders that they vouch for."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from concurrency.worker import FILES, fill, make_key

from moejit.cache import (
    BuildInfo,
    DamagedEntry,
    Entry,
    FileRecord,
    InvalidBuild,
    Manifest,
    Store,
    read_entry,
    verify,
)

RECORD = FileRecord(size=3, sha256=hashlib.sha256(b"abc").hexdigest())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store([tmp_path / "root"], tmp_path / "locks")


@pytest.fixture
def entry(store: Store) -> Entry:
    return store.get_or_build(make_key(), fill)


def with_checksum(tree: dict[str, Any]) -> str:
    """The text of an attacker who knows how the checksum is made."""
    tree = {name: value for name, value in tree.items() if name != "checksum"}
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return json.dumps({**tree, "checksum": hashlib.sha256(text.encode()).hexdigest()})


def manifest_tree(**changes: Any) -> dict[str, Any]:
    text = Manifest(key=make_key(), files={"kernel.so": RECORD}).to_json()
    return {**json.loads(text), **changes}


def test_manifest_comes_back_from_its_text() -> None:
    manifest = Manifest(
        key=make_key(),
        files={"kernel.so": RECORD, "parts/gemm1.py": RECORD},
        created={"at": "2026-01-01T00:00:00Z", "build_seconds": 3.25},
        report={"gemm1": {"registers": 168, "note": "é"}},
        signature="moe_layer(out: Tensor)",
        min_driver="570.00",
    )
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert json.loads(manifest.to_json())["key"]["arch"] == "sm_100a"  # in clear text, for people


@pytest.mark.parametrize(
    "name",
    [
        "../kernel.so",
        "parts/../../kernel.so",
        "..",
        ".",
        "/etc/passwd",
        "//kernel.so",
        "parts//kernel.so",
        "parts/",
        "./kernel.so",
        "",
        "parts\\kernel.so",
        "kernel.so\0",
        "kernel\n.so",
        "manifest.json",
        "last_used",
    ],
)
def test_manifest_that_points_elsewhere_is_refused(name: str) -> None:
    good = with_checksum(manifest_tree())
    Manifest.from_json(good)
    files = {"kernel.so": manifest_tree()["files"]["kernel.so"]}
    bad = with_checksum(manifest_tree(files={**files, name: files["kernel.so"]}))
    with pytest.raises(ValueError, match="it lists"):
        Manifest.from_json(bad)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"schema": 2}, "schema", id="foreign_schema"),
        pytest.param({"schema": None}, "schema", id="no_schema"),
        pytest.param({"digest": "0" * 64}, "digest", id="digest_of_another_key"),
        pytest.param({"files": {}}, "no file", id="no_files"),
        pytest.param({"files": []}, "not an object", id="files_list"),
        pytest.param({"files": {"a": {"size": -1, "sha256": "0" * 64}}}, "size", id="negative"),
        pytest.param({"files": {"a": {"size": True, "sha256": "0" * 64}}}, "size", id="bool_size"),
        pytest.param({"files": {"a": {"size": 1, "sha256": "0" * 63}}}, "sha256", id="short_sha"),
        pytest.param({"files": {"a": {"size": 1, "sha256": "Z" * 64}}}, "sha256", id="not_hex"),
        pytest.param({"files": {"a": {"size": 1}}}, "record", id="no_sha"),
        pytest.param({"key": {}}, "fields", id="no_key"),
        pytest.param({"key": None}, "fields", id="null_key"),
        pytest.param({"report": 3}, "not an object", id="report_number"),
        pytest.param({"signature": None}, "texts", id="no_signature"),
        pytest.param({"surprise": 1}, "fields", id="unknown_field"),
    ],
)
def test_manifest_with_a_wrong_field_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Manifest.from_json(with_checksum(manifest_tree(**change)))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "[" * 200_000, "\udcff", "{}"])
def test_text_that_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Manifest.from_json(text.encode("utf-8", "surrogateescape"))


def test_manifest_notices_an_edit_of_any_field() -> None:
    tree = manifest_tree(min_driver="570")
    with pytest.raises(ValueError, match="checksum"):
        Manifest.from_json(json.dumps(tree))


@pytest.mark.parametrize("report", [{"x": math.nan}, {"x": {1, 2}}, {"x": b""}])
def test_report_that_is_not_json_is_the_builders_fault(store: Store, report: Any) -> None:
    def build(folder: Path) -> BuildInfo:
        fill(folder)
        return BuildInfo(report=report)

    with pytest.raises(InvalidBuild, match="report"):
        store.get_or_build(make_key(), build)
    assert store.list() == []
    assert not list((store.root / "staging").iterdir())


def test_entry_tells_what_its_builder_said(store: Store, entry: Entry) -> None:
    assert entry.manifest.report == {"moejit_gemm1": {"registers": 168, "spills": 0}}
    assert entry.manifest.signature == "moe_layer()"
    assert entry.manifest.created["pid"] == os.getpid()
    assert entry.manifest.created["build_seconds"] >= 0
    assert set(entry.manifest.files) == set(FILES)
    assert entry.size_bytes == sum(map(len, FILES.values()))
    assert entry.path.name == f"moe_h7168_i2048_k8-{make_key().digest()}"
    assert entry.path.parent.name == make_key().digest()[:2]
    assert entry.digest == make_key().digest()


def test_entry_gives_out_listed_files_only(entry: Entry) -> None:
    (entry.path / "stray.so").write_bytes(b"not ours")
    assert entry.read("parts/gemm1.py") == FILES["parts/gemm1.py"]
    assert entry.file("kernel.so") == entry.path / "kernel.so"
    for name in ("stray.so", "../x", "manifest.json"):
        with pytest.raises(DamagedEntry, match="no file"):
            entry.file(name)
        with pytest.raises(DamagedEntry, match="no file"):
            entry.read(name)


def test_read_compares_the_bytes_it_returns(entry: Entry) -> None:
    (entry.path / "kernel.so").write_bytes(FILES["kernel.so"][:-1] + b"\0")
    with pytest.raises(DamagedEntry, match=r"kernel\.so"):
        entry.read("kernel.so")


def test_verify_lists_every_problem(entry: Entry) -> None:
    assert verify(entry) == []
    (entry.path / "kernel.so").write_bytes(b"\0" * len(FILES["kernel.so"]))
    (entry.path / "kernel.ptx").unlink()
    problems = verify(entry)
    assert len(problems) == 2
    assert any("kernel.so" in p and "sha256" in p for p in problems)
    assert any("kernel.ptx" in p and "cannot be read" in p for p in problems)


def test_verify_notices_another_keys_manifest(store: Store, entry: Entry) -> None:
    other = store.get_or_build(make_key(arch="sm_90a"), fill)
    (entry.path / "manifest.json").write_bytes((other.path / "manifest.json").read_bytes())
    assert verify(entry) == ["its manifest is now that of another key"]


def test_entry_under_another_name_is_refused(entry: Entry) -> None:
    read_entry(entry.path)
    moved = entry.path.with_name(f"renamed-{entry.digest}")
    entry.path.rename(moved)
    with pytest.raises(DamagedEntry, match="its manifest is that of moe_h7168_i2048_k8"):
        read_entry(moved)


def test_entry_of_another_key_is_refused(entry: Entry) -> None:
    assert read_entry(entry.path, make_key()) == entry
    with pytest.raises(DamagedEntry, match="that of another key"):
        read_entry(entry.path, make_key(arch="sm_90a"))


def link_out(folder: Path) -> None:
    (folder / "kernel.so").symlink_to("/etc/hostname")


def link_folder(folder: Path) -> None:
    (folder / "parts").symlink_to("/etc")


def fifo(folder: Path) -> None:
    os.mkfifo(folder / "kernel.so")


def own_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")


def own_last_used(folder: Path) -> None:
    (folder / "last_used").symlink_to("/etc/hostname")


def nothing(folder: Path) -> None:
    pass


def newline(folder: Path) -> None:
    (folder / "a\nb").touch()


@pytest.mark.parametrize(
    "build", [link_out, link_folder, fifo, own_manifest, own_last_used, nothing, newline]
)
def test_build_that_cannot_become_an_entry_is_refused(store: Store, build: Any) -> None:
    with pytest.raises(InvalidBuild) as caught:
        store.get_or_build(make_key(), build)
    assert caught.value.name == "moe_h7168_i2048_k8"
    assert store.find(make_key()) is None
    assert not list((store.root / "staging").iterdir())


def test_byte_code_left_by_the_build_is_not_published(store: Store) -> None:
    def build(folder: Path) -> None:
        fill(folder)
        for cached in (folder / "__pycache__", folder / "parts" / "__pycache__"):
            cached.mkdir()
            (cached / "kernel.cpython-311.pyc").write_bytes(b"code")

    entry = store.get_or_build(make_key(), build)
    assert set(entry.manifest.files) == set(FILES)
    assert not list(entry.path.rglob("__pycache__"))
