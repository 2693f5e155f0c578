"""Every setting of moejit, read once from the environment into one frozen object.

Nothing else in the package reads `os.environ`. `settings()` gives the process's object,
`scope` swaps it for the length of a ``with`` block (tests, `moejit` commands), `Settings.describe`
says what each value is and where it came from (`moejit doctor`, `docs/settings.md`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from moejit.cache.paths import default_lock_dir, default_root
from moejit.codegen.arch import ARCHS
from moejit.codegen.errors import MoejitError

__all__ = ["BadSetting", "Described", "Settings", "on_change", "scope", "settings"]

BACKENDS = ("auto", "cuda", "reference", "emulator", "null")
JIT_MODES = ("auto", "off", "error")

# Variables of the DSL that change what it compiles, with the values that leave it as it is. The
# architecture and the calling convention are not among them: we pass those explicitly.
_DSL_NEUTRAL: dict[str, tuple[str, ...]] = {
    "CUTE_DSL_AUTO_M2S": ("", "0", "false"),
    "CUTE_DSL_COMPILER_BACKEND": ("", "legacy"),
    "CUTE_DSL_COMPILER_OPT": ("",),
    "CUTE_DSL_DEBUG": ("", "0", "false"),
    "CUTE_DSL_DRYRUN": ("", "0", "false"),
    "CUTE_DSL_ENABLE_ASSERTIONS": ("", "0", "false"),
    "CUTE_DSL_ENABLE_PYIR": ("", "0", "false"),
    "CUTE_DSL_LINEINFO": ("", "0", "false"),
    "CUTE_DSL_LOC_TRACEBACKS": ("", "0"),
    "CUTE_DSL_TOLERATE_M2M": ("", "1", "true"),
    "CUTE_DSL_WARNINGS_AS_ERRORS": ("", "0", "false"),
}


class BadSetting(MoejitError, ValueError):
    """An environment variable holds a value that it cannot have.

    Attributes:
        variable: its name.
        value: what it holds.
        choices: what it may hold, in words.
    """

    def __init__(self, variable: str, value: str, choices: str) -> None:
        super().__init__(variable, value, choices)
        self.variable, self.value, self.choices = variable, value, choices

    def __str__(self) -> str:
        return (
            f"{self.variable} is {self.value!r}; it must be {self.choices}. "
            "Unset it for the default."
        )


@dataclass(frozen=True)
class Described:
    """One setting as people see it, with the variable it can come from and the one it did."""

    name: str
    variable: str
    value: str
    source: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the environment may decide.

    Attributes:
        backend: ``auto`` takes ``cuda`` for CUDA tensors and ``reference`` for CPU tensors.
        arch: compile for this target; None asks the device.
        jit: ``auto`` compiles what the cache lacks; ``off`` and ``error`` raise `JitDisabled`.
        cache_dir: root of the on-disk cache; the first folder of MOEJIT_CACHE_DIR.
        read_only_cache_dirs: the folders after it (as in PATH): read, never written.
        lock_dir: folder of the locks that keep two processes from compiling the same layer. Local
            to the machine, so that a cache on a network file system works.
        lock_timeout_s: longest wait for another process's compile before compiling it here too.
        linker: command that links a shared library; None looks for cc, gcc, clang, ld.
        dsl_overrides: ``CUTE_DSL_*`` variables set to values that would change compiled code.
    """

    backend: str = field(default="auto", metadata={"env": "MOEJIT_BACKEND"})
    arch: str | None = field(default=None, metadata={"env": "MOEJIT_ARCH"})
    jit: str = field(default="auto", metadata={"env": "MOEJIT_JIT"})
    cache_dir: Path = field(metadata={"env": "MOEJIT_CACHE_DIR"})
    read_only_cache_dirs: tuple[Path, ...] = field(default=(), metadata={"env": "MOEJIT_CACHE_DIR"})
    lock_dir: Path = field(metadata={"env": "XDG_RUNTIME_DIR"})
    lock_timeout_s: float = field(default=120.0, metadata={"env": "MOEJIT_LOCK_TIMEOUT_S"})
    linker: str | None = field(default=None, metadata={"env": "CC"})
    dsl_overrides: tuple[str, ...] = field(default=(), metadata={"env": "CUTE_DSL_*"})
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        _one_of("MOEJIT_BACKEND", self.backend, BACKENDS)
        _one_of("MOEJIT_JIT", self.jit, JIT_MODES)
        if self.arch is not None:
            _one_of("MOEJIT_ARCH", self.arch, tuple(ARCHS))
        if not self.lock_timeout_s >= 0:
            raise BadSetting(
                "MOEJIT_LOCK_TIMEOUT_S", str(self.lock_timeout_s), "a number of seconds, 0 or more"
            )

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Settings:
        """The settings that ``env`` asks for; an empty variable counts as unset.

        Raises:
            BadSetting: a variable holds a value that it cannot have.
        """
        found: dict[str, Any] = {}
        sources: dict[str, str] = {}

        def take(name: str, variable: str, convert: Any = str) -> bool:
            text = env.get(variable, "").strip()
            if text:
                found[name] = convert(text)
                sources[name] = variable
            return bool(text)

        take("backend", "MOEJIT_BACKEND")
        take("arch", "MOEJIT_ARCH")
        take("jit", "MOEJIT_JIT")
        take("lock_timeout_s", "MOEJIT_LOCK_TIMEOUT_S", _seconds)
        take("linker", "CC")
        if take("cache_dir", "MOEJIT_CACHE_DIR", _folders):
            found["cache_dir"], *others = found["cache_dir"]
            if others:
                found["read_only_cache_dirs"] = tuple(others)
                sources["read_only_cache_dirs"] = "MOEJIT_CACHE_DIR"
        else:
            found["cache_dir"] = default_root(env)
        found["lock_dir"] = default_lock_dir(env)
        overrides = [
            f"{name}={env[name]}"
            for name, neutral in _DSL_NEUTRAL.items()
            if env.get(name, "").strip().lower() not in neutral
        ]
        if overrides:
            found["dsl_overrides"], sources["dsl_overrides"] = tuple(overrides), "env"
        return cls(**found, sources=sources)

    def values(self) -> dict[str, Any]:
        """Every setting by name: what `scope` takes, also in another process."""
        return {i.name: getattr(self, i.name) for i in fields(self) if i.name != "sources"}

    def describe(self) -> list[Described]:
        """Each setting with its value and its source: the variable it came from, or ``default``."""
        return [
            Described(
                name=item.name,
                variable=item.metadata["env"],
                value=_text(getattr(self, item.name)),
                source=self.sources.get(item.name, "default"),
                meaning=_MEANINGS[item.name],
            )
            for item in fields(self)
            if item.name != "sources"
        ]


_MEANINGS = {
    "backend": f"who runs a layer: {' | '.join(BACKENDS)}",
    "arch": f"compile target: {' | '.join(ARCHS)}; empty asks the device",
    "jit": "auto compiles what the cache lacks; off and error raise JitDisabled instead",
    "cache_dir": "root of the kernel cache",
    "read_only_cache_dirs": "more roots, read after the first and never written",
    "lock_dir": "locks between processes of this machine",
    "lock_timeout_s": "longest wait for another process's compile, seconds",
    "linker": "command that links a shared library; empty looks for cc, gcc, clang, ld",
    "dsl_overrides": "variables of the DSL that would change compiled code: compiling refuses them",
}

_current: Settings | None = None
_on_change: list[Callable[[], None]] = []


def settings() -> Settings:
    """The process's settings; the first call reads the environment."""
    global _current
    if _current is None:
        _current = Settings.from_env(os.environ)
    return _current


@contextmanager
def scope(**changes: Any) -> Iterator[Settings]:
    """Change settings for the length of a ``with`` block, in all threads."""
    global _current
    before = settings()
    sources = {**before.sources, **dict.fromkeys(changes, "scope")}
    _current = replace(before, **changes, sources=sources)
    _tell()
    try:
        yield _current
    finally:
        _current = before
        _tell()


def on_change(call: Callable[[], None]) -> None:
    """Call ``call`` whenever `scope` changes the settings, for state that was made from them."""
    _on_change.append(call)


def _tell() -> None:
    for call in _on_change:
        call()


def _one_of(variable: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise BadSetting(variable, value, "one of " + ", ".join(choices))


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BadSetting("MOEJIT_LOCK_TIMEOUT_S", text, "a number of seconds, 0 or more") from None


def _folders(text: str) -> list[Path]:
    folders = [Path(part).expanduser().absolute() for part in text.split(os.pathsep) if part]
    if not folders:
        raise BadSetting("MOEJIT_CACHE_DIR", text, f"folders with {os.pathsep!r} between them")
    return folders


def _text(value: object) -> str:
    if value is None:
        return ""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
