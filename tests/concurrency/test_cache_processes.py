"""The store under several real processes and threads at once."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from concurrency.worker import FILES, Job, fill, make_key, start_together

from moejit.cache import BuildInfo, Entry, Store

LIBRARY = hashlib.sha256(FILES["kernel.so"]).hexdigest()


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


def test_eight_processes_that_race_on_a_cold_key_build_it_once(tmp_path: Path, marks: Path) -> None:
    job = Job(root=str(tmp_path / "root"), folder=str(marks), build_seconds=0.4)
    results = start_together([job] * 8)
    assert len(list(marks.glob("built.*"))) == 1
    assert {r["path"] for r in results} == {str(Store([Path(job.root)]).entry_path(make_key()))}
    assert [(r["library"], r["private"], r["log"]) for r in results] == [(LIBRARY, False, "")] * 8
    assert not list(Path(job.root, "staging").iterdir())


def test_processes_without_a_common_lock_all_get_the_same_entry(
    tmp_path: Path, marks: Path
) -> None:
    """As on two nodes that share a root: each may build, one wins the rename, nobody fails."""
    jobs = []
    for i in range(3):
        (marks / str(i)).mkdir()
        jobs.append(Job(root=str(tmp_path / "root"), folder=str(marks / str(i)), build_seconds=0.5))
    processes = [job.start() for job in jobs]
    for job in jobs:
        while not list(Path(job.folder).glob("ready.*")):
            time.sleep(0.005)
    for job in jobs:
        Path(job.folder, "go").touch()
    outputs = [process.communicate(timeout=30) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert len(list(marks.glob("*/built.*"))) > 1  # else this test has shown nothing
    assert not list((tmp_path / "root" / "staging").iterdir())
    assert not (tmp_path / "root" / "quarantine").exists()


def test_a_builder_killed_half_way_leaves_a_miss_and_no_lock(
    tmp_path: Path, marks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "root"
    (marks / "go").touch()
    killed = Job(root=str(root), folder=str(marks), killed_after_files=2).start()
    killed.communicate(timeout=30)
    assert killed.returncode == -signal.SIGKILL
    (left,) = (root / "staging").iterdir()
    assert sorted(p.name for p in left.iterdir()) == sorted(list(FILES)[:2])

    store = Store([root], marks / "locks", lock_timeout_s=30)
    assert store.find(make_key()) is None
    start = time.monotonic()
    entry = store.get_or_build(make_key(), fill)
    assert time.monotonic() - start < 10  # the kernel took the lock from the dead process
    assert entry.read("kernel.so") == FILES["kernel.so"]
    assert entry == store.find(make_key())
    assert left.exists()  # too young for the sweep that each build does
    assert store.sweep_staging(older_than_s=0) == 1
    assert not list((root / "staging").iterdir())
    assert caplog.records == []


def test_a_flipped_byte_is_rebuilt_once_by_four_processes(tmp_path: Path, marks: Path) -> None:
    root = tmp_path / "root"
    entry = Store([root], marks / "locks").get_or_build(make_key(), fill)
    data = bytearray(FILES["kernel.so"])
    data[len(data) // 2] ^= 0x10
    (entry.path / "kernel.so").write_bytes(data)
    results = start_together([Job(root=str(root), folder=str(marks), build_seconds=0.3)] * 4)
    assert len(list(marks.glob("built.*"))) == 1
    assert [r["library"] for r in results] == [LIBRARY] * 4
    (aside,) = (root / "quarantine").iterdir()
    assert (aside / "kernel.so").read_bytes() == data


def test_sixteen_threads_on_four_keys_build_each_key_once(tmp_path: Path) -> None:
    store = Store([tmp_path / "root"], tmp_path / "locks")
    keys = [make_key(arch=arch) for arch in ("sm_90a", "sm_100a", "sm_103a", "sm_110a")]
    built: list[str] = []
    barrier = threading.Barrier(16)

    def ask(i: int) -> Entry:
        key = keys[i % 4]

        def build(folder: Path) -> BuildInfo:
            built.append(key.arch)
            time.sleep(0.1)
            return fill(folder)

        barrier.wait(timeout=20)
        return store.get_or_build(key, build)

    with ThreadPoolExecutor(16) as pool:
        entries = list(pool.map(ask, range(16)))
    assert sorted(built) == sorted(key.arch for key in keys)
    assert [e.manifest.key for e in entries] == [keys[i % 4] for i in range(16)]


def test_one_slow_key_does_not_hold_up_another(tmp_path: Path) -> None:
    store = Store([tmp_path / "root"], tmp_path / "locks")
    started, release = threading.Event(), threading.Event()

    def slow(folder: Path) -> BuildInfo:
        started.set()
        assert release.wait(timeout=20)
        return fill(folder)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(store.get_or_build, make_key(), slow)
        assert started.wait(timeout=20)
        assert not store.get_or_build(make_key(arch="sm_90a"), fill).private
        release.set()
        assert not future.result(timeout=20).private


FORK = """
import os, sys
from pathlib import Path
from moejit.cache.lock import LockState, key_lock

folder = Path(sys.argv[1])
def forked_inside():
    with key_lock(folder, "k", 5) as state:
        assert state is LockState.HELD
        if os.fork() == 0:
            return "child"
        os.wait()
        assert (folder / "k.holder").exists()
        with key_lock(folder, "k", 0) as second:
            return second
got = forked_inside()
if got == "child":
    os._exit(0)
assert got is LockState.TIMED_OUT, got
with key_lock(folder, "k", 0) as state:
    assert state is LockState.HELD, state
"""


def test_a_forked_child_does_not_release_its_parents_lock(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FORK, str(tmp_path / "locks")], check=True, timeout=30)


PRIVATE_FORK = """
import os, sys
from pathlib import Path
from concurrency.worker import fill, make_key
from moejit.cache import Store

(Path(sys.argv[1]) / "file").touch()
store = Store([Path(sys.argv[1], "file")], Path(sys.argv[1], "locks"))
entry = store.get_or_build(make_key(), fill)
if os.fork() == 0:
    assert store.find(make_key()).private
    assert store.get_or_build(make_key(arch="sm_90a"), fill).private
    sys.exit(0)
assert os.wait()[1] == 0
assert store.find(make_key()) == entry
print(entry.path)
"""


def test_a_private_build_outlives_a_forked_child_but_not_its_process(tmp_path: Path) -> None:
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({tests!r})\n{PRIVATE_FORK}", tmp_path],
        check=True,
        timeout=30,
        text=True,
        stdout=subprocess.PIPE,
    )
    assert "moejit-private-" in done.stdout
    assert not Path(done.stdout.strip()).exists()
