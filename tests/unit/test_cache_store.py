"""Finding, building, damage, layers of roots and housekeeping of the store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cache_help import no_build, warnings_of
from concurrency.worker import FILES, fill, make_key

from moejit.cache import BuildInfo, DamagedEntry, Entry, Store, paths, verify
from moejit.cache.staging import QUARANTINE_KEEP


@pytest.fixture(autouse=True)
def nothing_warned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "_warned", {})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store([tmp_path / "root"], tmp_path / "locks")


def test_a_store_without_roots_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least one root"):
        Store([])


def test_find_on_an_empty_root_creates_nothing(store: Store) -> None:
    assert store.find(make_key()) is None
    assert not store.root.exists()
    assert not store.lock_dir.exists()


def test_what_was_built_is_found_by_another_store(store: Store, tmp_path: Path) -> None:
    built = store.get_or_build(make_key(), fill)
    again = Store([store.root], tmp_path / "other-locks")
    assert again.find(make_key()) == built
    assert again.get_or_build(make_key(), no_build) == built
    assert not built.private
    assert store.find(make_key(arch="sm_90a")) is None


def test_a_moved_root_still_hits(store: Store, tmp_path: Path) -> None:
    built = store.get_or_build(make_key(), fill)
    store.root.rename(tmp_path / "elsewhere")
    moved = Store([tmp_path / "elsewhere"], tmp_path / "locks").find(make_key())
    assert moved is not None
    assert moved.manifest == built.manifest


def test_finding_takes_no_lock_and_imports_no_lock_library(store: Store) -> None:
    store.get_or_build(make_key(), fill)
    shutil.rmtree(store.lock_dir)
    code = (
        f"import sys; sys.path.append({str(Path(__file__).parents[1])!r})\n"
        "from pathlib import Path\n"
        "from concurrency.worker import make_key\n"
        "from moejit.cache import Store\n"
        f"store = Store([Path({str(store.root)!r})], Path({str(store.lock_dir)!r}))\n"
        "assert store.find(make_key())\n"
        "heavy = {'filelock', 'torch', 'cutlass', 'tvm_ffi', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not store.lock_dir.exists()


def test_folders_of_the_cache_are_closed_to_others(store: Store) -> None:
    entry = store.get_or_build(make_key(), fill)
    folders = [store.root, entry.path.parents[1], entry.path.parent, entry.path, store.lock_dir]
    assert {oct(folder.stat().st_mode & 0o777) for folder in folders} == {"0o700"}


def test_a_failed_build_raises_its_own_error_and_leaves_nothing(store: Store) -> None:
    def fails(folder: Path) -> None:
        (folder / "kernel.so").write_bytes(b"half")
        raise ZeroDivisionError("in the compiler")

    with pytest.raises(ZeroDivisionError, match="in the compiler"):
        store.get_or_build(make_key(), fails)
    assert store.find(make_key()) is None
    assert not list((store.root / "staging").iterdir())
    assert store.get_or_build(make_key(), fill) == store.find(make_key())


def test_an_interrupted_build_leaves_nothing(store: Store) -> None:
    def interrupted(folder: Path) -> None:
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get_or_build(make_key(), interrupted)
    assert not list((store.root / "staging").iterdir())
    assert not store.get_or_build(make_key(), fill).private  # the lock is free


def truncate(entry: Entry) -> None:
    os.truncate(entry.path / "kernel.so", 1000)


def empty(entry: Entry) -> None:
    os.truncate(entry.path / "kernel.so", 0)


def longer(entry: Entry) -> None:
    with open(entry.path / "kernel.so", "ab") as file:
        file.write(b"\0")


def huge(entry: Entry) -> None:
    os.truncate(entry.path / "kernel.so", 1 << 40)  # sparse: hashing it would take an hour


def remove_file(entry: Entry) -> None:
    (entry.path / "kernel.ptx").unlink()


def remove_manifest(entry: Entry) -> None:
    (entry.path / "manifest.json").unlink()


def empty_manifest(entry: Entry) -> None:
    os.truncate(entry.path / "manifest.json", 0)


def not_json(entry: Entry) -> None:
    (entry.path / "manifest.json").write_text("schema: 1\n")


def deep_json(entry: Entry) -> None:
    (entry.path / "manifest.json").write_text("[" * 500_000)


def huge_manifest(entry: Entry) -> None:
    os.truncate(entry.path / "manifest.json", 1 << 40)  # sparse: reading it would take all memory


def foreign_schema(entry: Entry) -> None:
    tree = json.loads((entry.path / "manifest.json").read_text())
    (entry.path / "manifest.json").write_text(json.dumps({**tree, "schema": 999}))


def same_size_other_file(entry: Entry) -> None:
    (entry.path / "kernel.so").write_bytes(bytes(len(FILES["kernel.so"])))


def linked_file(entry: Entry) -> None:
    """The content is right, but it lies where anyone may change it."""
    (entry.path / "kernel.so").rename(entry.path.parents[3] / "outside.so")
    (entry.path / "kernel.so").symlink_to(entry.path.parents[3] / "outside.so")


def linked_folder(entry: Entry) -> None:
    (entry.path / "parts").rename(entry.path.parents[3] / "outside")
    (entry.path / "parts").symlink_to(entry.path.parents[3] / "outside")


def linked_manifest(entry: Entry) -> None:
    (entry.path / "manifest.json").rename(entry.path.parents[3] / "outside.json")
    (entry.path / "manifest.json").symlink_to(entry.path.parents[3] / "outside.json")


def linked_entry(entry: Entry) -> None:
    entry.path.rename(entry.path.parents[3] / "outside")
    entry.path.symlink_to(entry.path.parents[3] / "outside")


def fifo(entry: Entry) -> None:
    """Opening it without care blocks for ever."""
    (entry.path / "kernel.so").unlink()
    os.mkfifo(entry.path / "kernel.so")


def folder_for_file(entry: Entry) -> None:
    (entry.path / "kernel.so").unlink()
    (entry.path / "kernel.so").mkdir()


def file_for_entry(entry: Entry) -> None:
    shutil.rmtree(entry.path)
    entry.path.write_bytes(b"")


def empty_entry(entry: Entry) -> None:
    shutil.rmtree(entry.path)
    entry.path.mkdir()


def swapped_manifest(entry: Entry) -> None:
    store = Store([entry.path.parents[2]], entry.path.parents[3] / "locks")
    other = store.get_or_build(make_key(arch="sm_90a"), fill)
    (entry.path / "manifest.json").write_bytes((other.path / "manifest.json").read_bytes())


def flip(name: str) -> Callable[[Entry], None]:
    def flipped(entry: Entry) -> None:
        data = bytearray((entry.path / name).read_bytes())
        data[len(data) // 2] ^= 0x01
        (entry.path / name).write_bytes(data)

    flipped.__name__ = f"flip_{name}"
    return flipped


DAMAGES = [
    *[flip(name) for name in [*(n for n, data in FILES.items() if data), "manifest.json"]],
    truncate,
    empty,
    longer,
    huge,
    remove_file,
    remove_manifest,
    empty_manifest,
    not_json,
    deep_json,
    huge_manifest,
    foreign_schema,
    same_size_other_file,
    swapped_manifest,
    linked_file,
    linked_folder,
    linked_manifest,
    linked_entry,
    fifo,
    folder_for_file,
    file_for_entry,
    empty_entry,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_damage_is_a_miss_with_one_warning_and_is_rebuilt(
    store: Store, damage: Callable[[Entry], None], caplog: pytest.LogCaptureFixture
) -> None:
    entry = store.get_or_build(make_key(), fill)
    assert store.find(make_key()) is not None
    damage(entry)

    assert store.find(make_key()) is None
    assert store.find(make_key()) is None
    (warning,) = warnings_of(caplog)
    assert str(entry.path) in warning

    rebuilt = store.get_or_build(make_key(), fill)
    assert len(warnings_of(caplog)) == 1
    assert rebuilt.path == entry.path
    assert not rebuilt.private
    assert verify(rebuilt) == []
    assert store.find(make_key()) == rebuilt
    # Kept for a look, except for the empty folder, which the rename just replaces.
    aside = list((store.root / "quarantine").glob("*"))
    assert len(aside) == (0 if damage is empty_entry else 1)


def test_each_byte_of_a_manifest_counts(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    entry = store.get_or_build(make_key(), fill)
    good = (entry.path / "manifest.json").read_bytes()
    survived = []
    for i in range(0, len(good), 7):
        bad = bytearray(good)
        bad[i] ^= 0x04
        (entry.path / "manifest.json").write_bytes(bad)
        if store.find(make_key()) is not None:
            survived.append(good[max(0, i - 10) : i + 10])
    assert survived == []


def test_damage_that_comes_back_is_reported_again(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        truncate(store.get_or_build(make_key(), fill))
        assert store.find(make_key()) is None
    assert len(warnings_of(caplog)) == 2


def test_an_entry_replaced_while_it_is_read_is_no_damage(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = store.get_or_build(make_key(), fill)
    copy = store.root / "copy"
    shutil.copytree(entry.path, copy)
    truncate(entry)

    def replaced_meanwhile(path: Path, *args: object, **kwargs: object) -> Entry:
        monkeypatch.undo()
        path.rename(store.root / "old")
        copy.rename(path)
        raise DamagedEntry(path, "half old, half new")

    monkeypatch.setattr("moejit.cache.store.read_entry", replaced_meanwhile)
    assert store.find(make_key()) == entry
    assert (store.root / "old").exists()
    assert warnings_of(caplog) == []


def test_an_entry_moved_away_while_it_is_read_is_a_plain_miss(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.get_or_build(make_key(), fill)

    def moved_meanwhile(path: Path, *args: object, **kwargs: object) -> Entry:
        path.rename(store.root / "old")
        raise DamagedEntry(path, "gone")

    monkeypatch.setattr("moejit.cache.store.read_entry", moved_meanwhile)
    assert store.find(make_key()) is None
    assert warnings_of(caplog) == []


def test_a_foreign_entry_is_not_used(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole cache seen by another user; chown needs root, so the user changes instead."""
    store.get_or_build(make_key(), fill)
    owner, known = os.getuid(), 2
    if owner == 0:
        for folder, _, names in os.walk(store.root):
            for path in [folder, *(os.path.join(folder, name) for name in names)]:
                os.chown(path, 12345, -1)
        owner = 12345
    else:
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
        known = 3  # the lock folder is foreign then, too
    for _ in range(2):
        assert store.find(make_key()) is None
    (warning,) = warnings_of(caplog)
    assert f"belongs to uid {owner}" in warning
    assert "cp -r" in warning and "chown" in warning and "MOEJIT_CACHE_DIR" in warning

    # Said once of the root, not of each entry.
    assert list(store.list()) == []
    (verdict,) = store.verify()
    assert verdict.path == store.root and "chown" in verdict.problems[0]
    assert len(warnings_of(caplog)) == 1

    entry = store.get_or_build(make_key(), fill)  # not into somebody else's folder
    assert entry.private
    assert len(warnings_of(caplog)) == known

    trusting = Store([store.root], store.lock_dir, trusted_uids=[owner])
    found = trusting.find(make_key())
    assert found is not None
    assert not found.private
    assert found.read("kernel.so") == FILES["kernel.so"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", [".", "..", "../..", "../../..", "kernel.so", "manifest.json"])
def test_an_entry_with_a_foreign_part_is_not_used(
    store: Store, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    entry = store.get_or_build(make_key(), fill)
    os.chown(entry.path / name, 12345, -1)
    assert store.find(make_key()) is None
    (warning,) = warnings_of(caplog)
    assert "belongs to uid 12345" in warning


def test_read_only_roots_are_read_in_order_and_never_written(tmp_path: Path) -> None:
    shipped = Store([tmp_path / "shipped"], tmp_path / "locks")
    entry = shipped.get_or_build(make_key(), fill)
    old = time.time() - 10 * 86400
    os.utime(entry.path / "last_used", (old, old))
    before = {p: p.lstat() for p in shipped.root.rglob("*")}

    store = Store([tmp_path / "user", tmp_path / "absent", shipped.root], tmp_path / "locks")
    assert store.get_or_build(make_key(), no_build) == entry
    assert not (tmp_path / "user").exists()
    mine = store.get_or_build(make_key(arch="sm_90a"), fill)
    assert mine.path.is_relative_to(tmp_path / "user")
    assert [e.path for e in store.list()] == [mine.path, entry.path]
    assert not store.remove(make_key().digest())
    store.clear()
    after = {p: p.lstat() for p in shipped.root.rglob("*")}
    assert {p: s.st_mtime_ns for p, s in after.items()} == {
        p: s.st_mtime_ns for p, s in before.items()
    }


def test_damage_in_a_read_only_root_is_repaired_in_the_users(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shipped = Store([tmp_path / "shipped"], tmp_path / "locks").get_or_build(make_key(), fill)
    truncate(shipped)
    store = Store([tmp_path / "user", tmp_path / "shipped"], tmp_path / "locks")
    entry = store.get_or_build(make_key(), fill)
    assert entry.path.is_relative_to(tmp_path / "user")
    assert store.find(make_key()) == entry
    assert len(warnings_of(caplog)) == 1
    assert shipped.path.exists()


def test_the_users_own_entry_comes_before_a_shipped_one(tmp_path: Path) -> None:
    Store([tmp_path / "shipped"], tmp_path / "locks").get_or_build(make_key(), fill)
    mine = Store([tmp_path / "user"], tmp_path / "locks").get_or_build(make_key(), fill)
    store = Store([tmp_path / "user", tmp_path / "shipped"], tmp_path / "locks")
    assert store.find(make_key()) == mine
    truncate(mine)
    found = store.find(make_key())
    assert found is not None
    assert found.path.is_relative_to(tmp_path / "shipped")


def test_last_used_is_noted_at_most_once_a_day(store: Store) -> None:
    note = store.get_or_build(make_key(), fill).path / "last_used"
    hour_ago, days_ago = time.time() - 3600, time.time() - 2 * 86400
    os.utime(note, (hour_ago, hour_ago))
    store.find(make_key())
    assert note.stat().st_mtime == pytest.approx(hour_ago, abs=1)
    os.utime(note, (days_ago, days_ago))
    store.find(make_key())
    assert note.stat().st_mtime == pytest.approx(time.time(), abs=60)
    note.unlink()
    assert store.find(make_key()) is not None


def test_list_leaves_damaged_entries_out_and_verify_names_them(store: Store) -> None:
    good = store.get_or_build(make_key(), fill)
    flipped = store.get_or_build(make_key(arch="sm_90a"), fill)
    headless = store.get_or_build(make_key(arch="sm_103a"), fill)
    flip("kernel.ptx")(flipped)
    remove_manifest(headless)
    (store.root / "entries" / "stray").write_bytes(b"")

    assert {e.path for e in store.list()} == {good.path, flipped.path}  # files are not hashed here
    verdicts = {v.path: v for v in store.verify()}
    assert set(verdicts) == {good.path, flipped.path, headless.path}
    assert verdicts[good.path].problems == ()
    assert verdicts[good.path].entry == good
    assert "kernel.ptx" in verdicts[flipped.path].problems[0]
    assert "manifest.json" in verdicts[headless.path].problems[0]
    assert verdicts[headless.path].entry is None


def test_match_takes_the_start_of_a_digest_or_a_name(store: Store) -> None:
    a = store.get_or_build(make_key(), fill)
    b = store.get_or_build(make_key(name="moe_h4096_i1536_k8"), fill)
    assert list(store.match(a.digest[:10])) == [a]
    assert list(store.match("moe_h4096")) == [b]
    assert {e.path for e in store.match("moe_")} == {a.path, b.path}
    assert list(store.match("h4096")) == []


def test_remove_takes_one_entry(store: Store) -> None:
    a = store.get_or_build(make_key(), fill)
    b = store.get_or_build(make_key(arch="sm_90a"), fill)
    held = open(a.path / "kernel.so", "rb")
    assert store.remove(a.digest)
    assert not store.remove(a.digest)
    assert not store.remove("")
    assert store.find(make_key()) is None
    assert list(store.list()) == [b]
    with held:  # whoever has it open or mapped keeps it
        assert held.read() == FILES["kernel.so"]


def test_clear_leaves_builds_in_progress_alone(store: Store) -> None:
    store.get_or_build(make_key(), fill)
    truncate(store.get_or_build(make_key(arch="sm_90a"), fill))
    store.get_or_build(make_key(arch="sm_90a"), fill)

    def build(folder: Path) -> BuildInfo:
        assert store.clear() == 2
        return fill(folder)

    entry = store.get_or_build(make_key(arch="sm_103a"), build)
    assert list(store.list()) == [entry]
    assert not list((store.root / "quarantine").iterdir())
    assert store.clear() == 1
    assert store.clear() == 0


def test_sweep_removes_only_what_nobody_writes_to(store: Store) -> None:
    store.get_or_build(make_key(), fill)
    dead, alive = store.root / "staging" / "dead", store.root / "staging" / "alive"
    old = time.time() - 7200
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "kernel.py").write_bytes(b"")
        os.utime(folder / "kernel.py", (old, old))
        os.utime(folder, (old, old))
    (alive / "kernel.py").write_bytes(b"more")
    os.utime(alive, (old, old))
    assert store.sweep_staging() == 1
    assert [p.name for p in (store.root / "staging").iterdir()] == ["alive"]
    assert Store([store.root / "nowhere"]).sweep_staging() == 0


def test_the_next_build_sweeps_what_dead_ones_left(store: Store) -> None:
    dead = store.root / "staging" / "dead"
    dead.mkdir(parents=True)
    old = time.time() - 7200
    os.utime(dead, (old, old))
    store.get_or_build(make_key(), fill)
    assert not dead.exists()


def test_quarantine_does_not_grow_without_end(store: Store) -> None:
    for _ in range(QUARANTINE_KEEP + 3):
        truncate(store.get_or_build(make_key(), fill))
    store.get_or_build(make_key(), fill)
    assert len(list((store.root / "quarantine").iterdir())) == QUARANTINE_KEEP


def test_size_counts_every_byte_on_disk(store: Store) -> None:
    assert store.size_bytes() == 0
    entry = store.get_or_build(make_key(), fill)
    manifest = (entry.path / "manifest.json").stat().st_size
    assert store.size_bytes() == entry.size_bytes + manifest


def test_a_store_cannot_be_asked_with_in() -> None:
    """`if key in store: store.find(key)` would be a race."""
    assert not hasattr(Store, "__contains__")
