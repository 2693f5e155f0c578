"""Every error that moejit raises on purpose, in one place to import from.

The base class and the errors of code generation live in `codegen.errors`, the lowest layer, and are
re-exported here. Each class keeps its facts as fields, says in its text what happened, where, and
what to do next, and survives pickling, so that it comes out of a compile worker whole.
`docs/errors.md` lists them.
"""

from __future__ import annotations

from moejit.codegen.errors import MoejitError

__all__ = [
    "BackendUnavailable",
    "BadArgument",
    "CaptureWouldCompile",
    "CompileFailed",
    "JitDisabled",
    "LinkerMissing",
    "LoadFailed",
    "MoejitError",
    "NotKept",
]


class BadArgument(MoejitError, ValueError):
    """One argument of a public function is wrong; nothing was launched.

    Attributes:
        argument: The parameter's name.
        is_: What it is, with its verb: ``"has dtype torch.float32"``.
        should_be: What it should be, as an object: ``"torch.uint8, two FP4 values a byte"``.
        hint: One sentence on how to get there; may be empty.
        function: The public function that was called.
    """

    def __init__(
        self,
        argument: str,
        is_: str,
        should_be: str,
        hint: str = "",
        function: str = "moe_nvfp4",
    ) -> None:
        super().__init__(argument, is_, should_be, hint, function)
        self.argument = argument
        self.is_ = is_
        self.should_be = should_be
        self.hint = hint
        self.function = function

    def __str__(self) -> str:
        text = f"{self.function}: argument '{self.argument}' {self.is_}"
        text += f"; it should be {self.should_be}."
        return f"{text} {self.hint}" if self.hint else text


class BackendUnavailable(MoejitError):
    """The backend that was asked for cannot run here.

    Attributes:
        backend: Its name, such as ``"cuda"``.
        reason: What is missing.
        hint: What to install or choose instead; may be empty.
    """

    def __init__(self, backend: str, reason: str, hint: str = "") -> None:
        super().__init__(backend, reason, hint)
        self.backend = backend
        self.reason = reason
        self.hint = hint

    def __str__(self) -> str:
        text = f"backend '{self.backend}' is not available: {self.reason}"
        return f"{text}. {self.hint}" if self.hint else text


class CompileFailed(MoejitError):
    """The compiler rejected a rendered kernel. A failure is never stored in the cache.

    Attributes:
        kernel: The layer's or kernel's name.
        arch: The target, such as ``"sm_100a"``.
        template: The template that the failing line came from; empty when not known.
        line: Its line number there, from 1; 0 when not known.
        text: The compiler's own message.
    """

    def __init__(
        self, kernel: str, arch: str, template: str = "", line: int = 0, text: str = ""
    ) -> None:
        super().__init__(kernel, arch, template, line, text)
        self.kernel = kernel
        self.arch = arch
        self.template = template
        self.line = line
        self.text = text

    def __str__(self) -> str:
        head = f"compiling {self.kernel} for {self.arch} failed"
        if self.template:
            place = f"{self.template}:{self.line}" if self.line else self.template
            head += f" at {place}"
        return f"{head}:\n{self.text}" if self.text else head


class JitDisabled(MoejitError):
    """A kernel is not in the cache, and compiling is switched off.

    Attributes:
        missing: The problem or kernel that has no entry.
        mode: The value of ``MOEJIT_JIT`` that forbids the compile.
        hint: How to build the entry; may be empty.
    """

    def __init__(self, missing: str, mode: str, hint: str = "") -> None:
        super().__init__(missing, mode, hint)
        self.missing = missing
        self.mode = mode
        self.hint = hint

    def __str__(self) -> str:
        hint = self.hint or "Build it ahead of time with `moejit prewarm`."
        return (
            f"no compiled kernel for {self.missing}, and MOEJIT_JIT={self.mode} forbids compiling. "
            f"{hint}"
        )


class LoadFailed(MoejitError):
    """A compiled kernel is sound on disk but could not be loaded into this process.

    Attributes:
        entry: The cache entry or the file.
        reason: The loader's own message.
        hint: What to do; may be empty.
    """

    def __init__(self, entry: str, reason: str, hint: str = "") -> None:
        super().__init__(entry, reason, hint)
        self.entry = entry
        self.reason = reason
        self.hint = hint

    def __str__(self) -> str:
        text = f"cannot load {self.entry}: {self.reason}"
        return f"{text}. {self.hint}" if self.hint else text


class CaptureWouldCompile(MoejitError):
    """A kernel would have to be compiled or loaded while a CUDA graph is being captured.

    Attributes:
        missing: The problem or kernel that is not ready.
    """

    def __init__(self, missing: str) -> None:
        super().__init__(missing)
        self.missing = missing

    def __str__(self) -> str:
        return (
            f"a CUDA graph is being captured and {self.missing} is not loaded; compiling or "
            "loading now would break the capture. Call the layer once with these shapes, or "
            "prewarm it, before the capture."
        )


class LinkerMissing(MoejitError):
    """No linker was found to turn a compiled object into a shared library.

    Attributes:
        tried: The programs that were looked for, in order.
        setting: The variable that named the program; empty where none did.
    """

    def __init__(self, tried: tuple[str, ...], setting: str = "") -> None:
        super().__init__(tried, setting)
        self.tried = tried
        self.setting = setting

    def __str__(self) -> str:
        if self.setting:
            return (
                f"no linker found: {self.setting} is {' '.join(self.tried)!r}, which is no program "
                f"here. Set it to one that links a shared library, such as gcc, or unset it."
            )
        return (
            f"no linker found (looked for {', '.join(self.tried)}). Install one of them, or use a "
            "cache that was built on another machine."
        )


class NotKept(MoejitError):
    """A kernel was compiled ahead of time, but the cache folder could not keep it.

    Attributes:
        kernel: The layer's name.
        root: The cache folder.
        reason: What the file system said; may be empty.
    """

    def __init__(self, kernel: str, root: str, reason: str = "") -> None:
        super().__init__(kernel, root, reason)
        self.kernel = kernel
        self.root = root
        self.reason = reason

    def __str__(self) -> str:
        reason = f": {self.reason}" if self.reason else ""
        return (
            f"{self.kernel} was compiled, but the cache {self.root} could not keep it{reason}. "
            "MOEJIT_CACHE_DIR names another folder for the cache."
        )


def __getattr__(name: str) -> type[MoejitError]:
    """Errors of code generation (`UnknownArch`, `NoVariantFits`, `TemplateError`, ...)."""
    from moejit.codegen import errors as codegen_errors

    found = getattr(codegen_errors, name, None)
    if isinstance(found, type) and issubclass(found, MoejitError):
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
