"""Looks at everything that moejit stands on and says what is missing: `moejit doctor`.

Out: a list of `Check`. Looking changes nothing but for probe files, which are removed again.
Nothing here raises for what it finds.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import filelock

import moejit
from moejit.cache.paths import owner_problem
from moejit.codegen import ARCHS, MoejitError, arch_for_capability, arch_spec
from moejit.runtime.compiler import find_linker
from moejit.runtime.errors import LinkerMissing
from moejit.runtime.inspect import find_nvdisasm
from moejit.runtime.settings import Settings

__all__ = ["Check", "examine"]

OK, NOTE, MISSING = "ok", "note", "missing"
_DSL = "nvidia-cutlass-dsl"
_DSL_RANGE = ((4, 8), (4, 9))  # as in pyproject.toml
_LOW_SPACE_BYTES = 256 * 2**20  # some hundred layers


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        what: its name.
        status: ``ok``; ``note`` for what works but not at its best; ``missing`` for what moejit
            cannot do its work without.
        found: what is there.
        hint: what to do about it; empty when nothing needs doing.
    """

    what: str
    status: str
    found: str
    hint: str = ""


def examine(settings: Settings) -> list[Check]:
    """Every check, in the order of a call: versions, device, compiler, cache."""
    compiles = settings.jit == "auto"
    return [
        Check("moejit", OK, f"{moejit.__version__} at {Path(moejit.__file__).parent}"),
        Check("python", OK, f"{platform.python_version()} on {platform.machine()}"),
        *_torch(settings),
        _distribution("apache-tvm-ffi", "loads compiled layers", required=True),
        *_compiler(required=compiles),
        _linker(settings, required=compiles),
        _nvdisasm(),
        *_cache(settings.cache_dir),
        _lock(settings.lock_dir),
        _overrides(settings),
    ]


def _distribution(name: str, purpose: str, *, required: bool) -> Check:
    try:
        return Check(name, OK, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        status = MISSING if required else NOTE
        return Check(name, status, "not installed", f"pip install {name}: it {purpose}")


def _torch(settings: Settings) -> list[Check]:
    found = _distribution("torch", "holds the tensors", required=True)
    if found.status != OK:
        return [found]
    try:
        import torch
    except Exception as exc:
        hint = "Reinstall torch: its package is there, but it does not import."
        return [Check("torch", MISSING, f"{found.found}, {type(exc).__name__}: {exc}", hint)]
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    checks = [Check("torch", OK, f"{torch.__version__} ({build})")]
    driver = _driver_version()
    if not torch.cuda.is_available():
        hint = "CPU tensors run the reference; layers compile for any architecture."
        if driver:
            hint = "There is a driver, but torch cannot use it: install a CUDA build of torch."
        return [*checks, Check("GPU", NOTE, "none that torch can use", hint)]
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        capability = torch.cuda.get_device_capability(index)
        label = f"GPU {index}"
        try:
            arch = arch_for_capability(capability)
        except MoejitError:
            hint = f"There are kernels for {', '.join(ARCHS)}; this GPU can run the reference."
            text = f"{name}, compute capability {capability[0]}.{capability[1]}"
            checks.append(Check(label, NOTE, text, hint))
            continue
        need = arch_spec(arch).min_driver
        text = f"{name}, {arch}, driver {driver or 'unknown'}"
        if driver and int(driver.split(".")[0]) < int(need):
            checks.append(Check(label, MISSING, text, f"{arch} needs driver {need} or newer."))
        else:
            checks.append(Check(label, OK, text))
    return checks


def _driver_version() -> str:
    try:
        words = Path("/proc/driver/nvidia/version").read_text("utf-8").split("\n")[0].split()
        return next((w for w in words if w[:1].isdigit() and "." in w), "")
    except (OSError, UnicodeDecodeError):
        pass
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""


def _compiler(*, required: bool) -> list[Check]:
    found = _distribution(_DSL, "compiles layers", required=required)
    if found.status != OK:
        return [found]
    numbers = tuple(int(n) for n in found.found.split(".")[:2] if n.isdigit())
    if not _DSL_RANGE[0] <= numbers < _DSL_RANGE[1]:
        hint = f"pip install '{_DSL}>=4.8,<4.9': moejit is tested with these."
        return [Check(_DSL, MISSING if required else NOTE, found.found, hint)]
    flavours = sorted(
        {
            dist.name.rpartition("-")[2]
            for dist in importlib.metadata.distributions()
            if dist.name.startswith(f"{_DSL}-libs-cu")
        }
    )
    return [Check(_DSL, OK, f"{found.found}, flavour {' and '.join(flavours) or 'unknown'}")]


def _linker(settings: Settings, *, required: bool) -> Check:
    try:
        return Check("linker", OK, " ".join(find_linker(settings.linker)))
    except LinkerMissing as exc:
        hint = "Install gcc or clang, or use a cache that was built elsewhere with MOEJIT_JIT=off."
        text = f"none of {', '.join(exc.tried)}"
        if exc.setting:
            hint = f"{exc.setting} names it: set it to a program that is here, or unset it."
        return Check("linker", MISSING if required else NOTE, text, hint)


def _nvdisasm() -> Check:
    if path := find_nvdisasm():
        return Check("nvdisasm", OK, str(path))
    hint = "Only `moejit inspect --sass` needs it: pip install 'moejit[sass]'."
    return Check("nvdisasm", NOTE, "not found", hint)


def _cache(root: Path) -> list[Check]:
    present = root
    while not present.exists() and present != present.parent:
        present = present.parent
    hint = "Layers are kept in memory only. Set MOEJIT_CACHE_DIR to a folder that you can write."
    note = "" if present == root else " (will be created)"
    if not present.is_dir():
        return [Check("cache folder", NOTE, f"{root}: {present} is not a folder", hint)]
    try:
        with tempfile.TemporaryFile(dir=present, prefix=".moejit-probe-"):
            pass
    except OSError as exc:
        return [Check("cache folder", NOTE, f"{root}: cannot write, {exc.strerror}", hint)]
    if present == root and (problem := owner_problem(root)) is not None:
        hint = "Layers in it are not used: copy it as this user (cp -r), or set MOEJIT_CACHE_DIR."
        return [Check("cache folder", NOTE, problem, hint)]
    checks = [Check("cache folder", OK, f"{root}{note}")]
    try:
        free = shutil.disk_usage(present).free
    except OSError as exc:
        return [*checks, Check("free space", NOTE, f"unknown: {exc.strerror}")]
    text = f"{free / 2**30:.1f} GiB"
    if free < _LOW_SPACE_BYTES:
        hint = "When the disk is full, layers are kept in memory only."
        return [*checks, Check("free space", NOTE, text, hint)]
    return [*checks, Check("free space", OK, text)]


def _lock(folder: Path) -> Check:
    """Takes a lock twice through separate descriptors; the second must be refused."""
    hint = "Processes that start together may compile the same layer; each result is right."
    made = not folder.exists()
    path = folder / f".moejit-probe-{os.getpid()}.lock"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with filelock.FileLock(path, timeout=1):
            try:
                with filelock.FileLock(path, timeout=0):
                    return Check("lock", NOTE, f"{folder}: a held lock was granted again", hint)
            except filelock.Timeout:
                return Check("lock", OK, f"{folder}: excludes")
    except (OSError, filelock.Timeout) as exc:
        return Check("lock", NOTE, f"{folder}: {exc}", hint)
    finally:
        path.unlink(missing_ok=True)
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _overrides(settings: Settings) -> Check:
    if settings.dsl_overrides:
        hint = "They would change compiled code, so compiling refuses them: unset them."
        return Check("CUTE_DSL_*", MISSING, " ".join(settings.dsl_overrides), hint)
    return Check("CUTE_DSL_*", OK, "none that change compiled code")
