"""What a layer is made of: problem, plan, sources, PTX, machine code, resources of each kernel.

In: the start of a key, or a `MoeProblem`. Out: an `Inspection`, or text. Everything comes from the
cache entry; nothing is run, and only a layer that the cache lacks needs the compiler.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejit.cache.entry import Entry
from moejit.cache.store import Store
from moejit.codegen.errors import MoejitError
from moejit.codegen.plan import Sm90Gemm, Sm100Gemm
from moejit.codegen.problem import MoeProblem
from moejit.codegen.render import LayerSource, render
from moejit.codegen.select import Candidate, explain, select
from moejit.runtime.build import build_entry, layer_key, prewarm_command
from moejit.runtime.compiler import LIBRARY, PTX
from moejit.runtime.cubin import KernelResources, find_cubins, kernel_resources
from moejit.runtime.errors import JitDisabled
from moejit.runtime.settings import settings

__all__ = [
    "AmbiguousKey",
    "DisassemblerMissing",
    "Inspection",
    "NoSuchLayer",
    "entry_for",
    "entry_of_key",
    "find_nvdisasm",
    "inspect_entry",
    "ptx_of",
    "sass_of",
    "source_of_entry",
    "source_of_problem",
    "why",
]


class NoSuchLayer(MoejitError, LookupError):
    """The cache holds no layer with such a key.

    Attributes:
        prefix: what was looked for.
        root: the cache folder.
    """

    def __init__(self, prefix: str, root: Path) -> None:
        super().__init__(prefix, root)
        self.prefix, self.root = prefix, root

    def __str__(self) -> str:
        return (
            f"no layer in {self.root} has a key or a name that starts with {self.prefix!r}; "
            "`moejit cache list` shows them"
        )


class AmbiguousKey(MoejitError, LookupError):
    """More than one layer has a key that starts so.

    Attributes:
        prefix: what was looked for.
        matches: key and name of each.
    """

    def __init__(self, prefix: str, matches: Sequence[str]) -> None:
        super().__init__(prefix, tuple(matches))
        self.prefix, self.matches = prefix, tuple(matches)

    def __str__(self) -> str:
        lines = [f"  {match}" for match in self.matches[:20]]
        return "\n".join([f"{len(self.matches)} layers match {self.prefix!r}; say more:", *lines])


class DisassemblerMissing(MoejitError):
    """Machine code was asked for, and there is no nvdisasm, or it fails.

    Attributes:
        reason: what was tried.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot show machine code: {self.reason}. Install it: pip install 'moejit[sass]'"


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The facts of one compiled layer.

    Attributes:
        key: digest that the cache knows it by.
        name: readable name.
        arch: compile target.
        path: its folder.
        spec: problem and plan, as rendered.
        kernels: resources of each kernel, from the machine code.
        dynamic_smem_bytes: most dynamic shared memory that each GEMM asks for, from the plan.
        min_driver: oldest driver that can run it.
        created: when, by what and how long.
        files: size of each file.
    """

    key: str
    name: str
    arch: str
    path: Path
    spec: Mapping[str, Any]
    kernels: tuple[KernelResources, ...]
    dynamic_smem_bytes: Mapping[str, int]
    min_driver: str
    created: Mapping[str, Any]
    files: Mapping[str, int]

    @property
    def spills(self) -> bool:
        """Whether a kernel keeps registers in local memory."""
        return any(kernel.stack_bytes for kernel in self.kernels)


def entry_of_key(store: Store, prefix: str) -> Entry:
    """The one entry whose key or folder name starts with ``prefix``, verified.

    Raises:
        NoSuchLayer, AmbiguousKey: none, or several.
    """
    # By digest: several roots may hold the same entry.
    found = list({entry.digest: entry for entry in store.match(prefix)}.values())
    if not found:
        raise NoSuchLayer(prefix, store.root)
    if len(found) > 1:
        exact = [entry for entry in found if entry.path.name == prefix]
        if not exact:
            keys = [(entry.digest[:12], entry.manifest.key) for entry in found]
            raise AmbiguousKey(prefix, [f"{at}  {key.arch}  {key.name}" for at, key in keys])
        found = exact
    entry = store.find(found[0].manifest.key)
    if entry is None:
        raise NoSuchLayer(prefix, store.root)
    return entry


def source_of_problem(problem: MoeProblem) -> LayerSource:
    """The sources that a call with this problem would run; renders, compiles nothing."""
    return render(problem, select(problem))


def source_of_entry(entry: Entry) -> dict[str, str]:
    """The rendered sources in an entry, by file name."""
    names = [name for name in sorted(entry.manifest.files) if name.endswith(".py")]
    return {name: entry.read(name).decode() for name in names}


def entry_for(store: Store, problem: MoeProblem) -> Entry:
    """The compiled layer for a problem: from the cache, or built now.

    Raises:
        JitDisabled: it is not in the cache, and the settings forbid compiling.
    """
    source = source_of_problem(problem)
    key = layer_key(source)
    if (entry := store.find(key)) is not None:
        return entry
    if settings().jit != "auto":
        hint = f"Build it ahead of time: {prewarm_command(problem)}"
        raise JitDisabled(f"{source.name} ({problem.arch})", settings().jit, hint)
    return build_entry(store, key, source)


def inspect_entry(entry: Entry) -> Inspection:
    """The facts of an entry."""
    key = entry.manifest.key
    return Inspection(
        key=entry.digest,
        name=key.name,
        arch=key.arch,
        path=entry.path,
        spec=dict(key.spec),
        kernels=tuple(kernel_resources(entry.read(LIBRARY))),
        dynamic_smem_bytes=_dynamic_smem(key.spec),
        min_driver=entry.manifest.min_driver,
        created=dict(entry.manifest.created),
        files={name: record.size for name, record in sorted(entry.manifest.files.items())},
    )


def ptx_of(entry: Entry) -> str:
    """The PTX of all kernels of a layer."""
    return entry.read(PTX).decode()


def sass_of(entry: Entry) -> str:
    """The machine code of all kernels of a layer.

    Raises:
        DisassemblerMissing: there is no nvdisasm, or it does not know the target.
    """
    tool = find_nvdisasm()
    if tool is None:
        reason = "nvdisasm is neither on PATH nor in the package nvidia-cuda-nvdisasm"
        raise DisassemblerMissing(reason)
    texts = []
    with tempfile.TemporaryDirectory(prefix="moejit-sass-") as folder:
        for index, cubin in enumerate(find_cubins(entry.read(LIBRARY))):
            path = Path(folder) / f"{index}.cubin"
            path.write_bytes(cubin)
            done = subprocess.run([str(tool), str(path)], capture_output=True, text=True)
            if done.returncode:
                raise DisassemblerMissing(f"{tool} failed: {done.stderr.strip()}")
            texts.append(done.stdout)
    return "\n".join(texts)


def why(problem: MoeProblem) -> list[Candidate]:
    """Every plan with its modelled cost or the reasons against it, in the order of `explain`."""
    return explain(problem)


def find_nvdisasm() -> Path | None:
    """The disassembler: on PATH, or in the package nvidia-cuda-nvdisasm."""
    if found := shutil.which("nvdisasm"):
        return Path(found)
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.name == "nvdisasm"]
    return next((path for path in paths if path.is_file()), None)


def _dynamic_smem(spec: Mapping[str, Any]) -> dict[str, int]:
    """The most that each GEMM asks for at launch, from the plan's fields in the spec."""
    kinds: dict[str, Callable[..., Sm90Gemm | Sm100Gemm]] = {"sm90": Sm90Gemm, "sm100": Sm100Gemm}
    kind = kinds.get(str(spec.get("plan", "")).partition("_")[0])
    sizes = {}
    for name in ("gemm1", "gemm2"):
        fields = {k.partition(".")[2]: v for k, v in spec.items() if k.startswith(f"{name}.")}
        if kind is not None and fields:
            try:
                sizes[name] = kind(**fields).smem_bytes
            except TypeError:  # a version of moejit with other fields wrote the entry
                continue
    return sizes
