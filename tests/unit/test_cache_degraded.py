"""Full disks, folders that cannot be written, missing homes, locks that are late or missing."""

from __future__ import annotations

import errno
import json
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cache_help import no_build, warnings_of
from concurrency.worker import FILES, fill, make_key

from moejit.cache import (
    BuildInfo,
    CacheUnusable,
    Entry,
    Store,
    default_lock_dir,
    default_root,
    paths,
    staging,
    verify,
)
from moejit.cache.lock import LockState, holder_of, key_lock


@pytest.fixture(autouse=True)
def nothing_warned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "_warned", {})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store([tmp_path / "root"], tmp_path / "locks")


class FullDisk:
    """Makes the nth writing system call under a folder fail, and those after it if asked."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch, code: int, stays_full: bool) -> None:
        self.root, self.code, self.stays_full = str(root), code, stays_full
        self.calls, self.fail_at = 0, -1
        for name in ("mkdir", "rename", "fsync", "open", "utime"):
            patch.setattr(os, name, self.wrap(name, getattr(os, name)))
        patch.setattr(staging, "_write_file", self.wrap("write", staging._write_file))

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(target: Any, *args: Any, **kwargs: Any) -> Any:
            flags = args[0] if args else kwargs.get("flags", 0)
            reads = name == "open" and not flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)
            path = os.readlink(f"/proc/self/fd/{target}") if name == "fsync" else str(target)
            if path.startswith(self.root) and not reads:
                self.step()
            return real(target, *args, **kwargs)

        return wrapped

    def step(self) -> None:
        self.calls += 1
        if self.calls == self.fail_at or (self.stays_full and 0 < self.fail_at < self.calls):
            raise OSError(self.code, os.strerror(self.code))

    def fill(self, folder: Path) -> BuildInfo:
        if str(folder).startswith(self.root):
            self.step()
        return fill(folder)


@pytest.mark.parametrize("stays_full", [True, False], ids=["stays_full", "once"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS], ids=["full", "read_only"])
def test_a_disk_that_fails_at_any_step_costs_a_warning_and_no_kernel(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
    stays_full: bool,
) -> None:
    steps, private = 0, 0
    for fail_at in range(1, 100):
        root = tmp_path / f"root{fail_at}"
        store = Store([root], tmp_path / "locks")
        caplog.clear()
        with monkeypatch.context() as patch:
            disk = FullDisk(root, patch, code, stays_full)
            disk.fail_at = fail_at
            entry = store.get_or_build(make_key(), disk.fill)
        assert verify(entry) == []
        assert entry.read("kernel.so") == FILES["kernel.so"]
        assert store.get_or_build(make_key(), no_build).read("kernel.so") == FILES["kernel.so"]
        assert len(warnings_of(caplog)) == entry.private
        for path in root.glob("entries/*/*"):  # whatever was published is whole
            assert store.find(make_key()) is not None, path
        if (root / "staging").exists():
            assert not list((root / "staging").iterdir())
        if disk.calls < fail_at:
            break
        steps, private = steps + 1, private + entry.private
    # root, staging and its folder; the build; last_used; a flush a file, the manifest, two
    # folders; entries and shard; the rename; and the flush after it, which may fail for free.
    assert steps >= 10 + len(FILES)
    if stays_full:  # one failure alone may be in an mkdir of a folder that is there already
        assert private >= steps - 2


def test_a_full_disk_is_recognised_behind_the_compilers_own_error(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    folders = []

    def build(folder: Path) -> BuildInfo:
        folders.append(folder)
        if len(folders) == 1:
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as exc:
                raise RuntimeError("cannot write kernel.ptx") from exc
        return fill(folder)

    entry = store.get_or_build(make_key(), build)
    assert entry.private
    assert not folders[1].is_relative_to(store.root)
    assert not folders[0].exists()
    (warning,) = warnings_of(caplog)
    assert "cannot write kernel.ptx" in warning


def test_another_error_of_the_operating_system_belongs_to_the_build(store: Store) -> None:
    def build(folder: Path) -> BuildInfo:
        raise FileNotFoundError(errno.ENOENT, "no linker")

    with pytest.raises(FileNotFoundError, match="no linker"):
        store.get_or_build(make_key(), build)


@pytest.mark.parametrize("name", ["root", "root/entries", "root/staging"])
def test_a_file_where_a_folder_should_be_costs_one_warning_in_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    store = Store([tmp_path / "root"], tmp_path / "locks")
    for arch in ("sm_90a", "sm_100a"):
        entry = store.get_or_build(make_key(arch=arch), fill)
        assert entry.private
        assert store.find(make_key(arch=arch)) == entry
        assert store.get_or_build(make_key(arch=arch), no_build) == entry
    (warning,) = warnings_of(caplog)
    assert str(tmp_path / "root") in warning
    assert list(store.list()) == []
    assert list(store.verify()) == []
    assert store.clear() == 0


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "root"
    root.mkdir(mode=0o500)
    assert Store([root], tmp_path / "locks").get_or_build(make_key(), fill).private
    assert len(warnings_of(caplog)) == 1


def test_a_full_root_is_not_tried_for_the_next_kernel(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a process with a full disk would compile everything twice."""
    builds = []

    def build(folder: Path) -> BuildInfo:
        builds.append(folder)
        if folder.is_relative_to(store.root):
            raise OSError(errno.ENOSPC, "full")
        return fill(folder)

    store.get_or_build(make_key(), build)
    store.get_or_build(make_key(arch="sm_90a"), build)
    assert [folder.is_relative_to(store.root) for folder in builds] == [True, False, False]


def test_a_full_root_still_serves_what_it_has(store: Store) -> None:
    shipped = store.get_or_build(make_key(), fill)
    store._write_problem = "full"
    assert store.get_or_build(make_key(), no_build) == shipped


def test_a_private_entry_that_went_bad_is_built_again(tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(b"")
    store = Store([tmp_path / "root"], tmp_path / "locks")
    entry = store.get_or_build(make_key(), fill)
    (entry.path / "kernel.so").write_bytes(b"")
    assert store.find(make_key()) is None
    again = store.get_or_build(make_key(), fill)
    assert again.path != entry.path
    assert store.find(make_key()) == again


def test_no_place_at_all_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "root").write_bytes(b"")
    store = Store([tmp_path / "root"], tmp_path / "locks")

    def full(*args: object, **kwargs: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(CacheUnusable) as caught:
        store.get_or_build(make_key(), fill)
    text = str(caught.value)
    assert str(tmp_path / "root") in text
    assert "No space left on device" in text
    assert "TMPDIR" in text
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


def test_a_temporary_folder_that_fills_up_is_the_same_error(tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(b"")

    def full(folder: Path) -> BuildInfo:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CacheUnusable):
        Store([tmp_path / "root"], tmp_path / "locks").get_or_build(make_key(), full)


def test_a_private_build_that_fails_raises_its_own_error(tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(b"")
    store = Store([tmp_path / "root"], tmp_path / "locks")
    folders = []

    def fails(folder: Path) -> BuildInfo:
        folders.append(folder)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.get_or_build(make_key(), fails)
    assert not folders[0].exists()


def test_a_damaged_entry_that_cannot_be_moved_costs_a_private_build(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entry = store.get_or_build(make_key(), fill)
    os.truncate(entry.path / "kernel.so", 10)

    def stuck(root: Path, path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(staging, "move_aside", stuck)
    again = store.get_or_build(make_key(), fill)
    assert again.private
    assert verify(again) == []
    assert len(warnings_of(caplog)) == 2  # the damage, and that the root cannot be written


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"XDG_CACHE_HOME": "/xdg", "HOME": "/home/u"}, "/xdg/moejit"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/moejit"),
        ({"HOME": "/home/u"}, "/home/u/.cache/moejit"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/u"}, "/home/u/.cache/moejit"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home/u"}, "/home/u/.cache/moejit"),
    ],
)
def test_default_root_follows_xdg(
    env: dict[str, str], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert default_root(env) == Path(expected)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("env", [{}, {"HOME": ""}, {"HOME": "relative"}])
def test_without_a_home_the_root_is_temporary_and_says_so(
    env: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    assert default_root(env) == Path(tempfile.gettempdir(), f"moejit-{os.getuid()}", "cache")
    assert default_root(env) == default_root(env)
    (warning,) = warnings_of(caplog)
    assert "MOEJIT_CACHE_DIR" in warning


def test_default_lock_dir_is_the_runtime_folder_if_there_is_one(tmp_path: Path) -> None:
    fallback = Path(tempfile.gettempdir(), f"moejit-{os.getuid()}")
    assert default_lock_dir({"XDG_RUNTIME_DIR": str(tmp_path)}) == tmp_path / "moejit"
    assert default_lock_dir({"XDG_RUNTIME_DIR": str(tmp_path / "absent")}) == fallback
    assert default_lock_dir({"XDG_RUNTIME_DIR": "relative"}) == fallback
    assert default_lock_dir({}) == fallback


def test_a_late_lock_costs_a_second_build_and_names_the_holder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store([tmp_path / "root"], tmp_path / "locks", lock_timeout_s=0.1)
    seconds = []
    inner: list[Entry] = []

    def build(folder: Path) -> BuildInfo:  # holds the lock, while another handle asks for it
        start = time.monotonic()
        inner.append(store.get_or_build(make_key(), fill))
        seconds.append(time.monotonic() - start)
        return fill(folder)

    entry = store.get_or_build(make_key(), build)
    assert 0.1 <= seconds[0] < 5
    assert inner[0] == entry  # published by the second builder; the first one kept the winner
    assert not entry.private
    (warning,) = warnings_of(caplog)
    assert f"pid {os.getpid()} on {paths.host_name()}" in warning
    assert not list((store.root / "staging").iterdir())


def test_a_late_lock_leaves_a_damaged_entry_to_its_holder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store([tmp_path / "root"], tmp_path / "locks", lock_timeout_s=0.05)
    damaged = store.get_or_build(make_key(), fill)
    os.truncate(damaged.path / "kernel.so", 10)
    inner: list[Entry] = []

    def build(folder: Path) -> BuildInfo:
        inner.append(store.get_or_build(make_key(), fill))
        return fill(folder)

    entry = store.get_or_build(make_key(), build)
    assert inner[0].private
    assert verify(inner[0]) == []
    assert not entry.private
    assert entry.path == damaged.path
    assert len(list((store.root / "quarantine").iterdir())) == 1


@pytest.mark.parametrize("kind", ["file", "foreign", "link_to_nowhere"])
def test_without_a_lock_folder_builds_go_on_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    locks = tmp_path / "locks"
    if kind == "file":
        locks.write_bytes(b"")
    elif kind == "link_to_nowhere":
        locks.symlink_to(tmp_path / "nowhere")
    else:
        monkeypatch.setattr("moejit.cache.lock.owner_problem", lambda path: f"{path} is foreign")
    store = Store([tmp_path / "root"], locks)
    for arch in ("sm_90a", "sm_100a"):
        assert not store.get_or_build(make_key(arch=arch), fill).private
    (warning,) = warnings_of(caplog)
    assert str(locks) in warning
    os.truncate(store.entry_path(make_key()) / "kernel.so", 10)
    assert not store.get_or_build(make_key(), fill).private  # repaired, though without a lock


def test_lock_excludes_another_handle_and_is_free_afterwards(tmp_path: Path) -> None:
    with key_lock(tmp_path, "a", 5) as first, key_lock(tmp_path, "a", 0) as second:
        assert (first, second) == (LockState.HELD, LockState.TIMED_OUT)
        with key_lock(tmp_path, "b", 0) as other:
            assert other is LockState.HELD
    with key_lock(tmp_path, "a", 0) as again:
        assert again is LockState.HELD
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.lock", "b.lock"]


def test_lock_is_released_when_the_block_raises(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), key_lock(tmp_path, "a", 5):
        raise ZeroDivisionError
    with pytest.raises(OSError, match="mine"), key_lock(tmp_path, "a", 0) as state:
        assert state is LockState.HELD
        raise OSError("mine")  # not mistaken for a failure of the lock


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"pid": "x", "host": 1, "since": 0}', "[" * 9999]
)
def test_a_holder_that_left_nonsense_is_unknown(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.holder").write_text(text)
    assert holder_of(tmp_path / "a.lock") == "an unknown process"


def test_holder_is_named_with_pid_host_and_time(tmp_path: Path) -> None:
    holder = {"pid": 4711, "host": "node7", "since": time.time() - 90}
    (tmp_path / "a.holder").write_text(json.dumps(holder))
    assert holder_of(tmp_path / "a.lock") == "pid 4711 on node7 (for 90 s)"
