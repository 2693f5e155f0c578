"""A process that asks the store for one layer; also the key and the files that cache tests use.

`python worker.py '<json>'` with the fields of `Job`; waits for the folder's ``go`` file, so that
several of them really start together, and prints what it got.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moejit.cache import BuildInfo, KernelKey, Store

KEY: dict[str, Any] = {
    "name": "moe_h7168_i2048_k8",
    "source_sha256": "5" * 64,
    "spec": {"hidden": 7168, "top_k": 8, "clamp": 1.5, "pdl": True, "tile": [128, 256]},
    "kernel_names": ("moejit_gemm1", "moejit_gemm2"),
    "arch": "sm_100a",
    "options": {"opt_level": 3, "lineinfo": False},
    "dsl": ("nvidia-cutlass-dsl==4.8.1", "nvidia-cutlass-dsl-libs-cu12==4.8.1"),
    "compiler_digest": "191551984:" + "d" * 64,
    "tvm_ffi": "0.1",
    "host": {"machine": "x86_64", "cpu": "x86-64-v2", "libc": "glibc 2.36"},
}
FILES = {
    "__init__.py": b"",
    "kernel.py": b"def moe_layer(): ...\n",
    "kernel.ptx": b".version 8.7\n.target sm_100a\n" * 500,
    "kernel.so": b"\x7fELF" + bytes(range(256)) * 800,
    "parts/gemm1.py": b"TILE_M = 128\n",
}


def make_key(**changes: Any) -> KernelKey:
    return KernelKey(**{**KEY, **changes})


def fill(folder: Path) -> BuildInfo:
    """A build: writes `FILES`."""
    for name, data in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return BuildInfo(
        report={"moejit_gemm1": {"registers": 168, "spills": 0}}, signature="moe_layer()"
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    root: str
    folder: str  # marks go here: ready.<pid>, go, built.<pid>
    build_seconds: float = 0.0
    killed_after_files: int = 0
    lock_timeout_s: float = 60.0

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, __file__, json.dumps(asdict(self))]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def build(self, target: Path) -> BuildInfo:
        Path(self.folder, f"built.{os.getpid()}.{time.monotonic_ns()}").touch()
        time.sleep(self.build_seconds)
        if self.killed_after_files:
            for name in list(FILES)[: self.killed_after_files]:
                (target / name).write_bytes(FILES[name])
            os.kill(os.getpid(), signal.SIGKILL)
        return fill(target)


def start_together(jobs: list[Job]) -> list[dict[str, Any]]:
    """Starts a process for each job, lets them go at the same moment, returns what each got."""
    processes = [job.start() for job in jobs]
    folder = Path(jobs[0].folder)
    try:
        deadline = time.monotonic() + 30
        while len(list(folder.glob("ready.*"))) < len(jobs) and time.monotonic() < deadline:
            time.sleep(0.005)
        (folder / "go").touch()
        outputs = [process.communicate(timeout=30) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(jobs), outputs
    return [{**json.loads(out), "log": err} for out, err in outputs]


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    store = Store([Path(job.root)], Path(job.folder, "locks"), lock_timeout_s=job.lock_timeout_s)
    Path(job.folder, f"ready.{os.getpid()}").touch()
    while not Path(job.folder, "go").exists():
        time.sleep(0.001)
    entry = store.get_or_build(make_key(), job.build)
    library = hashlib.sha256(entry.read("kernel.so")).hexdigest()
    sys.stdout.write(
        json.dumps({"path": str(entry.path), "private": entry.private, "library": library})
    )


if __name__ == "__main__":
    main()
